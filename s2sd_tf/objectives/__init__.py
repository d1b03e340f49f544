"""Metric-learning objectives: Keras layers from `(embeddings, labels)` to a scalar loss."""

from s2sd_tf.objectives.base import Objective, TupleObjective, get, lookup, names, register, settings
from s2sd_tf.objectives.margin import Margin
from s2sd_tf.objectives.multi_similarity import MultiSimilarity
from s2sd_tf.objectives.proxy_anchor import ProxyAnchor
from s2sd_tf.objectives.triplet import Triplet

__all__ = [
    "Margin",
    "MultiSimilarity",
    "Objective",
    "ProxyAnchor",
    "Triplet",
    "TupleObjective",
    "get",
    "lookup",
    "names",
    "register",
    "settings",
]
