"""Writes an evaluation as a single HTML page that needs no server, no network and no other file."""

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
from s2sd_tf.reporting.charts import dimension_curves, pair_histogram, recall_curve, roc_curve, similarity_histogram
from s2sd_tf.reporting.embedded_images import EmbeddedImages, checked_images
from s2sd_tf.reporting.embedding_map import embedding_map
from s2sd_tf.reporting.meanings import meanings
from s2sd_tf.reporting.page import Markup, figure, joined, own_script, part, section, write_page
from s2sd_tf.reporting.pictures import QUERY, RIGHT, WRONG, of_different_classes, shortened

# Metrics that are not percentages.
_NOT_PERCENT = ("intra", "inter", "ratio", "rho", "threshold")
# The most queries in a section, classes, and characters of the name of a class, where it is shown and as a tooltip.
_QUERIES, _CLASSES, _NAME, _TEXT = 5, 15_000, 48, 200


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
    facts: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> None:
    """Writes the page: metrics with their intervals and what they mean, recall over k, similarities of positives and
    negatives, a map of the embeddings, the best, typical and worst queries of different classes with their neighbours,
    and a table of all classes.

    The map shows up to 3,000 queries in two dimensions (t-SNE): to zoom into, to filter by class, to search by class
    and id, with a picture of what the reader points at, and the neighbours of what they click on. It is drawn by Bokeh,
    whose 1.4 MB of JavaScript are in the page. Of more queries it shows a sample, and says so: up to 20 of a class, or
    more of few classes; if these are still too many, of some of the classes. The page stays below 20 MB for any number
    of queries and classes, if most names are in Latin letters; of more than 15,000 classes, the table has the best and
    the worst.

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
        facts: what to show above everything, by name: the model, the date, the data.
        config: settings to show when the reader asks for them, by name; may be nested.
        seed: seed of the intervals, and of the samples that charts show.

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
    intervals = result.confidence_intervals(seed=seed)
    generator = np.random.default_rng(seed)
    if verification is None:
        text = "Cosine similarity of pairs of one class and of different classes."
        pairs = [section("Similarities", text, similarity_histogram(queries.rows, queries.labels, generator))]
    else:
        intervals.update(verification.confidence_intervals(seed=seed))
        count = f"{verification.true_accepts[-1]:,} pairs of one class and {verification.false_accepts[-1]:,} of others"
        pairs = [
            section("Similarities", f"All {count}, and the threshold of the best F1.", pair_histogram(verification)),
            section("ROC", "Accepted pairs of one class, over those of different classes.", roc_curve(verification)),
        ]
    text = "In percent, with the 95% interval over classes (bootstrap)."
    places = embedding_map(result, neighbors, queries, gallery, generator)
    sections = [
        *([_facts(facts or {}, config or {})] if facts or config else []),
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
    text = f"{places.text} The color is the class. Point at an image to see it; click on it to see its neighbours."
    sections.append(section("Map", text, places.content))
    for heading, text, chosen in _choose(result):
        shown = joined(_query(i, result, neighbors, queries, gallery) for i in chosen)
        sections.append(section(heading, text, shown))
    sections.append(section("Classes", *_classes(result, queries, places.codes)))
    write_page(path, title, about, sections, [*_bokeh(), own_script()])


def _bokeh():
    """The scripts that the map needs."""
    from bokeh.resources import Resources

    return Resources(mode="inline", components=["bokeh", "bokeh-api"], log_level="warn").js_raw


def _facts(facts, config):
    listed = joined(part("fact", name=name, value=value) for name, value in facts.items())
    settings = joined(part("fact", name=name, value=value) for name, value in _leaves(config))
    return part("facts", facts=listed, config=part("config", facts=settings) if settings else Markup(""))


def _leaves(config, prefix=""):
    """`(name, value)` of all settings; the names of nested ones are joined by dots."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


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
    explained = part("meanings", meanings=joined(part("meaning", text=text) for text in meanings(names)))
    return part("metrics", columns=columns, lines=joined(lines), count=count, meanings=explained)


def _by_dim(dims):
    lines = []
    for name, value in next(iter(dims.values())).items():
        if isinstance(value, float) or name == "bytes":
            form = _number if isinstance(value, float) and name != "queries_per_second" else _whole
            cells = joined(part("cell", value=form(name, row[name])) for row in dims.values())
            lines.append(part("line", metric=name.replace("_", " "), cells=cells, interval=""))
    columns = joined(part("column", name=dim) for dim in dims)
    return part("table", heading="dimension", columns=columns, lines=joined(lines))


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
    return [
        (heading, f"{text} Of different classes, if there are enough. Green: same class; red: another.", chosen)
        for heading, text, key in (
            ("Best queries", "Highest MAP@R.", -quality),
            ("Typical queries", "MAP@R nearest to the median.", np.abs(quality - np.median(quality))),
            ("Worst queries", "Lowest MAP@R.", quality),
        )
        # Among equally good queries, those with more positives say more, so they come first.
        for chosen in [of_different_classes(there[np.lexsort((there, -positives, key))], result.labels, _QUERIES)]
    ]


def _query(query, result, neighbors, queries, gallery):
    label = queries.labels[query]
    score = f"MAP@R {100 * result.values['map@r'][query]:.1f}"
    figures = [figure(queries, query, QUERY, f"query: {queries.name(label)}", score)]
    for item, similarity in zip(neighbors.indices[query], neighbors.similarities[query]):
        if item >= 0:
            color = RIGHT if gallery.labels[item] == label else WRONG
            figures.append(figure(gallery, int(item), color, gallery.name(gallery.labels[item]), f"{similarity:.3f}"))
    return part("query", figures=joined(figures))


def _classes(result, queries, codes):
    """`(text, table)` of all classes. `codes` are the numbers of those that are on the map."""
    classes, counts, means = result.per_class()
    names = list(means)
    first, *more = dict.fromkeys([names[0], *(name for name in ("r_precision", "map@r", "mrr") if name in means)])
    order = np.lexsort((classes, means[first]))
    text = f"{len(order):,} classes, by {first} in percent; the worst first. Click on a heading to sort by it"
    if len(order) > _CLASSES:
        half = _CLASSES // 2
        order = np.concatenate([order[:half], order[-half:]])
        text = f"The {half:,} worst and the {half:,} best of {len(classes):,} classes. Click on a heading to sort by it"
    columns = [("class", "text", "none"), ("queries", "number", "none"), (first, "number", "ascending")]
    columns += [(name, "number", "none") for name in more]
    lines = []
    for i in order:
        cells = [f"{counts[i]:,}", *(f"{100 * means[name][i]:.1f}" for name in (first, *more))]
        name, code = queries.name(classes[i]), codes.get(int(classes[i]))
        short = shortened(name, _NAME)
        shown = short if code is None else part("class_link", code=code, name=short)
        lines.append(
            part("class", name=shortened(name, _TEXT), shown=shown, cells=joined(part("cell", value=c) for c in cells))
        )
    headings = joined(part("sorter", name=name, kind=kind, sort=sort) for name, kind, sort in columns)
    return f"{text}, on a class to see it on the map.", part("classes", columns=headings, lines=joined(lines))
