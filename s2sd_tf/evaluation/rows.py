"""Checks of embedding rows (in memory or on disk), labels and ids, and helpers that read rows in parts."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from s2sd_tf.evaluation.embeddings import Rows

# A part has at most this many numbers.
_PART = 2**22


def checked_rows(name: str, rows: Any) -> Rows:
    """Checks float rows `(n, dim)` and returns them, converted to an array if needed. Reads rows on disk once.

    Args:
        name: argument name for the error message.
        rows: an array, tensor, memory-mapped file or `EmbeddingShards`.

    Raises:
        ValueError: another shape or dtype, or values that are not finite.
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
            if np.isfinite(np.sum(part, dtype=np.float64)):
                continue
        bad = np.flatnonzero(~np.isfinite(part).all(axis=1))
        if len(bad):
            raise ValueError(
                f"{name}: expected finite values. Received: NaN or infinity, first in row {start + bad[0]}"
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
    query_ids, gallery_ids = np.asarray(query_ids), np.asarray(gallery_ids)
    for name, ids in (("query_ids", query_ids), ("gallery_ids", gallery_ids)):
        if not ids.ndim or (ids.size and ids.dtype.kind not in "iu"):
            raise ValueError(f"{name}: expected integers, one for each row. Received: {ids.dtype} {ids.shape}")
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


def checked_labels(name: str, labels: tf.Tensor | np.ndarray, rows: Rows) -> np.ndarray:
    """Returns integer labels, one for each row, as int64 `(n,)`.

    Raises:
        ValueError: labels that are not integers, or another number of them than rows.
    """
    labels = np.asarray(labels).reshape(-1)
    if len(labels) and not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{name}: expected integers. Received: {labels.dtype}")
    if len(labels) != rows.shape[0]:
        raise ValueError(f"{name}: expected one for each of {rows.shape[0]} rows. Received: {len(labels)}")
    return labels.astype(np.int64)


def parts(rows: Rows) -> Iterator[tuple[int, np.ndarray]]:
    """Yields all rows as `(start, part)`: arrays of at most 32 MiB in float64, and the position of their first row."""
    height = max(1, _PART // rows.shape[1])
    for start in range(0, rows.shape[0], height):
        yield start, np.asarray(rows[start : start + height])


def take(rows: Rows, positions: np.ndarray) -> np.ndarray:
    """The rows at `positions`, as an array `(len(positions), dim)`."""
    return np.asarray(rows[np.asarray(positions)])


def normalized(rows: tf.Tensor | np.ndarray) -> np.ndarray:
    """Scales rows to unit length, in float32. Rows of zeros stay zero."""
    rows = np.asarray(rows)
    wide = rows.astype(np.float64)
    norms = np.sqrt(np.einsum("ij,ij->i", wide, wide))[:, None]
    return (wide / np.maximum(norms, 1e-12)).astype(np.float32)


def mean_row(rows: Rows) -> np.ndarray:
    """Mean of the rows, float64 `(dim,)`."""
    total = np.zeros(rows.shape[1], np.float64)
    for _, part in parts(rows):
        total += np.sum(part, axis=0, dtype=np.float64)
    return total / max(rows.shape[0], 1)
