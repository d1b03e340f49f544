"""Distance-weighted negatives, some of them replaced by positives."""

from typing import Any

import tensorflow as tf

from s2sd_tf.checks import check_bool, check_within
from s2sd_tf.mining.base import Triplets, drawn_members, pair_masks, register, uniform_draws, weighted_members
from s2sd_tf.mining.distance_weighted import DistanceWeighted


@register("rho_distance")
class RhoDistance(DistanceWeighted):
    """`DistanceWeighted`, except that a positive replaces a triplet's negative with probability `rho` (rho
    regularisation of Roth et al., "Revisiting Training Strategies and Generalization Performance in Deep Metric
    Learning", ICML 2020).

    The replacement is drawn uniformly from the members of the class other than the anchor and the positive. In a class
    of two there is none: see `anchor_as_positive`.

    Args:
        rho: in [0, 1].
        lower_cutoff, upper_cutoff, one_per_anchor: see `DistanceWeighted`.
        anchor_as_positive: what to do in a class of two. False: it keeps its negatives, so the miner is
            `DistanceWeighted` if all classes have two samples. True, as in the published code: with probability `rho`
            the anchor is its own positive, and the other sample is the negative.
    """

    negatives_in_class = True

    def __init__(
        self,
        rho: float = 0.2,
        lower_cutoff: float = 0.5,
        upper_cutoff: float = 1.4,
        one_per_anchor: bool = False,
        anchor_as_positive: bool = False,
    ) -> None:
        super().__init__(lower_cutoff=lower_cutoff, upper_cutoff=upper_cutoff, one_per_anchor=one_per_anchor)
        check_within("RhoDistance: rho", rho, 0, 1)
        check_bool("anchor_as_positive", anchor_as_positive)
        self.rho = rho
        self.anchor_as_positive = anchor_as_positive

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "rho": self.rho, "anchor_as_positive": self.anchor_as_positive}

    def __call__(self, distances: tf.Tensor, labels: tf.Tensor, *, dim: int, seed: tf.Tensor) -> Triplets:
        positive, _ = pair_masks(labels)
        batch = tf.shape(labels)[0]
        draws = uniform_draws([4 if self.one_per_anchor else 3, batch, batch], seed, tf.float64)
        choice = weighted_members(self.probabilities(distances, labels, dim), draws[0])
        has_third = tf.reduce_sum(tf.cast(positive, tf.int32), axis=1, keepdims=True) > 1
        switched = draws[1] <= self.rho
        choice = tf.where(has_third & switched, drawn_members(positive, draws[2], besides=True), choice)
        found = self._triplets(choice, labels, draws[-1])
        if not self.anchor_as_positive:
            return found
        # The only other member of a class of two is the pair's positive. It becomes the negative.
        pair = tf.stack([found.anchor, found.positive], axis=1)
        own = tf.gather_nd(tf.logical_not(has_third) & switched, pair) & found.valid
        return found._replace(
            positive=tf.where(own, found.anchor, found.positive), negative=tf.where(own, found.positive, found.negative)
        )
