"""Keeps a sampler's stored embeddings up to date while a model trains."""

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from s2sd_tf.data.batches import batches_at
from s2sd_tf.keras_compat import keras


class RefreshStorage(keras.callbacks.Callback):
    """Embeds the training images with the model as it is at the start of every epoch, for a sampler with a storage.

    What calling the model gives, l2-normalised, goes into `sampler.storage`: of all images, or of the epoch's sample
    where not all fit into the sampler's `max_mib`. The images are streamed: beside the storage only some batches are in
    memory. It costs one forward pass over the images an epoch, with a progress bar for more than 10,000.

    The embeddings are a function of the model, `seed` and the epoch: a run that is resumed with the epoch's model and
    `start_epoch` draws the batches it would have drawn.

    Args:
        sampler: `samplers.Sampler` with a storage.
        images, preprocessing, seed, start_epoch: as handed to `training_batches`.
        batch_size: int >= 1, images embedded at a time.

    Raises:
        ValueError: a sampler without a storage; in `fit`, a model whose output is not `(batch, dim)` or not finite.
    """

    def __init__(self, sampler, images, preprocessing, seed=0, start_epoch=0, batch_size=256):
        super().__init__()
        if getattr(sampler, "storage", None) is None:
            raise ValueError(f"sampler: expected one that stores embeddings. Received: {sampler!r}")
        self.sampler = sampler
        self.images = images
        self.preprocessing = preprocessing
        self.seed = seed
        self.epoch = start_epoch
        self._positions = np.zeros([0], np.int64)
        self._batches = batches_at(lambda: self._positions, images, preprocessing, batch_size)
        self._embedder = None, None

    def refresh(self, model):
        """Embeds the images with `model` for the epoch that comes next.

        `fit` does it by itself. It is for batches that are drawn without `fit`; and under a distribution strategy for
        Keras 3, which draws a batch before it calls any callback.
        """
        embed = self._embed_function(model)
        shape = embed(tf.zeros([1, *self.preprocessing.output_shape])).shape
        if shape.rank != 2:
            raise ValueError(f"model: expected an output of shape (batch, dim). Received: {shape}")
        self._positions = self.sampler.images_to_store(self.images.labels, shape[1], self.seed, self.epoch)
        count = len(self._positions)
        with tqdm(
            total=count, desc="Embedding", unit="image", leave=False, disable=None if count > 10_000 else True
        ) as bar:

            def embeddings():
                for batch in self._batches:
                    yield embed(batch).numpy()
                    bar.update(len(batch))

            self.sampler.storage.refill(self._positions, shape[1], embeddings())

    def on_train_begin(self, logs=None):
        self.refresh(self.model)

    # Not at an epoch's begin: Keras 2, and any distribution strategy, may draw its batches before.
    def on_epoch_end(self, epoch, logs=None):
        self.epoch += 1
        if epoch + 1 != self.params.get("epochs"):
            self.refresh(self.model)

    def _embed_function(self, model):
        """A graph of `model`, traced once for a model and not at every epoch."""
        if self._embedder[0] is not model:
            signature = [tf.TensorSpec([None, *self.preprocessing.output_shape], tf.float32)]
            function = tf.function(lambda images: tf.cast(model(images, training=False), tf.float32), signature)
            self._embedder = model, function
        return self._embedder[1]
