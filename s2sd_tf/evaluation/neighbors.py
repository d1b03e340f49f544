"""The result type of a search, and the names of methods and metrics."""

from typing import NamedTuple

import numpy as np

from s2sd_tf.checks import check_choice, check_number

METRICS = ("cosine", "euclidean")
METHODS = ("exact", "scann")


class Neighbors(NamedTuple):
    """The neighbours of queries, nearest first.

    Attributes:
        indices: int64 `(queries, k)`, positions in the gallery; -1 if there are no more.
        similarities: float32 `(queries, k)`, cosine similarities or negative Euclidean distances; -inf if there are no
            more.
    """

    indices: np.ndarray
    similarities: np.ndarray


def check_search(method: str, metric: str, recall: float) -> None:
    """Raises ValueError for an unknown method or metric, or a recall outside (0, 1]."""
    check_choice("method", method, METHODS)
    check_choice("metric", metric, METRICS)
    check_number("recall", recall, "a number in (0, 1]")
    if not 0 < recall <= 1:
        raise ValueError(f"recall: expected a number in (0, 1]. Received: {recall!r}")


def lengths(indices: np.ndarray, similarities: np.ndarray, scale: float) -> np.ndarray:
    """Euclidean similarities of rows that were multiplied by `scale`, as those of the rows themselves, in float32.

    Distances that are too long for float32 become its largest number, as -inf means that there is no item.
    """
    found = np.maximum(similarities.astype(np.float64) / scale, np.finfo(np.float32).min)
    return np.where(indices < 0, -np.inf, found).astype(np.float32)


def padded(indices: np.ndarray, similarities: np.ndarray, k: int) -> Neighbors:
    """`Neighbors` with k columns; missing columns are filled with -1 and -inf."""
    missing = k - indices.shape[1]
    if missing > 0:
        indices = np.pad(indices, ((0, 0), (0, missing)), constant_values=-1)
        similarities = np.pad(similarities, ((0, 0), (0, missing)), constant_values=-np.inf)
    return Neighbors(indices, similarities)


def no_neighbors(queries: int, k: int) -> Neighbors:
    """`Neighbors` for a number of queries that found nothing."""
    return Neighbors(np.full((queries, k), -1, np.int64), np.full((queries, k), -np.inf, np.float32))


def without_own(
    neighbors: tuple[np.ndarray, np.ndarray], k: int, query_keys: np.ndarray, gallery_keys: np.ndarray
) -> Neighbors:
    """Removes the items that have the key of the query, and returns the first k of the others."""
    indices, similarities = neighbors
    missing = (indices < 0) | (gallery_keys[np.maximum(indices, 0)] == query_keys[:, None])
    order = np.argsort(missing, axis=1, kind="stable")[:, :k]
    missing = np.take_along_axis(missing, order, axis=1)
    indices = np.where(missing, -1, np.take_along_axis(indices, order, axis=1))
    similarities = np.where(missing, -np.inf, np.take_along_axis(similarities, order, axis=1))
    return padded(indices, similarities.astype(np.float32), k)
