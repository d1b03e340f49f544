"""Batch-hard triplets."""

import tensorflow as tf

from s2sd_tf.mining.base import Miner, Triplets, farthest, nearest, one_triplet_an_anchor, pair_masks, register


@register("hard")
class Hard(Miner):
    """The farthest positive and the nearest negative of each anchor (Hermans et al., "In Defense of the Triplet Loss
    for Person Re-Identification", 2017, eq. 5); the first in the batch wins a tie. Returns triplets `(batch,)`, with
    none for an anchor that lacks a positive or a negative.
    """

    def __call__(self, distances: tf.Tensor, labels: tf.Tensor, *, dim: int, seed: tf.Tensor) -> Triplets:
        del dim, seed
        positive, negative = pair_masks(labels)
        valid = tf.reduce_any(positive, axis=1) & tf.reduce_any(negative, axis=1)
        return one_triplet_an_anchor(farthest(distances, positive), nearest(distances, negative), valid)
