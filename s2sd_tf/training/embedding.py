"""Saved models, and what they make of images."""

import numpy as np
import tensorflow as tf

from s2sd_tf.data import evaluation_batches
from s2sd_tf.export import load_model

__all__ = ["embed", "load_model", "predict"]


def embed(model, images, preprocessing):
    """Embeddings float32 `(n, embedding_dim)` of an `ImageSet`, in its order."""
    return predict(model, evaluation_batches(images, preprocessing))


def predict(model, batches):
    """`model.predict` of a `tf.data.Dataset` of images; of a model under a strategy by this process's first device.

    (Keras 3 cannot predict under MultiWorkerMirroredStrategy.)
    """
    if model.distribute_strategy.num_replicas_in_sync == 1:
        return model.predict(batches, verbose=0)
    compute = tf.function(lambda images: model(images, training=False), reduce_retracing=True)
    return np.concatenate([compute(images).numpy() for images in batches])
