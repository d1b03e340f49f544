"""FastAP loss."""

import tensorflow as tf

from s2sd_tf.checks import checked_int
from s2sd_tf.objectives.base import PairObjective, mean_where, register, squared_distances


@register("fast_ap")
class FastAP(PairObjective):
    """FastAP loss (Cakir et al., "Deep Metric Learning to Rank", CVPR 2019): 1 - average precision, made
    differentiable by histograms of the squared distances in [0, 4], into which every pair enters by linear
    interpolation. With h+_j positives in bin j, and H+_j positives and H_j pairs of any kind in bins up to j:

        1 - 1 / N+ sum_j h+_j H+_j / H_j

    mean over the anchors that have both a positive and a negative.

    Args:
        bins: int >= 1, intervals of the histograms; they have `bins` + 1 nodes.
        **kwargs: arguments of `PairObjective`.
    """

    formula = "mean_a 1 - 1/N+ sum_j h+_j H+_j / H_j"
    paper = "Cakir et al., CVPR 2019"
    cost = "B^2"

    def __init__(self, bins=10, **kwargs):
        super().__init__(**kwargs)
        checked_int("bins", bins, 1)
        self.bins = bins

    def compute_pairs(self, anchors, references, pairs):
        positions = tf.clip_by_value(squared_distances(anchors, references), 0.0, 4.0) * (self.bins / 4.0)
        positive, negative = (tf.cast(mask, positions.dtype) for mask in pairs)
        positives, negatives = cumulative_histograms(positions, positive, negative, self.bins + 1)
        counts = positives - tf.pad(positives[:, :-1], [[0, 0], [1, 0]])
        precision = tf.reduce_sum(counts * tf.math.divide_no_nan(positives, positives + negatives), axis=1)
        has_both = pairs.complete()
        return mean_where(1.0 - tf.math.divide_no_nan(precision, tf.reduce_sum(positive, axis=1)), has_both)

    def get_config(self):
        return {**super().get_config(), "bins": self.bins}


def cumulative_histograms(positions, positive, negative, nodes):
    """Cumulative histograms of each row, of positives and of negatives, with linear interpolation between nodes.

    Args:
        positions: float `(n, m)` in `[0, nodes - 1]`.
        positive, negative: `(n, m)`, 1 for an entry that counts, 0 for one that does not.
        nodes: int.

    Returns:
        Two tensors `(n, nodes)`: column j is the sum over the row of the shares that lie in nodes 0 to j.
    """

    # By itself TensorFlow would keep some matrices for every node; but an entry moves one node's count only.
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
