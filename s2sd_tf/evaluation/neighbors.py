"""Nearest neighbours, exact or by ScaNN: one call, whatever searches."""

from typing import NamedTuple

import numpy as np

from s2sd_tf.checks import checked_int
from s2sd_tf.evaluation import exact
from s2sd_tf.evaluation.exact import METRICS

METHODS = ("exact", "scann")
# Neighbours that are looked at beyond the k nearest, before distances are computed one by one.
_MARGIN = 8


class Neighbors(NamedTuple):
    """The neighbours of queries, nearest first.

    Attributes:
        indices: int64 `(queries, k)`, positions in the gallery; -1 where there are no more.
        similarities: float32 `(queries, k)`: cosine similarities, or for the Euclidean metric minus the distances; -inf
            where there are no more.
    """

    indices: np.ndarray
    similarities: np.ndarray


def find_neighbors(
    queries,
    gallery,
    k,
    query_ids=None,
    gallery_ids=None,
    method="exact",
    metric="cosine",
    recall=0.99,
    memory_mib=512,
    progress=False,
):
    """The k nearest gallery items of every query.

    Args:
        queries: float array `(queries, dim)`, or what gives such rows when sliced: a memory-mapped file
            (`np.load(path, mmap_mode="r")`), an `EmbeddingShards`. Rows need not be normalised. Pass the gallery itself
            to search it with its own items: half of the work is saved.
        gallery: the same, `(gallery, dim)`.
        k: int >= 1; where fewer items remain, the rest is -1.
        query_ids, gallery_ids: integer arrays `(queries,)` and `(gallery,)`, or `(queries, m)` and `(gallery, m)`, or
            None. Items that have the id of the query, in all m columns, are left out: the way to keep an image from
            finding itself (which position in the list is not, as duplicates exist), or an identity from being found in
            pictures of the same camera (columns identity and camera).
        method: "exact" (blocked matrix products in float32; on a GPU where TensorFlow sees one, without TensorFloat-32)
            or "scann" (approximate for large galleries; see `ScannIndex`).
        metric: "cosine" or "euclidean".
        recall: float in (0, 1], to which "scann" is tuned.
        memory_mib: int >= 1, MiB that "exact" may take beside results and arguments. A gallery on disk is read
            block by block; "scann" copies it into memory.
        progress: bool, show a progress bar.

    Returns:
        `Neighbors`. Among equal similarities "exact" puts the lower position first.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, an unknown method or metric, or only one of the
            ids given.
    """
    queries, gallery, keys = checked_sets(queries, gallery, query_ids, gallery_ids)
    k = checked_int("k", k, 1)
    memory_mib = checked_int("memory_mib", memory_mib, 1)
    check_choice("method", method, METHODS)
    check_choice("metric", metric, METRICS)
    if not queries.shape[0] or not gallery.shape[0]:
        shape = (queries.shape[0], k)
        return Neighbors(np.full(shape, -1, np.int64), np.full(shape, -np.inf, np.float32))
    if method == "scann":
        return _scann(queries, gallery, k, keys, metric, recall)
    return exact_neighbors(queries, gallery, k, metric, keys, memory_mib, progress)


def exact_neighbors(queries, gallery, k, metric="cosine", keys=None, memory_mib=512, progress=False):
    """`find_neighbors` by exact search, of arguments that were checked."""
    left, right = exact.factors(queries, gallery, metric)
    if metric == "cosine":
        return Neighbors(*exact.search(left, right, k, keys, memory_mib, progress))
    # Some more, as those at the end may change places.
    indices, _ = exact.search(left, right, min(k + _MARGIN, gallery.shape[0]), keys, memory_mib, progress)
    indices, similarities = _exact_distances(queries, gallery, indices)
    return padded(indices[:, :k], similarities[:, :k], k)


def checked_sets(queries, gallery, query_ids=None, gallery_ids=None):
    """`(queries, gallery, keys)`: rows that can be sliced, and int64 keys `(queries,)`, `(gallery,)` or None.

    Raises:
        ValueError: what does not fit.
    """
    same = queries is gallery
    queries = checked_rows("queries", queries)
    gallery = queries if same else checked_rows("gallery", gallery)
    if queries.shape[1] != gallery.shape[1]:
        raise ValueError(f"gallery: expected dimension {queries.shape[1]}. Received: {gallery.shape[1]}")
    if (query_ids is None) != (gallery_ids is None):
        raise ValueError("query_ids and gallery_ids: expected both or neither")
    if query_ids is None:
        return queries, gallery, None
    query_ids, gallery_ids = np.asarray(query_ids), np.asarray(gallery_ids)
    for name, ids in (("query_ids", query_ids), ("gallery_ids", gallery_ids)):
        if not ids.ndim or (ids.size and ids.dtype.kind not in "iu"):
            raise ValueError(f"{name}: expected integers, one for each. Received: {ids.dtype} {ids.shape}")
    if len(query_ids) != queries.shape[0] or len(gallery_ids) != gallery.shape[0]:
        raise ValueError(
            f"ids: expected {queries.shape[0]} query and {gallery.shape[0]} gallery ids. "
            f"Received: {len(query_ids)} and {len(gallery_ids)}"
        )
    if query_ids.shape[1:] != gallery_ids.shape[1:] or query_ids.ndim > 2:
        raise ValueError(
            f"ids: expected both one-dimensional, or with the same columns. Received: {query_ids.shape} and "
            f"{gallery_ids.shape}"
        )
    codes = np.unique(np.concatenate([query_ids, gallery_ids]), axis=0, return_inverse=True)[1].reshape(-1)
    codes = codes.astype(np.int64)
    return queries, gallery, (codes[: len(query_ids)], codes[len(query_ids) :])


def checked_rows(name, rows):
    """What gives float rows `(n, dim)` when sliced: `rows`, or an array of them.

    Raises:
        ValueError: another shape or dtype.
    """
    if not (hasattr(rows, "shape") and hasattr(rows, "dtype")) or hasattr(rows, "numpy"):
        try:
            rows = np.asarray(rows)
        except ValueError as error:
            raise ValueError(f"{name}: expected a floating array of shape (n, dim). Received: {error}") from error
    if len(rows.shape) != 2 or not np.issubdtype(rows.dtype, np.floating) or not rows.shape[1]:
        raise ValueError(
            f"{name}: expected a floating array of shape (n, dim). Received: {rows.dtype} {tuple(rows.shape)}"
        )
    return rows


def checked_labels(name, labels):
    """Labels as int64 `(n,)`.

    Raises:
        ValueError: something else than integers.
    """
    labels = np.asarray(labels).reshape(-1)
    if len(labels) and not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{name}: expected integers. Received: {labels.dtype}")
    return labels.astype(np.int64)


def check_choice(name, value, choices):
    """Raises ValueError where `value` is none of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {choices}. Received: {value!r}")


def without_own(neighbors, k, query_keys, gallery_keys):
    """The first k of neighbours without the items that have the query's key."""
    indices, similarities = neighbors
    missing = (indices < 0) | (gallery_keys[np.maximum(indices, 0)] == query_keys[:, None])
    order = np.argsort(missing, axis=1, kind="stable")[:, :k]
    missing = np.take_along_axis(missing, order, axis=1)
    indices = np.where(missing, -1, np.take_along_axis(indices, order, axis=1))
    similarities = np.where(missing, -np.inf, np.take_along_axis(similarities, order, axis=1))
    return padded(indices, similarities.astype(np.float32), k)


def padded(indices, similarities, k):
    """`Neighbors` of k columns: what is missing is -1 and -inf."""
    missing = k - indices.shape[1]
    if missing > 0:
        indices = np.pad(indices, ((0, 0), (0, missing)), constant_values=-1)
        similarities = np.pad(similarities, ((0, 0), (0, missing)), constant_values=-np.inf)
    return Neighbors(indices, similarities)


def _scann(queries, gallery, k, keys, metric, recall):
    from s2sd_tf.evaluation.index import ScannIndex

    # As many more as share one id, so that k remain after the query's own are taken out.
    own = 0
    if keys is not None:
        counts = np.bincount(keys[1], minlength=int(keys[0].max()) + 1)
        own = int(counts[keys[0]].max())
    wanted = min(k + own, gallery.shape[0])
    index = ScannIndex.build(gallery, metric=metric, recall=recall, k=wanted)
    found = index.search(queries, wanted)
    if keys is None:
        return padded(*found, k)
    return without_own(found, k, *keys)


def _exact_distances(queries, gallery, indices, block=1024):
    """Neighbours in the order of distances that were computed one by one in float64."""
    ordered = np.empty_like(indices)
    similarities = np.empty(indices.shape, np.float32)
    for start in range(0, len(indices), block):
        found = indices[start : start + block]
        rows = np.asarray(queries[start : start + block]).astype(np.float64)
        distances = np.full(found.shape, np.inf)
        for column in range(found.shape[1]):
            there = np.flatnonzero(found[:, column] >= 0)
            others = exact.take(gallery, found[there, column]).astype(np.float64)
            distances[there, column] = np.linalg.norm(rows[there] - others, axis=1)
        # Equal distances: the lower position first, and what is missing last.
        order = np.lexsort((np.where(found < 0, np.iinfo(np.int64).max, found), distances), axis=1)
        ordered[start : start + block] = np.take_along_axis(found, order, axis=1)
        similarities[start : start + block] = -np.take_along_axis(distances, order, axis=1)
    return ordered, similarities
