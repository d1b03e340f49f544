"""Similarity distillation: the KL divergence between in-batch similarity structures, fused or composed."""

from s2sd_tf.distillation.similarity_kl import similarity_kl

__all__ = ["similarity_kl"]
