"""Building blocks of the backbones that load PyTorch weights; they compute what PyTorch computes.

Every layer has the name of the PyTorch module whose parameters it loads: `torch_weights` maps parameters by name.
"""

from collections.abc import Sequence
from typing import Any

from s2sd_tf.keras_compat import keras


def image_input(input_shape: Sequence[int], least: int = 1) -> Any:
    """Returns the Keras input of a backbone: images `(batch, height, width, 3)` with sides >= `least`.

    Raises:
        ValueError: `input_shape` is not such a `(height, width, 3)`.
    """
    shape = tuple(input_shape)
    if len(shape) != 3 or shape[2] != 3 or not all(isinstance(side, int) and side >= least for side in shape[:2]):
        raise ValueError(f"input_shape: expected (height, width, 3) with sides >= {least}. Received: {input_shape!r}")
    return keras.Input(shape, name="images")


def convolution(features: Any, filters: int, size: int, name: str, stride: int = 1, use_bias: bool = False) -> Any:
    """Applies a convolution of odd `size`, padded by `size // 2` on all sides.

    The kernel has He initialisation by fan-out (He et al., ICCV 2015), as in torchvision's ResNet.
    """
    if stride > 1:
        # Keras's "same" padding of a strided convolution is not symmetric.
        features = zero_padding(features, size // 2, f"{name}.pad") if size > 1 else features
    return keras.layers.Conv2D(
        filters,
        size,
        strides=stride,
        padding="same" if stride == 1 else "valid",
        use_bias=use_bias,
        kernel_initializer=keras.initializers.VarianceScaling(2.0, "fan_out", "untruncated_normal"),
        name=name,
    )(features)


def batch_norm(features: Any, name: str, epsilon: float = 1e-5) -> Any:
    """Applies batch normalisation with momentum 0.9, PyTorch's default (PyTorch calls it 0.1)."""
    return keras.layers.BatchNormalization(momentum=0.9, epsilon=epsilon, name=name)(features)


def relu(features: Any, name: str) -> Any:
    """Applies ReLU; `name` is the name of the preceding layer."""
    return keras.layers.ReLU(name=f"{name}.relu")(features)


def zero_padding(features: Any, padding: int | tuple[tuple[int, int], ...], name: str) -> Any:
    """Adds `padding` rows and columns of 0 to each side: an int, or `((top, bottom), (left, right))`."""
    return keras.layers.ZeroPadding2D(padding, name=name)(features)


def ceil_max_pool(features: Any, size: int, name: str) -> Any:
    """Max-pools maps >= 0 with stride 2; the last windows may extend past the edge (PyTorch's `ceil_mode`)."""
    # The windows that fit leave (side - size) % 2 rows. All maps are >= 0, so padding by 0 changes no maximum.
    rest = [(side - size) % 2 for side in features.shape[1:3]]
    if any(rest):
        features = zero_padding(features, tuple((0, extra) for extra in rest), f"{name}.pad")
    return keras.layers.MaxPooling2D(size, 2, name=name)(features)
