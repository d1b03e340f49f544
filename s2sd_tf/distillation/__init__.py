"""Similarity distillation: the KL divergence between in-batch similarities, as a fused op or in TensorFlow ops."""

from s2sd_tf.distillation.similarity_kl import similarity_kl

__all__ = ["similarity_kl"]
