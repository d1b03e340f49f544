"""Functions that find neighbours in one call, and that build and load indexes, by any method."""

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import tensorflow as tf

from s2sd_tf.checks import check_choice, checked_int
from s2sd_tf.evaluation.embeddings import Rows, check_finished, read_items, shard_folders
from s2sd_tf.evaluation.exact import exact_neighbors
from s2sd_tf.evaluation.funnel_index import FunnelIndex
from s2sd_tf.evaluation.index import FORMAT, ExactIndex, Index, check_min_score
from s2sd_tf.evaluation.neighbors import METHODS, METRICS, Neighbors, check_search, no_neighbors
from s2sd_tf.evaluation.rows import checked_keys, checked_sets
from s2sd_tf.evaluation.scann_index import ScannIndex, scann_neighbors
from s2sd_tf.evaluation.scann_searcher import import_scann, usable_methods
from s2sd_tf.evaluation.sharded_index import ShardedIndex
from s2sd_tf.evaluation.shortlist import CODES
from s2sd_tf.files import local_path
from s2sd_tf.untrusted import read_json_object, reading


def find_neighbors(
    queries: Rows | tf.Tensor,
    gallery: Rows | tf.Tensor,
    k: int,
    query_ids: np.ndarray | None = None,
    gallery_ids: np.ndarray | None = None,
    *,
    method: str = "exact",
    metric: str = "cosine",
    recall: float = 0.99,
    memory_mib: int = 512,
    progress: bool = False,
) -> Neighbors:
    """Finds the k nearest gallery items of every query.

    Args:
        queries: float rows `(queries, dim)`: an array, a memory-mapped file (`np.load(path, mmap_mode="r")`) or
            `EmbeddingShards`. Rows need not be normalised. To search a gallery with its own items, pass the same object
            twice: this saves half of the work.
        gallery: the same, `(gallery, dim)`.
        k: int >= 1. If fewer items remain, the rest is -1.
        query_ids, gallery_ids: integer arrays `(queries,)` and `(gallery,)`, or `(queries, m)` and `(gallery, m)`, or
            None. Items that have the id of the query, in all m columns, are excluded. Use this so that an image does
            not find itself (dropping the first result is wrong if there are duplicates), or so that an identity is not
            found in pictures of the same camera (columns identity and camera).
        method: "exact" (blocked matrix products in float32, without TensorFloat-32; on a GPU if TensorFlow sees one) or
            "scann" (approximate for large galleries; see `ScannIndex`).
        metric: "cosine" or "euclidean".
        recall: the recall that "scann" is tuned to, in (0, 1].
        memory_mib: MiB, >= 1, that "exact" may take in addition to results and arguments. It reads a gallery on disk
            block by block; "scann" copies it into memory.
        progress: whether to show a progress bar, for "exact".

    Returns:
        `Neighbors`. Among items whose similarities are equal as returned, "exact" puts the lower position first. It
        computes them in float64 from the two rows alone and rounds to float32, so equal rows are equally similar
        wherever they are, and so are integer rows at the same distance. `evaluate_retrieval` ranks in the same way.

    Raises:
        ValueError: shapes that do not fit, values that are not finite in float32, an unknown method or metric, or only
            one of the ids given.
    """
    queries, gallery = checked_sets(queries, gallery)
    keys = checked_keys(query_ids, gallery_ids, queries, gallery)
    k, memory_mib = checked_int("k", k, 1), checked_int("memory_mib", memory_mib, 1)
    check_search(method, metric, recall)
    if not queries.shape[0] or not gallery.shape[0]:
        return no_neighbors(queries.shape[0], k)
    if method == "scann":
        return scann_neighbors(queries, gallery, k, metric, keys, recall)
    return exact_neighbors(queries, gallery, k, metric, keys, memory_mib, progress)


def build_index(
    embeddings: Rows | tf.Tensor,
    ids: Iterable[str] | None = None,
    labels: Iterable[str] | None = None,
    method: str | None = None,
    metric: str = "cosine",
    recall: float = 0.99,
    k: int = 10,
    seed: int = 0,
    dim: int | None = None,
    codes: str = "float32",
) -> Index:
    """Builds an index of a gallery.

    Args:
        embeddings: float rows `(n, dim)`, n >= 1.
        ids: n different ids, or None to use the positions.
        labels: n labels, or None.
        method: "exact", "scann", "funnel" (shortlists by prefixes of nested embeddings; see `FunnelIndex`), or None:
            "scann" where ScaNN is installed, else "exact".
        metric: "cosine" or "euclidean"; "funnel" has only "cosine".
        recall, k, seed: for "scann" and "funnel"; see `ScannIndex.build`.
        dim, codes: for "funnel"; see `FunnelIndex.build`.

    Raises:
        ValueError: a bad argument.
    """
    check_index_settings(method, metric, recall, k, seed, dim, codes)
    method = method or usable_methods()[-1]
    if dim is not None:
        return FunnelIndex.build(embeddings, ids, labels, dim=dim, codes=codes, recall=recall, k=k, seed=seed)
    if method == "scann":
        return ScannIndex.build(embeddings, ids, labels, metric, recall, k, seed)
    return ExactIndex.build(embeddings, ids, labels, metric)


def check_index_settings(
    method: str | None = None,
    metric: str = "cosine",
    recall: float = 0.99,
    k: int = 10,
    seed: int = 0,
    dim: int | None = None,
    codes: str = "float32",
) -> None:
    """Checks the arguments of `build_index` that need no gallery, and that the library for them is installed.

    Raises:
        ValueError: a bad argument.
        ImportError: ScaNN is needed, and is missing or does not fit TensorFlow.
    """
    if method is not None:
        check_choice("method", method, (*METHODS, FunnelIndex.method))
    check_choice("codes", codes, CODES)
    check_search("exact", metric, recall)
    checked_int("k", k, 1)
    checked_int("seed", seed, 0)
    if method == FunnelIndex.method:
        check_choice("metric", metric, ("cosine",))
        if dim is None:
            raise ValueError("dim: expected the dimension of the prefixes, with method='funnel'. Received: None")
        checked_int("dim", dim, 1)
    elif dim is not None:
        raise ValueError(f"dim: expected None unless method='funnel'. Received: {dim!r}")
    elif codes != "float32":
        raise ValueError(f"codes: expected 'float32' unless method='funnel'. Received: {codes!r}")
    if "scann" in (method, codes):
        import_scann()


def load_index(folder: str | os.PathLike) -> Index:
    """Loads the index that `Index.save` wrote to `folder`, or the indexes of all shards in `folder` as one.

    Raises:
        FileNotFoundError: no index in `folder`.
        ValueError: an index of another format version, or a broken one; the message names the file.
    """
    folder = local_path("folder", folder)
    path = os.path.join(folder, "index.json")
    if not os.path.exists(path):
        return _load_shards(folder)
    about = read_json_object(path)
    if about.get("format") != FORMAT:
        raise ValueError(f"index: expected format {FORMAT}. Received: {about.get('format')!r} in {path!r}")
    kinds: dict[Any, type[Index]] = {cls.method: cls for cls in (ExactIndex, ScannIndex, FunnelIndex)}
    with reading(path, "what an index writes"):
        check_choice("method", about["method"], tuple(kinds))
        check_choice("metric", about["metric"], METRICS)
        checked_int("dim", about["dim"], 1)
        # Indexes of earlier versions have none.
        if about.get("min_score") is not None:
            check_min_score(about["min_score"], about["metric"])
    ids, labels = read_items(folder)
    if about.get("size") != len(ids):
        raise ValueError(f"{path}: expected size {len(ids)}, the number of its items. Received: {about.get('size')!r}")
    index = kinds[about["method"]].load(folder, about, ids, labels)
    index.min_score = about.get("min_score")
    return index


def _load_shards(folder):
    found = [os.path.join(shard, "index") for shard in shard_folders(folder)]
    # A shard has no index if none of its images could be embedded.
    found = [path for path in found if os.path.exists(path) or read_items(os.path.dirname(path))[0]]
    if not found or not all(os.path.exists(path) for path in found):
        raise FileNotFoundError(
            f"index: expected a folder with an index, or with shards that have one each. Received: {folder!r}"
        )
    check_finished(folder)
    with reading(folder, "shards with indexes of the same kind"):
        return ShardedIndex([load_index(path) for path in found])
