"""Loads the parameters of PyTorch modules into Keras layers with the same names."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from s2sd_tf.keras_compat import keras
from s2sd_tf.models.backbones.vit import ClassTokenAndPositions

# Classifiers, which no backbone has, and the step counter in PyTorch's batch normalisation.
IGNORED = re.compile(r"(fc|last_linear|heads?|head_dist|aux1|aux2)\..*|.*\.num_batches_tracked")


def load_state_dict(model: keras.Model, state: Mapping[str, np.ndarray]) -> None:
    """Loads the parameters of `state` into `model`. If one does not fit, loads none.

    Args:
        model: model whose layers have the names of PyTorch modules.
        state: parameters by name, as `read_state_dict` returns them. Classifiers (`fc`, `last_linear`, `head`, `heads`,
            `head_dist`, `aux1`, `aux2`) are ignored.

    Raises:
        ValueError: parameters are missing, belong to no layer, or have other shapes; the message names them.
    """
    layers = [(layer, *_parameters(layer)) for layer in model.layers if layer.weights]
    wanted = {name: shape for _, shapes, _ in layers for name, shape in shapes.items()}
    # Files converted from Caffe store vectors as matrices of one row.
    fitting = {
        name: array.reshape(wanted[name])
        for name, array in state.items()
        if name in wanted and (array.shape == wanted[name] or array.shape == (1, *wanted[name]))
    }
    wrong = {
        "without": [name for name in wanted if name not in state],
        "with": [name for name in state if name not in wanted and not IGNORED.fullmatch(name)],
        "of another shape:": [
            f"{name} {state[name].shape}, not {shape}"
            for name, shape in wanted.items()
            if name in state and name not in fitting
        ],
    }
    if any(wrong.values()):
        faults = "; ".join(f"{word} {_first(entries)}" for word, entries in wrong.items() if entries)
        raise ValueError(f"expected the parameters of {model.name}. Received: a state dict {faults}")
    for layer, shapes, to_keras in layers:
        layer.set_weights(to_keras(*(fitting[name].astype(np.float32) for name in shapes)))


_Shape = tuple[int, ...]
_Parameters = tuple[dict[str, _Shape], Callable[..., list[np.ndarray]]]


def _parameters(layer: keras.layers.Layer) -> _Parameters:
    """Returns `(shapes, to_keras)`: the shapes of the layer's PyTorch parameters by name, and the function that turns
    these parameters into a list in the order of the layer's weights.
    """
    for kind, parameters in _KINDS.items():
        if isinstance(layer, kind):
            return parameters(layer, [tuple(weight.shape) for weight in layer.weights])
    raise TypeError(f"layer: expected one of {[kind.__name__ for kind in _KINDS]}. Received: {layer!r}")


def _convolution(layer: keras.layers.Layer, shapes: list[_Shape]) -> _Parameters:
    height, width, inputs, outputs = shapes[0]
    names: dict[str, _Shape] = {f"{layer.name}.weight": (outputs, inputs, height, width)}
    if layer.use_bias:
        names[f"{layer.name}.bias"] = (outputs,)
    return names, lambda weight, *bias: [weight.transpose(2, 3, 1, 0), *bias]


def _depthwise(layer, shapes):
    height, width, channels, _ = shapes[0]
    return {f"{layer.name}.weight": (channels, 1, height, width)}, lambda weight: [weight.transpose(2, 3, 0, 1)]


def _dense(layer, shapes):
    names = {f"{layer.name}.weight": shapes[0][::-1], f"{layer.name}.bias": shapes[1]}
    return names, lambda weight, bias: [weight.T, bias]


def _norm(layer, shapes):
    # Layer normalisation has no moving statistics.
    suffixes = ("weight", "bias", "running_mean", "running_var")[: len(shapes)]
    return {f"{layer.name}.{suffix}": shapes[0] for suffix in suffixes}, lambda *arrays: list(arrays)


def _attention(layer, shapes):
    dim, heads, size = shapes[0]

    def to_keras(weight, bias, output_weight, output_bias):
        # The rows of the matrix belong to queries, then keys, then values.
        kernels = weight.reshape(3, heads, size, dim).transpose(0, 3, 1, 2)
        inputs = [array for pair in zip(kernels, bias.reshape(3, heads, size)) for array in pair]
        return [*inputs, output_weight.T.reshape(heads, size, dim), output_bias]

    return {
        f"{layer.name}.in_proj_weight": (3 * heads * size, dim),
        f"{layer.name}.in_proj_bias": (3 * heads * size,),
        f"{layer.name}.out_proj.weight": (dim, heads * size),
        f"{layer.name}.out_proj.bias": (dim,),
    }, to_keras


def _tokens(layer, shapes):
    return dict(zip(("class_token", f"{layer.name}.pos_embedding"), shapes)), lambda *arrays: list(arrays)


_KINDS: dict[Any, Callable[[Any, list[_Shape]], _Parameters]] = {
    keras.layers.DepthwiseConv2D: _depthwise,
    keras.layers.Conv2D: _convolution,
    keras.layers.Dense: _dense,
    keras.layers.BatchNormalization: _norm,
    keras.layers.LayerNormalization: _norm,
    keras.layers.MultiHeadAttention: _attention,
    ClassTokenAndPositions: _tokens,
}


def _first(entries):
    more = f" and {len(entries) - 3} more" if len(entries) > 3 else ""
    return ", ".join(entries[:3]) + more
