"""Circle loss."""

from typing import Any

import tensorflow as tf

from s2sd_tf.checks import check_above, check_number
from s2sd_tf.mining.base import Pairs
from s2sd_tf.objectives.base import PairObjective, masked_logsumexp, mean_where, register


@register("circle")
class Circle(PairObjective):
    """Circle loss (Sun et al., CVPR 2020).

    The mean over the anchors that have both a positive and a negative, with cosine similarities s, of

        log(1 + sum_n exp(gamma [s_n + m]+ (s_n - m)) * sum_p exp(-gamma [1 + m - s_p]+ (s_p - 1 + m)))

    No gradient flows through the weights in [ ]+.

    Args:
        margin: m; 0.4 for image retrieval in the paper.
        gamma: > 0, the scale; 80 for image retrieval in the paper.
        **kwargs: arguments of `PairObjective`.
    """

    formula = "mean_a log(1 + sum_n e^(g [s_an + m]+ (s_an - m)) sum_p e^(-g [1 + m - s_ap]+ (s_ap - 1 + m)))"
    paper = "Sun et al., CVPR 2020"
    cost = "B^2"

    def __init__(self, margin: float = 0.4, gamma: float = 80.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_above("gamma", gamma, 0)
        check_number("margin", margin)
        self.margin = margin
        self.gamma = gamma

    def compute_pairs(self, anchors: tf.Tensor, references: tf.Tensor, pairs: Pairs) -> tf.Tensor:
        similarities = tf.matmul(anchors, references, transpose_b=True)
        fixed = tf.stop_gradient(similarities)
        of_positives = -self.gamma * tf.nn.relu(1.0 + self.margin - fixed) * (similarities - 1.0 + self.margin)
        of_negatives = self.gamma * tf.nn.relu(fixed + self.margin) * (similarities - self.margin)
        losses = tf.nn.softplus(
            masked_logsumexp(of_positives, pairs.positive, axis=1)
            + masked_logsumexp(of_negatives, pairs.negative, axis=1)
        )
        return mean_where(losses, pairs.complete())

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "margin": self.margin, "gamma": self.gamma}
