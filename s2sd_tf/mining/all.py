"""Every valid triplet of a batch."""

import tensorflow as tf

from s2sd_tf.mining.base import Miner, Triplets, pair_masks, register


@register("all")
class AllTriplets(Miner):
    """All (anchor, positive, negative) of a batch: batch^3 entries, of which the valid ones are marked.

    The triplet and margin objectives have closed forms for all triplets in O(batch^2 log batch) and do not call it; nor
    do objectives over pairs, which take `pairs`.
    """

    def __call__(self, distances, labels, *, dim, seed):
        del distances, dim, seed
        positive, negative = pair_masks(labels)
        batch = tf.shape(labels)[0]
        positions = tf.range(batch, dtype=tf.int32)
        grid = tf.meshgrid(positions, positions, positions, indexing="ij")
        valid = positive[:, :, None] & negative[:, None, :]
        return Triplets(*(tf.reshape(axis, [-1]) for axis in grid), tf.reshape(valid, [-1]))

    def pairs(self, distances, labels, *, dim, seed):
        """All pairs of the batch, those of anchors without a triplet too (`Lifted` leaves them out)."""
        del distances, dim, seed
        return pair_masks(labels)
