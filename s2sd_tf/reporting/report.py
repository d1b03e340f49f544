"""Writes an evaluation as a single HTML page that needs no server, no network, no script and no other file."""

import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from s2sd_tf.checks import check_file_to_write
from s2sd_tf.evaluation.metrics import RetrievalResult
from s2sd_tf.evaluation.neighbors import Neighbors
from s2sd_tf.evaluation.verification import VerificationResult
from s2sd_tf.files import local_path
from s2sd_tf.reporting.charts import (
    dimension_curves,
    embedding_map,
    pair_histogram,
    recall_curve,
    roc_curve,
    similarity_histogram,
)
from s2sd_tf.reporting.embedded_images import EmbeddedImages, checked_images
from s2sd_tf.reporting.page import Markup, figure, joined, part, section, write_page
from s2sd_tf.reporting.pictures import QUERY, RIGHT, WRONG

# Metrics that are not percentages.
_NOT_PERCENT = ("intra", "inter", "ratio", "rho", "threshold")
# The largest number of queries in a section, and of classes.
_QUERIES, _CLASSES = 5, 40


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
    queries = checked_images("queries", queries)
    gallery = queries if gallery is None else checked_images("gallery", gallery)
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
    pairs = [section("Similarities", text, similarity_histogram(queries.rows, queries.labels, generator))]
    if verification is not None:
        intervals.update(verification.confidence_intervals())
        count = f"{verification.true_accepts[-1]:,} pairs of one class and {verification.false_accepts[-1]:,} of others"
        pairs = [
            section("Similarities", f"All {count}, and the threshold of the best F1.", pair_histogram(verification)),
            section("ROC", "Accepted pairs of one class, over those of different classes.", roc_curve(verification)),
        ]
    text = "In percent, with the 95% interval over classes (bootstrap)."
    sections = [
        section("Metrics", text, _metrics(result, table, intervals)),
        part(
            "pair",
            sections=joined(
                [
                    section(
                        "Recall over k", "Share of queries with a positive among the k nearest.", recall_curve(result)
                    ),
                    *pairs,
                ]
            ),
        ),
    ]
    if dims:
        text = "Prefixes of the embeddings, each l2-normalised. Metrics in percent; exact search, on this machine."
        sections.append(section("Dimensions", text, joined([_by_dim(dims), Markup(dimension_curves(dims))])))
    for heading, text, chosen in _choose(result):
        sections.append(section(heading, text, joined(_query(i, neighbors, queries, gallery) for i in chosen)))
    sections.append(section("Classes", *_classes(result, queries)))
    chart, text = embedding_map(queries.rows, queries.labels, lambda i: _described(queries, i), generator)
    sections.append(section("Map", text, chart))
    write_page(path, title, about, sections)


def _metrics(result, table, intervals):
    table = table or {"": result.means()}
    lines = []
    names = {name: None for row in table.values() for name, value in row.items() if isinstance(value, float)}
    for name in names:
        cells = joined(part("cell", value=_number(name, row.get(name))) for row in table.values())
        interval = " to ".join(_number(name, limit) for limit in intervals.get(name, ()))
        lines.append(part("line", metric=name, cells=cells, interval=interval))
    columns = joined(part("column", name=name) for name in table)
    count = f"{len(result.labels):,} queries, {int(np.sum(~result.answerable)):,} of them without a positive."
    return part("metrics", columns=columns, lines=joined(lines), count=count)


def _by_dim(dims):
    lines = []
    for name, value in next(iter(dims.values())).items():
        if isinstance(value, float) or name == "bytes":
            form = _number if isinstance(value, float) and name != "queries_per_second" else _whole
            cells = joined(part("cell", value=form(name, row[name])) for row in dims.values())
            lines.append(part("line", metric=name.replace("_", " "), cells=cells, interval=""))
    columns = joined(part("column", name=dim) for dim in dims)
    return part("dims", columns=columns, lines=joined(lines))


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
    figures = [figure(queries, query, QUERY, f"query: {queries.name(label)}")]
    for item, similarity in zip(neighbors.indices[query], neighbors.similarities[query]):
        if item >= 0:
            color = RIGHT if gallery.labels[item] == label else WRONG
            caption = f"{similarity:.3f} {gallery.name(gallery.labels[item])}"
            figures.append(figure(gallery, int(item), color, caption))
    return part("query", figures=joined(figures))


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
        part("bar", name=f"{queries.name(classes[i])} ({counts[i]})", percent=f"{100 * values[i]:.1f}") for i in order
    ]
    return text, part("bars", bars=joined(bars))


def _described(images, position):
    name = images.name(images.labels[position])
    return name if images.ids is None else f"{name} · {images.ids[position]}"
