"""What TensorBoard shows of a run."""

import os

from s2sd_tf.files import telling_out_of_space
from s2sd_tf.keras_compat import keras


class TensorBoard(keras.callbacks.TensorBoard):
    """Keras's, whose errors say where there is no room to write.

    Args:
        workdir: folder of the run.
        profile: `(first, last)`, steps since the run was called that are profiled, from 1; empty: none.
    """

    def __init__(self, workdir, profile=()):
        self.folder = os.path.join(workdir, "tensorboard")
        super().__init__(self.folder, write_graph=False, profile_batch=tuple(profile) or 0)

    def on_epoch_end(self, epoch, logs=None):
        with telling_out_of_space(self.folder):
            super().on_epoch_end(epoch, logs)

    def on_train_begin(self, logs=None):
        with telling_out_of_space(self.folder):
            super().on_train_begin(logs)

    def on_train_end(self, logs=None):
        with telling_out_of_space(self.folder):
            super().on_train_end(logs)
