"""Computes embeddings."""

import numpy as np
import tensorflow as tf

from s2sd_tf import progress
from s2sd_tf.data import ImageSet, Preprocessing, evaluation_batches
from s2sd_tf.data.image_files import naming_unreadable
from s2sd_tf.keras_compat import LAYERS_NEED_AUTOGRAPH, keras


def embed(model: keras.Model, images: ImageSet, preprocessing: Preprocessing) -> np.ndarray:
    """Embeddings of images, in their order; float32 `(n, embedding_dim)`."""
    with naming_unreadable(images):
        return predict(model, evaluation_batches(images, preprocessing))


def predict(model: keras.Model, batches: tf.data.Dataset) -> np.ndarray:
    """Outputs of the model for batches of images, as `model.predict`, with a progress bar on a terminal.

    With several replicas, the first device of this process computes all of them, because Keras 3 cannot predict under
    MultiWorkerMirroredStrategy.
    """
    total = int(tf.data.experimental.cardinality(batches))
    with progress.steps(total if total >= 0 else None, "Embedding", "batch") as bar:
        if model.distribute_strategy.num_replicas_in_sync == 1:
            update = keras.callbacks.LambdaCallback(on_predict_batch_end=lambda batch, logs=None: bar.update())
            return model.predict(batches, verbose=0, callbacks=[update])

        @tf.function(reduce_retracing=True, autograph=LAYERS_NEED_AUTOGRAPH)
        def compute(images):
            return model(images, training=False)

        parts = []
        for images in batches:
            parts.append(compute(images).numpy())
            bar.update()
        return np.concatenate(parts)
