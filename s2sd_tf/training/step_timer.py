"""Where the time of an epoch goes."""

import contextlib
import time
import weakref

import tensorflow as tf
from absl import logging

from s2sd_tf.keras_compat import keras

# Share of the time from which on the input is called the limit.
_LIMIT = 0.3


class StepTimer(keras.callbacks.Callback):
    """Adds to an epoch's logs where its time went, and tells where training waits for its images.

    The logs get, in seconds, "input_seconds", for which steps waited for their batches; "compute_seconds", the rest of
    the time from the first step to the last; what was measured under other names (see `measure`), of which
    "evaluation_seconds" and "checkpoint_seconds" are there always; and "images_per_second" of the steps. What comes
    after this callback in an epoch's end, as saving checkpoints does, is in the logs of the next one. Of an epoch that
    goes on after an interruption the times are those since.

    Attributes:
        waited: seconds of waiting in the present epoch.
    """

    def __init__(self):
        super().__init__()
        self._measured = {}
        self._reset()

    def timed(self, batches, images):
        """`batches`, a `tf.data.Dataset`, which counts how long every one of them was waited for.

        Args:
            batches: `tf.data.Dataset`.
            images: int, images a batch.
        """
        # A zip asks its datasets one after the other: the first tells when a batch was asked for.
        # (Python's clock, as TensorFlow's is refused where runs are deterministic.)
        asked = tf.data.Dataset.range(1).repeat().map(lambda _: tf.numpy_function(time.monotonic, [], tf.float64))
        # TensorFlow never lets go of a function that it calls back.
        this = weakref.ref(self)

        def waited(since):
            this()._add(time.monotonic() - since, images)
            return True

        def delivered(asked, batch):
            done = tf.numpy_function(waited, [asked], tf.bool)
            with tf.control_dependencies([done]):
                return tf.nest.map_structure(tf.identity, batch)

        timed = tf.data.Dataset.zip((asked, batches)).map(delivered)
        cardinality = batches.cardinality()
        if cardinality != tf.data.UNKNOWN_CARDINALITY:
            timed = timed.apply(tf.data.experimental.assert_cardinality(cardinality))
        return timed

    @contextlib.contextmanager
    def measure(self, name):
        """The time of the block goes into the logs under `name`."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self._measured[name] = self._measured.get(name, 0.0) + time.monotonic() - begin

    def report(self, epoch):
        """Tells in the log where the time of an epoch went, at the very end of it."""
        times = dict(self._logged)
        times["checkpoint_seconds"] = self._measured.get("checkpoint_seconds", 0.0)
        whole = times["compute_seconds"] + times["input_seconds"]
        share = times["input_seconds"] / whole if whole else 0.0
        told = ["compute_seconds", "input_seconds", "refresh_seconds", "evaluation_seconds", "checkpoint_seconds"]
        logging.info(
            "epoch %d: %s; %s",
            epoch + 1,
            ", ".join(f"{times[name]:.1f} s {name.removesuffix('_seconds')}" for name in told if name in times),
            "input-bound" if share >= _LIMIT else "compute-bound",
        )
        if share >= _LIMIT:
            logging.warning(
                "Epoch %d: %.0f%% of the time was spent waiting for images (%.0f images/s): reading and decoding are "
                "the limit. More cores help, and smaller images in shards (s2sd-shards).",
                epoch + 1,
                100 * share,
                times["images_per_second"],
            )

    def on_epoch_begin(self, epoch, logs=None):
        self._reset()

    # The last batch's end and not the epoch's, whose evaluations take no batches.
    def on_train_batch_end(self, batch, logs=None):
        self._end = time.monotonic()

    def on_epoch_end(self, epoch, logs=None):
        seconds = self._end - self._begin
        waited = min(self.waited, seconds)
        self._logged = {
            "input_seconds": waited,
            "compute_seconds": seconds - waited,
            "evaluation_seconds": 0.0,
            "checkpoint_seconds": 0.0,
            **self._measured,
            "images_per_second": self.images / seconds if seconds else 0.0,
        }
        self._measured = {}
        if logs is not None:
            logs.update(self._logged)

    def _add(self, seconds, images):
        self.waited += seconds
        self.images += images

    def _reset(self):
        self.waited, self.images = 0.0, 0
        self._begin = self._end = time.monotonic()
