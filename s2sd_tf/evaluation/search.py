"""Search by the method that is asked for: neighbours in one call, and indexes that are built and loaded."""

import os

from s2sd_tf.checks import check_choice, checked_int
from s2sd_tf.evaluation.embeddings import check_finished, read_items, shard_folders
from s2sd_tf.evaluation.exact import exact_neighbors
from s2sd_tf.evaluation.index import FORMAT, ExactIndex
from s2sd_tf.evaluation.neighbors import METHODS, METRICS, check_search, no_neighbors
from s2sd_tf.evaluation.rows import checked_keys, checked_sets
from s2sd_tf.evaluation.scann_index import ScannIndex, scann_neighbors
from s2sd_tf.evaluation.sharded_index import ShardedIndex
from s2sd_tf.untrusted import read_json_object, reading


def find_neighbors(
    queries,
    gallery,
    k,
    query_ids=None,
    gallery_ids=None,
    *,
    method="exact",
    metric="cosine",
    recall=0.99,
    memory_mib=512,
    progress=False,
):
    """The k nearest gallery items of every query.

    Args:
        queries: float array `(queries, dim)`, or what gives such rows when sliced: a memory-mapped file
            (`np.load(path, mmap_mode="r")`), an `EmbeddingShards`. Rows need not be normalised. Pass the gallery itself
            to search it with its own items: half of the work is saved.
        gallery: the same, `(gallery, dim)`.
        k: int >= 1; where fewer items remain, the rest is -1.
        query_ids, gallery_ids: integer arrays `(queries,)` and `(gallery,)`, or `(queries, m)` and `(gallery, m)`, or
            None. Items that have the id of the query, in all m columns, are left out: the way to keep an image from
            finding itself (which position in the list is not, as duplicates exist), or an identity from being found in
            pictures of the same camera (columns identity and camera).
        method: "exact" (blocked matrix products in float32; on a GPU where TensorFlow sees one, without TensorFloat-32)
            or "scann" (approximate for large galleries; see `ScannIndex`).
        metric: "cosine" or "euclidean".
        recall: float in (0, 1], to which "scann" is tuned.
        memory_mib: int >= 1, MiB that "exact" may take beside results and arguments. A gallery on disk is read
            block by block; "scann" copies it into memory.
        progress: bool, show a progress bar.

    Returns:
        `Neighbors`. Among equal similarities "exact" puts the lower position first.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, an unknown method or metric, or only one of the
            ids given.
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


def build_index(embeddings, ids=None, labels=None, method="scann", metric="cosine", recall=0.99, k=10, seed=0):
    """An `Index` of a gallery.

    Args:
        embeddings: float rows `(n, dim)`, n >= 1.
        ids: n different str, or None for the positions.
        labels: n str, or None.
        method: "exact" or "scann".
        metric: "cosine" or "euclidean".
        recall, k, seed: for "scann": see `ScannIndex.build`.

    Raises:
        ValueError: a bad argument.
    """
    check_choice("method", method, METHODS)
    if method == "scann":
        return ScannIndex.build(embeddings, ids, labels, metric, recall, k, seed)
    return ExactIndex.build(embeddings, ids, labels, metric)


def load_index(folder):
    """The `Index` that `save` wrote in `folder`, or all that are in its shards as one.

    Raises:
        FileNotFoundError: no index there.
        ValueError: one of a later format, or one that is broken; the message names the file.
    """
    path = os.path.join(folder, "index.json")
    if not os.path.exists(path):
        return _load_shards(folder)
    about = read_json_object(path)
    if about.get("format") != FORMAT:
        raise ValueError(f"index: expected format {FORMAT}. Received: {about.get('format')!r} in {path!r}")
    kinds = {cls.method: cls for cls in (ExactIndex, ScannIndex)}
    with reading(path, "what an index writes"):
        check_choice("method", about["method"], tuple(kinds))
        check_choice("metric", about["metric"], METRICS)
        checked_int("dim", about["dim"], 1)
    ids, labels = read_items(folder)
    if about.get("size") != len(ids):
        raise ValueError(f"{path}: expected the size of its items, {len(ids)}. Received: {about.get('size')!r}")
    return kinds[about["method"]].load(folder, about, ids, labels)


def _load_shards(folder):
    found = [os.path.join(shard, "index") for shard in shard_folders(folder)]
    # A shard none of whose images could be embedded has no index.
    found = [path for path in found if os.path.exists(path) or read_items(os.path.dirname(path))[0]]
    if not found or not all(os.path.exists(path) for path in found):
        raise FileNotFoundError(
            f"index: expected a folder with an index, or with shards that have one each. Received: {folder!r}"
        )
    check_finished(folder)
    with reading(folder, "shards with indexes of one kind"):
        return ShardedIndex([load_index(path) for path in found])
