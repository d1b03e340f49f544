"""Retrieval metrics of items with several labels each."""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from s2sd_tf.checks import check_choice, checked_int
from s2sd_tf.evaluation.embeddings import Rows
from s2sd_tf.evaluation.exact import exact_neighbors
from s2sd_tf.evaluation.metrics import checked_ks
from s2sd_tf.evaluation.neighbors import METRICS
from s2sd_tf.evaluation.rows import checked_labeled_sets
from s2sd_tf.relevance import JACCARD, relevance_matrix


def multi_label_metrics(
    queries: Rows | tf.Tensor,
    query_labels: tf.Tensor | np.ndarray,
    gallery: Rows | tf.Tensor | None = None,
    gallery_labels: tf.Tensor | np.ndarray | None = None,
    *,
    ks: Sequence[int] = (10, 100),
    query_ids: np.ndarray | None = None,
    gallery_ids: np.ndarray | None = None,
    metric: str = "cosine",
    memory_mib: int = 512,
    progress: bool = False,
) -> dict[str, float | int]:
    """Computes the normalised discounted cumulative gain of items with several labels each, by exact search.

    `ndcg@k` is the sum over the k nearest of relevance / log2(1 + rank), divided by that of the best ranking (Jarvelin
    and Kekalainen, "Cumulated Gain-Based Evaluation of IR Techniques", TOIS 2002). The relevance of two items is the
    number of labels that both have, divided by the number that either has (Jaccard); 0 if neither has one. Without a
    gallery the queries search among themselves, each excluding itself.

    Args:
        queries, gallery: see `evaluate_retrieval`.
        query_labels, gallery_labels: 0 or 1, `(n, labels)`.
        ks: ints >= 1, at least one.
        query_ids, gallery_ids, metric, memory_mib, progress: see `evaluate_retrieval`.

    Returns:
        dict of the mean of each `ndcg@k` over the queries that share a label with an item; and "queries" and
        "queries_without_relevant", ints.

    Raises:
        ValueError: labels or other arguments that do not fit, or no query that shares a label with an item.
    """
    ks = checked_ks("ks", ks)
    if not ks:
        raise ValueError("ks: expected at least one int >= 1. Received: none")
    check_choice("metric", metric, METRICS)
    memory_mib = checked_int("memory_mib", memory_mib, 1)
    sets = checked_labeled_sets(queries, query_labels, gallery, gallery_labels, query_ids, gallery_ids, columns=-1)
    for name, labels in (("query_labels", sets.query_labels), ("gallery_labels", sets.gallery_labels)):
        if labels.shape[1] != sets.query_labels.shape[1] or (
            labels.size and not 0 <= labels.min() <= labels.max() <= 1
        ):
            received = f"{labels.min()} to {labels.max()} of shape {labels.shape}" if labels.size else str(labels.shape)
            raise ValueError(f"{name}: expected 0 or 1, (n, {sets.query_labels.shape[1]}). Received: {received}")
    size, count = len(sets.gallery_labels), len(sets.query_labels)
    if not size:
        raise ValueError("gallery: expected at least one item. Received: none")
    depth = min(size, max(ks))
    found = exact_neighbors(sets.queries, sets.gallery, depth, metric, sets.keys, memory_mib, progress).indices
    discounts = 1.0 / np.log2(2.0 + np.arange(depth))
    values = {f"ndcg@{k}": np.zeros(count) for k in ks}
    relevant = np.zeros(count, bool)
    # A block of relevances and its copies take some 40 bytes per pair.
    height = max(1, memory_mib * 2**20 // (40 * size))
    for start in range(0, count, height):
        block = slice(start, min(start + height, count))
        relevance = relevance_matrix(sets.query_labels[block], sets.gallery_labels, JACCARD, "float64").numpy()
        if sets.keys is not None:
            relevance[sets.keys[0][block, None] == sets.keys[1][None, :]] = 0.0
        gains = np.where(found[block] >= 0, np.take_along_axis(relevance, np.maximum(found[block], 0), axis=1), 0.0)
        best = -np.sort(np.partition(-relevance, depth - 1, axis=1)[:, :depth], axis=1)
        relevant[block] = best[:, 0] > 0
        for k in ks:
            ideal = best[:, :k] @ discounts[:k]
            values[f"ndcg@{k}"][block] = gains[:, :k] @ discounts[:k] / np.where(ideal > 0, ideal, 1.0)
    if not relevant.any():
        raise ValueError("gallery_labels: expected at least one query to share a label with an item. Received: none")
    means = {name: float(np.mean(part[relevant])) for name, part in values.items()}
    return {**means, "queries": count, "queries_without_relevant": int(np.sum(~relevant))}
