"""All pairs of complete anchors."""

from s2sd_tf.mining.base import PairMiner, Pairs, pair_masks, register


@register("lifted")
class Lifted(PairMiner):
    """All pairs of the anchors that have both a positive and a negative, as a lifted structure takes them (Song et al.,
    "Deep Metric Learning via Lifted Structured Feature Embedding", CVPR 2016, eq. 4). Rows of other anchors are empty.
    """

    def pairs(self, distances, labels, *, dim, seed):
        del distances, dim, seed
        pairs = pair_masks(labels)
        complete = pairs.complete()[:, None]
        return Pairs(pairs.positive & complete, pairs.negative & complete)
