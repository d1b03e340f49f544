"""Writes an evaluation as a single HTML page that needs no server, no network, no script and no other file."""

import functools
import html
import importlib.resources
import math
import os
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from s2sd_tf.checks import check_file_to_write
from s2sd_tf.evaluation.embeddings import Rows
from s2sd_tf.evaluation.metrics import RetrievalResult
from s2sd_tf.evaluation.neighbors import Neighbors
from s2sd_tf.evaluation.rows import checked_labels, checked_rows
from s2sd_tf.evaluation.verification import VerificationResult
from s2sd_tf.files import local_path, replacing
from s2sd_tf.reporting.charts import (
    dimension_curves,
    embedding_map,
    pair_histogram,
    recall_curve,
    roc_curve,
    similarity_histogram,
)
from s2sd_tf.reporting.pictures import RIGHT, WRONG, data_uri

_QUERY = "#1c2430"
# Metrics that are not percentages.
_NOT_PERCENT = ("intra", "inter", "ratio", "rho", "threshold")
# The largest number of queries in a section, and of classes.
_QUERIES, _CLASSES = 5, 40


class EmbeddedImages(NamedTuple):
    """Embeddings of images, with the names, ids and pictures to show for them.

    Attributes:
        rows: float rows `(n, dim)`: an array, a memory-mapped file or `EmbeddingShards`.
        labels: int64 `(n,)`.
        names: class names by label, or None to show the labels themselves.
        ids: n ids, or None.
        image: function from a position to an array `(h, w)` or `(h, w, c)`, uint8 or float in [0, 1], or to None if it
            has no picture; or None for no pictures.
    """

    rows: Rows
    labels: np.ndarray
    names: Mapping[int, str] | Sequence[str] | None = None
    ids: Sequence[str] | None = None
    image: Callable[[int], Any] | None = None

    def name(self, label: int | np.integer) -> str:
        """The name of a class."""
        return str(int(label) if self.names is None else self.names[int(label)])


def save_report(
    path: str | os.PathLike,
    result: RetrievalResult,
    neighbors: Neighbors,
    queries: EmbeddedImages,
    gallery: EmbeddedImages | None = None,
    *,
    title: str = "Retrieval",
    about: str = "",
    table: Mapping[str, Mapping[str, Any]] | None = None,
    dims: Mapping[int, Mapping[str, Any]] | None = None,
    verification: VerificationResult | None = None,
    seed: int = 0,
) -> None:
    """Writes the page: metrics with their intervals, recall over k, similarities of positives and negatives, the best,
    typical and worst queries with their neighbours, the first metric of every class, and a 2-D projection.

    Args:
        path: file to write, atomically.
        result: metrics of the queries.
        neighbors: neighbours of the queries.
        queries: the query images.
        gallery: the images that the neighbours are from; None if the queries search among themselves.
        title, about: heading, and the line below it.
        table: metrics by column name. By default one column with the means of `result`.
        dims: what `evaluation.metrics_by_dim` returns, for a section about the dimensions; None: no section.
        verification: what `evaluation.verification_metrics` returns, for the similarities of all pairs and the ROC;
            None: similarities of a sample.
        seed: seed of the samples that charts show.

    Raises:
        ValueError: `path` is a folder, or arguments that do not fit.
    """
    path = local_path("path", path)
    check_file_to_write("path", path)
    queries = _checked("queries", queries)
    gallery = queries if gallery is None else _checked("gallery", gallery)
    for name, values in (("result", result.labels), ("neighbors", neighbors.indices)):
        if len(values) != len(queries.labels):
            raise ValueError(f"{name}: expected that of {len(queries.labels)} queries. Received: {len(values)}")
    if neighbors.indices.max(initial=-1) >= len(gallery.labels):
        raise ValueError(
            f"neighbors: expected positions of {len(gallery.labels)} gallery items. Received: {neighbors.indices.max()}"
        )
    generator = np.random.default_rng(seed)
    intervals = result.confidence_intervals()
    text = "Cosine similarity of pairs of one class and of different classes."
    pairs = [_section("Similarities", text, similarity_histogram(queries.rows, queries.labels, generator))]
    if verification is not None:
        intervals.update(verification.confidence_intervals())
        count = f"{verification.true_accepts[-1]:,} pairs of one class and {verification.false_accepts[-1]:,} of others"
        pairs = [
            _section("Similarities", f"All {count}, and the threshold of the best F1.", pair_histogram(verification)),
            _section("ROC", "Accepted pairs of one class, over those of different classes.", roc_curve(verification)),
        ]
    text = "In percent, with the 95% interval over classes (bootstrap)."
    sections = [
        _section("Metrics", text, _metrics(result, table, intervals)),
        _part(
            "pair",
            sections=_joined(
                [
                    _section(
                        "Recall over k", "Share of queries with a positive among the k nearest.", recall_curve(result)
                    ),
                    *pairs,
                ]
            ),
        ),
    ]
    if dims:
        text = "Prefixes of the embeddings, each l2-normalised. Metrics in percent; exact search, on this machine."
        sections.append(_section("Dimensions", text, _joined([_by_dim(dims), _Markup(dimension_curves(dims))])))
    for heading, text, chosen in _choose(result):
        sections.append(_section(heading, text, _joined(_query(i, neighbors, queries, gallery) for i in chosen)))
    sections.append(_section("Classes", *_classes(result, queries)))
    chart, text = embedding_map(queries.rows, queries.labels, lambda i: _described(queries, i), generator)
    sections.append(_section("Map", text, chart))
    page = _part("page", title=title, about=about, sections=_joined(sections))
    # Ids may be file names with bytes that are not UTF-8.
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(page)


def _checked(name, images):
    """`EmbeddedImages` with checked rows, labels, names and ids."""
    rows = checked_rows(f"{name}.rows", images.rows)
    labels = checked_labels(f"{name}.labels", images.labels, rows)
    if images.ids is not None and len(images.ids) != len(labels):
        raise ValueError(f"{name}.ids: expected one for each of {len(labels)} rows. Received: {len(images.ids)}")
    if images.names is not None:
        known = images.names if isinstance(images.names, Mapping) else range(len(images.names))
        missing = [label for label in np.unique(labels).tolist() if label not in known]
        if missing:
            raise ValueError(f"{name}.names: expected a name for every label. Received: none for {missing[:5]}")
    return images._replace(rows=rows, labels=labels)


class _Markup(str):
    """Text that is HTML already."""


@functools.cache
def _template():
    """The parts of `report.html` by name."""
    text = importlib.resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    pieces = re.split(r"^<!-- part: (\w+) -->\n", text, flags=re.MULTILINE)[1:]
    return {name: string.Template(part) for name, part in zip(pieces[::2], pieces[1::2])}


def _part(part, /, **values):
    """Fills a part of the template. Values that are not `_Markup` are escaped."""
    values = {key: value if isinstance(value, _Markup) else html.escape(str(value)) for key, value in values.items()}
    return _Markup(_template()[part].substitute(values))


def _joined(parts):
    return _Markup("".join(parts))


def _section(heading, text, content):
    return _part("section", heading=heading, text=text, content=_Markup(content))


def _metrics(result, table, intervals):
    table = table or {"": result.means()}
    lines = []
    for name, value in next(iter(table.values())).items():
        if not isinstance(value, float):
            continue
        cells = _joined(_part("cell", value=_number(name, row.get(name))) for row in table.values())
        interval = " to ".join(_number(name, limit) for limit in intervals.get(name, ()))
        lines.append(_part("line", metric=name, cells=cells, interval=interval))
    columns = _joined(_part("column", name=name) for name in table)
    count = f"{len(result.labels):,} queries, {int(np.sum(~result.answerable)):,} of them without a positive."
    return _part("metrics", columns=columns, lines=_joined(lines), count=count)


def _by_dim(dims):
    lines = []
    for name, value in next(iter(dims.values())).items():
        if isinstance(value, float) or name == "bytes":
            form = _number if isinstance(value, float) and name != "queries_per_second" else _whole
            cells = _joined(_part("cell", value=form(name, row[name])) for row in dims.values())
            lines.append(_part("line", metric=name.replace("_", " "), cells=cells, interval=""))
    columns = _joined(_part("column", name=dim) for dim in dims)
    return _part("dims", columns=columns, lines=_joined(lines))


def _whole(_, value):
    return f"{value:,.0f}"


def _number(name, value):
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.3f}" if name.split("@")[0] in _NOT_PERCENT else f"{100 * value:.1f}"


def _choose(result):
    """`(heading, text, positions)` of the queries to show."""
    there = np.flatnonzero(result.answerable)
    quality, positives = result.values["map@r"][there], result.positives[there]
    # Among equally good queries, those with more positives say more, so they come first.
    best, worst = (there[np.lexsort((there, -positives, key))] for key in (-quality, quality))
    middle = worst[np.searchsorted(np.sort(quality), np.median(quality)) :]
    return [
        ("Best queries", "Highest MAP@R. Green: same class; red: another.", best[:_QUERIES]),
        ("Typical queries", "MAP@R at the median.", middle[:_QUERIES]),
        ("Worst queries", "Lowest MAP@R.", worst[:_QUERIES]),
    ]


def _query(query, neighbors, queries, gallery):
    label = queries.labels[query]
    figures = [_figure(queries, query, _QUERY, f"query: {queries.name(label)}")]
    for item, similarity in zip(neighbors.indices[query], neighbors.similarities[query]):
        if item >= 0:
            color = RIGHT if gallery.labels[item] == label else WRONG
            caption = f"{similarity:.3f} {gallery.name(gallery.labels[item])}"
            figures.append(_figure(gallery, int(item), color, caption))
    return _part("query", figures=_joined(figures))


def _figure(images, position, color, caption):
    name = images.ids[position] if images.ids is not None else f"position {position}"
    pixels = images.image(position) if images.image is not None else None
    if pixels is None:
        return _part("no_image", id=name, color=color, position=position, caption=caption)
    return _part("image", id=name, color=color, source=data_uri(pixels), caption=caption)


def _classes(result, queries):
    """`(text, bars)` of all classes. The bars are HTML, not a chart, because names can have any length and script."""
    classes, counts, means = result.per_class()
    metric = next(iter(means))
    values = means[metric]
    order = np.lexsort((classes, values))
    text = f"{metric} of every class, the worst first, with the number of queries."
    if len(order) > _CLASSES:
        half = _CLASSES // 2
        order = np.concatenate([order[:half], order[-half:]])
        text = f"{metric} of the {half} worst and the {half} best of {len(classes):,} classes."
    bars = [
        _part("bar", name=f"{queries.name(classes[i])} ({counts[i]})", percent=f"{100 * values[i]:.1f}") for i in order
    ]
    return text, _part("bars", bars=_joined(bars))


def _described(images, position):
    name = images.name(images.labels[position])
    return name if images.ids is None else f"{name} · {images.ids[position]}"
