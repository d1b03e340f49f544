"""All pairs of the anchors that have both a positive and a negative."""

import tensorflow as tf

from s2sd_tf.mining.base import PairMiner, Pairs, pair_masks, register


@register("lifted")
class Lifted(PairMiner):
    """All pairs of the anchors that have both a positive and a negative, as the lifted structured loss uses them (Song
    et al., "Deep Metric Learning via Lifted Structured Feature Embedding", CVPR 2016, eq. 4). Other rows are empty.
    """

    def pairs(self, distances: tf.Tensor, labels: tf.Tensor, *, dim: int, seed: tf.Tensor) -> Pairs:
        del distances, dim, seed
        pairs = pair_masks(labels)
        complete = pairs.complete()[:, None]
        return Pairs(pairs.positive & complete, pairs.negative & complete)
