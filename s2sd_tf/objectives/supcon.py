"""Supervised contrastive loss."""

from typing import Any

import tensorflow as tf

from s2sd_tf.checks import check_above
from s2sd_tf.mining.base import Pairs
from s2sd_tf.objectives.base import GradedPairObjective, masked_logsumexp, mean_where, register


@register("supcon")
class SupCon(GradedPairObjective):
    """Supervised contrastive loss (Khosla et al., NeurIPS 2020, eq. 2, L_out).

    The mean over the anchors that have both a positive and a negative, with cosine similarities s, of

        -mean_p log(exp(s_ap / temperature) / sum_j exp(s_aj / temperature)),  j over all others

    With graded relevance r, positives are the pairs with r > 0 and negatives those with r < 1. The mean over the
    positives is weighted by r.

    Args:
        temperature: > 0.
        **kwargs: arguments of `GradedPairObjective`.
    """

    formula = "mean_a -mean_p log(e^(s_ap/T) / sum_(j != a) e^(s_aj/T))"
    paper = "Khosla et al., NeurIPS 2020"
    cost = "B^2"

    def __init__(self, temperature: float = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_above("temperature", temperature, 0)
        self.temperature = temperature

    def compute_pairs(self, anchors: tf.Tensor, references: tf.Tensor, pairs: Pairs) -> tf.Tensor:
        logits = tf.matmul(anchors, references, transpose_b=True) / self.temperature
        is_positive, is_negative = pairs.masks()
        totals = masked_logsumexp(logits, is_positive | is_negative, axis=1)
        positive = tf.cast(pairs.positive, logits.dtype)
        own = tf.math.divide_no_nan(tf.reduce_sum(logits * positive, axis=1), tf.reduce_sum(positive, axis=1))
        has_both = pairs.complete()
        return mean_where(tf.where(has_both, totals - own, 0.0), has_both)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "temperature": self.temperature}
