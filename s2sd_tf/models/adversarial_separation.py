"""Adversarial separation: a regulariser that makes two embeddings encode different information."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from s2sd_tf.checks import check_at_least, checked_int
from s2sd_tf.keras_compat import keras
from s2sd_tf.objectives.base import unit_rows


@keras.utils.register_keras_serializable("s2sd_tf")
class AdversarialSeparation(keras.layers.Layer):
    """A loss that makes two embeddings of the same images differ.

    A two-layer network R maps the other embedding y into the space of x and learns to predict x. Both embeddings get
    the reversed gradient and learn to be unlike (Roth et al., "MIC: Mining Interclass Characteristics for Improved
    Metric Learning", ICCV 2019). The loss is

        -weight * mean |x * R(y)|^2,  elementwise product of l2-normalised x and R(y)

    The layer itself reverses the gradients of x and y: add its output to the loss of the model unchanged.

    Args:
        embedding_dim: >= 1, dimension of x.
        other_dim: >= 1, dimension of y.
        hidden_dim: >= 1, width of R.
        weight: >= 0, factor on the loss.
        name: name of the layer.
        dtype: "float32" (default) or "float64".

    Example:
        >>> separate = s2sd_tf.models.AdversarialSeparation(embedding_dim=128, other_dim=128)
        >>> loss = objective(x, labels) + other_objective(y, other_labels) + separate(x, y)
    """

    def __init__(
        self,
        embedding_dim: int,
        other_dim: int,
        hidden_dim: int = 512,
        weight: float = 1.0,
        name: str | None = None,
        dtype: str = "float32",
        **kwargs: Any,
    ) -> None:
        super().__init__(name=name, dtype=dtype, **kwargs)
        if self.compute_dtype not in ("float32", "float64"):
            raise ValueError(f"dtype: expected 'float32' or 'float64'. Received: {dtype!r}")
        self.embedding_dim = checked_int("embedding_dim", embedding_dim, 1)
        self.other_dim = checked_int("other_dim", other_dim, 1)
        self.hidden_dim = checked_int("hidden_dim", hidden_dim, 1)
        check_at_least("weight", weight, 0)
        self.weight = weight
        self.hidden = keras.layers.Dense(hidden_dim, activation="relu", dtype=self.dtype_policy, name="hidden")
        self.projection = keras.layers.Dense(embedding_dim, dtype=self.dtype_policy, name="projection")

    def build(self, input_shape: Any) -> None:
        self.hidden.build((None, self.other_dim))
        self.projection.build((None, self.hidden_dim))
        super().build(input_shape)

    def call(self, embeddings: tf.Tensor, others: tf.Tensor) -> tf.Tensor:
        """Computes the loss of a batch.

        Args:
            embeddings: x, float `(batch, embedding_dim)`.
            others: y, float `(batch, other_dim)`.

        Returns:
            Scalar tensor in `[-weight, 0]`.
        """
        embeddings = reverse_gradient(unit_rows(tf.cast(embeddings, self.compute_dtype)))
        others = reverse_gradient(unit_rows(tf.cast(others, self.compute_dtype)))
        predicted = unit_rows(self.projection(self.hidden(others)))
        agreement = tf.reduce_sum(tf.square(embeddings * predicted), axis=1)
        return -self.weight * tf.reduce_mean(agreement)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "embedding_dim": self.embedding_dim,
            "other_dim": self.other_dim,
            "hidden_dim": self.hidden_dim,
            "weight": self.weight,
        }


@tf.custom_gradient
def reverse_gradient(values: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
    """Returns `values` unchanged and flips the sign of their gradient (Ganin and Lempitsky, ICML 2015)."""
    return tf.identity(values), lambda upstream: -upstream
