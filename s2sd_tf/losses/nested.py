"""Nested embeddings: the prefixes of an embedding, and means over them (Kusupati et al., 2022, arXiv 2205.13147)."""

from collections.abc import Iterable, Sequence

import tensorflow as tf

from s2sd_tf.checks import check_at_least, checked_int
from s2sd_tf.objectives.base import unit_rows


def checked_dims(dims: Sequence[int]) -> tuple[int, ...]:
    """Returns the dimensions of the prefixes.

    Raises:
        ValueError: not strictly increasing ints >= 1.
    """
    wanted = "nested_dims: expected strictly increasing ints >= 1, such as (16, 32, 64)"
    if isinstance(dims, (str, bytes)) or not isinstance(dims, Iterable):
        raise ValueError(f"{wanted}. Received: {dims!r}")
    checked = tuple(checked_int("nested_dims", dim, 1) for dim in dims)
    if list(checked) != sorted(set(checked)):
        raise ValueError(f"{wanted}. Received: {checked}")
    return checked


def checked_weights(weights: Sequence[float], dims: Sequence[int]) -> tuple[float, ...]:
    """Returns the weights of the prefixes, or () for equal weights.

    Raises:
        ValueError: not a number >= 0 for each prefix, or all are 0.
    """
    wanted = f"nested_weights: expected {len(dims)} numbers >= 0, one for each of nested_dims, not all 0; or ()"
    if isinstance(weights, (str, bytes)) or not isinstance(weights, Iterable):
        raise ValueError(f"{wanted}. Received: {weights!r}")
    checked = tuple(weights)
    for weight in checked:
        check_at_least("nested_weights", weight, 0)
    if checked and (len(checked) != len(dims) or not any(checked)):
        raise ValueError(f"{wanted}. Received: {checked}")
    return tuple(float(weight) for weight in checked)


def prefixes(embedding: tf.Tensor, dims: Sequence[int]) -> list[tf.Tensor]:
    """Returns the prefixes of unit rows `(batch, dim)`, each with unit rows: those of `dims[:-1]`, then all of it."""
    return [*(unit_rows(embedding[:, :dim]) for dim in dims[:-1]), embedding]


def mean(values: Sequence[tf.Tensor], weights: Sequence[float]) -> tf.Tensor:
    """Returns the mean over the prefixes of tensors of one shape, weighted by `weights`; () for equal weights."""
    if len(values) == 1:
        return values[0]
    shares = tf.constant(weights or [1.0] * len(values), values[0].dtype)
    return tf.tensordot(shares / tf.reduce_sum(shares), tf.stack(values), axes=1)
