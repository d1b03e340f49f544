"""From pooled features to l2-normalised embeddings."""

import tensorflow as tf

from s2sd_tf.keras_compat import keras, loss_dtype


class _Head(keras.layers.Layer):
    """What both heads share: an output dimension, and unit-norm rows in at least float32."""

    def __init__(self, dim, **kwargs):
        super().__init__(**kwargs)
        self.dim = dim

    def _dense(self, name, activation=None):
        # Uniform in +-1/sqrt(fan_in), the initialisation of the published implementation's linear layers.
        initializer = keras.initializers.VarianceScaling(1.0 / 3.0, mode="fan_in", distribution="uniform")
        return keras.layers.Dense(
            self.dim, activation=activation, kernel_initializer=initializer, dtype=self.dtype_policy, name=name
        )

    def _normalize(self, embeddings):
        return tf.math.l2_normalize(tf.cast(embeddings, loss_dtype(self)), axis=-1, epsilon=1e-12)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.dim)

    def get_config(self):
        return {**super().get_config(), "dim": self.dim}


@keras.utils.register_keras_serializable("s2sd_tf")
class EmbeddingHead(_Head):
    """The base embedding: one linear layer, then l2 normalisation. `(batch, features)` to `(batch, dim)`."""

    def __init__(self, dim, **kwargs):
        super().__init__(dim, **kwargs)
        self.linear = self._dense("linear")

    def build(self, input_shape):
        self.linear.build(input_shape)
        super().build(input_shape)

    def call(self, features):
        return self._normalize(self.linear(features))


@keras.utils.register_keras_serializable("s2sd_tf")
class TargetHead(_Head):
    """A target embedding: Linear-ReLU-Linear, both of `dim` units, then l2 normalisation (S2SD, section 3).

    `(batch, features)` to `(batch, dim)`.
    """

    def __init__(self, dim, **kwargs):
        super().__init__(dim, **kwargs)
        self.hidden = self._dense("hidden", activation="relu")
        self.linear = self._dense("linear")

    def build(self, input_shape):
        self.hidden.build(input_shape)
        self.linear.build((*input_shape[:-1], self.dim))
        super().build(input_shape)

    def call(self, features):
        return self._normalize(self.linear(self.hidden(features)))
