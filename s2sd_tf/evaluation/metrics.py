"""Retrieval metrics from embeddings and labels."""

import numpy as np

from s2sd_tf.evaluation.neighbors import find_neighbors

# Queries ranked at a time, so that the ranks of a large set never stand in memory at once.
_RANKS_BYTES = 64 * 2**20


def retrieval_metrics(
    queries,
    query_labels,
    gallery=None,
    gallery_labels=None,
    ks=(1, 2, 4, 8),
    method="exact",
    mrr_depth=None,
):
    """Retrieval quality by cosine similarity.

    Without a gallery the queries search among themselves, each without itself. With R the number of a query's positives
    in the gallery (items of its label other than itself):

    - `recall@k`: share of queries with a positive among the k nearest;
    - `precision@1`: share of queries whose nearest is a positive;
    - `r_precision`: share of positives among the R nearest;
    - `map@r`: mean over the first R ranks of the precision at the rank, where that rank is a positive, else 0 (Musgrave
      et al., "A Metric Learning Reality Check", ECCV 2020);
    - `mrr@k`, with k = `mrr_depth`: 1 / rank of the first positive, 0 where that is beyond the k nearest. A k of the
      gallery's size or more is the mean reciprocal rank of the whole ranking.

    Each is a mean over the queries that have a positive; the number of the others is reported. A k above the gallery's
    size counts the whole gallery.

    Args:
        queries: float array `(queries, dim)`.
        query_labels: integer array `(queries,)`.
        gallery, gallery_labels: the same of the gallery, or None.
        ks: ints >= 1.
        method: "exact" or "scann".
        mrr_depth: int >= 1, or None to leave the mean reciprocal rank out.

    Returns:
        dict of floats by the names above, and the ints "queries" and "queries_without_positive".

    Raises:
        ValueError: no queries, labels that do not fit, or no query that has a positive.
    """
    queries, query_labels = np.asarray(queries), np.asarray(query_labels).reshape(-1)
    if not ks or min(ks) < 1:
        raise ValueError(f"ks: expected ints >= 1. Received: {ks}")
    if (gallery is None) != (gallery_labels is None):
        raise ValueError("gallery and gallery_labels: expected both or neither")
    if mrr_depth is not None and mrr_depth < 1:
        raise ValueError(f"mrr_depth: expected an int >= 1 or None. Received: {mrr_depth}")
    ids = gallery_ids = None
    if gallery is None:
        gallery, gallery_labels = queries, query_labels
        ids = gallery_ids = np.arange(len(queries))
    gallery_labels = np.asarray(gallery_labels).reshape(-1)
    for name, labels, items in (("query", query_labels, queries), ("gallery", gallery_labels, gallery)):
        if len(labels) != len(items):
            raise ValueError(f"{name}_labels: expected one for each of {len(items)}. Received: {len(labels)}")
    if not len(queries):
        raise ValueError("queries: expected at least one. Received: none")

    classes, inverse = np.unique(np.concatenate([query_labels, gallery_labels]), return_inverse=True)
    positives = np.bincount(inverse[len(queries) :], minlength=len(classes))[inverse[: len(queries)]]
    positives = positives - (ids is not None)
    answerable = np.flatnonzero(positives > 0)
    if not len(answerable):
        raise ValueError(
            "gallery_labels: expected at least one query to have a positive in the gallery. Received: none"
        )

    depth = min(len(gallery), max(*ks, int(positives.max()), mrr_depth or 1))
    sums = {}
    rows = max(1, _RANKS_BYTES // (8 * depth)) if method == "exact" else len(answerable)
    for start in range(0, len(answerable), rows):
        chosen = answerable[start : start + rows]
        found = find_neighbors(
            queries[chosen], gallery, depth, None if ids is None else ids[chosen], gallery_ids, method
        ).indices
        hits = (gallery_labels[found] == query_labels[chosen, None]) & (found >= 0)
        for name, values in _per_query(hits, positives[chosen], ks, mrr_depth).items():
            sums[name] = sums.get(name, 0.0) + float(np.sum(values))
    return {
        **{name: total / len(answerable) for name, total in sums.items()},
        "queries": len(queries),
        "queries_without_positive": len(queries) - len(answerable),
    }


def _per_query(hits, positives, ks, mrr_depth):
    """Each metric for each query `(queries,)`, from the ranked hits `(queries, depth)` and the R of each query."""
    ranks = np.arange(1, hits.shape[1] + 1)
    counts = np.cumsum(hits, axis=1)
    within = ranks[None, :] <= positives[:, None]
    values = {f"recall@{k}": counts[:, min(k, hits.shape[1]) - 1] > 0 for k in ks}
    values["precision@1"] = hits[:, 0]
    values["r_precision"] = np.sum(hits & within, axis=1) / positives
    values["map@r"] = np.sum(np.where(hits & within, counts / ranks, 0.0), axis=1) / positives
    if mrr_depth is not None:
        top = hits[:, :mrr_depth]
        values[f"mrr@{mrr_depth}"] = np.where(top.any(axis=1), 1.0 / (np.argmax(top, axis=1) + 1.0), 0.0)
    return values
