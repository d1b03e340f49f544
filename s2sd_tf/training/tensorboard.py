"""Writes the TensorBoard logs of a run."""

import os
from collections.abc import Mapping, Sequence

from s2sd_tf.files import local_path, reporting_out_of_space
from s2sd_tf.keras_compat import keras


class TensorBoard(keras.callbacks.TensorBoard):
    """Keras's TensorBoard callback; it raises `OutOfSpace` if the disk is full.

    Args:
        workdir: work directory of the run.
        profile: `(first, last)`, the steps to profile, counted from 1 since this process started to train; empty: none.
    """

    def __init__(self, workdir: str | os.PathLike, profile: Sequence[int] = ()) -> None:
        self.folder = os.path.join(local_path("workdir", workdir), "tensorboard")
        super().__init__(self.folder, write_graph=False, profile_batch=tuple(profile) or 0)

    def on_epoch_end(self, epoch: int, logs: Mapping[str, float] | None = None) -> None:
        with reporting_out_of_space(self.folder):
            super().on_epoch_end(epoch, logs)

    def on_train_begin(self, logs: Mapping[str, float] | None = None) -> None:
        with reporting_out_of_space(self.folder):
            super().on_train_begin(logs)

    def on_train_end(self, logs: Mapping[str, float] | None = None) -> None:
        with reporting_out_of_space(self.folder):
            super().on_train_end(logs)
