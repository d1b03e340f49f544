"""The callbacks of a run that are not a subject of their own: evaluation, refreshes of a storage, TensorBoard."""

import os

from s2sd_tf.data import RefreshStorage, evaluation_batches
from s2sd_tf.evaluation import RetrievalEvaluation
from s2sd_tf.files import telling_out_of_space
from s2sd_tf.keras_compat import keras
from s2sd_tf.training.averages import averaged_weights
from s2sd_tf.training.embedding import predict


def evaluation_callbacks(config, run_data, interruption, timer):
    """`Evaluation` of the held-out part, where there is one, and of the test classes."""
    parts = [("validation", "val_", None), ("test", "test_", run_data.gallery)]
    return [
        _evaluation(config, run_data, getattr(run_data, part), prefix, gallery, interruption, timer)
        for part, prefix, gallery in parts
        if getattr(run_data, part) is not None
    ]


class Evaluation(RetrievalEvaluation):
    """With the averaged weights, where the optimizer keeps averages; leaves off promptly where the run is to stop.

    Args:
        epochs: int, epochs of the run, of which a `fit` may have a part.
        interruption: `Interruption`.
        timer: `StepTimer`.
        Others: see `RetrievalEvaluation`.
    """

    def __init__(self, *args, epochs, interruption, timer, **kwargs):
        super().__init__(*args, **kwargs)
        self.epochs = epochs
        self.interruption = interruption
        self.timer = timer

    def set_params(self, params):
        super().set_params({**(params or {}), "epochs": self.epochs})

    def on_epoch_end(self, epoch, logs=None):
        with self.timer.measure("evaluation_seconds"), averaged_weights(self.model), self.interruption.prompt():
            super().on_epoch_end(epoch, logs)

    def embed(self, images):
        return predict(self.model, images)


class Refresh(RefreshStorage):
    """Leaves off promptly where the run is to stop.

    Args:
        interruption: `Interruption`.
        timer: `StepTimer`.
        Others: see `RefreshStorage`.
    """

    def __init__(self, *args, interruption, timer, **kwargs):
        super().__init__(*args, **kwargs)
        self.interruption = interruption
        self.timer = timer

    def refresh(self, model, epoch=None):
        with self.timer.measure("refresh_seconds"), self.interruption.prompt():
            super().refresh(model, epoch)


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


def _evaluation(config, run_data, images, prefix, gallery, interruption, timer):
    searched = {}
    if gallery is not None:
        searched = {
            "gallery_images": evaluation_batches(gallery, run_data.preprocessing, cache=None),
            "gallery_labels": gallery.labels,
        }
    return Evaluation(
        evaluation_batches(images, run_data.preprocessing, cache=None),
        images.labels,
        every=config.eval.every or config.train.epochs,
        prefix=prefix,
        ks=config.eval.ks,
        epochs=config.train.epochs,
        interruption=interruption,
        timer=timer,
        **searched,
    )
