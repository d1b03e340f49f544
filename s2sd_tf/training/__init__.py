"""Trains a model from a config: the config, the run and its work directory."""

from s2sd_tf.training.collapse_alarm import CollapseAlarm
from s2sd_tf.training.config import automatic, default_config, preset_config, resolve
from s2sd_tf.training.datasets import load_split
from s2sd_tf.training.finite_loss import NonFiniteLoss
from s2sd_tf.training.interruption import Interrupted
from s2sd_tf.training.protocol import published_config
from s2sd_tf.training.run import train
from s2sd_tf.training.workdir import load_run

__all__ = [
    "CollapseAlarm",
    "Interrupted",
    "NonFiniteLoss",
    "automatic",
    "default_config",
    "load_run",
    "load_split",
    "preset_config",
    "published_config",
    "resolve",
    "train",
]
