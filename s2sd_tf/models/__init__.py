"""The S2SD model and its parts: heads, poolings, presets, a regulariser, and backbones by name."""

from s2sd_tf.models import backbones
from s2sd_tf.models.adversarial_separation import AdversarialSeparation
from s2sd_tf.models.heads import EmbeddingHead, TargetHead
from s2sd_tf.models.pooling import GeM
from s2sd_tf.models.presets import PRESETS, preset
from s2sd_tf.models.s2sd_model import S2SDModel

__all__ = [
    "PRESETS",
    "AdversarialSeparation",
    "EmbeddingHead",
    "GeM",
    "S2SDModel",
    "TargetHead",
    "backbones",
    "preset",
]
