"""A Keras callback that evaluates retrieval on unseen classes during training."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from s2sd_tf.checks import check_choice, checked_int
from s2sd_tf.evaluation.metrics import check_answerable, checked_ks, retrieval_metrics
from s2sd_tf.evaluation.neighbors import METHODS
from s2sd_tf.evaluation.scann_searcher import import_scann
from s2sd_tf.keras_compat import keras
from s2sd_tf.labels import label_array


class RetrievalEvaluation(keras.callbacks.Callback):
    """Evaluates retrieval every n epochs and adds the metrics to the epoch's logs.

    The logs then have `val_recall@1`, `val_map@r` and so on, for the progress bar, TensorBoard, `History` and the
    callbacks after this one in the list.

    Args:
        images: what `model.predict` takes: an array `(n, height, width, channels)`, or a finite `tf.data.Dataset` of
            image batches in the order of `labels`.
        labels: integer array `(n,)`.
        every: number of epochs between evaluations, >= 1. The end of `fit` is always evaluated: if training stops early
            (`EarlyStopping`), with the final weights, and the metrics are added to the `History` after the last epoch.
        prefix: goes before the names of the metrics.
        ks: ints >= 1, for recall@k.
        method: "exact" or "scann".
        gallery_images, gallery_labels: the gallery to search, in the same form. By default the images are searched
            among themselves.

    Attributes:
        latest: dict of the metrics of the last evaluation, without the prefix; None before the first.
    """

    def __init__(
        self,
        images: tf.Tensor | np.ndarray | tf.data.Dataset,
        labels: tf.Tensor | np.ndarray,
        every: int = 1,
        prefix: str = "val_",
        ks: Sequence[int] = (1, 2, 4, 8),
        method: str = "exact",
        gallery_images: tf.Tensor | np.ndarray | tf.data.Dataset | None = None,
        gallery_labels: tf.Tensor | np.ndarray | None = None,
    ) -> None:
        super().__init__()
        if (gallery_images is None) != (gallery_labels is None):
            raise ValueError("gallery_labels: expected labels if gallery_images is given, else None")
        self.images = images
        self.labels = label_array("labels", labels)
        self.every = checked_int("every", every, 1)
        self.prefix = prefix
        self.ks = tuple(checked_ks("ks", ks))
        check_choice("method", method, METHODS)
        if method == "scann":
            # Before the training.
            import_scann()
        self.method = method
        self.gallery_images = gallery_images
        self.gallery_labels = None if gallery_labels is None else label_array("gallery_labels", gallery_labels)
        for argument, there, known in (
            ("labels", images, self.labels),
            ("gallery_labels", gallery_images, self.gallery_labels),
        ):
            shape = getattr(there, "shape", None)
            if known is not None and shape is not None and len(known) != shape[0]:
                raise ValueError(f"{argument}: expected one for each of {shape[0]} images. Received: {len(known)}")
        self.latest: dict[str, float] | None = None
        self._is_due_at_end = False

    def is_due(self, epoch: int, epochs: int) -> bool:
        """Whether epoch number `epoch`, counted from 0, of `epochs` in total is evaluated."""
        return (epoch + 1) % self.every == 0 or epoch + 1 == epochs

    def evaluate(self, embed: Callable[[Any], tf.Tensor | np.ndarray]) -> dict[str, float]:
        """Evaluates now and returns the metrics by their names in the logs. For training loops without `fit`.

        Args:
            embed: function from `images` or `gallery_images` to embeddings `(n, dim)`.
        """
        gallery = None if self.gallery_images is None else embed(self.gallery_images)
        metrics = retrieval_metrics(
            embed(self.images), self.labels, gallery, self.gallery_labels, ks=self.ks, method=self.method
        )
        self.latest = {name: value for name, value in metrics.items() if isinstance(value, float)}
        return {self.prefix + name: value for name, value in self.latest.items()}

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Raises ValueError if no query has a positive."""
        check_answerable("labels", self.labels, self.gallery_labels)
        self._is_due_at_end = False

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        if self._is_due_at_end:
            found = self._evaluate_model()
            for name, value in found.items():
                self.model.history.history.setdefault(name, []).append(value)
            if logs is not None:
                logs.update(found)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        due = self.is_due(epoch, self.params.get("epochs"))
        self._is_due_at_end = not due
        if due:
            found = self._evaluate_model()
            if logs is not None:
                logs.update(found)

    def _evaluate_model(self):
        # Keras 2's `predict` replaces the history, which `fit` returns.
        history = getattr(self.model, "history", None)
        found = self.evaluate(lambda images: self.model.predict(images, verbose=0))
        self.model.history = history
        return found
