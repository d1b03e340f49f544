"""From a config to a run, and from runs to a comparison."""

from s2sd_tf.training.config import default_config, preset_config, resolve
from s2sd_tf.training.protocol import published_config
from s2sd_tf.training.run import load_run, train

__all__ = ["default_config", "load_run", "preset_config", "published_config", "resolve", "train"]
