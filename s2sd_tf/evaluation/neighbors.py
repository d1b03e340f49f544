"""Nearest neighbours by cosine similarity, exact or by ScaNN."""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

METHODS = ("exact", "scann")
# What a block of exact similarities may take, in bytes.
BLOCK_BYTES = 256 * 2**20
# Below this ScaNN searches by brute force, as its authors advise.
SCANN_BRUTE_FORCE_SIZE = 20_000


class Neighbors(NamedTuple):
    """The neighbours of queries, nearest first.

    Attributes:
        indices: int64 `(queries, k)`, positions in the gallery; -1 where there are no more.
        similarities: float32 `(queries, k)`, cosine similarities; -inf where there are no more.
    """

    indices: np.ndarray
    similarities: np.ndarray


def find_neighbors(queries, gallery, k, query_ids=None, gallery_ids=None, method="exact"):
    """The k nearest gallery items of every query by cosine similarity.

    Args:
        queries: float array `(queries, dim)`; rows need not be normalised.
        gallery: float array `(gallery, dim)`.
        k: int >= 1; where fewer items remain, the rest is -1.
        query_ids, gallery_ids: integer arrays `(queries,)` and `(gallery,)`, or None. Items that have the id of the
            query are left out: the way to keep an image from finding itself, which position in the list is not, as
            duplicates exist.
        method: "exact" (blocked matrix products, float32) or "scann" (approximate above 20,000 items).

    Returns:
        `Neighbors`. Among equal similarities "exact" puts the lower position first.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, an unknown method, or only one of the ids given.
    """
    queries, gallery = _normalized("queries", queries), _normalized("gallery", gallery)
    if queries.shape[1] != gallery.shape[1]:
        raise ValueError(f"gallery: expected dimension {queries.shape[1]}. Received: {gallery.shape[1]}")
    if not k >= 1:
        raise ValueError(f"k: expected an int >= 1. Received: {k}")
    if method not in METHODS:
        raise ValueError(f"method: expected one of {METHODS}. Received: {method!r}")
    if (query_ids is None) != (gallery_ids is None):
        raise ValueError("query_ids and gallery_ids: expected both or neither")
    if query_ids is not None:
        query_ids, gallery_ids = np.asarray(query_ids), np.asarray(gallery_ids)
        if len(query_ids) != len(queries) or len(gallery_ids) != len(gallery):
            raise ValueError(
                f"ids: expected {len(queries)} query and {len(gallery)} gallery ids. "
                f"Received: {len(query_ids)} and {len(gallery_ids)}"
            )
    found = _exact if method == "exact" else _scann
    if not len(queries) or not len(gallery):
        indices, similarities = np.empty((len(queries), 0), np.int64), np.empty((len(queries), 0), np.float32)
    else:
        indices, similarities = found(queries, gallery, k, query_ids, gallery_ids)
    return _padded(indices, similarities, k)


def _exact(queries, gallery, k, query_ids, gallery_ids):
    rows = max(1, BLOCK_BYTES // (4 * len(gallery)))
    k = min(k, len(gallery))
    indices, similarities = [], []
    for start in range(0, len(queries), rows):
        # On the CPU, as GPUs multiply in TensorFloat-32 by default.
        with tf.device("CPU:0"):
            block = tf.matmul(queries[start : start + rows], gallery, transpose_b=True)
            if query_ids is not None:
                same = query_ids[start : start + rows, None] == gallery_ids[None, :]
                block = tf.where(same, -np.inf, block)
            values, positions = tf.math.top_k(block, k)
        similarities.append(values.numpy())
        indices.append(positions.numpy().astype(np.int64))
    indices, similarities = np.concatenate(indices), np.concatenate(similarities)
    return np.where(np.isneginf(similarities), -1, indices), similarities


def _scann(queries, gallery, k, query_ids, gallery_ids):
    try:
        import scann
    except ImportError as error:
        raise ImportError(
            "method='scann' needs ScaNN built for this TensorFlow: `pip install scann==1.4.2` for TensorFlow 2.20, "
            "`pip install scann==1.3.0` for 2.15. Or use method='exact'."
        ) from error
    # As many more as share one id, so that k remain after the query's own are taken out.
    own = 0 if query_ids is None else int(np.unique(gallery_ids, return_counts=True)[1].max())
    wanted = min(k + own, len(gallery))
    builder = scann.scann_ops_pybind.builder(gallery, wanted, "dot_product")
    if len(gallery) < SCANN_BRUTE_FORCE_SIZE:
        searcher = builder.score_brute_force().build()
    else:
        leaves = int(np.sqrt(len(gallery)))
        searcher = (
            builder.tree(
                num_leaves=leaves,
                num_leaves_to_search=min(leaves, max(20, leaves // 10)),
                training_sample_size=min(len(gallery), 250_000),
            )
            .score_ah(2, anisotropic_quantization_threshold=0.2)
            .reorder(max(4 * wanted, 100))
            .build()
        )
    indices, similarities = searcher.search_batched_parallel(queries, final_num_neighbors=wanted)
    indices, similarities = np.asarray(indices, np.int64), np.array(similarities, np.float32)
    missing = ~np.isfinite(similarities)
    if query_ids is not None:
        missing |= gallery_ids[np.minimum(indices, len(gallery) - 1)] == query_ids[:, None]
    # Moves what is left out to the end and keeps the order of the rest.
    order = np.argsort(missing, axis=1, kind="stable")[:, :k]
    missing = np.take_along_axis(missing, order, axis=1)
    indices = np.where(missing, -1, np.take_along_axis(indices, order, axis=1))
    return indices, np.where(missing, -np.inf, np.take_along_axis(similarities, order, axis=1)).astype(np.float32)


def _normalized(name, embeddings):
    embeddings = np.asarray(embeddings)
    if embeddings.ndim != 2 or not np.issubdtype(embeddings.dtype, np.floating):
        raise ValueError(
            f"{name}: expected a floating array of shape (n, dim). Received: {embeddings.dtype} {embeddings.shape}"
        )
    if not np.isfinite(embeddings).all():
        bad = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
        raise ValueError(
            f"{name}: expected finite values. Received: NaN or infinity in {len(bad)} rows, first row {bad[0]}"
        )
    norms = np.linalg.norm(embeddings.astype(np.float64), axis=1, keepdims=True)
    return (embeddings / np.maximum(norms, 1e-12)).astype(np.float32)


def _padded(indices, similarities, k):
    missing = k - indices.shape[1]
    if missing > 0:
        indices = np.pad(indices, ((0, 0), (0, missing)), constant_values=-1)
        similarities = np.pad(similarities, ((0, 0), (0, missing)), constant_values=-np.inf)
    return Neighbors(indices, similarities)
