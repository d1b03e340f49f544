"""Samplers: they choose the images of each batch of an epoch."""

from s2sd_tf.data.samplers.base import Sampler, get, lookup, names, register, settings
from s2sd_tf.data.samplers.class_balanced import ClassBalanced
from s2sd_tf.data.samplers.coreset import D2Coreset, GreedyCoreset
from s2sd_tf.data.samplers.fully_random import FullyRandom
from s2sd_tf.data.samplers.matching import DistanceMatching, FidMatching
from s2sd_tf.data.samplers.storage import EmbeddingStorage, StorageSampler

__all__ = [
    "ClassBalanced",
    "D2Coreset",
    "DistanceMatching",
    "EmbeddingStorage",
    "FidMatching",
    "FullyRandom",
    "GreedyCoreset",
    "Sampler",
    "StorageSampler",
    "get",
    "lookup",
    "names",
    "register",
    "settings",
]
