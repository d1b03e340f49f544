"""Histogram loss."""

from typing import Any

import tensorflow as tf

from s2sd_tf.checks import checked_int
from s2sd_tf.mining.base import Pairs
from s2sd_tf.objectives.base import PairObjective, register


@register("histogram")
class Histogram(PairObjective):
    """Histogram loss (Ustinova and Lempitsky, "Learning Deep Embeddings with Histogram Loss", NIPS 2016).

    The probability that a random negative pair is more similar than a random positive pair. It is computed from
    histograms h+ and h- of the cosine similarities of positive and negative pairs, to which each pair is added by
    linear interpolation:

        sum_r h-_r sum_(q <= r) h+_q

    The loss is 0 if the batch has no positive or no negative pair.

    Args:
        bins: >= 2, number of histogram nodes on [-1, 1].
        **kwargs: arguments of `PairObjective`.
    """

    formula = "sum_r h-_r sum_(q <= r) h+_q"
    paper = "Ustinova and Lempitsky, NIPS 2016"
    cost = "B^2"

    def __init__(self, bins: int = 65, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        checked_int("bins", bins, 2)
        self.bins = bins

    def compute_pairs(self, anchors: tf.Tensor, references: tf.Tensor, pairs: Pairs) -> tf.Tensor:
        similarities = tf.matmul(anchors, references, transpose_b=True)
        positions = (tf.clip_by_value(similarities, -1.0, 1.0) + 1.0) * (self.bins - 1) / 2.0
        lower = tf.minimum(tf.floor(tf.stop_gradient(positions)), self.bins - 2.0)
        above = positions - lower
        # One pass for both histograms: positives go into bins 0 to `bins` - 1, negatives into the next `bins`. Other
        # pairs get negative numbers, which are dropped.
        offset = tf.where(pairs.positive, 0, tf.where(pairs.negative, self.bins, -2 * self.bins))
        # Similarities that are not finite cast to arbitrary integers, which must not become valid bins.
        nodes = tf.reshape(tf.clip_by_value(tf.cast(lower, tf.int32), 0, self.bins - 2) + offset, [-1])
        above = tf.reshape(above, [-1])
        counts = tf.math.unsorted_segment_sum(1.0 - above, nodes, 2 * self.bins)
        counts += tf.math.unsorted_segment_sum(above, nodes + 1, 2 * self.bins)
        counts = tf.reshape(counts, [2, self.bins])
        positive, negative = tf.unstack(
            tf.math.divide_no_nan(counts, tf.stop_gradient(tf.reduce_sum(counts, axis=1, keepdims=True)))
        )
        return tf.reduce_sum(negative * tf.cumsum(positive))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "bins": self.bins}
