"""From feature maps to one vector an image."""

import tensorflow as tf

from s2sd_tf.checks import check_above
from s2sd_tf.keras_compat import keras

POOLINGS = ("avg", "max", "avg+max", "gem")


def pool(features, pooling, gem=None):
    """Feature maps `(batch, h, w, features)` to `(batch, features)`; pooled features stay as they are.

    Args:
        features: float tensor.
        pooling: one of `POOLINGS`.
        gem: the `GeM` layer, for "gem".
    """
    if features.shape.rank == 2:
        return features
    if pooling == "gem":
        return gem(features)
    if pooling == "max":
        return _global_max(features)
    pooled = tf.reduce_mean(features, axis=[1, 2])
    return pooled + _global_max(features) if pooling == "avg+max" else pooled


@keras.utils.register_keras_serializable("s2sd_tf")
class GeM(keras.layers.Layer):
    """Generalized-mean pooling, mean(max(x, epsilon)^p)^(1/p) (Radenovic et al., TPAMI 2018, arXiv 1711.02512).

    `(batch, h, w, features)` to `(batch, features)`, in the layer's dtype: with the power, float16 would not do. p = 1
    is average pooling, and as p grows it becomes max pooling. One p, which is trained, serves all features.

    Args:
        p: float > 0, the power to begin with.
        epsilon: float > 0, what smaller features count as.
    """

    def __init__(self, p=3.0, epsilon=1e-6, **kwargs):
        super().__init__(**kwargs)
        check_above("p", p, 0)
        check_above("epsilon", epsilon, 0)
        self.initial_p = p
        self.epsilon = epsilon

    def build(self, input_shape):
        self.p = self.add_weight(name="p", shape=(), initializer=keras.initializers.Constant(self.initial_p))
        super().build(input_shape)

    def call(self, features):
        features = tf.maximum(features, self.epsilon)
        p = tf.convert_to_tensor(self.p)
        # In units of the largest one no power over- or underflows; the result is the same, so the unit has no gradient.
        unit = tf.stop_gradient(tf.reduce_max(features, axis=[1, 2], keepdims=True))
        means = tf.reduce_mean((features / unit) ** p, axis=[1, 2])
        return unit[:, 0, 0] * means ** (1.0 / p)

    def compute_output_shape(self, input_shape):
        return (input_shape[0], input_shape[-1])

    def get_config(self):
        return {**super().get_config(), "p": self.initial_p, "epsilon": self.epsilon}


def _global_max(features):
    # ReLU maps are often 0 throughout: the gradient goes to the first of equal maxima, as the published implementation
    # has it, where reduce_max would share it out.
    shape = tf.shape(features)
    positions = tf.reshape(features, [shape[0], shape[1] * shape[2], features.shape[3]])
    first = tf.one_hot(
        tf.argmax(positions, axis=1), shape[1] * shape[2], on_value=True, off_value=False, axis=1, dtype=tf.bool
    )
    return tf.reduce_sum(tf.where(first, positions, tf.zeros_like(positions)), axis=1)
