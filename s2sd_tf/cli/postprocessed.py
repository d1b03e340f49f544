"""Retrieval metrics after post-processing, for `s2sd-evaluate --postprocess`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from s2sd_tf import evaluation, progress
from s2sd_tf.checks import check_choice
from s2sd_tf.evaluation.embeddings import Rows
from s2sd_tf.evaluation.rows import normalized
from s2sd_tf.reporting import EmbeddedImages

STEPS = ("whiten", "augment", "expand", "rerank")


def check(values: Sequence[str], has_gallery: bool, has_training: bool) -> None:
    """Checks the flag: steps joined by + in the order in which they apply.

    Raises:
        ValueError: an unknown step or order, or a step that needs another flag.
    """
    if has_training and not any("whiten" in value.split("+") for value in values):
        raise ValueError("--training_embeddings: expected --postprocess=whiten too. Received: none")
    for value in values:
        steps = value.split("+")
        for step in steps:
            check_choice("--postprocess", step, STEPS)
        if steps != [step for step in STEPS if step in steps]:
            raise ValueError(f"--postprocess: expected each step once, in the order {STEPS}. Received: {value!r}")
        if "whiten" in steps and not has_training:
            raise ValueError("--postprocess=whiten: expected --training_embeddings too. Received: none")
        if "augment" in steps and not has_gallery:
            raise ValueError(
                "--postprocess=augment: expected a gallery, as queries that search among themselves would be averaged "
                "into what they find. Received: none"
            )


def fitted(rows: Rows | None, dim: int) -> evaluation.Whitening | None:
    """Fits the whitening of embeddings of dimension `dim` to the training embeddings `rows`, if there are any.

    Raises:
        ValueError: the training embeddings have another dimension, or are too few.
    """
    if rows is None:
        return None
    if rows.shape[1] != dim:
        raise ValueError(f"--training_embeddings: expected dimension {dim}. Received: {rows.shape[1]}")
    with progress.stage("Fitting the whitening"):
        return evaluation.Whitening.fit(rows)


def metrics(
    values: Sequence[str],
    queries: EmbeddedImages,
    gallery: EmbeddedImages | None,
    ids: Mapping[str, np.ndarray],
    whitening: evaluation.Whitening | None,
    settings: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """Returns the metrics of exact search by cosine similarity after each of `values`, by its name.

    Args:
        values: the flag, checked.
        queries, gallery: what is evaluated.
        ids: the ids to exclude; see `find_neighbors`. Without a gallery, each query leaves out itself.
        whitening: for the step "whiten".
        settings: further arguments of `evaluate_retrieval`.
    """
    if gallery is None:
        own = np.arange(len(queries.labels))
        gallery, ids = queries, {"query_ids": own, "gallery_ids": own}
    found = {}
    for value in values:
        with progress.stage(f"Searching, {value}"):
            found[value] = _metrics(value.split("+"), queries, gallery, ids, whitening, settings)
    return found


def _metrics(steps, queries, gallery, ids, whitening, settings):
    def prepared(part):
        rows = normalized(np.asarray(part.rows[:]))
        return whitening(rows) if "whiten" in steps else rows

    searched = prepared(queries)
    # The same array, which halves the work of searches.
    items = searched if gallery is queries else prepared(gallery)
    if "augment" in steps:
        own = np.arange(len(items))
        items = evaluation.expand(items, items, query_ids=own, gallery_ids=own, memory_mib=settings["memory_mib"])
    if "expand" in steps:
        searched = evaluation.expand(searched, items, **ids, memory_mib=settings["memory_mib"])
    neighbors = None
    if "rerank" in steps:
        # As many as the metrics look at: the largest number of positives, and 100 for the reciprocal rank.
        most = int(np.unique(gallery.labels, return_counts=True)[1].max())
        depth = max(100, most, *settings["ks"], *settings["precision_ks"], *settings["map_ks"])
        neighbors = evaluation.reranked_neighbors(
            searched, items, min(depth, len(items)), **ids, memory_mib=settings["memory_mib"]
        )
    return evaluation.retrieval_metrics(
        searched, queries.labels, items, gallery.labels, **ids, **settings, neighbors=neighbors
    )
