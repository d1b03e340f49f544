"""ResNet-50 v1.5."""

from collections.abc import Sequence

from s2sd_tf.keras_compat import keras
from s2sd_tf.models.backbones.layers import batch_norm, convolution, image_input, relu, zero_padding

# The number of blocks of each stage and their inner width; a block outputs four times as many features.
STAGES = ((3, 64), (4, 128), (6, 256), (3, 512))


def resnet50_v1_5(input_shape: Sequence[int]) -> keras.Model:
    """Builds ResNet-50 (He et al., CVPR 2016) with the strides in the 3 x 3 convolutions ("v1.5").

    torchvision, timm and the published S2SD code use this variant. Its layers load the parameters of torchvision by
    name.

    Args:
        input_shape: `(height, width, 3)`.

    Returns:
        A model from `(batch, height, width, 3)` to `(batch, h, w, 2048)`, where h = ceil(height / 32).

    Raises:
        ValueError: `input_shape` is invalid.
    """
    images = image_input(input_shape)
    features = relu(batch_norm(convolution(images, 64, 7, "conv1", stride=2), "bn1"), "bn1")
    # After a ReLU, padding by 0 changes no maximum.
    features = zero_padding(features, 1, "maxpool.pad")
    features = keras.layers.MaxPooling2D(3, 2, name="maxpool")(features)
    for stage, (blocks, width) in enumerate(STAGES, 1):
        for block in range(blocks):
            stride = 2 if stage > 1 and block == 0 else 1
            features = _bottleneck(features, width, stride, block == 0, f"layer{stage}.{block}")
    return keras.Model(images, features, name="resnet50_v1_5")


def _bottleneck(features, width, stride, projects, name):
    residual = features
    for number, (size, step) in enumerate(((1, 1), (3, stride)), 1):
        residual = convolution(residual, width, size, f"{name}.conv{number}", stride=step)
        residual = relu(batch_norm(residual, f"{name}.bn{number}"), f"{name}.bn{number}")
    residual = batch_norm(convolution(residual, 4 * width, 1, f"{name}.conv3"), f"{name}.bn3")
    if projects:
        features = convolution(features, 4 * width, 1, f"{name}.downsample.0", stride=stride)
        features = batch_norm(features, f"{name}.downsample.1")
    return relu(keras.layers.Add(name=f"{name}.add")([features, residual]), name)
