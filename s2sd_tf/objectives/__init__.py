"""Metric-learning objectives: Keras layers from `(embeddings, labels)` to a scalar loss."""

from s2sd_tf.objectives.addons import (
    AddonsContrastive,
    AddonsLiftedStruct,
    AddonsNpairs,
    AddonsTripletHard,
    AddonsTripletSemiHard,
)
from s2sd_tf.objectives.adversarial_separation import AdversarialSeparation
from s2sd_tf.objectives.angular import Angular
from s2sd_tf.objectives.base import (
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
from s2sd_tf.objectives.circle import Circle
from s2sd_tf.objectives.contrastive import Contrastive
from s2sd_tf.objectives.fast_ap import FastAP
from s2sd_tf.objectives.histogram import Histogram
from s2sd_tf.objectives.lifted_structure import GeneralizedLifted, LiftedStructure
from s2sd_tf.objectives.margin import Margin
from s2sd_tf.objectives.multi_similarity import MultiSimilarity
from s2sd_tf.objectives.n_pair import NPair, NTXent
from s2sd_tf.objectives.proxy_anchor import ProxyAnchor
from s2sd_tf.objectives.proxy_nca import ProxyNCA
from s2sd_tf.objectives.proxy_softmax import ArcFace, CosFace, NormalizedSoftmax
from s2sd_tf.objectives.quadruplet import Quadruplet
from s2sd_tf.objectives.recall_at_k import RecallAtKSurrogate
from s2sd_tf.objectives.signal_to_noise import SignalToNoise
from s2sd_tf.objectives.soft_triple import SoftTriple
from s2sd_tf.objectives.supcon import SupCon
from s2sd_tf.objectives.triplet import Triplet

__all__ = [
    "AddonsContrastive",
    "AddonsLiftedStruct",
    "AddonsNpairs",
    "AddonsTripletHard",
    "AddonsTripletSemiHard",
    "AdversarialSeparation",
    "Angular",
    "ArcFace",
    "Circle",
    "Contrastive",
    "CosFace",
    "FastAP",
    "GeneralizedLifted",
    "Histogram",
    "LiftedStructure",
    "Margin",
    "MultiSimilarity",
    "NPair",
    "NTXent",
    "NormalizedSoftmax",
    "Objective",
    "PairObjective",
    "ProxyAnchor",
    "ProxyNCA",
    "ProxyObjective",
    "Quadruplet",
    "RecallAtKSurrogate",
    "SignalToNoise",
    "SoftTriple",
    "SupCon",
    "Triplet",
    "TupleObjective",
    "get",
    "lookup",
    "names",
    "register",
    "settings",
]
