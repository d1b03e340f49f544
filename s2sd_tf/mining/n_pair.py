"""One pair a class."""

import tensorflow as tf

from s2sd_tf.mining.base import PairMiner, Pairs, pair_masks, register, uniform_draws


@register("n_pair")
class NPair(PairMiner):
    """Of every class with two samples or more one anchor and one positive, drawn uniformly; negatives of an anchor are
    the positives of the other classes (Sohn, "Improved Deep Metric Learning with Multi-class N-pair Loss Objective",
    NIPS 2016, section 3.2).

    The row of an anchor has exactly one positive; other rows are empty. With fewer than two such classes, and so
    without negatives, all rows are.
    """

    def one_pair_a_class(self, labels, seed):
        """The pairs by their positions in the batch.

        Returns:
            `(anchors, positives, valid)`: int32, int32 and bool `(batch // 2,)`, as there can be no more; an entry that
            is not valid stands for no pair.
        """
        batch = tf.shape(labels)[0]
        # Shuffled and then sorted by class, the first two of each class are a random pair.
        shuffled = tf.argsort(uniform_draws(tf.shape(labels), seed, tf.float32), stable=True)
        order = tf.gather(shuffled, tf.argsort(tf.gather(labels, shuffled), stable=True))
        ranked = tf.gather(labels, order)
        as_next = tf.equal(ranked[:-1], ranked[1:])
        is_first = tf.concat([tf.ones_like(ranked[:1], tf.bool), tf.logical_not(as_next)], axis=0)
        is_pair = is_first[:-1] & as_next
        pairs_first = tf.argsort(tf.cast(tf.logical_not(is_pair), tf.int32), stable=True)[: batch // 2]
        valid = tf.gather(is_pair, pairs_first)
        valid &= tf.reduce_sum(tf.cast(valid, tf.int32)) > 1
        return tf.gather(order, pairs_first), tf.gather(order, pairs_first + 1), valid

    def pairs(self, distances, labels, *, dim, seed):
        del distances, dim
        anchors, positives, valid = self.one_pair_a_class(labels, seed)
        batch = tf.shape(labels)[0]
        cells = tf.scatter_nd(tf.stack([anchors, positives], axis=1), tf.cast(valid, tf.int32), [batch, batch])
        chosen = cells > 0
        others = tf.reduce_any(chosen, axis=1, keepdims=True) & tf.reduce_any(chosen, axis=0, keepdims=True)
        return Pairs(chosen, others & pair_masks(labels).negative)
