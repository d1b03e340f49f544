"""Recall@k surrogate loss."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from s2sd_tf.checks import check_above, checked_int
from s2sd_tf.mining.base import Pairs
from s2sd_tf.objectives.base import PairObjective, mean_where, register


@register("recall_at_k_surrogate")
class RecallAtKSurrogate(PairObjective):
    """Recall@k surrogate (Patel et al., "Recall@k Surrogate Loss with Large Batches and Similarity Mixup", CVPR 2022).

    The loss is 1 - recall@k with both step functions replaced by sigmoids, averaged over `ks` and over the anchors that
    have both a positive and a negative. With the soft rank of a positive p among all other images z,

        rank_p = 1 + sum_(z != p) sigmoid((s_az - s_ap) / rank_temperature)
        recall@k = min(1, sum_p sigmoid((k - rank_p) / temperature) / min(k, number of positives))

    The anchor itself is not ranked; in the published code it counts in every rank.

    Args:
        ks: each >= 1.
        temperature: > 0, of the sigmoid around k.
        rank_temperature: > 0, of the sigmoids in the ranks.
        **kwargs: arguments of `PairObjective`.
    """

    formula = "mean_a,k 1 - sum_p sigmoid((k - rank_p)/T1) / min(k, N+), rank_p = 1 + sum_z sigmoid((s_az - s_ap)/T2)"
    paper = "Patel et al., CVPR 2022"
    cost = "B^2 memory; B^2 M time, M images in the largest class"

    def __init__(
        self,
        ks: Sequence[int] = (1, 2, 4, 8, 16),
        temperature: float = 1.0,
        rank_temperature: float = 0.01,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not isinstance(ks, (list, tuple)) or not ks:
            raise ValueError(f"ks: expected ints >= 1, at least one. Received: {ks!r}")
        self.ks = tuple(checked_int("ks", k, 1) for k in ks)
        check_above("temperature", temperature, 0)
        check_above("rank_temperature", rank_temperature, 0)
        self.temperature = temperature
        self.rank_temperature = rank_temperature

    def compute_pairs(self, anchors: tf.Tensor, references: tf.Tensor, pairs: Pairs) -> tf.Tensor:
        similarities = tf.matmul(anchors, references, transpose_b=True)
        has_both = pairs.complete()
        counted = pairs.positive & has_both[:, None]
        ranks = soft_ranks(similarities, counted, pairs.positive | pairs.negative, self.rank_temperature)
        positive = tf.cast(counted, ranks.dtype)
        count = tf.reduce_sum(positive, axis=1)
        loss = tf.zeros_like(count)
        for k in self.ks:
            found = tf.reduce_sum(tf.sigmoid((k - ranks) / self.temperature) * positive, axis=1)
            loss += 1.0 - tf.minimum(tf.math.divide_no_nan(found, tf.minimum(count, float(k))), 1.0)
        return mean_where(loss / len(self.ks), has_both)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "ks": list(self.ks),
            "temperature": self.temperature,
            "rank_temperature": self.rank_temperature,
        }


def soft_ranks(similarities: tf.Tensor, positive: tf.Tensor, ranked: tf.Tensor, temperature: float) -> tf.Tensor:
    """Computes the soft rank of each positive among the ranked entries of its row.

    This handles one positive of each row at a time, and the gradient recomputes each turn, so memory is that of a few
    `(n, m)` matrices rather than a few per positive.

    Args:
        similarities: float `(n, m)`.
        positive, ranked: bool `(n, m)`; every positive is also ranked.
        temperature: > 0.

    Returns:
        `(n, m)`: 1 + sum over the other ranked z of sigmoid((s_z - s_p) / temperature) at positives, 0 elsewhere.
    """
    order = tf.cumsum(tf.cast(positive, tf.int32), axis=1)
    turns = tf.reduce_max(order)

    def at_turn(turn):
        """Returns a mask of the positives of this turn, at most one per row."""
        return positive & tf.equal(order, turn + 1)

    def value_at(mask, values):
        return tf.reduce_sum(tf.where(mask, values, 0.0), axis=1, keepdims=True)

    def above(mask, values):
        """Returns in (0, 1) how far each ranked entry is above the positive; 0 for the positive itself."""
        higher = tf.sigmoid((values - value_at(mask, values)) / temperature)
        return tf.where(ranked & tf.logical_not(mask), higher, 0.0)

    @tf.custom_gradient
    def ranks(values):
        def step(turn, result):
            mask = at_turn(turn)
            rank = 1.0 + tf.reduce_sum(above(mask, values), axis=1, keepdims=True)
            return turn + 1, tf.where(mask, rank, result)

        _, result = tf.while_loop(lambda turn, _: turn < turns, step, [0, tf.zeros_like(values)])

        def gradient(upstream):
            def back(turn, total):
                mask = at_turn(turn)
                higher = above(mask, values)
                slopes = value_at(mask, upstream) * higher * (1.0 - higher) / temperature
                own = tf.reduce_sum(slopes, axis=1, keepdims=True)
                return turn + 1, total + tf.where(mask, -own, slopes)

            return tf.while_loop(lambda turn, _: turn < turns, back, [0, tf.zeros_like(values)])[1]

        return result, gradient

    return ranks(similarities)
