"""The backbones of `keras.applications`, without the normalisation that some of them have in front."""

import functools

from s2sd_tf.keras_compat import keras

# Whether the model has a normalisation of its own to leave out.
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


def builder(name):
    """The function from `input_shape` to the `keras.Model` of that name in `APPLICATIONS`, with random weights."""
    return functools.partial(_build, name, None)


def pretrained(name, input_shape):
    """The model of that name with Keras's ImageNet weights, which are downloaded unless they are in Keras's cache.

    Raises:
        ValueError: they cannot be had; the message says what to do instead.
    """
    try:
        return _build(name, "imagenet", input_shape)
    # Keras raises a bare `Exception` for a download that fails.
    except Exception as error:
        raise ValueError(
            f"weights: expected 'imagenet' in Keras's cache or a download of it; or a file of Keras weights of {name}, "
            f"got by other means, as weights=<file>.h5. Received: {error}"
        ) from error


@keras.utils.register_keras_serializable("s2sd_tf")
class ResidualSum(keras.layers.Layer):
    """x + y of two tensors of one shape, in place of the bare operation in Keras 2's ConvNeXt."""

    def call(self, x, y, name=None):
        return x + y


@keras.utils.register_keras_serializable("s2sd_tf")
class LayerScale(keras.layers.Layer):
    """A learned factor for each feature (Touvron et al., ICCV 2021), in place of the unregistered class of Keras 2."""

    def __init__(self, init_values, projection_dim, **kwargs):
        super().__init__(**kwargs)
        self.init_values = init_values
        self.projection_dim = projection_dim

    def build(self, input_shape):
        initializer = keras.initializers.Constant(self.init_values)
        self.gamma = self.add_weight(name="gamma", shape=(self.projection_dim,), initializer=initializer)
        super().build(input_shape)

    def call(self, features):
        return features * self.gamma

    def get_config(self):
        return {**super().get_config(), "init_values": self.init_values, "projection_dim": self.projection_dim}


def _build(name, weights, input_shape):
    class_name, normalizes = APPLICATIONS[name]
    settings = {"include_preprocessing": False} if normalizes else {}
    build = getattr(keras.applications, class_name)
    model = build(include_top=False, weights=weights, input_shape=tuple(input_shape), **settings)
    return _loadable(model)


def _loadable(model):
    """`model`, or a copy that can be loaded once it is saved, as Keras 2 cannot load what its ConvNeXt is made of."""
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
