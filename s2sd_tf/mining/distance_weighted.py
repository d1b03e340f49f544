"""Distance-weighted negatives."""

from typing import Any

import tensorflow as tf

from s2sd_tf.checks import check_number
from s2sd_tf.mining.base import (
    Miner,
    Triplets,
    one_negative_a_positive,
    pair_masks,
    register,
    uniform_draws,
    weighted_members,
)


@register("distance_weighted")
class DistanceWeighted(Miner):
    """One negative for each ordered positive pair, drawn with probability proportional to 1 / q(d).

    q(d) = d^(n-2) (1 - d^2/4)^((n-3)/2) is the density of the distance between two random points on the unit sphere in
    n dimensions (Wu et al., "Sampling Matters in Deep Embedding Learning", ICCV 2017, eq. 4 and 5). Distances below
    `lower_cutoff` count as `lower_cutoff`. Negatives at `upper_cutoff` or beyond are drawn only if the anchor has no
    nearer negative, and then uniformly.

    Args:
        lower_cutoff: in (0, 2).
        upper_cutoff: > `lower_cutoff`.
    """

    def __init__(self, lower_cutoff: float = 0.5, upper_cutoff: float = 1.4) -> None:
        check_number("lower_cutoff", lower_cutoff)
        check_number("upper_cutoff", upper_cutoff)
        if not 0 < lower_cutoff < 2 or not upper_cutoff > lower_cutoff:
            raise ValueError(
                "DistanceWeighted: expected 0 < lower_cutoff < 2 and upper_cutoff > lower_cutoff. "
                f"Received: lower_cutoff={lower_cutoff}, upper_cutoff={upper_cutoff}"
            )
        self.lower_cutoff = lower_cutoff
        self.upper_cutoff = upper_cutoff

    def get_config(self) -> dict[str, Any]:
        return {"lower_cutoff": self.lower_cutoff, "upper_cutoff": self.upper_cutoff}

    def probabilities(self, distances: tf.Tensor, labels: tf.Tensor, dim: int) -> tf.Tensor:
        """Returns float64 `(batch, batch)`: the probability that anchor i draws j; 0 for anchors without a negative."""
        # In float64 always: powers of `dim` amplify float32 rounding, and with it the differences between XLA's
        # functions and TensorFlow's.
        distances = tf.cast(distances, tf.float64)
        _, negative = pair_masks(labels)
        near = negative & (distances < self.upper_cutoff)
        log_weights = log_inverse_density(tf.maximum(distances, self.lower_cutoff), dim)
        log_weights = tf.where(near, log_weights, distances.dtype.min)
        log_weights -= tf.reduce_max(log_weights, axis=1, keepdims=True)
        weights = tf.where(near, tf.exp(log_weights), 0.0)
        weights = tf.where(tf.reduce_any(near, axis=1, keepdims=True), weights, tf.cast(negative, distances.dtype))
        return tf.math.divide_no_nan(weights, tf.reduce_sum(weights, axis=1, keepdims=True))

    def __call__(self, distances: tf.Tensor, labels: tf.Tensor, *, dim: int, seed: tf.Tensor) -> Triplets:
        positive, negative = pair_masks(labels)
        draws = uniform_draws(tf.shape(distances), seed, tf.float64)
        choice = weighted_members(self.probabilities(distances, labels, dim), draws)
        return one_negative_a_positive(choice, positive & tf.reduce_any(negative, axis=1, keepdims=True))


def log_inverse_density(distances: tf.Tensor, dim: int) -> tf.Tensor:
    """Returns log(1 / q(d)) up to a constant, with the density q of `DistanceWeighted`.

    Distances must be > 0; those above 1.999 count as 1.999, because q is 0 at 2.
    """
    distances = tf.minimum(distances, 1.999)
    return (2.0 - dim) * tf.math.log(distances) - (dim - 3.0) / 2.0 * tf.math.log1p(-tf.square(distances) / 4.0)
