"""Miners: which triplets or pairs of a batch an objective looks at."""

from typing import TYPE_CHECKING

from s2sd_tf.mining.base import Miner, PairMiner, Pairs, Triplets, get, lookup, names, register, settings
from s2sd_tf.registry import import_modules

# The modules of this package register their miners; the class of each is public here by its name.
import_modules(__name__, __path__)
_classes = {cls.__name__: cls for cls in map(lookup, names())}
globals().update(_classes)

if TYPE_CHECKING:

    def __getattr__(name: str) -> type[Miner]: ...


__all__ = [
    "Miner",
    "PairMiner",
    "Pairs",
    "Triplets",
    "get",
    "lookup",
    "names",
    "register",
    "settings",
    *_classes,
]
