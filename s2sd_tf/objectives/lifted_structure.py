"""Lifted structured loss, as in the original paper."""

from typing import Any

import tensorflow as tf

from s2sd_tf.checks import check_number
from s2sd_tf.mining.base import Pairs
from s2sd_tf.objectives.base import (
    LengthPenalizedObjective,
    euclidean_distances,
    masked_logsumexp,
    mean_where,
    register,
)


@register("lifted_structure")
class LiftedStructure(LengthPenalizedObjective):
    """Lifted structured loss (Song et al., "Deep Metric Learning via Lifted Structured Feature Embedding", CVPR 2016,
    eq. 4).

    With Euclidean distances d, over the positive pairs P of anchors that have a negative, it is

        1 / (2 |P|) sum_(i,j) max(0, log(sum_k exp(margin - d_ik) + sum_l exp(margin - d_jl)) + d_ij)^2

    where k runs over the negatives of i, and l over the negatives of j.

    Args:
        margin: any finite number.
        normalize, l2_weight: see `LengthPenalizedObjective`; the paper does not normalise.
        **kwargs: arguments of `PairObjective`.
    """

    formula = "mean_ap 1/2 [log(sum_n e^(m - d_an) + sum_n e^(m - d_pn)) + d_ap]+^2"
    paper = "Song et al., CVPR 2016"
    cost = "B^2"

    def __init__(self, margin: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_number("margin", margin)
        self.margin = margin

    def compute_pairs(self, anchors: tf.Tensor, references: tf.Tensor, pairs: Pairs) -> tf.Tensor:
        distances = euclidean_distances(anchors, references)
        # The negatives of a positive j are the anchors that have j as a negative.
        of_anchor = masked_logsumexp(self.margin - distances, pairs.negative, axis=1)[:, None]
        of_positive = masked_logsumexp(self.margin - distances, pairs.negative, axis=0)[None, :]
        has_negative = tf.reduce_any(pairs.negative, axis=1, keepdims=True)
        # The logarithm of the sum of both; where they are equal, each has half of the gradient.
        both = of_anchor + tf.nn.softplus(of_positive - of_anchor)
        return mean_where(tf.square(tf.nn.relu(both + distances)) / 2.0, pairs.positive & has_negative)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "margin": self.margin}
