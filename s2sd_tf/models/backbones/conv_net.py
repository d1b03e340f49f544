"""A small convolutional network."""

from collections.abc import Sequence

from s2sd_tf.keras_compat import keras


def conv_blocks(
    input_shape: Sequence[int], filters: Sequence[int] = (64, 64, 64, 64), pools: int | None = None
) -> keras.Model:
    """Builds a small convolutional network; by default, "Conv-4" of few-shot learning (Vinyals et al., NeurIPS 2016).

    Each block is a 3 x 3 convolution, batch normalisation, ReLU and 2 x 2 max pooling.

    Args:
        input_shape: `(height, width, channels)`.
        filters: >= 1 each, output channels of every block.
        pools: >= 0, how many blocks pool, counted from the first; by default all. No block pools maps with a side of 1.

    Returns:
        A model from `(batch, height, width, channels)` to `(batch, h, w, filters[-1])`.
    """
    if not filters or not all(isinstance(count, int) and count >= 1 for count in filters):
        raise ValueError(f"filters: expected an int >= 1 for each block. Received: {filters!r}")
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
