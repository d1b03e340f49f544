"""BN-Inception, the standard backbone of older metric-learning papers."""

from collections.abc import Sequence

from s2sd_tf.keras_compat import keras
from s2sd_tf.models.backbones.layers import batch_norm, ceil_max_pool, convolution, image_input, relu, zero_padding

# Features of the branches: 1 x 1; reduction and 3 x 3; reduction and double 3 x 3; pooling. A block without the first
# and the last branch (0) has stride 2.
BLOCKS = {
    "3a": (64, 64, 64, 64, 96, 32),
    "3b": (64, 64, 96, 64, 96, 64),
    "3c": (0, 128, 160, 64, 96, 0),
    "4a": (224, 64, 96, 96, 128, 128),
    "4b": (192, 96, 128, 96, 128, 128),
    "4c": (160, 128, 160, 128, 160, 128),
    "4d": (96, 128, 192, 160, 192, 128),
    "4e": (0, 128, 192, 192, 256, 0),
    "5a": (352, 192, 320, 160, 224, 128),
    "5b": (352, 192, 320, 192, 224, 128),
}


def bn_inception(input_shape: Sequence[int]) -> keras.Model:
    """Builds Inception with batch normalisation (Ioffe and Szegedy, ICML 2015).

    It follows the Caffe model that metric-learning papers start from: convolutions have a bias, and pooling windows
    extend past the edge. Its layers load the parameters of the PyTorch port in `pretrainedmodels` by name. It expects
    BGR images.

    Args:
        input_shape: `(height, width, 3)`. Sides must be even wherever the network halves them; multiples of 32 are.

    Returns:
        A model from `(batch, height, width, 3)` to `(batch, h, w, 1024)`; 7 x 7 maps for 224 x 224 images.

    Raises:
        ValueError: `input_shape` is invalid.
    """
    images = image_input(input_shape, 15)
    features = ceil_max_pool(_unit(images, 64, 7, "conv1_7x7_s2", stride=2), 3, "pool1_3x3_s2")
    features = _unit(_unit(features, 64, 1, "conv2_3x3_reduce"), 192, 3, "conv2_3x3")
    features = ceil_max_pool(features, 3, "pool2_3x3_s2")
    for name, widths in BLOCKS.items():
        if not widths[0] and any(side % 2 for side in features.shape[1:3]):
            # Convolution and pooling would round half the side differently.
            raise ValueError(f"input_shape: expected sides that are multiples of 32. Received: {input_shape!r}")
        features = _inception(features, *widths, f"inception_{name}")
    return keras.Model(images, features, name="bn_inception")


def _inception(features, one, reduced3, three, reduced_double, double, pooled, name):
    stride = 1 if one else 2
    branches = [_unit(features, one, 1, f"{name}_1x1")] if one else []
    branch = _unit(features, reduced3, 1, f"{name}_3x3_reduce")
    branches.append(_unit(branch, three, 3, f"{name}_3x3", stride=stride))
    branch = _unit(features, reduced_double, 1, f"{name}_double_3x3_reduce")
    branch = _unit(branch, double, 3, f"{name}_double_3x3_1")
    branches.append(_unit(branch, double, 3, f"{name}_double_3x3_2", stride=stride))
    if stride == 2:
        branches.append(ceil_max_pool(features, 3, f"{name}_pool"))
    else:
        branches.append(_unit(_pool(features, f"{name}_pool"), pooled, 1, f"{name}_pool_proj"))
    return keras.layers.Concatenate(name=name)(branches)


def _pool(features, name):
    if name == "inception_5b_pool":
        return keras.layers.MaxPooling2D(3, 1, padding="same", name=name)(features)
    # The average includes the zeros of the padding.
    return keras.layers.AveragePooling2D(3, 1, name=name)(zero_padding(features, 1, f"{name}.pad"))


def _unit(features, filters, size, name, stride=1):
    features = convolution(features, filters, size, name, stride=stride, use_bias=True)
    return relu(batch_norm(features, f"{name}_bn"), name)
