"""Keeps a sampler's stored embeddings up to date while a model trains."""

import weakref

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from s2sd_tf.checks import checked_int
from s2sd_tf.data.batches import batches_at
from s2sd_tf.keras_compat import keras


class RefreshStorage(keras.callbacks.Callback):
    """Embeds the training images with the model as it is at the start of every epoch, for a sampler with a storage.

    What calling the model gives, l2-normalised, goes into `sampler.storage`: of all images, or of the epoch's sample
    where not all fit into the sampler's `max_mib`. It costs one forward pass over the images an epoch, with a progress
    bar for more than 10,000; they are read and preprocessed anew each time, some batches at a time. Beside the storage
    and these, images of an `ImageSet` that holds pixels or encoded bytes are in memory a second time, in a copy that
    `tf.data` reads from; `training_batches` without a cache shares it.

    The batches of a pass over `training_batches` are those of the epoch that the storage was last refreshed for. A pass
    waits for a refresh that has begun, and the other way round. `fit` again goes on with the next epoch.

    The embeddings are a function of the model, `seed` and the epoch: a run that is resumed with the epoch's model and
    `start_epoch` draws the batches it would have drawn. That takes batches that are not read ahead into the next epoch,
    see `training_batches`.

    Args:
        sampler: `samplers.Sampler` with a storage.
        images, preprocessing, seed: as handed to `training_batches`.
        start_epoch: int >= 0, the epoch of the first refresh.
        batch_size: int >= 1, images embedded at a time.

    Raises:
        ValueError: a bad argument, a sampler without a storage; in `fit`, a model whose output is not `(batch, dim)` or
            not finite.
    """

    def __init__(self, sampler, images, preprocessing, seed=0, start_epoch=0, batch_size=256):
        super().__init__()
        if getattr(sampler, "storage", None) is None:
            raise ValueError(f"sampler: expected one that stores embeddings. Received: {sampler!r}")
        self.sampler = sampler
        self.images = images
        self.preprocessing = preprocessing
        self.seed = checked_int("seed", seed, 0)
        self.epoch = checked_int("start_epoch", start_epoch, 0)
        batch_size = checked_int("batch_size", batch_size, 1)
        self._positions = np.zeros([0], np.int64)
        # TensorFlow never lets go of the function; the images, the model and the storage should not stay with it.
        this = weakref.ref(self)
        self._batches = batches_at(lambda: this()._positions, images, preprocessing, batch_size)
        self._embedder = None, None

    def refresh(self, model, epoch=None):
        """Embeds the images with `model` for an epoch.

        `fit` does it by itself. It is for loops without `fit`, which hand over the number of each epoch; and for Keras
        3 under a distribution strategy, before the first `fit`: that takes a batch before it calls any callback.

        Args:
            model: function of images `(batch, height, width, channels)` and `training` to embeddings `(batch, dim)`.
            epoch: int >= 0. Default: the one that comes next in `fit`.
        """
        if epoch is not None:
            self.epoch = checked_int("epoch", epoch, 0)
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

            self.sampler.storage.refill(self._positions, shape[1], embeddings(), self.epoch)

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
