"""Miners: which triplets or pairs of a batch an objective looks at."""

from s2sd_tf.mining.all_triplets import AllTriplets
from s2sd_tf.mining.base import Miner, PairMiner, Pairs, Triplets, get, lookup, names, register, settings
from s2sd_tf.mining.distance_weighted import DistanceWeighted
from s2sd_tf.mining.easy_positive import EasyPositive
from s2sd_tf.mining.hard import Hard
from s2sd_tf.mining.intra_random import IntraRandom
from s2sd_tf.mining.lifted import Lifted
from s2sd_tf.mining.n_pair import NPair
from s2sd_tf.mining.parametric import Parametric
from s2sd_tf.mining.random import Random
from s2sd_tf.mining.rho_distance import RhoDistance
from s2sd_tf.mining.semi_hard import SemiHard
from s2sd_tf.mining.soft_hard import SoftHard

__all__ = [
    "AllTriplets",
    "DistanceWeighted",
    "EasyPositive",
    "Hard",
    "IntraRandom",
    "Lifted",
    "Miner",
    "NPair",
    "PairMiner",
    "Pairs",
    "Parametric",
    "Random",
    "RhoDistance",
    "SemiHard",
    "SoftHard",
    "Triplets",
    "get",
    "lookup",
    "names",
    "register",
    "settings",
]
