"""Backbones by name: models from images to feature maps, with optional pretrained weights and frozen BatchNorm."""

from s2sd_tf.models.backbones.conv_net import conv_blocks
from s2sd_tf.models.backbones.frozen_norm import freeze_batch_norm
from s2sd_tf.models.backbones.registry import describe, get, is_installed, names, normalization
from s2sd_tf.models.backbones.state_dict import read_state_dict

__all__ = [
    "conv_blocks",
    "describe",
    "freeze_batch_norm",
    "get",
    "is_installed",
    "names",
    "normalization",
    "read_state_dict",
]
