"""Class labels: one check for every place that takes them, and their exact form, int64."""

from typing import Any

import numpy as np
import tensorflow as tf

from s2sd_tf.keras_compat import is_keras_tensor


def checked_labels(argument: str, labels: Any, rows: int | None = None, columns: int = 0) -> tf.Tensor:
    """Checks class labels and returns them as int64 `(n,)`, without a loss: hashes and ids above 2^31 stay distinct.

    With `columns`, every image has several labels, and they are returned as `(n, columns)`.

    Floating-point labels in a graph have no values yet. They are returned as they are, for `exact_labels`.

    Args:
        argument: name of the argument, for the error message.
        labels: whole numbers or bools, `(n,)` or `(n, 1)`, or `(n, columns)`: a tensor, an array or a sequence.
        rows: n, if it is known.
        columns: labels of an image; 0: one class. -1: any number of labels.

    Raises:
        ValueError: labels of another type, shape or number, or numbers that are not whole.
    """
    if is_keras_tensor(labels):
        return labels
    wanted = _wanted(argument, columns)
    if not isinstance(labels, tf.Tensor):
        try:
            # Not by TensorFlow, which takes the numbers of a list as int32.
            labels = tf.convert_to_tensor(labels if isinstance(labels, tf.Variable) else np.asarray(labels))
        except (TypeError, ValueError, OverflowError):
            received = f"a {type(labels).__name__} that is not an array of numbers"
            raise ValueError(f"{wanted}. Received: {received}") from None
    if not (labels.dtype.is_integer or labels.dtype.is_floating or labels.dtype.is_bool) or labels.dtype.is_quantized:
        received = "strings" if labels.dtype == tf.string else labels.dtype.name
        raise ValueError(f"{wanted}; number the classes, such as by np.unique's return_inverse. Received: {received}")
    shape = labels.shape
    if shape.rank is not None and not _has_shape(shape, columns):
        if not columns:
            several = "several labels need an objective with a relevance, or hierarchical_metrics"
            wanted += f"; {several}; make labels of one-hot rows with argmax(axis=-1)"
        raise ValueError(f"{wanted}. Received: {labels.dtype.name} of shape {tuple(shape)}")
    if rows is not None and shape.rank and shape[0] not in (None, rows):
        raise ValueError(f"{wanted}. Received: {shape[0]} labels for {rows} images")
    if labels.dtype.is_floating:
        if not tf.executing_eagerly():
            return labels
        bad = labels.numpy()[~_exact(labels).numpy()]
        if bad.size:
            raise ValueError(f"{wanted}; {_whole(labels)}. Received: {labels.dtype.name} {float(bad[0])!r}")
    if columns:
        if shape.rank is None or (shape[1] is None and columns > 0):
            message = f"{wanted}. Received: labels of another shape"
            fits = tf.equal(tf.rank(labels), 2) & ((columns < 0) | tf.equal(tf.shape(labels)[-1], columns))
            with tf.control_dependencies([tf.debugging.Assert(fits, [message])]):
                # Not by `ensure_shape`: TensorFlow would take its rank for known, and remove the check.
                labels = tf.reshape(labels, [tf.shape(labels)[0], columns])
    elif shape.rank != 1:
        if shape.rank is None or shape[1] is None:
            message = f"{wanted}. Received: labels of another shape"
            tf.debugging.assert_equal(tf.size(labels), tf.shape(labels)[0], message)
        labels = tf.reshape(labels, [-1])
    return tf.cast(labels, tf.int64)


def exact_labels(
    argument: str, labels: Any, rows: int | None = None, columns: int = 0
) -> tuple[tf.Tensor, tf.Tensor | bool]:
    """Returns `checked_labels` as int64 `(n,)` or `(n, columns)`, and whether all are whole numbers.

    It is True, except for floating-point labels in a graph. These are asserted to be whole numbers; XLA has no
    assertions.
    """
    labels = checked_labels(argument, labels, rows, columns)
    if not labels.dtype.is_floating:
        return labels, True
    exact = tf.reduce_all(_exact(labels))
    check = tf.debugging.Assert(exact, [f"{argument}: expected integers; {_whole(labels)}. Received:", labels])
    with tf.control_dependencies([] if check is None else [check]):
        labels = labels if columns else tf.reshape(labels, [-1])
        return tf.cast(labels, tf.int64), exact


def label_array(argument: str, labels: Any, columns: int = 0, rows: int | None = None) -> np.ndarray:
    """Returns class labels as an int64 array `(n,)` or `(n, columns)`; see `checked_labels`.

    Raises:
        ValueError: what `checked_labels` refuses, or integers that int64 does not hold.
    """
    found = checked_labels(argument, labels, rows, columns).numpy()
    # Integers of 64 bits without a sign keep their bits.
    if found.size and found.min() < 0 and np.asarray(labels).dtype == np.uint64:
        raise ValueError(
            f"{argument}: expected integers below 2^63; for hashes, take labels.view('int64'). "
            f"Received: {np.max(labels)}"
        )
    return found


def _wanted(argument, columns):
    if not columns:
        return f"{argument}: expected integers (batch,), one class for each image"
    return f"{argument}: expected integers (batch, {'labels' if columns < 0 else columns}), the labels of each image"


def _has_shape(shape, columns):
    if not columns:
        return shape.rank == 1 or (shape.rank == 2 and shape[1] in (None, 1))
    return shape.rank == 2 and (columns < 0 or shape[1] in (None, columns))


def _limit(dtype):
    """The whole numbers below this are those that a floating dtype holds exactly."""
    return {"float64": 2**53, "float32": 2**24, "float16": 2**11}.get(dtype.name, 2**8)


def _exact(labels):
    return tf.equal(labels, tf.floor(labels)) & (tf.abs(labels) < tf.cast(_limit(labels.dtype), labels.dtype))


def _whole(labels):
    return f"or whole numbers below 2^{_limit(labels.dtype).bit_length() - 1} if floating-point"
