"""Multi-similarity loss."""

from typing import Any

import tensorflow as tf

from s2sd_tf.checks import check_above, check_number
from s2sd_tf.mining.base import Pairs
from s2sd_tf.objectives.base import GradedPairObjective, masked_log1p_sum_exp, mean_where, register


@register("multi_similarity")
class MultiSimilarity(GradedPairObjective):
    """Multi-similarity loss (Wang et al., CVPR 2019). With cosine similarities s, the loss of an anchor i is

        L_i = 1/alpha log(1 + sum_p exp(-alpha (s_ip - lambda_))) + 1/beta log(1 + sum_n exp(beta (s_in - lambda_)))

    Pair mining (eq. 11 and 12) keeps negatives with s_in + epsilon > min_p s_ip and positives with
    s_ip - epsilon < max_n s_in. The loss is the mean over the anchors that keep both a positive and a negative.

    With graded relevance r, positives are the pairs with r > 0 and negatives those with r < 1. The summands of the
    positives have the factor r, those of the negatives 1 - r.

    Args:
        alpha, beta: > 0, the sharpness for positives and for negatives.
        lambda_: the similarity margin.
        epsilon: the mining margin; if it is negative, all pairs count and the mean is over all anchors.
        **kwargs: arguments of `GradedPairObjective`.
    """

    formula = "mean_a 1/a log(1 + sum_p e^(-a (s_ap - l))) + 1/b log(1 + sum_n e^(b (s_an - l)))"
    paper = "Wang et al., CVPR 2019"
    cost = "B^2"

    def __init__(
        self, alpha: float = 2.0, beta: float = 40.0, lambda_: float = 0.5, epsilon: float = 0.1, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        check_above("alpha", alpha, 0)
        check_above("beta", beta, 0)
        check_number("lambda_", lambda_)
        check_number("epsilon", epsilon)
        self.alpha = alpha
        self.beta = beta
        self.lambda_ = lambda_
        self.epsilon = epsilon

    def compute_pairs(self, anchors: tf.Tensor, references: tf.Tensor, pairs: Pairs) -> tf.Tensor:
        similarities = tf.matmul(anchors, references, transpose_b=True)
        positive, negative = pairs.masks()
        kept = tf.ones(tf.shape(positive)[:1], tf.bool)
        if self.epsilon >= 0:
            top, low = similarities.dtype.max, similarities.dtype.min
            fixed = tf.stop_gradient(similarities)
            least_positive = tf.reduce_min(tf.where(positive, fixed, top), axis=1, keepdims=True)
            greatest_negative = tf.reduce_max(tf.where(negative, fixed, low), axis=1, keepdims=True)
            positive &= fixed - self.epsilon < greatest_negative
            negative &= fixed + self.epsilon > least_positive
            pairs = pairs.within(positive, negative)
            kept = pairs.complete()
        losses = masked_log1p_sum_exp(-self.alpha * (similarities - self.lambda_), pairs.positive, axis=1) / self.alpha
        losses += masked_log1p_sum_exp(self.beta * (similarities - self.lambda_), pairs.negative, axis=1) / self.beta
        return mean_where(losses, kept)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "alpha": self.alpha,
            "beta": self.beta,
            "lambda_": self.lambda_,
            "epsilon": self.epsilon,
        }
