"""Contrastive loss."""

from typing import Any

import tensorflow as tf

from s2sd_tf.checks import check_at_least, check_bool
from s2sd_tf.mining.base import Miner, Pairs
from s2sd_tf.objectives.base import GradedPairObjective, euclidean_distances, mean_where, register


@register("contrastive")
class Contrastive(GradedPairObjective):
    """Contrastive loss (Hadsell et al., "Dimensionality Reduction by Learning an Invariant Mapping", CVPR 2006, eq. 4).

    With Euclidean distances d of l2-normalised embeddings it is

        mean over positive pairs of max(0, d - positive_margin)
        + mean over negative pairs of max(0, negative_margin - d)

    The paper squares both hinges. The default here does not, as is usual in metric learning. Positives and negatives
    are averaged separately, because there are far more negatives.

    With graded relevance r, which needs the miner "all", the mean over positives is weighted by r and the mean over
    negatives by 1 - r.

    Args:
        positive_margin: >= 0.
        negative_margin: >= 0.
        squared: whether to square the hinges.
        miner: name or `mining.Miner`; "all" chooses all pairs.
        **kwargs: arguments of `GradedPairObjective`.
    """

    formula = "mean_p [d_ap - m_p]+ + mean_n [m_n - d_an]+"
    paper = "Hadsell et al., CVPR 2006"
    cost = "B^2"

    def __init__(
        self,
        positive_margin: float = 0.0,
        negative_margin: float = 1.0,
        squared: bool = False,
        miner: str | Miner = "distance_weighted",
        **kwargs: Any,
    ) -> None:
        super().__init__(miner=miner, **kwargs)
        check_at_least("positive_margin", positive_margin, 0)
        check_at_least("negative_margin", negative_margin, 0)
        self.positive_margin = positive_margin
        self.negative_margin = negative_margin
        check_bool("squared", squared)
        self.squared = squared

    def compute_pairs(self, anchors: tf.Tensor, references: tf.Tensor, pairs: Pairs) -> tf.Tensor:
        distances = euclidean_distances(anchors, references)
        power = tf.square if self.squared else tf.identity
        loss = mean_where(power(tf.nn.relu(distances - self.positive_margin)), pairs.positive)
        return loss + mean_where(power(tf.nn.relu(self.negative_margin - distances)), pairs.negative)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "positive_margin": self.positive_margin,
            "negative_margin": self.negative_margin,
            "squared": self.squared,
        }
