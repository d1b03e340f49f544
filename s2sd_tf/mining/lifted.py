"""All pairs of complete anchors."""

import tensorflow as tf

from s2sd_tf.mining.base import PairMiner, Pairs, pair_masks, register


@register("lifted")
class Lifted(PairMiner):
    """All pairs of the anchors that have both a positive and a negative, as a lifted structure takes them (Song et al.,
    "Deep Metric Learning via Lifted Structured Feature Embedding", CVPR 2016, eq. 4). Rows of other anchors are empty.
    """

    def pairs(self, distances, labels, *, dim, seed):
        del distances, dim, seed
        positive, negative = pair_masks(labels)
        complete = tf.reduce_any(positive, axis=1, keepdims=True) & tf.reduce_any(negative, axis=1, keepdims=True)
        return Pairs(positive & complete, negative & complete)
