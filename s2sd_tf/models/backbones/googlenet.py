"""GoogLeNet with batch normalisation."""

from collections.abc import Sequence

from s2sd_tf.keras_compat import keras
from s2sd_tf.models.backbones.layers import batch_norm, ceil_max_pool, convolution, image_input, relu

# Features of the branches: 1 x 1; reduction and 3 x 3; reduction and "5 x 5"; pooling (table 1 of the paper). A single
# number is the window size of a max pooling with stride 2.
BLOCKS: dict[str, int | tuple[int, int, int, int, int, int]] = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "maxpool3": 3,
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "maxpool4": 2,
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}


def googlenet(input_shape: Sequence[int]) -> keras.Model:
    """Builds torchvision's variant of GoogLeNet (Szegedy et al., CVPR 2015), without auxiliary classifiers.

    It has batch normalisation, 3 x 3 convolutions where the paper has 5 x 5, and pooling windows that extend past the
    edge. Its layers load the parameters of torchvision by name.

    Args:
        input_shape: `(height, width, 3)`, sides >= 15.

    Returns:
        A model from `(batch, height, width, 3)` to `(batch, h, w, 1024)`; 7 x 7 maps for 224 x 224 images.

    Raises:
        ValueError: `input_shape` is invalid.
    """
    images = image_input(input_shape, 15)
    features = _unit(images, 64, 7, "conv1", stride=2)
    features = ceil_max_pool(features, 3, "maxpool1")
    features = _unit(features, 64, 1, "conv2")
    features = ceil_max_pool(_unit(features, 192, 3, "conv3"), 3, "maxpool2")
    for name, widths in BLOCKS.items():
        if isinstance(widths, int):
            features = ceil_max_pool(features, widths, name)
        else:
            features = _inception(features, *widths, f"inception{name}")
    return keras.Model(images, features, name="googlenet")


def _inception(features, one, reduced3, three, reduced5, five, pooled, name):
    branches = [
        _unit(features, one, 1, f"{name}.branch1"),
        _unit(_unit(features, reduced3, 1, f"{name}.branch2.0"), three, 3, f"{name}.branch2.1"),
        _unit(_unit(features, reduced5, 1, f"{name}.branch3.0"), five, 3, f"{name}.branch3.1"),
    ]
    maxima = keras.layers.MaxPooling2D(3, 1, padding="same", name=f"{name}.branch4.0")(features)
    branches.append(_unit(maxima, pooled, 1, f"{name}.branch4.1"))
    return keras.layers.Concatenate(name=name)(branches)


def _unit(features, filters, size, name, stride=1):
    features = convolution(features, filters, size, f"{name}.conv", stride=stride)
    return relu(batch_norm(features, f"{name}.bn", epsilon=1e-3), name)
