"""Writes what `evaluation.audit` found: CSV tables, a list of images to exclude, a JSON summary and an HTML page."""

import csv
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from s2sd_tf.checks import check_at_least, check_within
from s2sd_tf.evaluation.audit_items import SimilarPairs
from s2sd_tf.evaluation.dataset_audit import Audit
from s2sd_tf.files import check_replaceable, local_path, replacing, write_json
from s2sd_tf.reporting.audit_page import write_audit_page
from s2sd_tf.reporting.embedded_images import EmbeddedImages, checked_images

# The summary, by which a folder is known to be an audit.
SUMMARY = "audit.json"
# At most this many pairs of classes.
_PAIRS = 1000


def save_audit(
    folder: str | os.PathLike,
    found: Audit,
    images: EmbeddedImages,
    gallery: EmbeddedImages | None = None,
    *,
    label_score: float = 0.5,
    outlier_score: float = 3.5,
    about: str = "",
) -> dict[str, Any]:
    """Writes the files of an audit, atomically. An earlier audit in the folder is replaced.

    - `duplicates.csv`, `leaks.csv`: image, other, similarity, exact (1 or 0, see `SimilarPairs.equal`), label,
      other_label. In leaks the other image is of the gallery;
    - `label_errors.csv`: image, label, suggested_label, score;
    - `outliers.csv`: image, label, score;
    - `confused_classes.csv`: label, other_label, share; at most the first 1,000;
    - `split_classes.csv`: image, label, group (1 or 2), silhouette, distance, other_distance;
    - `exclude.txt`, if the images have ids: those of `Audit.to_exclude(label_score)`, for `config.data.exclude`;
    - `audit.json`: the counts and settings, as returned;
    - `audit.html`: the worst of every kind, with pictures.

    The worst come first everywhere. Images are named by their ids, or by their positions if they have none.

    Args:
        folder: folder to write.
        found: what `audit` returns.
        images: the audited images.
        gallery: the gallery of the audit, or None.
        label_score: number in [0, 1], see `Audit.label_errors`.
        outlier_score: number >= 0, see `Audit.outliers`.
        about: text below the heading of the page.

    Returns:
        dict of the counts and settings.

    Raises:
        ValueError: arguments that do not fit, or a folder with other content.
    """
    folder = local_path("folder", folder)
    check_replaceable("folder", folder, SUMMARY)
    check_within("label_score", label_score, 0, 1)
    check_at_least("outlier_score", outlier_score, 0)
    images = checked_images("images", images)
    if len(found.label_scores) != len(images.labels):
        raise ValueError(
            f"found: expected the audit of {len(images.labels)} images. Received: {len(found.label_scores)}"
        )
    if gallery is not None:
        gallery = checked_images("gallery", gallery)
    if found.leaks.second.max(initial=-1) >= (0 if gallery is None else len(gallery.labels)):
        raise ValueError("gallery: expected that of the audit. Received: fewer images")
    tables = _tables(found, images, gallery, label_score, outlier_score)
    excluded = found.to_exclude(label_score)
    together = np.unique(np.concatenate(list(excluded.values())))
    summary = {
        "images": len(images.labels),
        "classes": len(np.unique(images.labels)),
        "gallery": None if gallery is None else len(gallery.labels),
        "duplicate_similarity": found.duplicate_similarity,
        "label_score": label_score,
        "outlier_score": outlier_score,
        "found": {
            "duplicates": len(found.duplicates.first),
            "exact_duplicates": int(np.sum(found.duplicates.equal)),
            "leaks": len(found.leaks.first),
            "exact_leaks": int(np.sum(found.leaks.equal)),
            "label_errors": len(found.label_errors(label_score)),
            "outliers": len(found.outliers(outlier_score)),
            "confused_classes": len(found.confusions.shares),
            "split_classes": len(found.split_classes),
        },
        "excluded": {**{reason: len(chosen) for reason, chosen in excluded.items()}, "images": len(together)},
    }
    with replacing(folder) as temporary:
        os.makedirs(temporary)
        for name, (header, rows) in tables.items():
            with _opened(temporary, f"{name}.csv") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(header)
                writer.writerows(rows)
        if images.ids is not None:
            with _opened(temporary, "exclude.txt") as file:
                file.writelines(f"{_id(images, position)}\n" for position in together)
        write_json(os.path.join(temporary, SUMMARY), summary)
        page = os.path.join(temporary, "audit.html")
        write_audit_page(page, found, images, gallery, label_score, outlier_score, summary, about)
    return summary


def _opened(folder, name):
    # Names of files may have bytes that are not UTF-8, and are written as they are.
    return open(os.path.join(folder, name), "w", encoding="utf-8", errors="surrogateescape", newline="")


def _tables(
    found: Audit, images: EmbeddedImages, gallery: EmbeddedImages | None, label_score: float, outlier_score: float
) -> dict[str, tuple[Sequence[str], Iterable[tuple]]]:
    """`(header, rows)` of the CSV files by name."""

    def name(position):
        return images.name(images.labels[position])

    pairs = ("image", "other", "similarity", "exact", "label", "other_label")
    wrong, odd = found.label_errors(label_score).tolist(), found.outliers(outlier_score).tolist()
    confused = zip(*(values[:_PAIRS].tolist() for values in found.confusions))
    tables: dict[str, tuple[Sequence[str], Iterable[tuple]]] = {
        "duplicates": (pairs, _pair_rows(found.duplicates, images, images)),
        "label_errors": (
            ("image", "label", "suggested_label", "score"),
            (
                (_id(images, i), name(i), images.name(found.suggested_labels[i]), _number(found.label_scores[i]))
                for i in wrong
            ),
        ),
        "outliers": (
            ("image", "label", "score"),
            ((_id(images, i), name(i), _number(found.outlier_scores[i])) for i in odd),
        ),
        "confused_classes": (
            ("label", "other_label", "share"),
            ((images.name(one), images.name(other), _number(share)) for one, other, share in confused),
        ),
        "split_classes": (
            ("image", "label", "group", "silhouette", "distance", "other_distance"),
            (
                (_id(images, i), images.name(split.label), group, *map(_number, split[2:]))
                for split in found.split_classes
                for group, positions in enumerate(split.groups, 1)
                for i in positions
            ),
        ),
    }
    if gallery is not None:
        tables["leaks"] = (pairs, _pair_rows(found.leaks, images, gallery))
    return tables


def _pair_rows(pairs: SimilarPairs, images: EmbeddedImages, others: EmbeddedImages) -> Iterator[tuple]:
    for first, second, similarity, equal in zip(*(values.tolist() for values in pairs)):
        labels = images.name(images.labels[first]), others.name(others.labels[second])
        yield _id(images, first), _id(others, second), _number(similarity), int(equal), *labels


def _id(images, position):
    return str(position) if images.ids is None else images.ids[position]


def _number(value):
    return f"{value:.6g}"
