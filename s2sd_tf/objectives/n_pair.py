"""N-pair loss, and its softmax over positive pairs."""

from typing import Any

import tensorflow as tf

from s2sd_tf.checks import check_above
from s2sd_tf.mining.base import Miner, Pairs
from s2sd_tf.objectives.base import LengthPenalizedObjective, masked_logsumexp, mean_where, register


@register("n_pair")
class NPair(LengthPenalizedObjective):
    """N-pair loss (Sohn, "Improved Deep Metric Learning with Multi-class N-pair Loss Objective", NIPS 2016).

    The mean over the positive pairs of anchors that have a negative, with dot products s, of

        log(1 + sum_n exp((s_an - s_ap) / temperature))

    Args:
        temperature: > 0; 1 in the paper, which is weak for embeddings of unit length.
        miner: name or `mining.Miner`. "n_pair" chooses one pair per class; negatives are the other classes' positives.
        normalize, l2_weight: see `LengthPenalizedObjective`; the paper does not normalise.
        **kwargs: arguments of `PairObjective`.
    """

    formula = "mean_ap log(1 + sum_n exp(s_an - s_ap))"
    paper = "Sohn, NIPS 2016"
    cost = "B^2"

    def __init__(self, temperature: float = 1.0, miner: str | Miner = "n_pair", **kwargs: Any) -> None:
        super().__init__(miner=miner, **kwargs)
        check_above("temperature", temperature, 0)
        self.temperature = temperature

    def compute_pairs(self, anchors: tf.Tensor, references: tf.Tensor, pairs: Pairs) -> tf.Tensor:
        return pair_softmax(anchors, references, pairs, self.temperature)

    def compute_one_pair_per_class(self, anchors: tf.Tensor, positives: tf.Tensor, valid: tf.Tensor) -> tf.Tensor:
        # Only the diagonal holds positive pairs.
        logits = tf.matmul(anchors, positives, transpose_b=True) / self.temperature
        others = valid & tf.logical_not(tf.eye(tf.shape(valid)[0], dtype=tf.bool))
        negatives = masked_logsumexp(logits, others, axis=1)
        return mean_where(tf.nn.softplus(negatives - tf.linalg.diag_part(logits)), valid)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "temperature": self.temperature}


def pair_softmax(anchors: tf.Tensor, references: tf.Tensor, pairs: Pairs, temperature: float) -> tf.Tensor:
    """Computes the mean over positive pairs of log(1 + sum_n exp((s_an - s_ap) / temperature))."""
    logits = tf.matmul(anchors, references, transpose_b=True) / temperature
    # The sum over the negatives is the same for all positives of an anchor.
    negatives = masked_logsumexp(logits, pairs.negative, axis=1)[:, None]
    has_negative = tf.reduce_any(pairs.negative, axis=1, keepdims=True)
    return mean_where(tf.nn.softplus(negatives - logits), pairs.positive & has_negative)
