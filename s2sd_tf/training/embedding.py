"""Saved models, and what they make of images."""

from s2sd_tf.data import evaluation_batches
from s2sd_tf.export import load_model

__all__ = ["embed", "load_model"]


def embed(model, images, preprocessing):
    """Embeddings float32 `(n, embedding_dim)` of an `ImageSet`, in its order."""
    return model.predict(evaluation_batches(images, preprocessing), verbose=0)
