"""Encoder, index, ids and labels as one SavedModel: images in, what is like them out."""

import os

import tensorflow as tf

from s2sd_tf.checks import checked_int
from s2sd_tf.evaluation.scann_index import index_for_graphs
from s2sd_tf.evaluation.scann_searcher import import_scann
from s2sd_tf.export.saved_model import load_saved_model
from s2sd_tf.files import check_replaceable, replacing

_NEEDS = """Loading this SavedModel takes TensorFlow {tensorflow} and ScaNN's operations for it, imported before:

    import tensorflow as tf
    from scann.scann_ops.py import scann_ops
    model = tf.saved_model.load("<this folder>")

"Op type not registered 'Scann>...'" says that they were not: pip install scann, 1.4.2 for TensorFlow 2.20, 1.3.0 for
2.15.
"""


def export_retrieval(encoder, index, path, k=10):
    """Writes a SavedModel that finds the k nearest of an index's items for images.

    Its signatures give `{"ids", "labels"}`, strings `(batch, k)`, and `"scores"`, float32 `(batch, k)`: cosine
    similarities, or minus the Euclidean distances. Where there are no more, the id is empty and the score -inf.

    - "serving_default": `images`, float32 `(batch, h, w, channels)` of any size, white being 1;
    - "encoded_images": `encoded_images`, strings `(batch,)`, each an encoded PNG, JPEG, BMP or GIF image;
    - "embeddings": `embeddings`, float32 `(batch, dim)`.

    Loading it takes TensorFlow and ScaNN alone; `load_retrieval` says so where the latter is missing. The index is
    built anew with TensorFlow's operations, which know no spilling, and is tuned to the same recall.

    Args:
        encoder: folder of a SavedModel of `export_encoder`.
        index: `evaluation.Index`; an exact one is searched by brute force.
        path: folder to write, whole or not at all.
        k: int >= 1; an index of fewer items gives as many as it has.

    Raises:
        ValueError: an encoder of another dimension than the index, or a folder that is there and is something else.
        ImportError: ScaNN is missing or does not fit TensorFlow.
    """
    k = checked_int("k", k, 1)
    check_replaceable("path", path, "saved_model.pb")
    module = _Retrieval(load_saved_model("encoder", encoder), index, min(k, len(index)))
    with replacing(path) as temporary:
        tf.saved_model.save(module, temporary, signatures=module.signatures())
        os.makedirs(os.path.join(temporary, "assets.extra"), exist_ok=True)
        with open(os.path.join(temporary, "assets.extra", "README.txt"), "w") as file:
            file.write(_NEEDS.format(tensorflow=tf.__version__))


def load_retrieval(path):
    """What `export_retrieval` wrote, loaded: call its `signatures`.

    Raises:
        FileNotFoundError: no SavedModel there.
        ValueError: one that is broken, or that `load_saved_model` refuses.
        ImportError: ScaNN's operations are missing or do not fit TensorFlow; the message says what to install.
    """
    if not tf.saved_model.contains_saved_model(os.fspath(path)):
        raise FileNotFoundError(f"path: expected the folder of a SavedModel. Received: {path!r}")
    import_scann("scann.scann_ops.py.scann_ops")
    return load_saved_model("path", path)


class _Retrieval(tf.Module):
    def __init__(self, encoder, index, k):
        super().__init__()
        self._ops = import_scann("scann.scann_ops.py.scann_ops")
        self._encoder = encoder
        self._k = k
        found = encoder.signatures["encoded_images"].structured_outputs["embedding"].shape[-1]
        if found != index.dim:
            raise ValueError(f"index: expected one of the encoder's dimension {found}. Received: {index.dim}")
        searcher, self._metric, self._numbers = index_for_graphs(index, k)
        self._state = searcher.serialize_to_module()
        # Variables, as constants of a graph may take 2 GiB at most.
        self._ids = tf.Variable(index.ids, trainable=False, dtype=tf.string)
        self._labels = tf.Variable(index.labels or [""] * len(index), trainable=False, dtype=tf.string)

    def signatures(self):
        """The functions to export, by name."""
        images = self._encoder.signatures["serving_default"].structured_input_signature[1]["images"]

        @tf.function(input_signature=[tf.TensorSpec(images.shape, tf.float32, "images")])
        def serving_default(images):
            return self._search(self._encoder.signatures["serving_default"](images=images)["embedding"])

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "encoded_images")])
        def encoded_images(encoded_images):
            embedded = self._encoder.signatures["encoded_images"](encoded_images=encoded_images)
            return self._search(embedded["embedding"])

        dim = self._encoder.signatures["encoded_images"].structured_outputs["embedding"].shape[-1]

        @tf.function(input_signature=[tf.TensorSpec([None, dim], tf.float32, "embeddings")])
        def embeddings(embeddings):
            return self._search(embeddings)

        return {f.__name__: f for f in (serving_default, encoded_images, embeddings)} | {
            "serving_default": serving_default
        }

    def _search(self, embeddings):
        if self._metric == "cosine":
            embeddings = tf.math.l2_normalize(embeddings, axis=1, epsilon=1e-12)
        searcher = self._ops.searcher_from_module(self._state)
        indices, scores = searcher.search_batched_parallel(embeddings, final_num_neighbors=self._k, **self._numbers)
        indices, scores = tf.cast(indices, tf.int64), tf.cast(scores, tf.float32)
        there = tf.math.is_finite(scores) & (indices >= 0) & (indices < tf.size(self._ids, tf.int64))
        if self._metric == "euclidean":
            scores = -tf.sqrt(tf.maximum(scores, 0.0))
        found = tf.where(there, indices, 0)
        return {
            "ids": tf.where(there, tf.gather(self._ids, found), ""),
            "labels": tf.where(there, tf.gather(self._labels, found), ""),
            "scores": tf.where(there, scores, float("-inf")),
        }
