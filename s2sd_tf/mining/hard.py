"""Batch-hard triplets."""

import tensorflow as tf

from s2sd_tf.mining.base import Miner, farthest, nearest, one_triplet_an_anchor, pair_masks, register


@register("hard")
class Hard(Miner):
    """For every anchor its farthest positive and its nearest negative (Hermans et al., "In Defense of the Triplet Loss
    for Person Re-Identification", 2017, eq. 5); the first in the batch of equally far ones. Triplets `(batch,)`, none
    for an anchor without a positive or without a negative.
    """

    def __call__(self, distances, labels, *, dim, seed):
        del dim, seed
        positive, negative = pair_masks(labels)
        valid = tf.reduce_any(positive, axis=1) & tf.reduce_any(negative, axis=1)
        return one_triplet_an_anchor(farthest(distances, positive), nearest(distances, negative), valid)
