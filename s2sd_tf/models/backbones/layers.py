"""What the backbones with PyTorch weights are made of, with the arithmetic of PyTorch.

Layers bear the names of the PyTorch modules whose parameters they take, as `torch_weights` maps them by name.
"""

from s2sd_tf.keras_compat import keras


def image_input(input_shape, least=1):
    """The input of a backbone for images `(batch, height, width, 3)` of sides >= `least`.

    Raises:
        ValueError: `input_shape` is not such a `(height, width, 3)`.
    """
    shape = tuple(input_shape)
    if len(shape) != 3 or shape[2] != 3 or not all(isinstance(side, int) and side >= least for side in shape[:2]):
        raise ValueError(f"input_shape: expected (height, width, 3) with sides >= {least}. Received: {input_shape!r}")
    return keras.Input(shape, name="images")


def convolution(features, filters, size, name, stride=1, use_bias=False):
    """A convolution of odd `size`, padded by `size // 2` on all sides; He initialisation of the outputs' scale (He et
    al., ICCV 2015), as PyTorch's ResNet has it."""
    if stride > 1:
        # Keras's own "same" padding of a strided convolution is not symmetric.
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


def batch_norm(features, name, epsilon=1e-5, gamma="ones"):
    """Batch normalisation with PyTorch's momentum, which it calls 0.1."""
    return keras.layers.BatchNormalization(momentum=0.9, epsilon=epsilon, gamma_initializer=gamma, name=name)(features)


def relu(features, name):
    """ReLU, under the name of the layer before it."""
    return keras.layers.ReLU(name=f"{name}.relu")(features)


def zero_padding(features, padding, name):
    """`padding` rows and columns of 0: an int, or `((top, bottom), (left, right))`."""
    return keras.layers.ZeroPadding2D(padding, name=name)(features)


def ceil_max_pool(features, size, name):
    """Max pooling with stride 2 of maps >= 0, whose last windows may go over the edge (`ceil_mode`)."""
    # The windows that fit leave (side - size) % 2 rows over. After a ReLU, padding by 0 changes no maximum.
    rest = [(side - size) % 2 for side in features.shape[1:3]]
    if any(rest):
        features = zero_padding(features, tuple((0, extra) for extra in rest), f"{name}.pad")
    return keras.layers.MaxPooling2D(size, 2, name=name)(features)
