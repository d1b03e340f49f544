"""Retrieval metrics from embeddings and labels."""

import contextlib
import dataclasses
from collections.abc import Generator, Iterable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from s2sd_tf.checks import check_choice, checked_int
from s2sd_tf.evaluation.embeddings import Rows
from s2sd_tf.evaluation.exact import positive_ranks
from s2sd_tf.evaluation.neighbors import Neighbors, check_search, without_own
from s2sd_tf.evaluation.rows import checked_labeled_sets
from s2sd_tf.evaluation.scann_index import scann_neighbors

# The neighbours of ScaNN that `mrr` is computed over.
_SCANN_MRR = 100


@dataclasses.dataclass(frozen=True)
class RetrievalResult:
    """The retrieval metrics of every query.

    Attributes:
        values: dict from a metric's name to a float64 array `(queries,)`; NaN for queries without a positive.
        labels: int64 `(queries,)`.
        positives: int64 `(queries,)`, the number of positives of each query in the gallery.
        first_ranks: int64 `(queries,)`, the rank of the first positive, counted from 1; 0 if none was found.
    """

    values: dict[str, np.ndarray]
    labels: np.ndarray
    positives: np.ndarray
    first_ranks: np.ndarray

    @property
    def answerable(self) -> np.ndarray:
        """Mask of the queries that have a positive, bool `(queries,)`."""
        return self.positives > 0

    def means(self) -> dict[str, float | int]:
        """The mean of each metric over the queries that have a positive, and the counts "queries" and
        "queries_without_positive".
        """
        return {
            **{name: float(np.mean(values[self.answerable])) for name, values in self.values.items()},
            "queries": len(self.labels),
            "queries_without_positive": int(np.sum(~self.answerable)),
        }

    def per_class(self) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """The mean of each metric per class.

        Returns:
            `(labels, counts, means)`: the classes that have answerable queries, ascending, int64 `(classes,)`; the
            number of answerable queries of each; and a dict from metric to float64 `(classes,)`.
        """
        classes, inverse = np.unique(self.labels[self.answerable], return_inverse=True)
        counts = np.bincount(inverse, minlength=len(classes))
        means = {
            name: np.bincount(inverse, values[self.answerable], len(classes)) / counts
            for name, values in self.values.items()
        }
        return classes, counts, means

    def confidence_intervals(
        self, level: float = 0.95, resamples: int = 1000, seed: int = 0, unit: str = "class"
    ) -> dict[str, tuple[float, float]]:
        """Percentile bootstrap intervals of the means.

        Args:
            level: confidence level in (0, 1).
            resamples: int >= 1.
            seed: int >= 0.
            unit: what to draw with replacement. "class" draws whole classes (a cluster bootstrap), as queries of one
                class are not independent; "query" draws single queries.

        Returns:
            dict from metric to `(low, high)`.
        """
        if not 0 < level < 1:
            raise ValueError(f"level: expected a number in (0, 1). Received: {level!r}")
        resamples = checked_int("resamples", resamples, 1)
        check_choice("unit", unit, ("class", "query"))
        names = list(self.values)
        values = np.stack([self.values[name][self.answerable] for name in names], axis=1)
        sums, counts = values, np.ones(len(values))
        if unit == "class":
            inverse = np.unique(self.labels[self.answerable], return_inverse=True)[1]
            counts = np.bincount(inverse).astype(np.float64)
            sums = np.stack([np.bincount(inverse, column) for column in values.T], axis=1)
        generator = np.random.default_rng(checked_int("seed", seed, 0))
        means = np.empty((resamples, len(names)))
        for resample in range(resamples):
            drawn = np.bincount(generator.integers(0, len(sums), len(sums)), minlength=len(sums))
            means[resample] = drawn @ sums / (drawn @ counts)
        low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
        return {name: (float(low[i]), float(high[i])) for i, name in enumerate(names)}


def check_answerable(
    argument: str, query_labels: tf.Tensor | np.ndarray, gallery_labels: tf.Tensor | np.ndarray | None = None
) -> None:
    """Raises ValueError unless at least one query has a positive, without which nothing can be evaluated.

    Args:
        argument: what the message names.
        query_labels, gallery_labels: integer arrays `(n,)`. Without a gallery the queries search among themselves.
    """
    query_labels = np.asarray(query_labels)
    if gallery_labels is None:
        wanted, answerable = "two images", np.unique(query_labels, return_counts=True)[1].max(initial=0) > 1
    else:
        wanted = "a query and an image in the gallery"
        answerable = bool(np.isin(query_labels, np.asarray(gallery_labels)).any())
    if not answerable:
        raise ValueError(
            f"{argument}: expected at least one class with {wanted}, or nothing can be evaluated. Received: "
            f"{len(query_labels)} queries of {len(np.unique(query_labels))} classes, all without"
        )


def retrieval_metrics(
    queries: Rows | tf.Tensor,
    query_labels: tf.Tensor | np.ndarray,
    gallery: Rows | tf.Tensor | None = None,
    gallery_labels: tf.Tensor | np.ndarray | None = None,
    **settings: Any,
) -> dict[str, float | int]:
    """Evaluates retrieval like `evaluate_retrieval`, with the same arguments, and returns the means only.

    Returns:
        dict from metric to float, with the ints "queries" and "queries_without_positive".
    """
    return evaluate_retrieval(queries, query_labels, gallery, gallery_labels, **settings).means()


def evaluate_retrieval(
    queries: Rows | tf.Tensor,
    query_labels: tf.Tensor | np.ndarray,
    gallery: Rows | tf.Tensor | None = None,
    gallery_labels: tf.Tensor | np.ndarray | None = None,
    *,
    ks: Sequence[int] = (1, 2, 4, 8),
    precision_ks: Sequence[int] = (1,),
    map_ks: Sequence[int] = (),
    mrr_depth: int | None = None,
    query_ids: np.ndarray | None = None,
    gallery_ids: np.ndarray | None = None,
    method: str = "exact",
    metric: str = "cosine",
    recall: float = 0.99,
    memory_mib: int = 512,
    progress: bool = False,
    neighbors: Neighbors | None = None,
) -> RetrievalResult:
    """Computes the retrieval metrics of every query.

    Without a gallery the queries search among themselves, each excluding itself. R is the number of positives of a
    query: the gallery items that have its label and are not excluded by ids.

    - `recall@k`: 1 if a positive is among the k nearest, else 0;
    - `precision@k`: share of positives among the k nearest, or in the whole gallery if that is smaller;
    - `r_precision`: share of positives among the R nearest;
    - `map@r`: mean over the first R ranks of the precision at that rank if it is a positive, else of 0 (Musgrave et
      al., "A Metric Learning Reality Check", ECCV 2020);
    - `map@k`: the same sum over the first k ranks, divided by min(k, R), so that perfect retrieval scores 1 for any k
      and R. With k the size of the gallery, this is the mean average precision of the whole ranking;
    - `mrr`: 1 / rank of the first positive in the whole ranking. With `mrr_depth` = k it is called `mrr@k`, and is 0 if
      no positive is among the k nearest.

    Exact search finds the true rank of every positive, however low. The ranking is that of `find_neighbors`: by
    similarity in float32, and by position where that is equal. ScaNN finds only the nearest neighbours, at least as
    many as the largest k and R, and positives beyond count as not found. Its `mrr` is always over the 100 nearest, so
    that it does not depend on the other metrics.

    Args:
        queries: float rows `(queries, dim)`: an array, a memory-mapped file or `EmbeddingShards`.
        query_labels: integer array `(queries,)`.
        gallery, gallery_labels: the same for the gallery, or None.
        ks, precision_ks, map_ks: ints >= 1, for `recall@k`, `precision@k` and `map@k`. `ks` needs at least one.
        mrr_depth: int >= 1, or None.
        query_ids, gallery_ids: see `find_neighbors`. Without a gallery pass `query_ids` only; by default they are the
            positions.
        method, metric, recall, memory_mib, progress: see `find_neighbors`. `memory_mib` includes the ranks of a block
            of queries, unless everything has the same label.
        neighbors: `Neighbors` that another search found, such as `reranked_neighbors`, instead of `method`; those that
            the ids exclude do not count. As with ScaNN, positives beyond count as not found.

    Raises:
        ValueError: no queries, labels that do not fit, or no query that has a positive.
    """
    ks, precision_ks, map_ks = (
        checked_ks(name, values) for name, values in (("ks", ks), ("precision_ks", precision_ks), ("map_ks", map_ks))
    )
    if not ks:
        raise ValueError("ks: expected at least one int >= 1. Received: none")
    if mrr_depth is not None:
        checked_int("mrr_depth", mrr_depth, 1)
    check_search(method, metric, recall)
    memory_mib = checked_int("memory_mib", memory_mib, 1)
    sets = checked_labeled_sets(queries, query_labels, gallery, gallery_labels, query_ids, gallery_ids)
    queries, gallery, query_labels, gallery_labels, keys, _ = sets
    positives, candidates = sets.counts()
    if not positives.any():
        raise ValueError(
            "gallery_labels: expected at least one query to have a positive in the gallery. Received: none"
        )
    reach = mrr_depth
    if neighbors is not None:
        neighbors = _checked_neighbors(neighbors, len(query_labels), len(gallery_labels), keys)
        reach = mrr_depth or neighbors.indices.shape[1]
        blocks = _ranks_in(neighbors.indices, query_labels, gallery_labels)
    elif method == "exact":
        blocks = positive_ranks(queries, gallery, query_labels, gallery_labels, metric, keys, memory_mib, progress)
    else:
        reach = mrr_depth or _SCANN_MRR
        depth = min(len(gallery_labels), max(*ks, *precision_ks, *map_ks, int(positives.max()), reach))
        found = scann_neighbors(queries, gallery, depth, metric, keys, recall)
        blocks = _ranks_in(found.indices, query_labels, gallery_labels)

    values: dict[str, np.ndarray] = {}
    first_ranks = np.zeros(len(query_labels), np.int64)
    with contextlib.closing(blocks):
        for chosen, ranks in blocks:
            at = (ks, precision_ks, map_ks, reach)
            per_query = metrics_of_ranks(ranks, positives[chosen], candidates[chosen], *at)
            if reach != mrr_depth:
                per_query["mrr"] = per_query.pop(f"mrr@{reach}")
            first_ranks[chosen] = per_query.pop("first_rank")
            for name, part in per_query.items():
                values.setdefault(name, np.full(len(query_labels), np.nan))[chosen] = part
    for part in values.values():
        part[positives == 0] = np.nan
    return RetrievalResult(values, query_labels, positives, first_ranks)


def checked_ks(name: str, values: Any) -> list[int]:
    """Returns `values` as a list of ints >= 1.

    Raises:
        ValueError: not a sequence of ints >= 1.
    """
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise ValueError(f"{name}: expected a sequence of ints >= 1. Received: {values!r}")
    return [checked_int(name, k, 1) for k in values]


def _checked_neighbors(neighbors, queries, gallery, keys):
    wanted = f"neighbors: expected Neighbors with integer indices ({queries}, k) below {gallery}. Received: "
    if not isinstance(neighbors, Neighbors):
        raise ValueError(f"{wanted}{type(neighbors).__name__}")
    indices = np.asarray(neighbors.indices)
    if indices.ndim != 2 or len(indices) != queries or not indices.shape[1] or indices.dtype.kind not in "iu":
        raise ValueError(f"{wanted}{indices.dtype} {indices.shape}")
    if indices.max() >= gallery:
        raise ValueError(f"{wanted}{indices.max()}")
    return neighbors if keys is None else without_own(neighbors, indices.shape[1], *keys)


def _ranks_in(
    neighbors: np.ndarray, query_labels: np.ndarray, gallery_labels: np.ndarray
) -> Generator[tuple[np.ndarray, list[np.ndarray]], None, None]:
    """Yields what `positive_ranks` yields, from the indices of neighbours that were already found."""
    for start in range(0, len(neighbors), 4096):
        chosen = np.arange(start, min(start + 4096, len(neighbors)))
        found = neighbors[chosen]
        hits = (gallery_labels[np.maximum(found, 0)] == query_labels[chosen, None]) & (found >= 0)
        yield chosen, [np.flatnonzero(row) + 1 for row in hits]


def metrics_of_ranks(
    ranks: Sequence[np.ndarray],
    positives: np.ndarray,
    candidates: np.ndarray,
    ks: Sequence[int],
    precision_ks: Sequence[int],
    map_ks: Sequence[int],
    mrr_depth: int | None,
) -> dict[str, np.ndarray]:
    """Computes the metrics of `evaluate_retrieval` for some queries.

    Args:
        ranks: for each query the ranks of its positives that were found, ascending, counted from 1.
        positives, candidates: int `(queries,)`, the number of positives, and of items that it is compared with.
        ks, precision_ks, map_ks, mrr_depth: see `evaluate_retrieval`.

    Returns:
        dict from the name of a metric, and "first_rank", to an array `(queries,)`.
    """
    size = len(ranks)
    lengths = np.array([len(row) for row in ranks])
    flat = np.concatenate([np.empty(0, np.int64), *ranks])
    query = np.repeat(np.arange(size), lengths)
    # The number of positives up to and including each one.
    place = np.arange(len(flat)) - np.repeat(np.cumsum(lengths) - lengths, lengths) + 1

    def count(within):
        return np.bincount(query[within], minlength=size)

    def precisions(within):
        return np.bincount(query[within], (place / np.maximum(flat, 1))[within], size)

    first = np.zeros(size, np.int64)
    first[lengths > 0] = flat[(np.cumsum(lengths) - lengths)[lengths > 0]]
    relevant = np.maximum(positives, 1)
    in_r = flat <= positives[query]
    values = {"first_rank": first}
    values.update({f"recall@{k}": ((first > 0) & (first <= k)).astype(np.float64) for k in ks})
    for k in precision_ks:
        values[f"precision@{k}"] = count(flat <= k) / np.maximum(np.minimum(k, candidates), 1)
    values["r_precision"] = count(in_r) / relevant
    values["map@r"] = precisions(in_r) / relevant
    for k in map_ks:
        values[f"map@{k}"] = precisions(flat <= k) / np.minimum(k, relevant)
    reached = (first > 0) & (first <= (mrr_depth or np.inf))
    values["mrr" if mrr_depth is None else f"mrr@{mrr_depth}"] = np.where(reached, 1.0 / np.maximum(first, 1), 0.0)
    return values
