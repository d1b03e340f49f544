"""What the metrics of an evaluation mean, in a sentence each, for the places that print them."""

from collections.abc import Iterable

# By the name of the metric without its "@k". Those with a value at several k or rates stand for all of them.
_MEANINGS = {
    "recall": "recall@k: share of queries with an image of their class among the k nearest",
    "precision": "precision@k: share of the k nearest that are of the query's class",
    "r_precision": "r_precision: share of the R nearest that are of the query's class, which has R other images",
    "map": "map@r: for every image of the query's class among the R nearest, the share of such images up to it, "
    "summed and divided by R; 100% only if these images come first. map@k: the same among the k nearest, divided by k "
    "or R, whichever is smaller",
    "mrr": "mrr: 1 / rank of the first image of the query's class, averaged",
    "intra": "intra: mean distance of two images of one class; smaller is tighter",
    "inter": "inter: mean distance of the means of two classes; larger is wider apart",
    "ratio": "ratio: intra / inter, the mean distance of two images of one class over that of the means of two "
    "classes; the smaller, the better the classes are separated",
    "rho": "rho: how unevenly the embedding uses its dimensions: 0 if all are used equally, larger if a few dominate, "
    "infinite if one is not used at all. Embeddings that generalise to new classes tend to have a small rho",
    "nmi": "nmi: how much k-means clusters tell about the classes, from 0 (nothing) to 100% (everything)",
    "ami": "ami: nmi adjusted for chance: 0 for random clusters",
    "f1": "f1: harmonic mean of two shares of pairs of images: of those in one k-means cluster, how many are of one "
    "class, and of those of one class, how many are in one cluster",
    "tar": "tar@f: share of the pairs of one class that a threshold accepts, where it accepts at most the share f of "
    "the pairs of different classes",
    "dir": "dir@f: share of queries that find their class, where at most the share f of those without one find "
    "anything",
    "threshold": "threshold@f: that threshold on the similarity",
    "eer": "eer: share of wrongly accepted and of wrongly refused pairs at the threshold where the two are equal",
    "auroc": "auroc: probability that a pair of one class is more similar than a pair of different classes",
    "average_precision": "average_precision: precision of the accepted pairs, averaged over all thresholds",
    "best_f1": "best_f1: the largest harmonic mean of precision and recall of the accepted pairs that a threshold has",
}


def meanings(names: Iterable[str]) -> list[str]:
    """Explains metrics, in the order of their names; those of one kind, such as recall@1 and recall@2, once.

    Args:
        names: names of metrics, such as "rho" or "recall@1". Others are left out.
    """
    kinds = dict.fromkeys(name.split("@")[0] for name in names)
    return [_MEANINGS[kind] for kind in kinds if kind in _MEANINGS]
