"""Gradient caching: gradients of a loss over a whole batch, with the memory of a part of the batch.

Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP 2021, arXiv 2101.06983.
The outputs of the whole batch are computed part by part, without keeping what their gradients need. Then the loss is
differentiated with respect to the outputs. Finally each part is computed again, and these gradients are backpropagated
to the weights.
"""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from s2sd_tf.keras_compat import keras, restores_random_layers
from s2sd_tf.models.updates import leaves


class GradientCaching:
    """Computes the gradients of a step while the backbone processes only `size` images at a time.

    Args:
        backbone: built model.
        compute: function from images to a list of float tensors `(rows, dim)`; it calls the backbone.
        size: >= 1, images at a time.
        dims: the dim of each output of `compute`.
        dtype: the dtype of these outputs.

    Raises:
        ValueError: the backbone does not compute the same twice.
    """

    def __init__(
        self,
        backbone: keras.Model,
        compute: Callable[[Any], list[tf.Tensor]],
        size: int,
        dims: Sequence[int],
        dtype: str | tf.DType,
    ) -> None:
        _check_repeats(backbone)
        self._backbone = backbone
        self._compute = compute
        self._size = size
        self._dims = dims
        self._dtype = dtype

    def gradients(
        self,
        inputs: Any,
        loss_of: Callable[[list[tf.Tensor]], tuple[Any, tf.Tensor]],
        variables: Sequence[tf.Variable],
        computing: Sequence[tf.Variable],
    ) -> tuple[Any, list[Any]]:
        """Returns `(terms, gradients)` of a batch, the gradients in the order of `variables`.

        Args:
            inputs: images of the batch.
            loss_of: function from the outputs of `compute` for the batch, each `(batch, dim)`, to `(terms, loss)`; the
                scalar loss is differentiated.
            variables: trainable variables.
            computing: those `variables` that `compute` depends on.
        """
        # The second pass must use the same statistics and random numbers as the first.
        state = self._backbone.non_trainable_variables
        before = [tf.identity(variable) for variable in state]
        outputs = outputs_in_parts(self._compute, inputs, self._size, self._dims, self._dtype)
        for variable, value in zip(state, before):
            variable.assign(value)
        with tf.GradientTape() as tape:
            tape.watch(outputs)
            terms, loss = loss_of(outputs)
        gradients, upstream = tape.gradient(loss, (variables, outputs))
        inner = {id(variable) for variable in computing}
        places = [k for k, variable in enumerate(variables) if id(variable) in inner]
        chosen = [variables[k] for k in places]
        for k, gradient in zip(places, gradients_in_parts(self._compute, inputs, self._size, upstream, chosen)):
            if gradient is not None:
                own = gradients[k]
                gradients[k] = gradient if own is None else tf.convert_to_tensor(own) + gradient
        return terms, gradients


def outputs_in_parts(
    compute: Callable[[Any], list[tf.Tensor]],
    inputs: Any,
    size: int,
    dims: Sequence[int],
    dtype: str | tf.DType,
) -> list[tf.Tensor]:
    """Computes `compute(inputs)`, `size` rows at a time.

    Args:
        compute: function from tensors `(rows, ...)` to a list of float tensors `(rows, dim)`.
        inputs: tensor, or structure of tensors, `(batch, ...)`.
        size: >= 1, rows at a time.
        dims: the dim of each output.
        dtype: floating dtype of the outputs.

    Returns:
        List of tensors `(batch, dim)`.
    """
    parts, part, even = _parts(inputs, size)
    arrays = tuple(
        tf.TensorArray(dtype, parts, infer_shape=False, element_shape=[size if even else None, dim]) for dim in dims
    )

    def body(k, *arrays):
        return k + 1, *(array.write(k, output) for array, output in zip(arrays, compute(part(k))))

    _, *arrays = tf.while_loop(lambda k, *_: k < parts, body, (tf.constant(0), *arrays), parallel_iterations=1)
    batch = tf.nest.flatten(inputs)[0].shape[0]
    # XLA can stack a TensorArray but not concatenate it.
    return [
        tf.reshape(array.stack(), [batch, dim]) if even else tf.ensure_shape(array.concat(), [batch, dim])
        for array, dim in zip(arrays, dims)
    ]


def gradients_in_parts(
    compute: Callable[[Any], list[tf.Tensor]],
    inputs: Any,
    size: int,
    upstream: Sequence[tf.Tensor],
    variables: Sequence[tf.Variable],
) -> list[tf.Tensor | None]:
    """Backpropagates the gradients of a loss from `compute(inputs)` to `variables`, `size` rows at a time.

    Args:
        compute, inputs, size: see `outputs_in_parts`.
        upstream: the gradients of the loss with respect to each output, float `(batch, dim)`.
        variables: the variables to differentiate with respect to.

    Returns:
        A tensor of the shape and dtype of each variable; None if the outputs do not depend on the variable.
    """
    parts, part, _ = _parts((inputs, upstream), size)
    unused: set[int] = set()

    def body(k, sums):
        rows, gradients = part(k)
        with tf.GradientTape() as tape:
            outputs = compute(rows)
        found = tape.gradient(outputs, variables, output_gradients=gradients)
        unused.update(n for n, gradient in enumerate(found) if gradient is None)
        return k + 1, [
            total if gradient is None else total + tf.cast(tf.convert_to_tensor(gradient), total.dtype)
            for total, gradient in zip(sums, found)
        ]

    zeros = [tf.zeros(variable.shape, variable.dtype) for variable in variables]
    _, sums = tf.while_loop(lambda k, _: k < parts, body, (tf.constant(0), zeros), parallel_iterations=1)
    return [None if n in unused else total for n, total in enumerate(sums)]


def _parts(inputs, size):
    """Returns the number of parts, a function that slices out part k, and whether all are known to have `size` rows."""
    first = tf.nest.flatten(inputs)[0]
    batch = tf.shape(first)[0] if first.shape[0] is None else first.shape[0]
    even = first.shape[0] is not None and batch % size == 0

    def part(k):
        rows = size if even else tf.minimum(size, batch - k * size)

        def cut(values):
            rest = values.shape[1:]
            # XLA needs to know the size.
            sizes = rest if rest.is_fully_defined() else [-1] * rest.rank
            piece = tf.slice(values, [k * size, *[0] * rest.rank], [rows, *sizes])
            return tf.ensure_shape(piece, [size if even else None, *rest])

        return tf.nest.map_structure(cut, inputs)

    return -(-batch // size), part, even


def _check_repeats(backbone):
    for layer in leaves(backbone):
        if getattr(layer, "activity_regularizer", None) is not None:
            raise ValueError(
                "micro_batch_size: expected a backbone without activity regularizers. "
                f"Received: one with {layer.name!r}"
            )
        if not restores_random_layers() and getattr(layer, "rate", None) and "rate" in layer.get_config():
            raise ValueError(
                "micro_batch_size: expected a backbone without dropout or noise with Keras 2, which cannot draw "
                f"the same random numbers twice. Received: one with {layer.name!r}"
            )
