"""Checks of embedding rows (in memory or on disk), labels and ids, and helpers that read rows in parts."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from s2sd_tf.evaluation.embeddings import Rows
from s2sd_tf.labels import label_array

# A part has at most this many numbers.
_PART = 2**22
_LARGEST = float(np.finfo(np.float32).max)


class LabeledSets(NamedTuple):
    """Queries and the gallery that they are compared with, checked.

    Attributes:
        queries, gallery: float rows; the same object if the queries are compared among themselves.
        query_labels, gallery_labels: int64, `(queries,)` and `(gallery,)`.
        keys: `(query_keys, gallery_keys)`, int64, or None. Items with the key of the query are left out.
        alone: whether there is no gallery.
    """

    queries: Rows
    gallery: Rows
    query_labels: np.ndarray
    gallery_labels: np.ndarray
    keys: tuple[np.ndarray, np.ndarray] | None
    alone: bool

    def counts(self) -> tuple[np.ndarray, np.ndarray]:
        """The number of positives of every query, and of all items that it is compared with, int64 `(queries,)`."""
        labels = np.concatenate([self.query_labels, self.gallery_labels])
        classes, inverse = np.unique(labels, return_inverse=True)
        of_queries, of_gallery = inverse[: len(self.query_labels)], inverse[len(self.query_labels) :]
        positives = np.bincount(of_gallery, minlength=len(classes))[of_queries]
        candidates = np.full(len(of_queries), len(of_gallery))
        if self.keys is None:
            return positives, candidates
        query_keys, gallery_keys = self.keys
        most = max(int(query_keys.max(initial=0)), int(gallery_keys.max(initial=0))) + 1
        candidates = candidates - np.bincount(gallery_keys, minlength=most)[query_keys]
        both, own = np.unique(of_gallery * most + gallery_keys, return_counts=True)
        wanted = of_queries * most + query_keys
        if len(both):
            found = np.minimum(np.searchsorted(both, wanted), len(both) - 1)
            positives = positives - own[found] * (both[found] == wanted)
        return positives, candidates


def checked_labeled_sets(
    queries: Any,
    query_labels: Any,
    gallery: Any,
    gallery_labels: Any,
    query_ids: Any,
    gallery_ids: Any,
    columns: int = 0,
) -> LabeledSets:
    """Checks the sets that a metric compares. Without a gallery, each query leaves itself out by default.

    With `columns`, labels are `(n, columns)`, see `label_array`.

    Raises:
        ValueError: only one of gallery and labels, no queries, or what the checks of each refuse.
    """
    alone = gallery is None
    if alone != (gallery_labels is None):
        raise ValueError("gallery and gallery_labels: expected both or neither")
    if alone:
        if gallery_ids is not None:
            raise ValueError("gallery_ids: expected None without a gallery")
        gallery, gallery_labels = queries, query_labels
    queries, gallery = checked_sets(queries, gallery)
    if alone:
        query_ids = np.arange(queries.shape[0]) if query_ids is None else query_ids
        gallery_ids = query_ids
    query_labels = checked_labels("query_labels", query_labels, queries, columns)
    gallery_labels = query_labels if alone else checked_labels("gallery_labels", gallery_labels, gallery, columns)
    if not len(query_labels):
        raise ValueError("queries: expected at least one. Received: none")
    keys = checked_keys(query_ids, gallery_ids, queries, gallery)
    return LabeledSets(queries, gallery, query_labels, gallery_labels, keys, alone)


def checked_rows(name: str, rows: Any) -> Rows:
    """Checks float rows `(n, dim)` and returns them, converted to an array if needed. Reads rows on disk once.

    Args:
        name: argument name for the error message.
        rows: an array, tensor, memory-mapped file or `EmbeddingShards`.

    Raises:
        ValueError: another shape or dtype, or values that are not finite or too large for float32, in which embeddings
            are stored.
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
    for start, part in parts(rows):
        # If the sum is finite, so are all values. Otherwise check each one.
        with np.errstate(over="ignore", invalid="ignore"):
            finite = np.isfinite(np.sum(part, dtype=np.float64))
        bad = np.empty(0, int) if finite else np.flatnonzero(~np.isfinite(part).all(axis=1))
        if len(bad):
            raise ValueError(
                f"{name}: expected finite values. Received: NaN or infinity, first in row {start + bad[0]}"
            )
        large = np.flatnonzero(np.abs(part).max(axis=1) > _LARGEST) if rows.dtype.itemsize > 4 else bad
        if len(large):
            raise ValueError(
                f"{name}: expected finite float32 values; divide all rows by one number. Received: values above "
                f"{_LARGEST:.3g}, first in row {start + large[0]}"
            )
    return rows


def checked_sets(queries: Any, gallery: Any) -> tuple[Rows, Rows]:
    """Applies `checked_rows` to both, and returns the same object twice if the queries are the gallery.

    Raises:
        ValueError: what `checked_rows` refuses, or different dimensions.
    """
    same = queries is gallery
    queries = checked_rows("queries", queries)
    gallery = queries if same else checked_rows("gallery", gallery)
    if queries.shape[1] != gallery.shape[1]:
        raise ValueError(f"gallery: expected dimension {queries.shape[1]}. Received: {gallery.shape[1]}")
    return queries, gallery


def checked_keys(
    query_ids: Any, gallery_ids: Any, queries: Rows, gallery: Rows
) -> tuple[np.ndarray, np.ndarray] | None:
    """Turns ids of one or more columns into int64 keys that are equal if all columns are equal.

    Returns:
        Keys of shapes `(queries,)` and `(gallery,)`; None without ids.

    Raises:
        ValueError: only one of the ids is given, they are not integers, or their number is not that of the rows.
    """
    if (query_ids is None) != (gallery_ids is None):
        raise ValueError("query_ids and gallery_ids: expected both or neither")
    if query_ids is None:
        return None
    query_ids, gallery_ids = _int64("query_ids", query_ids), _int64("gallery_ids", gallery_ids)
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
    return codes[: len(query_ids)], codes[len(query_ids) :]


def checked_labels(name: str, labels: tf.Tensor | np.ndarray, rows: Rows, columns: int = 0) -> np.ndarray:
    """Returns integer labels, one for each row, as int64 `(n,)`; with `columns` as `(n, columns)`.

    Raises:
        ValueError: labels that `label_array` refuses, or another number of them than rows.
    """
    labels = label_array(name, labels, columns)
    if len(labels) != rows.shape[0]:
        raise ValueError(f"{name}: expected one for each of {rows.shape[0]} rows. Received: {len(labels)}")
    return labels


def _int64(name, values):
    try:
        values = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{name}: expected integers, one for each row. Received: {error}") from error
    if not values.ndim or (values.size and values.dtype.kind not in "iu"):
        raise ValueError(
            f"{name}: expected integers, one for each row; `np.unique(values, return_inverse=True)[1]` numbers others. "
            f"Received: {values.dtype} {values.shape}"
        )
    if values.dtype == np.uint64 and values.size and values.max() > np.iinfo(np.int64).max:
        raise ValueError(
            f"{name}: expected integers that fit into int64; of hashes pass `.view(np.int64)`. Received: {values.max()}"
        )
    return values.astype(np.int64)


def parts(rows: Rows) -> Iterator[tuple[int, np.ndarray]]:
    """Yields all rows as `(start, part)`: arrays of at most 32 MiB in float64, and the position of their first row."""
    height = max(1, _PART // rows.shape[1])
    for start in range(0, rows.shape[0], height):
        yield start, np.asarray(rows[start : start + height])


def take(rows: Rows, positions: np.ndarray) -> np.ndarray:
    """The rows at `positions`, as an array `(len(positions), dim)`."""
    return np.asarray(rows[np.asarray(positions)])


def unit(rows: tf.Tensor | np.ndarray) -> np.ndarray:
    """Scales rows of any length to unit length, in float64. Rows of zeros stay zero."""
    wide = np.asarray(rows).astype(np.float64)
    squares = np.einsum("ij,ij->i", wide, wide)
    extreme = np.flatnonzero((squares < 1e-200) | (squares > 1e200))
    if len(extreme):
        # Their squares may be too small or too large even for float64.
        wide[extreme] *= row_scales(wide[extreme])
        squares[extreme] = np.einsum("ij,ij->i", wide[extreme], wide[extreme])
    return wide / np.sqrt(np.where(squares > 0, squares, 1.0))[:, None]


def normalized(rows: tf.Tensor | np.ndarray) -> np.ndarray:
    """`unit` in float32."""
    rows = np.asarray(rows)
    scaled_rows = np.empty(rows.shape, np.float32)
    for start, part in parts(rows):
        scaled_rows[start : start + len(part)] = unit(part)
    return scaled_rows


def row_scales(rows: np.ndarray) -> np.ndarray:
    """For every row the power of two that brings its largest absolute value into [0.5, 1): float64 `(n, 1)`.

    Multiplying by it is exact. Afterwards squares neither overflow nor vanish. It is 1 for rows of zeros.
    """
    exponents = np.frexp(np.abs(rows).max(axis=1, keepdims=True, initial=0.0).astype(np.float64))[1]
    # Beyond 2^1000 the power itself is too large. Such rows then have values below 0.5, which is large enough.
    return np.ldexp(1.0, np.minimum(-exponents, 1000))


def scaled(rows: Rows, scale: Any) -> np.ndarray:
    """All rows times `scale`, a number or `(n, 1)`, as a float64 array."""
    return np.asarray(rows[:]).astype(np.float64) * scale


def scale_of(*sets: Rows) -> float:
    """`row_scales` of all values in `sets` together."""
    largest = [np.abs(part).max() for rows in sets for _, part in parts(rows)]
    return float(row_scales(np.array([largest], np.float64))[0, 0])


def mean_row(rows: Rows) -> np.ndarray:
    """Mean of the rows, float64 `(dim,)`."""
    total = np.zeros(rows.shape[1], np.float64)
    for _, part in parts(rows):
        total += np.sum(part, axis=0, dtype=np.float64)
    return total / max(rows.shape[0], 1)
