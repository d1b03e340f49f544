"""Distance-weighted negatives, some of them replaced by positives."""

from typing import Any

import tensorflow as tf

from s2sd_tf.checks import check_within
from s2sd_tf.mining.base import (
    Triplets,
    drawn_members,
    one_negative_a_positive,
    pair_masks,
    register,
    uniform_draws,
    weighted_members,
)
from s2sd_tf.mining.distance_weighted import DistanceWeighted


@register("rho_distance")
class RhoDistance(DistanceWeighted):
    """`DistanceWeighted`, except that a positive replaces a triplet's negative with probability `rho` (rho
    regularisation of Roth et al., "Revisiting Training Strategies and Generalization Performance in Deep Metric
    Learning", ICML 2020).

    The replacement is drawn uniformly from the members of the class other than the anchor and the positive; a class of
    two keeps its negatives. (The published code then also uses the anchor as its own positive.) Returns triplets
    `(batch^2,)`, one for each ordered positive pair whose anchor has a negative.

    Args:
        rho: in [0, 1].
        lower_cutoff, upper_cutoff: see `DistanceWeighted`.
    """

    negatives_in_class = True

    def __init__(self, rho: float = 0.2, lower_cutoff: float = 0.5, upper_cutoff: float = 1.4) -> None:
        super().__init__(lower_cutoff=lower_cutoff, upper_cutoff=upper_cutoff)
        check_within("RhoDistance: rho", rho, 0, 1)
        self.rho = rho

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "rho": self.rho}

    def __call__(self, distances: tf.Tensor, labels: tf.Tensor, *, dim: int, seed: tf.Tensor) -> Triplets:
        positive, negative = pair_masks(labels)
        batch = tf.shape(labels)[0]
        draws = uniform_draws([3, batch, batch], seed, tf.float64)
        choice = weighted_members(self.probabilities(distances, labels, dim), draws[0])
        has_third = tf.reduce_sum(tf.cast(positive, tf.int32), axis=1, keepdims=True) > 1
        switched = has_third & (draws[1] <= self.rho)
        choice = tf.where(switched, drawn_members(positive, draws[2], besides=True), choice)
        return one_negative_a_positive(choice, positive & tf.reduce_any(negative, axis=1, keepdims=True))
