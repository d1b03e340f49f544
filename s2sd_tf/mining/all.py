"""Every valid triplet of a batch."""

import tensorflow as tf

from s2sd_tf.mining.base import Miner, Pairs, Triplets, pair_masks, register


@register("all")
class AllTriplets(Miner):
    """Every triplet (anchor, positive, negative) of the batch, as batch^3 entries with the valid ones marked.

    The triplet, SNR and margin objectives do not call it: they have closed forms over all triplets, in at most
    O(batch^2 log batch). Pair objectives call `pairs` instead.
    """

    def __call__(self, distances: tf.Tensor, labels: tf.Tensor, *, dim: int, seed: tf.Tensor) -> Triplets:
        del distances, dim, seed
        positive, negative = pair_masks(labels)
        batch = tf.shape(labels)[0]
        positions = tf.range(batch, dtype=tf.int32)
        grid = tf.meshgrid(positions, positions, positions, indexing="ij")
        valid = positive[:, :, None] & negative[:, None, :]
        anchors, positives, negatives = (tf.reshape(axis, [-1]) for axis in grid)
        return Triplets(anchors, positives, negatives, tf.reshape(valid, [-1]))

    def pairs(self, distances: tf.Tensor, labels: tf.Tensor, *, dim: int, seed: tf.Tensor) -> Pairs:
        """All pairs of the batch, including those of anchors without a triplet (`Lifted` leaves these out)."""
        del distances, dim, seed
        return pair_masks(labels)
