"""Retrieval metrics of the prefixes of embeddings, with what each costs to store and to search."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from s2sd_tf.evaluation.embeddings import Rows
from s2sd_tf.evaluation.exact import exact_neighbors
from s2sd_tf.evaluation.metrics import checked_ks, evaluate_retrieval
from s2sd_tf.evaluation.rows import checked_sets
from s2sd_tf.truncation import truncate

# The search that is timed: this many queries at a time and neighbours, the median of so many times.
_QUERIES, _NEIGHBORS, _TIMES = 1000, 10, 3


def metrics_by_dim(
    queries: Rows | tf.Tensor,
    query_labels: tf.Tensor | np.ndarray,
    gallery: Rows | tf.Tensor | None = None,
    gallery_labels: tf.Tensor | np.ndarray | None = None,
    *,
    dims: Sequence[int],
    **settings: Any,
) -> dict[int, dict[str, Any]]:
    """Evaluates the retrieval of prefixes of embeddings, each l2-normalised, by cosine similarity.

    Args:
        queries, query_labels, gallery, gallery_labels: see `evaluate_retrieval`.
        dims: dimensions of the prefixes, each from 1 to the dimension of the embeddings.
        **settings: further arguments of `evaluate_retrieval`, but not `neighbors`.

    Returns:
        For each dimension, the means of the metrics, and "bytes", the size of an item in float32, and
        "queries_per_second": of exact search for the 10 nearest on this machine, up to 1,000 queries at a time.

    Raises:
        ValueError: a dimension is out of range, or what `evaluate_retrieval` refuses.
    """
    if "neighbors" in settings:
        raise ValueError("neighbors: expected none, as each dimension has its own. Received: neighbors")
    alone = gallery is None
    queries, gallery = checked_sets(queries, queries if alone else gallery)
    dims = checked_ks("dims", dims)
    if max(dims, default=1) > queries.shape[1]:
        raise ValueError(f"dims: expected at most {queries.shape[1]}, that of the embeddings. Received: {max(dims)}")
    found = {}
    for dim in dims:
        rows = truncate(np.asarray(queries[:]), dim)
        searched = rows if alone else truncate(np.asarray(gallery[:]), dim)
        others = () if alone else (searched, gallery_labels)
        result = evaluate_retrieval(rows, query_labels, *others, **settings)
        found[dim] = {
            **result.means(),
            "bytes": 4 * dim,
            "queries_per_second": _queries_per_second(rows[:_QUERIES], searched),
        }
    return found


def _queries_per_second(queries, gallery):
    seconds = []
    for _ in range(1 + _TIMES):
        start = time.perf_counter()
        exact_neighbors(queries, gallery, min(_NEIGHBORS, len(gallery)))
        seconds.append(time.perf_counter() - start)
    # The first one warms up.
    return float(len(queries) / np.median(seconds[1:]))
