"""Retrieval on unseen classes while a model trains."""

from s2sd_tf.checks import checked_int
from s2sd_tf.evaluation.metrics import checked_ks, retrieval_metrics
from s2sd_tf.keras_compat import keras


class RetrievalEvaluation(keras.callbacks.Callback):
    """Evaluates retrieval every n epochs and adds the metrics to the epoch's logs.

    The logs then hold `val_recall@1`, `val_map@r` and so on, for the progress bar, TensorBoard, `History` and any
    callback after this one in the list.

    Args:
        images: what `model.predict` takes: an array `(n, height, width, channels)`, or a finite `tf.data.Dataset` of
            image batches in the order of `labels`.
        labels: integer array `(n,)`.
        every: int >= 1, epochs between evaluations; the last epoch of `fit` is always evaluated.
        prefix: str, goes before the names of the metrics.
        ks: ints >= 1, for recall@k.
        method: "exact" or "scann".
        gallery_images, gallery_labels: the same of what the images are searched in. Default: among themselves.

    Attributes:
        latest: the metrics of the last evaluation, without the prefix.
    """

    def __init__(
        self,
        images,
        labels,
        every=1,
        prefix="val_",
        ks=(1, 2, 4, 8),
        method="exact",
        gallery_images=None,
        gallery_labels=None,
    ):
        super().__init__()
        if (gallery_images is None) != (gallery_labels is None):
            raise ValueError("gallery_labels: expected labels with gallery_images, and only then")
        self.images = images
        self.labels = labels
        self.every = checked_int("every", every, 1)
        self.prefix = prefix
        self.ks = tuple(checked_ks("ks", ks))
        self.method = method
        self.gallery_images = gallery_images
        self.gallery_labels = gallery_labels
        self.latest = None

    def is_due(self, epoch, epochs):
        """Whether epoch `epoch` (from 0) of so many `epochs` is evaluated."""
        return (epoch + 1) % self.every == 0 or epoch + 1 == epochs

    def evaluate(self, embed):
        """The metrics by their names in the logs, for loops without `fit`.

        Args:
            embed: function from `images`, and `gallery_images`, to embeddings `(n, dim)`.
        """
        gallery = None if self.gallery_images is None else embed(self.gallery_images)
        metrics = retrieval_metrics(
            embed(self.images), self.labels, gallery, self.gallery_labels, ks=self.ks, method=self.method
        )
        self.latest = {name: value for name, value in metrics.items() if isinstance(value, float)}
        return {self.prefix + name: value for name, value in self.latest.items()}

    def on_epoch_end(self, epoch, logs=None):
        if self.is_due(epoch, self.params.get("epochs")):
            found = self.evaluate(lambda images: self.model.predict(images, verbose=0))
            if logs is not None:
                logs.update(found)
