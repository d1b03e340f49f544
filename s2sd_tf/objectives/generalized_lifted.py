"""Generalised lifted structured loss."""

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


@register("generalized_lifted")
class GeneralizedLifted(LengthPenalizedObjective):
    """Generalised lifted structured loss (Hermans et al., "In Defense of the Triplet Loss for Person
    Re-Identification", 2017).

    The mean over the anchors that have both a positive and a negative, with Euclidean distances d, of

        max(0, log sum_p exp(d_ap) + log sum_n exp(margin - d_an))

    Args:
        margin: any finite number.
        normalize, l2_weight: see `LengthPenalizedObjective`; the paper does not normalise.
        **kwargs: arguments of `PairObjective`.
    """

    formula = "mean_a [log sum_p e^(d_ap) + log sum_n e^(m - d_an)]+"
    paper = "Hermans et al., 2017"
    cost = "B^2"

    def __init__(self, margin: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_number("margin", margin)
        self.margin = margin

    def compute_pairs(self, anchors: tf.Tensor, references: tf.Tensor, pairs: Pairs) -> tf.Tensor:
        distances = euclidean_distances(anchors, references)
        pull = masked_logsumexp(distances, pairs.positive, axis=1)
        push = masked_logsumexp(self.margin - distances, pairs.negative, axis=1)
        has_both = pairs.complete()
        return mean_where(tf.nn.relu(pull + push), has_both)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "margin": self.margin}
