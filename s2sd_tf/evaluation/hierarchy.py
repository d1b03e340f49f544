"""Retrieval metrics of classes in a hierarchy: graded ones, and those of every level."""

import contextlib
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from s2sd_tf.checks import check_choice, checked_int
from s2sd_tf.evaluation.embeddings import Rows
from s2sd_tf.evaluation.exact import positive_ranks
from s2sd_tf.evaluation.metrics import checked_ks, metrics_of_ranks
from s2sd_tf.evaluation.neighbors import METRICS
from s2sd_tf.evaluation.rows import checked_labeled_sets
from s2sd_tf.relevance import JACCARD, checked_relevance


def hierarchical_metrics(
    queries: Rows | tf.Tensor,
    query_labels: tf.Tensor | np.ndarray,
    gallery: Rows | tf.Tensor | None = None,
    gallery_labels: tf.Tensor | np.ndarray | None = None,
    *,
    relevance: Sequence[float] = (),
    ks: Sequence[int] = (1, 2, 4, 8),
    ndcg_ks: Sequence[int] = (),
    query_ids: np.ndarray | None = None,
    gallery_ids: np.ndarray | None = None,
    metric: str = "cosine",
    memory_mib: int = 512,
    progress: bool = False,
) -> dict[str, float | int]:
    """Evaluates retrieval of items whose classes are in a hierarchy, by exact search over the whole ranking.

    Two items share a level if they are equal up to and including its column of the labels. Their relevance is that of
    the finest level that they share, and 0 if they share none. Without a gallery the queries search among themselves.

    - `ndcg`: normalised discounted cumulative gain, the sum of relevance / log2(1 + rank) divided by that of the best
      ranking (Jarvelin and Kekalainen, "Cumulated Gain-Based Evaluation of IR Techniques", TOIS 2002). `ndcg@k`: the
      same over the first k ranks;
    - `h_ap`: hierarchical average precision (Ramzi et al., "Hierarchical Average Precision Training for Pertinent Image
      Retrieval", ECCV 2022): the average precision in which an item counts, at the rank of another one, the lesser of
      both relevances. The paper divides its relevances by the number of items at a level; these are not divided;
    - for level l, from `level1`, the coarsest, `level1_recall@k`, `level1_r_precision`, `level1_map@r` and `level1_ap`,
      the average precision of the whole ranking, with the items that share this level as positives. See
      `evaluate_retrieval`.

    Args:
        queries, gallery: see `evaluate_retrieval`.
        query_labels, gallery_labels: integers `(n, levels)`, coarse to fine, at least two levels.
        relevance: for each level a number in [0, 1], not decreasing, the last one 1. (): (2^l - 1) / (2^levels - 1) for
            level l = 1, 2, ..., the gains of nDCG in that paper's code: (1/3, 1) for two levels.
        ks, ndcg_ks: ints >= 1, for recall@k and ndcg@k.
        query_ids, gallery_ids, metric, memory_mib, progress: see `evaluate_retrieval`.

    Returns:
        dict of the means over the queries that have an item of relevance > 0, or at a level, over those that share it
        with an item; and "queries" and "queries_without_relevant", ints.

    Raises:
        ValueError: labels, a relevance or other arguments that do not fit, or no query that has a relevant item.
    """
    ks, ndcg_ks = checked_ks("ks", ks), checked_ks("ndcg_ks", ndcg_ks)
    check_choice("metric", metric, METRICS)
    memory_mib = checked_int("memory_mib", memory_mib, 1)
    sets = checked_labeled_sets(queries, query_labels, gallery, gallery_labels, query_ids, gallery_ids, columns=-1)
    levels = sets.query_labels.shape[1]
    if levels < 2 or sets.gallery_labels.shape[1] != levels:
        received = f"{sets.query_labels.shape} and {sets.gallery_labels.shape}"
        raise ValueError(f"labels: expected (n, levels) with the same levels, at least two. Received: {received}")
    grades = checked_relevance(relevance) or tuple((2**level - 1) / (2**levels - 1) for level in range(1, levels + 1))
    if grades == JACCARD or len(grades) != levels:
        raise ValueError(f"relevance: expected a number for each of {levels} levels. Received: {relevance!r}")

    size, count = len(sets.gallery_labels), len(sets.query_labels)
    discounts = 1.0 / np.log2(2.0 + np.arange(size))
    ideal = np.concatenate([[0.0], np.cumsum(discounts)])
    reaches = {"ndcg": size, **{f"ndcg@{k}": min(k, size) for k in ndcg_ks}}
    gains = {name: np.zeros((2, count)) for name in (*reaches, "h_ap")}
    means: dict[str, float] = {}
    relevant = np.zeros(count, bool)
    # The relevance of an item is the sum of the steps up to its level, so both graded metrics are sums over the levels.
    # (The lesser of two relevances is the sum of the steps that both have.)
    for level, step in enumerate(np.diff([0.0, *grades]), 1):
        query_labels, gallery_labels = _labels_of(sets, level)
        chosen = sets._replace(query_labels=query_labels, gallery_labels=gallery_labels)
        positives, candidates = chosen.counts()
        if step > 0:
            relevant |= positives > 0
        names = (*(f"recall@{k}" for k in ks), "r_precision", "map@r", "ap")
        values = {name: np.zeros(count) for name in names}
        blocks = positive_ranks(
            sets.queries, sets.gallery, query_labels, gallery_labels, metric, sets.keys, memory_mib, progress
        )
        with contextlib.closing(blocks):
            for block, ranks in blocks:
                found = metrics_of_ranks(ranks, positives[block], candidates[block], ks, (), (size,), None)
                found["ap"] = found.pop(f"map@{size}")
                for name in names:
                    values[name][block] = found[name]
                for name, reach in reaches.items():
                    within = [np.sum(discounts[row[row <= reach] - 1]) for row in ranks]
                    gains[name][:, block] += step * np.stack([within, ideal[np.minimum(positives[block], reach)]])
                gains["h_ap"][:, block] += step * positives[block] * np.stack([found["ap"], np.ones(len(block))])
        shared = positives > 0
        means.update({f"level{level}_{name}": _mean(part[shared]) for name, part in values.items()})
    if not relevant.any():
        raise ValueError("gallery_labels: expected at least one query to have a relevant item. Received: none")
    graded = {name: _mean(found[relevant] / best[relevant]) for name, (found, best) in gains.items()}
    return {**graded, **means, "queries": count, "queries_without_relevant": int(np.sum(~relevant))}


def _labels_of(sets, level):
    """Labels of queries and gallery, int64 `(n,)`, that are equal where the first `level` columns are."""
    columns = np.concatenate([sets.query_labels, sets.gallery_labels])[:, :level]
    codes = np.unique(columns, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)
    count = len(sets.query_labels)
    return codes[:count], codes[count:]


def _mean(values):
    return float(np.mean(values)) if len(values) else float("nan")
