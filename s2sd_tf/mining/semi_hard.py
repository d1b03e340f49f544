"""Semi-hard negatives."""

import tensorflow as tf

from s2sd_tf.mining.base import Miner, Triplets, one_negative_a_positive, pair_masks, ranked, register


@register("semi_hard")
class SemiHard(Miner):
    """The nearest negative that is farther than the positive, for each ordered positive pair (FaceNet, Schroff et al.,
    CVPR 2015, section 3.2); if there is none, the farthest negative.
    """

    def __call__(self, distances: tf.Tensor, labels: tf.Tensor, *, dim: int, seed: tf.Tensor) -> Triplets:
        del dim, seed
        positive, negative = pair_masks(labels)
        order, rising = ranked(distances, negative)
        nearer = tf.searchsorted(rising, distances, side="right")
        count = tf.reduce_sum(tf.cast(negative, tf.int32), axis=1, keepdims=True)
        rank = tf.clip_by_value(nearer, 0, tf.maximum(count - 1, 0))
        return one_negative_a_positive(tf.gather(order, rank, batch_dims=1), positive & (count > 0))
