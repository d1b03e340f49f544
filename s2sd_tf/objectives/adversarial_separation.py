"""Adversarial separation: a regulariser that makes two embeddings carry different things."""

import tensorflow as tf

from s2sd_tf.checks import check_at_least, checked_int
from s2sd_tf.keras_compat import keras
from s2sd_tf.objectives.base import Objective, register


@register("adversarial_separation")
class AdversarialSeparation(Objective):
    """Adversarial separation of two embeddings (Roth et al., "MIC: Mining Interclass Characteristics for Improved
    Metric Learning", ICCV 2019). A two-layer network R maps the other embedding y into the space of x and learns
    to agree with it, while both embeddings get the reversed gradient and learn to be unlike:

        -weight * mean |x * R(y)|^2,  entry by entry, on l2-normalised x and R(y)

    The gradients of x and y come out reversed: add the loss to that of the model as it is.

    Args:
        embedding_dim: int >= 1, dimension of x.
        other_dim: int >= 1, dimension of y.
        hidden_dim: int >= 1, width of R.
        weight: float >= 0.
        learning_rate_multiplier, name, dtype: see `Objective`.

    Example:
        >>> separate = s2sd_tf.objectives.get("adversarial_separation", embedding_dim=128, other_dim=128)
        >>> loss = objective(x, labels) + other_objective(y, other_labels) + separate(x, y)
    """

    kind = "regularizer"
    formula = "-w mean |x * R(y)|^2, gradients of x and y reversed"
    paper = "Roth et al., ICCV 2019"
    cost = "B D H"

    def __init__(self, embedding_dim=None, other_dim=None, hidden_dim=512, weight=1.0, **kwargs):
        super().__init__(**kwargs)
        for argument, value in (("embedding_dim", embedding_dim), ("other_dim", other_dim), ("hidden_dim", hidden_dim)):
            if value is None:
                raise ValueError(f"{argument}: expected an int >= 1. Received: None")
            checked_int(argument, value, 1)
        check_at_least("weight", weight, 0)
        self.embedding_dim = embedding_dim
        self.other_dim = other_dim
        self.hidden_dim = hidden_dim
        self.weight = weight
        self.hidden = keras.layers.Dense(hidden_dim, activation="relu", dtype=self.dtype_policy, name="hidden")
        self.projection = keras.layers.Dense(embedding_dim, dtype=self.dtype_policy, name="projection")

    def build(self, input_shape):
        self.hidden.build((None, self.other_dim))
        self.projection.build((None, self.hidden_dim))
        super().build(input_shape)

    def call(self, embeddings, others, training=False):
        """The regulariser of a batch.

        Args:
            embeddings: float tensor `(batch, embedding_dim)`.
            others: float tensor `(batch, other_dim)`.
            training: bool; nothing depends on it.

        Returns:
            Scalar tensor in `[-weight, 0]`.
        """
        del training
        embeddings = reverse_gradient(self.prepare(tf.cast(embeddings, self.compute_dtype)))
        others = reverse_gradient(self.prepare(tf.cast(others, self.compute_dtype)))
        predicted = self.prepare(self.projection(self.hidden(others)))
        agreement = tf.reduce_sum(tf.square(embeddings * predicted), axis=1)
        return -self.weight * tf.reduce_mean(agreement)

    def get_config(self):
        return {
            **super().get_config(),
            "embedding_dim": self.embedding_dim,
            "other_dim": self.other_dim,
            "hidden_dim": self.hidden_dim,
            "weight": self.weight,
        }


@tf.custom_gradient
def reverse_gradient(values):
    """The values; their gradient goes on with the opposite sign (Ganin and Lempitsky, ICML 2015)."""
    return tf.identity(values), lambda upstream: -upstream
