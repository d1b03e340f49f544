"""Random negatives."""

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


@register("random")
class Random(Miner):
    """One negative for each ordered positive pair, drawn uniformly from the anchor's negatives (the random tuple mining
    that Roth et al., "Revisiting Training Strategies and Generalization Performance in Deep Metric Learning", ICML
    2020, use as a baseline). Returns triplets `(batch^2,)`, with none for an anchor without a negative.
    """

    def __call__(self, distances: tf.Tensor, labels: tf.Tensor, *, dim: int, seed: tf.Tensor) -> Triplets:
        del dim
        positive, negative = pair_masks(labels)
        choice = drawn_members(negative, uniform_draws(tf.shape(distances), seed, distances.dtype))
        return one_negative_a_positive(choice, positive & tf.reduce_any(negative, axis=1, keepdims=True))
