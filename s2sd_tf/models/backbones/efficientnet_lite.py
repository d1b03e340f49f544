"""EfficientNet-Lite."""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from s2sd_tf.keras_compat import keras
from s2sd_tf.models.backbones.layers import image_input

# Width and depth relative to Lite0.
SCALES = {"efficientnet_lite0": (1.0, 1.0), "efficientnet_lite1": (1.0, 1.1), "efficientnet_lite2": (1.1, 1.2)}
# Each stage: blocks, kernel size, stride of the first block, expansion, channels.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def builder(name: str) -> Callable[[Sequence[int]], keras.Model]:
    """Returns the function that builds the model `name` of `SCALES`, given `input_shape`."""
    return functools.partial(efficientnet_lite, name=name)


def efficientnet_lite(input_shape: Sequence[int], name: str = "efficientnet_lite0") -> keras.Model:
    """Builds an EfficientNet-Lite: EfficientNet (Tan and Le, ICML 2019) with ReLU6 and without squeeze-excite.

    Its layers load the parameters of efficientnet-lite-pytorch (see `reference_state`). Blocks are never dropped in
    training.

    Args:
        input_shape: `(height, width, 3)`; the weights were trained on 224 (Lite0), 240 (Lite1) and 260 (Lite2) pixels.
        name: one of `SCALES`.

    Returns:
        A model from `(batch, height, width, 3)` to `(batch, h, w, 1280)`; 7 x 7 maps for 224 x 224 images.

    Raises:
        ValueError: `input_shape` is invalid.
    """
    width, depth = SCALES[name]
    images = image_input(input_shape)
    features = _unit(images, 32, 3, "conv_stem", "bn0", stride=2)
    number = 0
    for stage, (blocks, size, stride, expansion, channels) in enumerate(STAGES):
        # The Lite models do not scale the depth of the first and the last stage.
        count = blocks if stage in (0, len(STAGES) - 1) else math.ceil(depth * blocks)
        for block in range(count):
            features = _block(
                features, size, 1 if block else stride, expansion, _rounded(width * channels), f"blocks.{number}"
            )
            number += 1
    return keras.Model(images, _unit(features, 1280, 1, "conv_head", "bn1"), name=name)


def reference_state(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns a state dict of efficientnet-lite-pytorch under the names of this model's layers.

    The names there begin with underscores, which TensorFlow does not allow.
    """
    return {re.sub(r"(^|\.)_", r"\1", name): array for name, array in state.items()}


def _block(features, size, stride, expansion, channels, name):
    inputs = features
    if expansion > 1:
        features = _unit(features, expansion * inputs.shape[-1], 1, f"{name}.expand_conv", f"{name}.bn0")
    features = keras.layers.DepthwiseConv2D(
        size, stride, "same", use_bias=False, depthwise_initializer=_initializer(), name=f"{name}.depthwise_conv"
    )(features)
    features = _relu6(_norm(features, f"{name}.bn1"), f"{name}.bn1")
    features = _norm(_convolution(features, channels, 1, f"{name}.project_conv"), f"{name}.bn2")
    return keras.layers.Add(name=name)([features, inputs]) if inputs.shape == features.shape else features


def _unit(features, filters, size, name, norm_name, stride=1):
    return _relu6(_norm(_convolution(features, filters, size, name, stride), norm_name), norm_name)


def _convolution(features, filters, size, name, stride=1):
    return keras.layers.Conv2D(
        filters, size, stride, "same", use_bias=False, kernel_initializer=_initializer(), name=name
    )(features)


def _initializer():
    return keras.initializers.VarianceScaling(2.0, "fan_out", "untruncated_normal")


def _norm(features, name):
    return keras.layers.BatchNormalization(momentum=0.99, epsilon=1e-3, name=name)(features)


def _relu6(features, name):
    return keras.layers.ReLU(6.0, name=f"{name}.relu6")(features)


def _rounded(channels):
    """Rounds to a multiple of 8, and not down by more than a tenth."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded
