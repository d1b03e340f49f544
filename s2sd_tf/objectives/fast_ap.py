"""FastAP loss."""

from typing import Any

import tensorflow as tf

from s2sd_tf.checks import checked_int
from s2sd_tf.mining.base import Pairs
from s2sd_tf.objectives.base import PairObjective, mean_where, register, squared_distances


@register("fast_ap")
class FastAP(PairObjective):
    """FastAP loss: a differentiable 1 - average precision (Cakir et al., "Deep Metric Learning to Rank", CVPR 2019).

    Average precision comes from histograms of the squared distances in [0, 4], to which each pair is added by linear
    interpolation. With h+_j positives in bin j, and H+_j positives and H_j pairs of any kind in bins up to j, the loss
    is the mean over the anchors that have both a positive and a negative of

        1 - 1 / N+ sum_j h+_j H+_j / H_j

    Args:
        bins: >= 1, number of histogram intervals; there are `bins` + 1 nodes.
        **kwargs: arguments of `PairObjective`.
    """

    formula = "mean_a 1 - 1/N+ sum_j h+_j H+_j / H_j"
    paper = "Cakir et al., CVPR 2019"
    cost = "B^2"

    def __init__(self, bins: int = 10, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        checked_int("bins", bins, 1)
        self.bins = bins

    def compute_pairs(self, anchors: tf.Tensor, references: tf.Tensor, pairs: Pairs) -> tf.Tensor:
        positions = tf.clip_by_value(squared_distances(anchors, references), 0.0, 4.0) * (self.bins / 4.0)
        positive, negative = (tf.cast(mask, positions.dtype) for mask in pairs)
        positives, negatives = cumulative_histograms(positions, positive, negative, self.bins + 1)
        counts = positives - tf.pad(positives[:, :-1], [[0, 0], [1, 0]])
        precision = tf.reduce_sum(counts * tf.math.divide_no_nan(positives, positives + negatives), axis=1)
        has_both = pairs.complete()
        return mean_where(1.0 - tf.math.divide_no_nan(precision, tf.reduce_sum(positive, axis=1)), has_both)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "bins": self.bins}


def cumulative_histograms(
    positions: tf.Tensor, positive: tf.Tensor, negative: tf.Tensor, nodes: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """Computes each row's cumulative histograms of positives and negatives, with linear interpolation between nodes.

    Args:
        positions: float `(n, m)` in `[0, nodes - 1]`.
        positive, negative: `(n, m)`, 1 for an entry that counts, else 0.
        nodes: number of nodes.

    Returns:
        Two tensors `(n, nodes)`, for positives and negatives: column j is the sum of the row's shares in nodes 0 to j.
    """

    # TensorFlow's own gradient would keep several matrices per node, although an entry changes the count of only one.
    @tf.custom_gradient
    def histograms(values):
        columns = []
        for node in range(nodes):
            # The share in nodes 0 to j falls from 1 to 0 between j and j + 1.
            share = tf.clip_by_value(node + 1.0 - values, 0.0, 1.0)
            columns.append((tf.reduce_sum(share * positive, axis=1), tf.reduce_sum(share * negative, axis=1)))

        def gradient(of_positives, of_negatives):
            node = tf.cast(values, tf.int32)
            slopes = positive * tf.gather(of_positives, node, batch_dims=1)
            return -slopes - negative * tf.gather(of_negatives, node, batch_dims=1)

        return tuple(tf.stack(column, axis=1) for column in zip(*columns)), gradient

    return histograms(positions)
