"""One pair per class."""

import tensorflow as tf

from s2sd_tf.labels import exact_labels
from s2sd_tf.mining.base import PairMiner, Pairs, pair_masks, register, uniform_draws


@register("n_pair")
class NPair(PairMiner):
    """One anchor and one positive, drawn uniformly, from each class with at least two samples; an anchor's negatives
    are the positives of the other classes (Sohn, "Improved Deep Metric Learning with Multi-class N-pair Loss
    Objective", NIPS 2016, section 3.2).

    An anchor's row has exactly one positive; other rows are empty. If fewer than two classes have two samples there are
    no negatives, and all rows are empty.
    """

    def one_pair_per_class(self, labels: tf.Tensor, seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Draws the pairs and returns their positions in the batch.

        Returns:
            `(anchors, positives, valid)`: int32, int32 and bool `(batch // 2,)`, the largest possible number of pairs.
            Where `valid` is False there is no pair.
        """
        labels, _ = exact_labels("labels", labels)
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

    def pairs(self, distances: tf.Tensor, labels: tf.Tensor, *, dim: int, seed: tf.Tensor) -> Pairs:
        del distances, dim
        anchors, positives, valid = self.one_pair_per_class(labels, seed)
        batch = tf.shape(labels)[0]
        cells = tf.scatter_nd(tf.stack([anchors, positives], axis=1), tf.cast(valid, tf.int32), [batch, batch])
        chosen = cells > 0
        others = tf.reduce_any(chosen, axis=1, keepdims=True) & tf.reduce_any(chosen, axis=0, keepdims=True)
        return Pairs(chosen, others & pair_masks(labels).negative)
