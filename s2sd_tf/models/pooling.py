"""Pooling of feature maps to one vector per image."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from s2sd_tf.checks import check_above
from s2sd_tf.keras_compat import keras

POOLINGS = ("avg", "max", "avg+max", "gem")


def pool(features: tf.Tensor, pooling: str, gem: "GeM | None" = None) -> tf.Tensor:
    """Pools feature maps to one vector per image.

    Args:
        features: float `(batch, h, w, features)`. Already pooled features, `(batch, features)`, are returned unchanged.
        pooling: one of `POOLINGS`.
        gem: the layer that pools for "gem".

    Returns:
        Float tensor `(batch, features)`.
    """
    if features.shape.rank == 2:
        return features
    if pooling == "gem":
        return gem(features)  # type: ignore[misc]
    if pooling == "max":
        return _global_max(features)
    pooled = tf.reduce_mean(features, axis=[1, 2])
    return pooled + _global_max(features) if pooling == "avg+max" else pooled


@keras.utils.register_keras_serializable("s2sd_tf")
class GeM(keras.layers.Layer):
    """Generalized-mean pooling, mean(max(x, epsilon)^p)^(1/p) (Radenovic et al., TPAMI 2018, arXiv 1711.02512).

    `(batch, h, w, features)` to `(batch, features)`, in the layer's dtype: float16 is not enough for the power. p = 1
    is average pooling; as p grows, it approaches max pooling. p is trained, and all features share it.

    Args:
        p: > 0, the initial power.
        epsilon: > 0; smaller features are raised to it.
    """

    def __init__(self, p: float = 3.0, epsilon: float = 1e-6, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_above("p", p, 0)
        check_above("epsilon", epsilon, 0)
        self.initial_p = p
        self.epsilon = epsilon

    def build(self, input_shape: Sequence[int | None]) -> None:
        self.p = self.add_weight(name="p", shape=(), initializer=keras.initializers.Constant(self.initial_p))
        super().build(input_shape)

    def call(self, features: tf.Tensor) -> tf.Tensor:
        features = tf.maximum(features, self.epsilon)
        p = tf.convert_to_tensor(self.p)
        # Divided by the maximum, so that the powers neither overflow nor all underflow. It cancels out: no gradient.
        unit = tf.stop_gradient(tf.reduce_max(features, axis=[1, 2], keepdims=True))
        means = tf.reduce_mean((features / unit) ** p, axis=[1, 2])
        return unit[:, 0, 0] * means ** (1.0 / p)

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> tuple[int | None, ...]:
        return (input_shape[0], input_shape[-1])

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "p": self.initial_p, "epsilon": self.epsilon}


def _global_max(features):
    # ReLU maps are often all 0. The gradient goes to the first of equal maxima, as in the published implementation;
    # reduce_max would divide it among them.
    shape = tf.shape(features)
    positions = tf.reshape(features, [shape[0], shape[1] * shape[2], features.shape[3]])
    first = tf.one_hot(
        tf.argmax(positions, axis=1), shape[1] * shape[2], on_value=True, off_value=False, axis=1, dtype=tf.bool
    )
    return tf.reduce_sum(tf.where(first, positions, tf.zeros_like(positions)), axis=1)
