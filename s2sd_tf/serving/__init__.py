"""Embeds images with an exported encoder, in this process or on many machines, and writes searchable embeddings."""

from s2sd_tf.serving.embed import Item, embed_images, list_images
from s2sd_tf.serving.encoder import Encoder

__all__ = ["Encoder", "Item", "embed_images", "list_images"]
