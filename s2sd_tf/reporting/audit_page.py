"""The HTML page of an audit. Arguments are not checked here; `save_audit` has done that."""

import os
from collections.abc import Mapping
from typing import Any

from s2sd_tf.evaluation.dataset_audit import Audit
from s2sd_tf.reporting.embedded_images import EmbeddedImages
from s2sd_tf.reporting.page import figure, joined, part, section, write_page
from s2sd_tf.reporting.pictures import QUERY, RIGHT, WRONG, shortened

# The most entries in a section, neighbours of an image, images of a group, and characters of the name of one of two
# classes.
_SHOWN, _NEIGHBORS, _OF_GROUP, _OF_TWO = 20, 8, 6, 34
_GROUPS = ("#1f5fa8", "#d1701f")


def write_audit_page(
    path: str | os.PathLike,
    found: Audit,
    images: EmbeddedImages,
    gallery: EmbeddedImages | None,
    label_score: float,
    outlier_score: float,
    summary: Mapping[str, Any],
    about: str,
) -> None:
    """Writes the page: the counts, and the worst of every kind with their pictures.

    Args:
        path: file to write.
        found, images, gallery, label_score, outlier_score, about: see `save_audit`.
        summary: what `save_audit` returns.
    """
    near = f"Cosine similarity of at least {found.duplicate_similarity:.4g}."
    sections = [section("Counts", "The files beside this page list all of them.", _counts(summary))]
    if gallery is not None:
        text = f"Each image, and its copy in the gallery. {near}"
        sections.append(_listed("Leaks", text, found.leaks.first, lambda i: _pair(found.leaks, i, images, gallery)))
    text = f"{near} Red: the two have different labels."
    pairs = found.duplicates
    sections += [
        _listed("Duplicates", text, pairs.first, lambda i: _pair(pairs, i, images, images)),
        _label_errors(found, images, label_score),
        _confusions(found, images),
        _split_classes(found, images),
        _outliers(found, images, outlier_score),
    ]
    write_page(path, "Audit of a data set", about, sections)


def _counts(summary):
    rows = {**summary["found"], **{f"excluded: {reason}": count for reason, count in summary["excluded"].items()}}
    lines = joined(
        part("line", metric=name.replace("_", " "), cells=part("cell", value=f"{count:,}"), interval="")
        for name, count in rows.items()
    )
    return part("table", heading="what", columns=part("column", name="count"), lines=lines)


def _listed(heading, text, entries, show, around=joined):
    """A section of the first entries. `show` makes HTML of a position in them, and `around` joins that."""
    total = len(entries)
    if total > _SHOWN:
        text += f" The first {_SHOWN} of {total:,}."
    content = around([show(i) for i in range(min(total, _SHOWN))]) if total else part("nothing")
    return section(heading, text, content)


def _in_row(figures):
    return part("query", figures=joined(figures))


def _in_bars(bars):
    return part("bars", bars=joined(bars))


def _pair(pairs, i, images, others):
    first, second = int(pairs.first[i]), int(pairs.second[i])
    one, other = images.name(images.labels[first]), others.name(others.labels[second])
    kind = "exact" if pairs.equal[i] else f"{pairs.similarities[i]:.4f}"
    color = RIGHT if one == other else WRONG
    return _in_row([figure(images, first, QUERY, one), figure(others, second, color, other, kind)])


def _label_errors(found, images, label_score):
    chosen = found.label_errors(label_score).tolist()

    def show(i):
        item, label = chosen[i], images.labels[chosen[i]]
        suggested = images.name(found.suggested_labels[item])
        name, short = (
            f"{cut(images.name(label))}: {cut(suggested)}?" for cut in (str, lambda name: shortened(name, _OF_TWO))
        )
        figures = [figure(images, item, QUERY, name, f"{found.label_scores[item]:.2f}", short)]
        for other in found.neighbors.indices[item, :_NEIGHBORS].tolist():
            if other >= 0:
                its_label = images.labels[other]
                figures.append(figure(images, other, RIGHT if its_label == label else WRONG, images.name(its_label)))
        return _in_row(figures)

    text = (
        f"Neighbours of another class, with a score of at least {label_score:g}. Each image with its label and the "
        "suggested one, then its nearest neighbours. Green: its label; red: another."
    )
    return _listed("Probable label errors", text, chosen, show)


def _confusions(found, images):
    pairs = found.confusions

    def show(i):
        both = images.name(pairs.first[i]), images.name(pairs.second[i])
        short = " / ".join(shortened(name, _OF_TWO) for name in both)
        return part("bar", name=" / ".join(both), short=short, percent=f"{100 * pairs.shares[i]:.1f}")

    text = "Percentage of the neighbours of one class that are of the other, mean of both directions."
    return _listed("Confused classes", text, pairs.shares, show, _in_bars)


def _split_classes(found, images):
    def show(i):
        split = found.split_classes[i]
        figures = [
            figure(images, int(position), color, images.name(split.label), f"group {number} ({len(group):,})")
            for number, (color, group) in enumerate(zip(_GROUPS, split.groups), 1)
            for position in group[:_OF_GROUP]
        ]
        return _in_row(figures)

    text = "Two groups that are clear, and as far from each other as from another class. Some images of both."
    return _listed("Classes that are two", text, found.split_classes, show)


def _outliers(found, images, outlier_score):
    chosen = found.outliers(outlier_score).tolist()

    def show(i):
        name, score = images.name(images.labels[chosen[i]]), f"{found.outlier_scores[chosen[i]]:.1f}"
        return figure(images, chosen[i], QUERY, name, score)

    text = f"Images far from all others, by at least {outlier_score:g} robust standard deviations."
    return _listed("Outliers", text, chosen, show, _in_row)
