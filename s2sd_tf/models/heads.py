"""Heads that turn pooled features into l2-normalised embeddings."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from s2sd_tf.checks import check_bool, checked_int
from s2sd_tf.keras_compat import keras, loss_dtype


class _Head(keras.layers.Layer):
    """Base class of the heads: an output dimension, and unit-norm rows in at least float32."""

    def __init__(self, dim: int, uniform_biases: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dim = checked_int("dim", dim, 1)
        check_bool("uniform_biases", uniform_biases)
        self.uniform_biases = uniform_biases

    def _dense(self, name, activation=None):
        # Uniform in +-1/sqrt(fan_in), the initialisation of the published implementation's linear layers.
        initializer = keras.initializers.VarianceScaling(1.0 / 3.0, mode="fan_in", distribution="uniform")
        return keras.layers.Dense(
            self.dim, activation=activation, kernel_initializer=initializer, dtype=self.dtype_policy, name=name
        )

    def _build_dense(self, dense, input_shape):
        if self.uniform_biases:
            limit = input_shape[-1] ** -0.5
            dense.bias_initializer = keras.initializers.RandomUniform(-limit, limit)
        dense.build(input_shape)

    def _normalize(self, embeddings):
        return tf.math.l2_normalize(tf.cast(embeddings, loss_dtype(self)), axis=-1, epsilon=1e-12)

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> tuple[int | None, ...]:
        return (*input_shape[:-1], self.dim)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "dim": self.dim, "uniform_biases": self.uniform_biases}


@keras.utils.register_keras_serializable("s2sd_tf")
class EmbeddingHead(_Head):
    """Computes the base embedding: a linear layer and l2 normalisation. `(batch, features)` to `(batch, dim)`.

    `uniform_biases`: see `S2SDModel`.
    """

    def __init__(self, dim: int, uniform_biases: bool = False, **kwargs: Any) -> None:
        super().__init__(dim, uniform_biases, **kwargs)
        self.linear = self._dense("linear")

    def build(self, input_shape: Sequence[int | None]) -> None:
        self._build_dense(self.linear, input_shape)
        super().build(input_shape)

    def call(self, features: tf.Tensor) -> tf.Tensor:
        return self._normalize(self.linear(features))


@keras.utils.register_keras_serializable("s2sd_tf")
class TargetHead(_Head):
    """Computes a target embedding: Linear-ReLU-Linear with `dim` units each, l2 normalisation (S2SD, section 3).

    `(batch, features)` to `(batch, dim)`. `uniform_biases`: see `S2SDModel`.
    """

    def __init__(self, dim: int, uniform_biases: bool = False, **kwargs: Any) -> None:
        super().__init__(dim, uniform_biases, **kwargs)
        self.hidden = self._dense("hidden", activation="relu")
        self.linear = self._dense("linear")

    def build(self, input_shape: Sequence[int | None]) -> None:
        self._build_dense(self.hidden, input_shape)
        self._build_dense(self.linear, (*input_shape[:-1], self.dim))
        super().build(input_shape)

    def call(self, features: tf.Tensor) -> tf.Tensor:
        return self._normalize(self.linear(self.hidden(features)))
