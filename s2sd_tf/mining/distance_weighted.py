"""Distance-weighted negatives."""

from typing import Any

import tensorflow as tf

from s2sd_tf.checks import check_bool, check_number
from s2sd_tf.mining.base import (
    Miner,
    Triplets,
    drawn_members,
    one_negative_a_positive,
    one_triplet_an_anchor,
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
    nearer negative, and then uniformly. (The published code has no upper cutoff, which is one above 2.) Returns
    triplets `(batch^2,)`, or `(batch,)` with `one_per_anchor`, whose anchors have a positive and a negative.

    Args:
        lower_cutoff: in (0, 2).
        upper_cutoff: > `lower_cutoff`.
        one_per_anchor: whether each anchor has only one of its triplets, drawn uniformly, as in the published code. The
            same if a class has two samples.
    """

    def __init__(self, lower_cutoff: float = 0.5, upper_cutoff: float = 1.4, one_per_anchor: bool = False) -> None:
        check_number("lower_cutoff", lower_cutoff)
        check_number("upper_cutoff", upper_cutoff)
        if not 0 < lower_cutoff < 2 or not upper_cutoff > lower_cutoff:
            raise ValueError(
                "DistanceWeighted: expected 0 < lower_cutoff < 2 and upper_cutoff > lower_cutoff. "
                f"Received: lower_cutoff={lower_cutoff}, upper_cutoff={upper_cutoff}"
            )
        check_bool("one_per_anchor", one_per_anchor)
        self.lower_cutoff = lower_cutoff
        self.upper_cutoff = upper_cutoff
        self.one_per_anchor = one_per_anchor

    def get_config(self) -> dict[str, Any]:
        return {
            "lower_cutoff": self.lower_cutoff,
            "upper_cutoff": self.upper_cutoff,
            "one_per_anchor": self.one_per_anchor,
        }

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
        batch = tf.shape(labels)[0]
        draws = uniform_draws([2 if self.one_per_anchor else 1, batch, batch], seed, tf.float64)
        choice = weighted_members(self.probabilities(distances, labels, dim), draws[0])
        return self._triplets(choice, labels, draws[-1])

    def _triplets(self, choice, labels, draws):
        """The triplets of the positive pairs, or one an anchor, with the negatives `choice` `(batch, batch)`."""
        positive, negative = pair_masks(labels)
        valid = positive & tf.reduce_any(negative, axis=1, keepdims=True)
        if not self.one_per_anchor:
            return one_negative_a_positive(choice, valid)
        drawn = drawn_members(valid, draws[:, :1])
        return one_triplet_an_anchor(
            drawn[:, 0], tf.gather(choice, drawn, batch_dims=1)[:, 0], tf.reduce_any(valid, axis=1)
        )


def log_inverse_density(distances: tf.Tensor, dim: int) -> tf.Tensor:
    """Returns log(1 / q(d)) up to a constant, with the density q of `DistanceWeighted`.

    Distances must be > 0; those above 1.999 count as 1.999, because q is 0 at 2.
    """
    distances = tf.minimum(distances, 1.999)
    return (2.0 - dim) * tf.math.log(distances) - (dim - 3.0) / 2.0 * tf.math.log1p(-tf.square(distances) / 4.0)
