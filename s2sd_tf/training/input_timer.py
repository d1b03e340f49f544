"""How long a training step waits for its images."""

import time
import weakref

import tensorflow as tf
from absl import logging

from s2sd_tf.keras_compat import keras

# Share of the time from which on the input is called the limit.
_LIMIT = 0.3


class InputTimer(keras.callbacks.Callback):
    """Tells in the log, after every epoch, where training waits for its images.

    Args:
        batches: `tf.data.Dataset`.
        batch_size: int, images a batch.

    Attributes:
        batches: the same dataset, which counts how long every batch was waited for.
        waited: seconds of waiting in the present epoch.
    """

    def __init__(self, batches, batch_size):
        super().__init__()
        self.batch_size = batch_size
        self.waited = 0.0
        self.count = 0
        # A zip asks its datasets one after the other: the first tells when a batch was asked for.
        # (Python's clock, as TensorFlow's is refused where runs are deterministic.)
        asked = tf.data.Dataset.range(1).repeat().map(lambda _: tf.numpy_function(time.monotonic, [], tf.float64))
        # TensorFlow never lets go of a function that it calls back.
        this = weakref.ref(self)

        def waited(since):
            this()._add(time.monotonic() - since)
            return True

        def delivered(asked, batch):
            done = tf.numpy_function(waited, [asked], tf.bool)
            with tf.control_dependencies([done]):
                return tf.nest.map_structure(tf.identity, batch)

        self.batches = tf.data.Dataset.zip((asked, batches)).map(delivered)
        self.batches = self.batches.apply(tf.data.experimental.assert_cardinality(batches.cardinality()))

    def _add(self, seconds):
        self.waited += seconds
        self.count += 1

    def on_epoch_begin(self, epoch, logs=None):
        self.waited, self.count = 0.0, 0
        self._begin = time.monotonic()

    # The last batch's end and not the epoch's, whose evaluations take no batches.
    def on_train_batch_end(self, batch, logs=None):
        self._end = time.monotonic()

    def on_epoch_end(self, epoch, logs=None):
        seconds = self._end - self._begin
        share = min(1.0, self.waited / seconds)
        if share >= _LIMIT:
            logging.warning(
                "Epoch %d: %.0f%% of the time was spent waiting for images (%.0f images/s): reading and decoding are "
                "the limit. More cores help, and smaller images in shards (s2sd-shards).",
                epoch + 1,
                100 * share,
                self.batch_size * self.count / seconds,
            )
