"""Exports encoder, index, ids and labels as one SavedModel: images in, the most similar items out."""

import os
from typing import Any

import tensorflow as tf

from s2sd_tf.checks import checked_int
from s2sd_tf.evaluation.funnel_index import FunnelIndex
from s2sd_tf.evaluation.index import Index, least_similarity
from s2sd_tf.evaluation.scann_index import index_for_graphs
from s2sd_tf.evaluation.scann_searcher import SCANN_OPS, import_scann
from s2sd_tf.export.encoder import LoadedEncoder, load_encoder
from s2sd_tf.export.saved_model import load_saved_model
from s2sd_tf.files import check_replaceable, local_path, replacing
from s2sd_tf.graph_checks import checked_finite, checked_shape, for_any_batch
from s2sd_tf.truncation import truncate

_NEEDS = """To load this SavedModel, you need TensorFlow {tensorflow} and its ScaNN operations. Import them first:

    import tensorflow as tf
    from scann.scann_ops.py import scann_ops
    model = tf.saved_model.load("<this folder>")

The error "Op type not registered 'Scann>...'" means that they were not imported. To install them: pip install scann,
version 1.4.2 for TensorFlow 2.20 or 1.3.0 for 2.15.
"""


def export_retrieval(encoder: str | os.PathLike, index: Index, path: str | os.PathLike, k: int = 10) -> None:
    """Writes a SavedModel that finds the k nearest items of an index for images.

    All signatures return `{"ids", "labels"}`, strings `(batch, k)`, and `"scores"`, float32 `(batch, k)`: cosine
    similarities or negative Euclidean distances. If fewer items are found, or fewer reach `index.min_score`, the
    remaining ids are empty and the remaining scores -inf.

    - "serving_default", "pixels" and "encoded_images" take images, and refuse some, as those of `export_encoder`;
    - "embeddings": `embeddings`, float32 `(batch, dim)`; numbers that are not finite are refused.

    Only TensorFlow and ScaNN are needed to load it; `load_retrieval` reports if ScaNN is missing. The index is rebuilt
    with ScaNN's TensorFlow operations, which do not support spilling, and tuned to the same recall.

    Args:
        encoder: SavedModel folder that `export_encoder` wrote. If it was trained with `nested_dims`, the dimension of
            the index may be any of these.
        index: the index; an exact index becomes a brute-force search. The shortlist of a funnel is found by ScaNN,
            by brute force unless it was found by ScaNN before, and ranked by the whole embedding.
        path: folder to write; a new folder, or a SavedModel to replace. It is written completely or not at all.
        k: >= 1; if the index has fewer items, all of them are returned.

    Raises:
        ValueError: `encoder` or `index` is something else, the encoder does not have the dimension of the index, or
            `path` exists and is neither an empty folder nor a SavedModel.
        ImportError: ScaNN is missing or does not fit TensorFlow.
    """
    k = checked_int("k", k, 1)
    check_replaceable("path", path, "saved_model.pb")
    if not isinstance(index, Index):
        raise ValueError(f"index: expected an index of build_index or load_index. Received: {type(index).__name__}")
    module = _Retrieval(load_encoder(encoder, index.dim, "index.dim"), index, min(k, len(index)))
    with replacing(path) as temporary:
        tf.saved_model.save(module, temporary, signatures=module.signatures())
        os.makedirs(os.path.join(temporary, "assets.extra"), exist_ok=True)
        with open(os.path.join(temporary, "assets.extra", "README.txt"), "w") as file:
            file.write(_NEEDS.format(tensorflow=tf.__version__))


def load_retrieval(path: str | os.PathLike) -> Any:
    """Loads a SavedModel that `export_retrieval` wrote; call its `signatures`.

    Raises:
        FileNotFoundError: `path` is not a SavedModel.
        ValueError: the SavedModel is another or damaged, or `load_saved_model` refuses it.
        ImportError: ScaNN's operations are missing or do not fit TensorFlow; the message says what to install.
    """
    path = local_path("path", path)
    if not tf.saved_model.contains_saved_model(path):
        raise FileNotFoundError(f"path: expected the folder of a SavedModel. Received: {path!r}")
    import_scann(SCANN_OPS)
    model = load_saved_model("path", path)
    if "embeddings" not in model.signatures:
        raise ValueError(
            f"path: expected a SavedModel of export_retrieval, with the signature 'embeddings'. Received: {path!r} "
            f"with the signatures {sorted(model.signatures)}"
        )
    return model


class _Retrieval(tf.Module):
    def __init__(self, encoder: LoadedEncoder, index: Index, k: int) -> None:
        super().__init__()
        self._ops = import_scann(SCANN_OPS)
        self._encoder = encoder.model
        self._encoders = encoder.signatures
        self._dim = encoder.dim
        self._k = k
        self._min_score = index.min_score
        # Of a funnel, the dimension and length of the shortlist.
        self._prefix, self._found = None, k
        length = index.length(k) if isinstance(index, FunnelIndex) else None
        if isinstance(index, FunnelIndex) and length is not None:
            self._prefix, self._found = index.settings["dim"], length
            self._rows = tf.Variable(index.rows(), trainable=False)
        searcher, self._metric, self._numbers = index_for_graphs(index, self._found, self._prefix)
        self._state = searcher.serialize_to_module()
        # Variables, because the constants of a graph are limited to 2 GiB.
        # Names of files may have bytes that are not UTF-8.
        ids, labels = (
            [text.encode(errors="surrogateescape") for text in texts]
            for texts in (index.ids, index.labels or [""] * len(index))
        )
        self._ids = tf.Variable(ids, trainable=False, dtype=tf.string)
        self._labels = tf.Variable(labels, trainable=False, dtype=tf.string)

    def signatures(self) -> dict[str, Any]:
        """Returns the functions to export, by signature name."""

        def through(encode):
            (spec,) = encode.structured_input_signature[1].values()

            @tf.function(input_signature=[spec], autograph=False)
            def search(images):
                return self._search(encode(**{spec.name: images})["embedding"])

            return search

        @tf.function(input_signature=[tf.TensorSpec([None, self._dim], tf.float32, "embeddings")], autograph=False)
        def embeddings(embeddings):
            expected = f"embeddings: expected shape (batch, {self._dim})"
            return self._search(checked_shape(embeddings, [None, self._dim], expected))

        return {**{name: through(encode) for name, encode in self._encoders.items()}, "embeddings": embeddings}

    def _search(self, embeddings):
        embeddings = checked_finite(embeddings, "embeddings: expected finite numbers")
        return for_any_batch(self._nearest, embeddings, [self._dim])

    def _nearest(self, embeddings):
        if self._metric == "cosine":
            # In float64, as the index's own rows: the squares of float32 numbers can be too large or small for float32.
            embeddings = tf.math.l2_normalize(tf.cast(embeddings, tf.float64), axis=1, epsilon=1e-200)
            embeddings = tf.cast(embeddings, tf.float32)
        searcher = self._ops.searcher_from_module(self._state)
        queries = embeddings if self._prefix is None else truncate(embeddings, self._prefix)
        indices, scores = searcher.search_batched_parallel(queries, final_num_neighbors=self._found, **self._numbers)
        indices, scores = tf.cast(indices, tf.int64), tf.cast(scores, tf.float32)
        there = tf.math.is_finite(scores) & (indices >= 0) & (indices < tf.size(self._ids, tf.int64))
        if self._prefix is not None:
            scores = self._whole_scores(embeddings, tf.where(there, indices, 0))
        if self._metric == "euclidean":
            scores = -tf.sqrt(tf.maximum(scores, 0.0))
        if self._min_score is not None:
            there &= scores >= tf.constant(least_similarity(self._min_score))
        # ScaNN's order is not always that of its scores.
        scores = tf.where(there, scores, float("-inf"))
        scores, places = tf.math.top_k(scores, tf.minimum(self._k, tf.shape(scores)[1]))
        there = tf.math.is_finite(scores)
        found = tf.where(there, tf.gather(indices, places, batch_dims=1), 0)
        return {
            "ids": tf.where(there, tf.gather(self._ids, found), ""),
            "labels": tf.where(there, tf.gather(self._labels, found), ""),
            "scores": scores,
        }

    def _whole_scores(self, embeddings, shortlists):
        """The similarities of shortlists `(batch, length)` by the whole embedding."""
        # A query at a time: the rows of all shortlists together may take gigabytes.
        return tf.map_fn(
            lambda query: tf.linalg.matvec(tf.gather(self._rows, query[0]), query[1]),
            (shortlists, embeddings),
            fn_output_signature=tf.float32,
        )
