"""Gradients of a loss over a whole batch in the memory of a part of it (gradient caching).

Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP 2021, arXiv 2101.06983:
the outputs of the whole batch are computed part by part, without keeping what their gradients need; the loss gives the
gradients with respect to the outputs; and each part is computed once more, to go on from these to the weights.
"""

import tensorflow as tf

from s2sd_tf.keras_compat import restores_random_layers
from s2sd_tf.models.updates import leaves


class GradientCaching:
    """The gradients of a step, of which a backbone computes `size` images at a time.

    Args:
        backbone: built `keras.Model`.
        compute: function from a part's images to a list of float tensors `(rows, dim)`, through the backbone.
        size: int >= 1, images at a time.
        dims: list of int, the dims of what `compute` gives.
        dtype: its dtype.

    Raises:
        ValueError: a backbone that does not compute the same twice.
    """

    def __init__(self, backbone, compute, size, dims, dtype):
        _check_repeats(backbone)
        self._backbone = backbone
        self._compute = compute
        self._size = size
        self._dims = dims
        self._dtype = dtype

    def gradients(self, inputs, loss_of, variables, computing):
        """`(terms, gradients)` of a batch.

        Args:
            inputs: images of the batch.
            loss_of: function from the list of `compute`'s outputs `(batch, dim)` to `(terms, loss)`; the scalar loss is
                differentiated.
            variables: list of trainable variables.
            computing: those of them that `compute` depends on.
        """
        # Statistics and random numbers of the second time shall be those of the first.
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


def outputs_in_parts(compute, inputs, size, dims, dtype):
    """`compute(inputs)`, computed `size` rows at a time.

    Args:
        compute: function from tensors of `(rows, ...)` to a list of float tensors `(rows, dim)`.
        inputs: tensor, or structure of tensors, `(batch, ...)`.
        size: int >= 1.
        dims: list of int, the dims of the outputs.
        dtype: floating dtype of the outputs.

    Returns:
        The list of tensors `(batch, dim)`.
    """
    parts, part, even = _parts(inputs, size)
    arrays = tuple(
        tf.TensorArray(dtype, parts, infer_shape=False, element_shape=[size if even else None, dim]) for dim in dims
    )

    def body(k, *arrays):
        return k + 1, *(array.write(k, output) for array, output in zip(arrays, compute(part(k))))

    _, *arrays = tf.while_loop(lambda k, *_: k < parts, body, (tf.constant(0), *arrays), parallel_iterations=1)
    batch = tf.nest.flatten(inputs)[0].shape[0]
    # XLA can stack them, and not concatenate.
    return [
        tf.reshape(array.stack(), [batch, dim]) if even else tf.ensure_shape(array.concat(), [batch, dim])
        for array, dim in zip(arrays, dims)
    ]


def gradients_in_parts(compute, inputs, size, upstream, variables):
    """The gradients of `compute(inputs)` by variables, computed `size` rows at a time.

    Args:
        compute, inputs, size: see `outputs_in_parts`.
        upstream: list of float tensors `(batch, dim)`, the gradients of a loss by the outputs.
        variables: list of variables.

    Returns:
        List of tensors of the variables' shapes and dtypes; None for a variable that the outputs do not depend on.
    """
    parts, part, _ = _parts((inputs, upstream), size)
    unused = set()

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
    """How many parts there are, the function that cuts the k-th one out, and whether all are known to be of `size`."""
    first = tf.nest.flatten(inputs)[0]
    batch = tf.shape(first)[0] if first.shape[0] is None else first.shape[0]
    even = first.shape[0] is not None and batch % size == 0

    def part(k):
        rows = size if even else tf.minimum(size, batch - k * size)

        def cut(values):
            rest = values.shape[1:]
            # XLA wants to know the size.
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
        if not restores_random_layers() and getattr(layer, "rate", 0) and "rate" in layer.get_config():
            raise ValueError(
                "micro_batch_size: expected a backbone without dropout or noise with Keras 2, which cannot draw "
                f"the same random numbers twice. Received: one with {layer.name!r}"
            )
