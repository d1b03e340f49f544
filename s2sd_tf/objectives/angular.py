"""Angular loss."""

import math
from typing import Any

import tensorflow as tf

from s2sd_tf.checks import check_above, check_at_least, check_number
from s2sd_tf.mining.base import Miner, Pairs
from s2sd_tf.objectives.base import PairObjective, mean_where, register
from s2sd_tf.objectives.n_pair import pair_softmax


@register("angular")
class Angular(PairObjective):
    """Angular loss plus N-pair loss (Wang et al., "Deep Metric Learning with Angular Loss", ICCV 2017).

    The mean over the positive pairs of anchors that have a negative, with t = tan(alpha)^2, of

        log(1 + sum_n exp((s_an - s_ap) / temperature))
        + angular_weight * log(1 + sum_n exp(4 t (x_a + x_p) x_n - 2 (1 + t) s_ap))

    Args:
        alpha: in (0, 60], upper bound in degrees of the angle at the negative.
        angular_weight: >= 0, the paper's lambda.
        temperature: > 0, of the N-pair term; 1 in the paper.
        miner: name or `mining.Miner`. "n_pair" chooses one pair per class; negatives are the other classes' positives.
        **kwargs: arguments of `PairObjective`. A memory of m embeddings takes m^2 numbers here.
    """

    formula = "n_pair + w mean_ap log(1 + sum_n exp(4 t (x_a + x_p) x_n - 2 (1 + t) s_ap)), t = tan^2 alpha"
    paper = "Wang et al., ICCV 2017"
    cost = "B^2, and B^3 multiplications"

    def __init__(
        self,
        alpha: float = 45.0,
        angular_weight: float = 2.0,
        temperature: float = 1.0,
        miner: str | Miner = "n_pair",
        **kwargs: Any,
    ) -> None:
        super().__init__(miner=miner, **kwargs)
        check_number("alpha", alpha, "degrees in (0, 60]")
        if not 0 < alpha <= 60:
            raise ValueError(f"alpha: expected degrees in (0, 60]. Received: {alpha!r}")
        check_at_least("angular_weight", angular_weight, 0)
        check_above("temperature", temperature, 0)
        self.alpha = alpha
        self.angular_weight = angular_weight
        self.temperature = temperature

    def compute_pairs(self, anchors: tf.Tensor, references: tf.Tensor, pairs: Pairs) -> tf.Tensor:
        loss = pair_softmax(anchors, references, pairs, self.temperature)
        tangent = math.tan(math.radians(self.alpha)) ** 2
        similarities = tf.matmul(anchors, references, transpose_b=True)
        to_anchor = 4.0 * tangent * similarities
        to_positive = 4.0 * tangent * tf.matmul(references, references, transpose_b=True)
        # The sum over n of exp(u_an) exp(v_pn) is a matrix product. Each factor is shifted by its row maxima, so it
        # cannot overflow; at 60 degrees and unit length the terms stay above 1e-21.
        lowest = tf.constant(-1e30, similarities.dtype)
        row_maxima = tf.stop_gradient(tf.reduce_max(tf.where(pairs.negative, to_anchor, lowest), axis=1, keepdims=True))
        column_maxima = tf.stop_gradient(tf.reduce_max(to_positive, axis=1, keepdims=True))
        factors = tf.exp(tf.where(pairs.negative, to_anchor - row_maxima, lowest))
        sums = tf.matmul(factors, tf.exp(to_positive - column_maxima), transpose_b=True)
        logs = tf.math.log(tf.maximum(sums, 1e-37)) + row_maxima + tf.transpose(column_maxima)
        has_negative = tf.reduce_any(pairs.negative, axis=1, keepdims=True)
        valid = pairs.positive & has_negative
        angles = tf.nn.softplus(tf.where(valid, logs - 2.0 * (1.0 + tangent) * similarities, lowest))
        return loss + self.angular_weight * mean_where(angles, valid)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "alpha": self.alpha,
            "angular_weight": self.angular_weight,
            "temperature": self.temperature,
        }
