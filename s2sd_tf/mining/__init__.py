"""Miners: which triplets or pairs of a batch an objective looks at."""

from s2sd_tf.mining.all_triplets import AllTriplets
from s2sd_tf.mining.base import Miner, PairMiner, Pairs, Triplets, get, names, register
from s2sd_tf.mining.distance_weighted import DistanceWeighted
from s2sd_tf.mining.semi_hard import SemiHard

__all__ = [
    "AllTriplets",
    "DistanceWeighted",
    "Miner",
    "PairMiner",
    "Pairs",
    "SemiHard",
    "Triplets",
    "get",
    "names",
    "register",
]
