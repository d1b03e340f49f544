"""Similarity distillation: the KL between in-batch similarity structures, and the schedules of its weight."""

from s2sd_tf.distillation.schedules import distillation_weight
from s2sd_tf.distillation.similarity_kl import similarity_kl

__all__ = ["distillation_weight", "similarity_kl"]
