"""Random triplets within a class."""

import tensorflow as tf

from s2sd_tf.mining.base import (
    Miner,
    Triplets,
    drawn_members,
    one_negative_a_positive,
    pair_masks,
    register,
    uniform_draws,
)


@register("intra_random")
class IntraRandom(Miner):
    """A third member of the class as the negative of each ordered positive pair, drawn uniformly, to learn structure
    within classes (Milbich et al., "DiVA: Diverse Visual Feature Aggregation for Deep Metric Learning", ECCV 2020,
    intra-class task). Returns triplets `(batch^2,)`, with none for classes of fewer than three samples.
    """

    negatives_in_class = True

    def __call__(self, distances: tf.Tensor, labels: tf.Tensor, *, dim: int, seed: tf.Tensor) -> Triplets:
        del dim
        positive, _ = pair_masks(labels)
        draws = uniform_draws(tf.shape(distances), seed, distances.dtype)
        has_third = tf.reduce_sum(tf.cast(positive, tf.int32), axis=1, keepdims=True) > 1
        return one_negative_a_positive(drawn_members(positive, draws, besides=True), positive & has_third)
