"""Signal-to-noise-ratio loss."""

from typing import Any

import tensorflow as tf

from s2sd_tf.checks import check_at_least
from s2sd_tf.mining.base import Miner, Triplets
from s2sd_tf.objectives.base import TupleObjective, register, zero_diagonal
from s2sd_tf.objectives.triplet import all_triplet_hinges, triplet_hinges


@register("snr")
class SignalToNoise(TupleObjective):
    """Triplet loss on signal-to-noise distances (Yuan et al., "Signal-to-Noise Ratio: A Robust Distance Metric for Deep
    Metric Learning", CVPR 2019).

    The mean over the triplets, with variances over the dimensions, of

        max(0, d(a, p) - d(a, n) + margin),  d(i, j) = var(x_i - x_j) / var(x_i)

    plus `regularization` times the mean absolute sum of an embedding's entries, which pulls their mean towards zero.

    Args:
        margin: >= 0.
        regularization: >= 0, the paper's lambda; 0 in the published code with the distance-weighted miner.
        miner: name or `mining.Miner`. With "all" every valid triplet counts, in O(batch^2 log batch).
        **kwargs: `seed` of the miner, and arguments of `Objective`.
    """

    formula = "mean_apn [var(x_a - x_p)/var(x_a) - var(x_a - x_n)/var(x_a) + m]+ + r mean_a |sum x_a|"
    paper = "Yuan et al., CVPR 2019"
    cost = "B^2"

    def __init__(
        self,
        margin: float = 0.2,
        regularization: float = 0.005,
        miner: str | Miner = "distance_weighted",
        **kwargs: Any,
    ) -> None:
        super().__init__(miner=miner, **kwargs)
        check_at_least("margin", margin, 0)
        check_at_least("regularization", regularization, 0)
        self.margin = margin
        self.regularization = regularization

    def compute_triplets(
        self, embeddings: tf.Tensor, labels: tf.Tensor, triplets: Triplets, seed: tf.Tensor
    ) -> tf.Tensor:
        del labels, seed
        loss = triplet_hinges(noise_to_signal(embeddings), triplets, self.margin)
        return loss + self._penalty(embeddings, tf.reduce_any(triplets.valid))

    def compute_all(self, embeddings: tf.Tensor, labels: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        del seed
        loss, triplets = all_triplet_hinges(noise_to_signal(embeddings), labels, self.margin)
        return loss + self._penalty(embeddings, triplets > 0)

    def _penalty(self, embeddings, any_triplet):
        penalty = self.regularization * tf.reduce_mean(tf.abs(tf.reduce_sum(embeddings, axis=1)))
        return tf.where(any_triplet, penalty, 0.0)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "margin": self.margin, "regularization": self.regularization}


def noise_to_signal(embeddings: tf.Tensor) -> tf.Tensor:
    """Computes var(x_i - x_j) / var(x_i), `(batch, batch)`; row i is 0 if all entries of embedding i are equal."""
    centered = embeddings - tf.reduce_mean(embeddings, axis=1, keepdims=True)
    variances = tf.reduce_mean(tf.square(centered), axis=1)
    covariances = tf.matmul(centered, centered, transpose_b=True) / tf.cast(tf.shape(embeddings)[1], embeddings.dtype)
    noise = tf.nn.relu(variances[:, None] + variances[None, :] - 2.0 * covariances)
    noise = zero_diagonal(noise)
    constant = variances[:, None] < 1e-12
    # Tensors instead of numbers, because a graph turns a number next to float64 into float32.
    signal = tf.where(constant, tf.ones_like(variances[:, None]), variances[:, None])
    return tf.where(constant, tf.zeros_like(noise), noise / signal)
