"""Semi-hard negatives."""

import tensorflow as tf

from s2sd_tf.mining.base import Miner, one_negative_a_positive, pair_masks, ranked, register


@register("semi_hard")
class SemiHard(Miner):
    """For every ordered positive pair the nearest negative that is farther than the positive (FaceNet, Schroff et al.,
    CVPR 2015, section 3.2); where there is none, the farthest negative.
    """

    def __call__(self, distances, labels, *, dim, seed):
        del dim, seed
        positive, negative = pair_masks(labels)
        order, rising = ranked(distances, negative)
        nearer = tf.searchsorted(rising, distances, side="right")
        count = tf.reduce_sum(tf.cast(negative, tf.int32), axis=1, keepdims=True)
        rank = tf.clip_by_value(nearer, 0, tf.maximum(count - 1, 0))
        return one_negative_a_positive(tf.gather(order, rank, batch_dims=1), positive & (count > 0))
