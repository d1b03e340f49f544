"""Callback that keeps the embeddings stored by a sampler up to date during training."""

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from s2sd_tf.checks import checked_int
from s2sd_tf.data.batches import batches_at
from s2sd_tf.data.image_set import ImageSet
from s2sd_tf.data.preprocessing import Preprocessing
from s2sd_tf.data.samplers import StorageSampler
from s2sd_tf.keras_compat import LAYERS_NEED_AUTOGRAPH, keras


class RefreshStorage(keras.callbacks.Callback):
    """Embeds the training images with the current model at the start of every epoch, for a sampler that needs it.

    The model's outputs are l2-normalised and stored in `sampler.storage`: for all images, or for a sample that is drawn
    for the epoch if not all fit into the sampler's `max_mib`. Each epoch costs one forward pass over the images, with a
    progress bar for more than 10,000 images. They are read and preprocessed again each time, a few batches at a time.
    For an `ImageSet` of pixels or encoded bytes, `tf.data` reads from a second copy of the images in memory, which
    `training_batches` without a cache shares.

    A pass over `training_batches` has the batches of the epoch that the storage was last refreshed for. Passes and
    refreshes wait for each other. Another `fit` continues with the next epoch.

    The embeddings depend only on the model, `seed` and the epoch. So a run that is resumed with the epoch's model and
    `start_epoch` draws the same batches, provided that batches are not read ahead into the next epoch, see
    `training_batches`.

    Args:
        sampler: a sampler with a storage.
        images, preprocessing, seed: the same as for `training_batches`.
        start_epoch: int >= 0, the epoch of the first refresh.
        batch_size: int >= 1, the number of images embedded at a time.

    Raises:
        ValueError: a bad argument, or a sampler without a storage; in `fit`, a model whose output is not
            `(batch, dim)` or not finite.
    """

    def __init__(
        self,
        sampler: StorageSampler,
        images: ImageSet,
        preprocessing: Preprocessing,
        seed: int = 0,
        start_epoch: int = 0,
        batch_size: int = 256,
    ) -> None:
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
        # TensorFlow never frees the function, which must not keep the images, the model and the storage alive.
        this: Callable[[], Any] = weakref.ref(self)
        self._batches = batches_at(lambda: this()._positions, images, preprocessing, batch_size)
        self._embedder = None, None

    def refresh(self, model: Callable[..., tf.Tensor], epoch: int | None = None) -> None:
        """Embeds the images with `model` for an epoch.

        `fit` calls it. Call it yourself in loops without `fit`, with the number of each epoch; and before the first
        `fit` of Keras 3 under a distribution strategy, which takes a batch before it calls any callback.

        Args:
            model: takes images `(batch, height, width, channels)` and `training`, returns embeddings `(batch, dim)`.
            epoch: int >= 0. Default: the next epoch of `fit`.
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

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self.refresh(self.model)

    # Not in on_epoch_begin: Keras 2 and distribution strategies may draw the epoch's batches before it.
    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self.epoch += 1
        if epoch + 1 != self.params.get("epochs"):
            self.refresh(self.model)

    def _embed_function(self, model):
        """A graph of `model`, traced once per model and not at every epoch."""
        if self._embedder[0] is not model:
            signature = [tf.TensorSpec([None, *self.preprocessing.output_shape], tf.float32)]

            @tf.function(input_signature=signature, autograph=LAYERS_NEED_AUTOGRAPH)
            def embed(images):
                return tf.cast(model(images, training=False), tf.float32)

            self._embedder = model, embed
        return self._embedder[1]
