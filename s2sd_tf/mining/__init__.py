"""Miners choose the triplets or pairs of a batch that an objective uses."""

from typing import TYPE_CHECKING

from s2sd_tf.mining.base import Miner, PairMiner, Pairs, Triplets, get, lookup, names, register, settings
from s2sd_tf.registry import import_modules

# Importing the modules registers their miners; each class is then public here under its own name.
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
