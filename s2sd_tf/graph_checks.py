"""Checks of the inputs of exported graphs, and empty batches.

Failed checks raise `tf.errors.InvalidArgumentError`, or ValueError outside of graphs.

A signature promises the shape of its inputs, but TensorFlow does not enforce it, so the graphs check it themselves.
"""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf


def checked_shape(tensor: tf.Tensor, shape: Sequence[int | None], expected: str) -> tf.Tensor:
    """Returns `tensor` if it has the shape `shape`, whose sizes may be None for any size.

    The size of no dimension may be 0, except that of the first. `expected` starts the error message.
    """
    # TensorFlow would take the promised shape for the real one and remove the check.
    tensor = tf.compat.v1.placeholder_with_default(tensor, shape=None)
    sizes = tf.shape(tensor)
    has_rank = tf.equal(tf.size(sizes), len(shape))

    def has_sizes():
        fits = [sizes[axis] == size for axis, size in enumerate(shape) if size is not None]
        is_filled = (sizes[0] == 0) | tf.reduce_all(sizes[1:] > 0)
        return tf.reduce_all([is_filled, *fits])

    fits = tf.cond(has_rank, has_sizes, lambda: False)
    checked = _checked(tensor, fits, expected, lambda: tf.strings.format("shape {}", sizes, summarize=8))
    return tf.ensure_shape(checked, shape)


def checked_finite(tensor: tf.Tensor, expected: str) -> tf.Tensor:
    """Returns the float `tensor` if all its numbers are finite. `expected` starts the error message."""
    fits = tf.reduce_all(tf.math.is_finite(tensor))
    return _checked(tensor, fits, expected, lambda: tf.constant("NaN or infinity"))


def checked_range(tensor: tf.Tensor, low: float, high: float, expected: str) -> tf.Tensor:
    """Returns the float `tensor` if all its numbers are in [low, high]; NaN is not. `expected` starts the message."""
    fits = tf.reduce_all((tensor >= low) & (tensor <= high))

    def received():
        finite = tf.boolean_mask(tensor, tf.math.is_finite(tensor))
        values = tf.reduce_min(finite), tf.reduce_max(finite), tf.size(tensor) - tf.size(finite)
        return tf.strings.format("numbers from {} to {}, and {} that are not finite", values)

    return _checked(tensor, fits, expected, received)


def for_any_batch(function: Callable[[tf.Tensor], Any], batch: tf.Tensor, row_shape: Sequence[int]) -> Any:
    """Returns `function(batch)`, a structure of tensors `(n, ...)`, also for n = 0, which many operations refuse.

    Args:
        function: a function of a batch.
        batch: the batch `(n, ...)`.
        row_shape: shape of a row that `function` accepts instead of none.
    """
    count = tf.shape(batch)[0]
    batch = tf.cond(count > 0, lambda: batch, lambda: tf.zeros([1, *row_shape], batch.dtype))
    return tf.nest.map_structure(lambda rows: rows[:count], function(batch))


def _checked(tensor, fits, expected, received):
    """Returns `tensor` if `fits`, else raises an error with `expected` and the string that `received` returns."""

    if tf.executing_eagerly():
        if not fits:
            raise ValueError(f"{expected}. Received: {received().numpy().decode()}")
        return tensor

    def refuse():
        message = tf.strings.join([expected, ". Received: ", received()])
        # Depends on the assertion, so that nothing is computed from a refused tensor.
        with tf.control_dependencies([tf.debugging.Assert(False, [message])]):
            return tf.identity(tensor)

    return tf.cond(fits, lambda: tf.identity(tensor), refuse)
