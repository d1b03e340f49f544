"""Truncation: the first dimensions of an embedding as an embedding."""

from typing import Any

import numpy as np
import tensorflow as tf

from s2sd_tf.checks import checked_int

# Below the square of any float32 number; only zeros stay shorter than 1.
_LEAST_SQUARE = 1e-200


def truncate(embeddings: tf.Tensor | np.ndarray, dim: int) -> Any:
    """Returns the first `dim` dimensions of embeddings, l2-normalised.

    For embeddings of a model that was trained with `nested_dims` (Kusupati et al., "Matryoshka Representation
    Learning", NeurIPS 2022, arXiv 2205.13147), and `dim` one of them. Prefixes of other embeddings retrieve worse.

    Args:
        embeddings: float array or tensor `(..., embedding_dim)`, of any length.
        dim: from 1 to embedding_dim.

    Returns:
        `(..., dim)` in the dtype of `embeddings`, a tensor for a tensor and otherwise an array. Rows are of length 1,
        except that a prefix of zeros stays zeros.

    Raises:
        ValueError: `embeddings` are something else, or `dim` is out of range.
    """
    is_tensor = tf.is_tensor(embeddings)
    rows: Any = tf.convert_to_tensor(embeddings) if is_tensor else np.asarray(embeddings)
    is_float = rows.dtype.is_floating if is_tensor else np.issubdtype(rows.dtype, np.floating)
    size = rows.shape[-1] if (rows.shape.rank if is_tensor else rows.ndim) else None
    if not is_float or not size:
        raise ValueError(
            f"embeddings: expected floats of shape (..., dim). Received: {rows.dtype.name} of shape {rows.shape}"
        )
    if checked_int("dim", dim, 1) > size:
        raise ValueError(f"dim: expected at most {size}, the dimension of the embeddings. Received: {dim}")
    # In float64, because the squares of float32 numbers can be too large or small for float32.
    if is_tensor:
        prefix = tf.cast(rows[..., :dim], tf.float64)
        return tf.cast(tf.math.l2_normalize(prefix, axis=-1, epsilon=_LEAST_SQUARE), rows.dtype)
    prefix = rows[..., :dim].astype(np.float64)
    squares = np.sum(np.square(prefix), axis=-1, keepdims=True)
    return (prefix / np.sqrt(np.maximum(squares, _LEAST_SQUARE))).astype(rows.dtype)
