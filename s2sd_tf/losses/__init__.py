"""The S2SD loss on embeddings, without a backbone, and the schedule of its weights."""

from s2sd_tf.losses.s2sd_loss import S2SDLoss
from s2sd_tf.losses.schedules import distillation_weight

__all__ = ["S2SDLoss", "distillation_weight"]
