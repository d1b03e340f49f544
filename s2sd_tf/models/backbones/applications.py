"""The backbones of `keras.applications`, without the normalisation layers that some of them start with."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from s2sd_tf.keras_compat import keras

# The class in `keras.applications`, and whether its model starts with a normalisation to leave out.
APPLICATIONS = {
    "resnet50": ("ResNet50", False),
    "convnext_tiny": ("ConvNeXtTiny", True),
    "convnext_small": ("ConvNeXtSmall", True),
    "convnext_base": ("ConvNeXtBase", True),
    "efficientnet_v2_b0": ("EfficientNetV2B0", True),
    "efficientnet_v2_b1": ("EfficientNetV2B1", True),
    "efficientnet_v2_b2": ("EfficientNetV2B2", True),
    "efficientnet_v2_b3": ("EfficientNetV2B3", True),
    "efficientnet_v2_s": ("EfficientNetV2S", True),
    "efficientnet_v2_m": ("EfficientNetV2M", True),
}


def builder(name: str) -> Callable[[Sequence[int]], keras.Model]:
    """Returns the function that builds the model `name` of `APPLICATIONS` with random weights, given `input_shape`."""
    return functools.partial(_build, name, None)


def pretrained(name: str, input_shape: Sequence[int]) -> keras.Model:
    """Builds the model `name` with Keras's ImageNet weights; downloads them unless they are in Keras's cache.

    Raises:
        ValueError: the weights cannot be downloaded; the message says what to do instead.
    """
    try:
        return _build(name, "imagenet", input_shape)
    # Keras raises a bare `Exception` if the download fails.
    except Exception as error:
        raise ValueError(
            f"weights: expected 'imagenet' to be in Keras's cache or to be downloaded; otherwise pass a file of Keras "
            f"weights of {name}, weights=<file>.h5. Received: {error}"
        ) from error


@keras.utils.register_keras_serializable("s2sd_tf")
class ResidualSum(keras.layers.Layer):
    """x + y of two tensors of the same shape; replaces the bare operation in Keras 2's ConvNeXt."""

    def call(self, x: tf.Tensor, y: tf.Tensor, name: str | None = None) -> tf.Tensor:
        return x + y


@keras.utils.register_keras_serializable("s2sd_tf")
class LayerScale(keras.layers.Layer):
    """A learned factor for each feature (Touvron et al., ICCV 2021); replaces the unregistered class of Keras 2."""

    def __init__(self, init_values: float, projection_dim: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.init_values = init_values
        self.projection_dim = projection_dim

    def build(self, input_shape: Sequence[int | None]) -> None:
        initializer = keras.initializers.Constant(self.init_values)
        self.gamma = self.add_weight(name="gamma", shape=(self.projection_dim,), initializer=initializer)
        super().build(input_shape)

    def call(self, features: tf.Tensor) -> tf.Tensor:
        return features * self.gamma

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "init_values": self.init_values, "projection_dim": self.projection_dim}


def _build(name, weights, input_shape):
    class_name, normalizes = APPLICATIONS[name]
    settings = {"include_preprocessing": False} if normalizes else {}
    build = getattr(keras.applications, class_name)
    model = build(include_top=False, weights=weights, input_shape=tuple(input_shape), **settings)
    return _loadable(model)


def _loadable(model):
    """Returns `model`, or for Keras 2's ConvNeXt a copy without the layers that Keras 2 saves but cannot load."""
    if not any(_is_sum(layer) for layer in model.layers):
        return model

    def copy(layer):
        if _is_sum(layer):
            return ResidualSum(name=layer.name)
        kind = LayerScale if type(layer).__name__ == "LayerScale" else type(layer)
        return kind.from_config(layer.get_config())

    clone = keras.models.clone_model(model, clone_function=copy)
    clone.set_weights(model.get_weights())
    return clone


def _is_sum(layer):
    return layer.name.startswith("tf.__operators__.add")
