"""Triplet loss."""

import tensorflow as tf

from s2sd_tf.mining.base import pair_masks
from s2sd_tf.objectives.base import TupleObjective, mean_where, register, squared_distances


@register("triplet")
class Triplet(TupleObjective):
    """Triplet loss on squared Euclidean distances of l2-normalised embeddings (FaceNet, Schroff et al., CVPR 2015,
    eq. 3), mean over the triplets: max(0, d(a, p)^2 - d(a, n)^2 + margin).

    Args:
        margin: float >= 0.
        miner: name or `mining.Miner`. With "all" every valid triplet counts, in O(batch^2 log batch).
        **kwargs: `seed` of the miner, and arguments of `Objective`.
    """

    def __init__(self, margin=0.2, miner="distance_weighted", **kwargs):
        super().__init__(miner=miner, **kwargs)
        if not margin >= 0:
            raise ValueError(f"margin: expected a number >= 0. Received: {margin}")
        self.margin = margin

    def compute_triplets(self, embeddings, labels, triplets):
        del labels
        distances = squared_distances(embeddings)
        to_positive = tf.gather_nd(distances, tf.stack([triplets.anchor, triplets.positive], axis=1))
        to_negative = tf.gather_nd(distances, tf.stack([triplets.anchor, triplets.negative], axis=1))
        return mean_where(tf.nn.relu(to_positive - to_negative + self.margin), triplets.valid)

    def compute_all(self, embeddings, labels):
        # For an anchor and a positive, the active negatives are those nearer than d(a, p)^2 + margin: with the
        # negatives sorted and summed up once an anchor, a pair needs one binary search instead of a batch-long row.
        distances = squared_distances(embeddings)
        positive, negative = pair_masks(labels)
        counts = tf.reduce_sum(tf.cast(negative, tf.int32), axis=1, keepdims=True)
        top = tf.stop_gradient(tf.reduce_max(distances)) + self.margin + 1.0
        ranked = tf.sort(tf.where(negative, distances, top), axis=1)
        limits = distances + self.margin
        active = tf.searchsorted(tf.stop_gradient(ranked), tf.stop_gradient(limits), side="left")
        active = tf.minimum(active, counts)
        sums = tf.concat([tf.zeros_like(ranked[:, :1]), tf.cumsum(ranked, axis=1)], axis=1)
        active_sums = tf.gather(sums, active, batch_dims=1)
        losses = tf.cast(active, distances.dtype) * limits - active_sums
        triplets = tf.cast(positive, distances.dtype) * tf.cast(counts, distances.dtype)
        total = tf.reduce_sum(tf.where(positive, losses, 0.0))
        return tf.math.divide_no_nan(total, tf.reduce_sum(triplets))

    def get_config(self):
        return {**super().get_config(), "margin": self.margin}
