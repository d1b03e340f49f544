"""Random hard triplets."""

import tensorflow as tf

from s2sd_tf.mining.base import (
    Miner,
    Triplets,
    drawn_members,
    farthest,
    nearest,
    one_triplet_an_anchor,
    pair_masks,
    register,
    uniform_draws,
)


@register("soft_hard")
class SoftHard(Miner):
    """A random hard positive and a random hard negative of each anchor: a positive drawn uniformly from those farther
    than its nearest negative and, independently, a negative drawn uniformly from those nearer than its farthest
    positive (soft-hard mining of Roth et al., "Revisiting Training Strategies and Generalization Performance in Deep
    Metric Learning", ICML 2020).

    If no positive is farther than a negative, the anchor has neither kind. It then gets its farthest positive and its
    nearest negative, where the published code draws any. Returns triplets `(batch,)`, with none for an anchor that
    lacks a positive or a negative.
    """

    def __call__(self, distances: tf.Tensor, labels: tf.Tensor, *, dim: int, seed: tf.Tensor) -> Triplets:
        del dim
        positive, negative = pair_masks(labels)
        farthest_positive = farthest(distances, positive)
        nearest_negative = nearest(distances, negative)
        farther = positive & (distances > tf.gather(distances, nearest_negative, batch_dims=1)[:, None])
        nearer = negative & (distances < tf.gather(distances, farthest_positive, batch_dims=1)[:, None])
        draws = uniform_draws([2, tf.shape(labels)[0], 1], seed, distances.dtype)
        valid = tf.reduce_any(positive, axis=1) & tf.reduce_any(negative, axis=1)
        return one_triplet_an_anchor(
            tf.where(tf.reduce_any(farther, axis=1), drawn_members(farther, draws[0])[:, 0], farthest_positive),
            tf.where(tf.reduce_any(nearer, axis=1), drawn_members(nearer, draws[1])[:, 0], nearest_negative),
            valid,
        )
