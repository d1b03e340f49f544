"""A small convolutional network."""

from s2sd_tf.keras_compat import keras


def conv_blocks(input_shape, filters=(64, 64, 64, 64), pools=None):
    """A small convolutional network: one block of 3 x 3 convolution, batch normalisation, ReLU and 2 x 2 max pooling
    for every entry of `filters` (the 4 x 64 "Conv-4" of the few-shot literature: Vinyals et al., NeurIPS 2016).

    Args:
        input_shape: `(height, width, channels)`.
        filters: ints >= 1, output channels of each block.
        pools: int >= 0, the blocks that pool, from the first on. Default: all. A block never pools a side of 1.

    Returns:
        A `keras.Model` from `(batch, height, width, channels)` to `(batch, h, w, filters[-1])`.
    """
    if not filters or not all(isinstance(count, int) and count >= 1 for count in filters):
        raise ValueError(f"filters: expected one int >= 1 a block. Received: {filters!r}")
    pools = len(filters) if pools is None else pools
    images = keras.Input(input_shape, name="images")
    features = images
    for block, count in enumerate(filters):
        features = keras.layers.Conv2D(count, 3, padding="same", use_bias=False, name=f"conv{block}")(features)
        features = keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name=f"norm{block}")(features)
        features = keras.layers.ReLU(name=f"relu{block}")(features)
        if block < pools and min(features.shape[1:3]) >= 2:
            features = keras.layers.MaxPooling2D(2, name=f"pool{block}")(features)
    return keras.Model(images, features, name="conv_blocks")
