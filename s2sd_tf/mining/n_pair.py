"""One pair a class."""

import tensorflow as tf

from s2sd_tf.mining.base import PairMiner, Pairs, drawn_members, pair_masks, register, uniform_draws


@register("n_pair")
class NPair(PairMiner):
    """Of every class with two samples or more one anchor and one positive, drawn uniformly; negatives of an anchor are
    the positives of the other classes (Sohn, "Improved Deep Metric Learning with Multi-class N-pair Loss Objective",
    NIPS 2016, section 3.2).

    The row of an anchor has exactly one positive; other rows are empty. With fewer than two such classes, and so
    without negatives, all rows are.
    """

    def pairs(self, distances, labels, *, dim, seed):
        del dim
        positive, negative = pair_masks(labels)
        batch = tf.shape(labels)[0]
        positions = tf.range(batch, dtype=tf.int32)
        draws = uniform_draws([2, batch, 1], seed, distances.dtype)
        same = tf.equal(labels[:, None], labels[None, :])
        # All samples of a class draw its anchor, with the draw of the first of them.
        first = tf.argmax(tf.cast(same, tf.int32), axis=1, output_type=tf.int32)
        is_anchor = drawn_members(same, tf.gather(draws[0], first)) == positions[:, None]
        chosen = is_anchor & positive & (drawn_members(positive, draws[1]) == positions[None, :])
        others = negative & tf.reduce_any(chosen, axis=1, keepdims=True) & tf.reduce_any(chosen, axis=0, keepdims=True)
        return Pairs(chosen & tf.reduce_any(others, axis=1, keepdims=True), others)
