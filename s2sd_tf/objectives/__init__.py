"""Metric-learning objectives: Keras layers that map `(embeddings, labels)` to a scalar loss."""

from typing import TYPE_CHECKING

from s2sd_tf.objectives.base import (
    GradedPairObjective,
    Objective,
    PairObjective,
    ProxyObjective,
    TupleObjective,
    get,
    lookup,
    names,
    register,
    settings,
)
from s2sd_tf.objectives.keras_loss import ObjectiveHolder, as_keras_loss
from s2sd_tf.registry import import_modules

# Importing the modules registers their objectives; each class is then public here under its own name.
import_modules(__name__, __path__)
_classes = {cls.__name__: cls for cls in map(lookup, names())}
globals().update(_classes)

if TYPE_CHECKING:

    def __getattr__(name: str) -> type[Objective]: ...


__all__ = [
    "GradedPairObjective",
    "Objective",
    "ObjectiveHolder",
    "PairObjective",
    "ProxyObjective",
    "TupleObjective",
    "as_keras_loss",
    "get",
    "lookup",
    "names",
    "register",
    "settings",
    *_classes,
]
