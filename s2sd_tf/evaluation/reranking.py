"""Re-ranking by k-reciprocal neighbours."""

import numpy as np
import scipy.sparse
import tensorflow as tf
from tqdm import tqdm

from s2sd_tf.checks import check_within, checked_int
from s2sd_tf.evaluation.embeddings import Rows
from s2sd_tf.evaluation.neighbors import Neighbors, no_neighbors, padded
from s2sd_tf.evaluation.rows import checked_keys, checked_sets, normalized
from s2sd_tf.evaluation.search import find_neighbors


def reranked_neighbors(
    queries: Rows | tf.Tensor,
    gallery: Rows | tf.Tensor,
    k: int,
    query_ids: np.ndarray | None = None,
    gallery_ids: np.ndarray | None = None,
    *,
    k1: int = 20,
    k2: int = 6,
    weight: float = 0.3,
    memory_mib: int = 512,
    progress: bool = False,
) -> Neighbors:
    """Finds the k nearest gallery items by a distance that also compares neighbourhoods.

    Zhong et al., "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017. The k1-reciprocal
    neighbours of an item are those of its k1 nearest that have the item among their k1 nearest; sets of k1/2-reciprocal
    neighbours that they share join them (equation 4). The distance is `weight` d + (1 - `weight`) J: d is 1 - cosine
    similarity, and J the Jaccard distance of these sets, weighted by exp(-d) and averaged over the k2 nearest items
    (equations 7 to 12). Queries and gallery are neighbours of each other; the queries too, so results depend on which
    are searched together. The paper divides d by the largest of each query; here it is not, so no other item matters.

    Args:
        queries, gallery, k, query_ids, gallery_ids, memory_mib: see `find_neighbors`. Ids leave out items of the result
            only. To search a gallery with its own items, pass the same object twice.
        k1, k2: ints >= 1.
        weight: of the original distance, in [0, 1]. 1 gives the original ranking.
        progress: whether to show a progress bar.

    Returns:
        `Neighbors`, whose similarities are 1 - distance. Equally near items are in the order of their positions.

    Raises:
        ValueError: a bad argument.
    """
    k, k1, k2 = checked_int("k", k, 1), checked_int("k1", k1, 1), checked_int("k2", k2, 1)
    check_within("weight", weight, 0.0, 1.0)
    alone = queries is gallery
    queries, gallery = checked_sets(queries, gallery)
    keys = checked_keys(query_ids, gallery_ids, queries, gallery)
    if not queries.shape[0] or not gallery.shape[0]:
        return no_neighbors(queries.shape[0], k)
    of_gallery = normalized(np.asarray(gallery[:]))
    rows = of_gallery if alone else np.concatenate([of_gallery, normalized(np.asarray(queries[:]))])
    first = 0 if alone else len(of_gallery)
    vectors = _encoded(rows, k1, k2, memory_mib, progress)
    columns = vectors[: len(of_gallery)].tocsc()
    nearest = find_neighbors(queries, gallery, k, query_ids, gallery_ids, memory_mib=memory_mib)
    indices = np.full((queries.shape[0], k), -1, np.int64)
    similarities = np.full((queries.shape[0], k), -np.inf, np.float32)
    for query in tqdm(range(len(indices)), desc="Re-ranking", unit="query", disable=not progress):
        shared = _shared(vectors, columns, first + query)
        # Of the items that share nothing, whose J is 1, those that are the nearest come first.
        others = nearest.indices[query]
        items = np.union1d(np.flatnonzero(shared), others[others >= 0])
        if keys is not None:
            items = items[keys[1][items] != keys[0][query]]
        jaccard = 1.0 - shared[items] / (2.0 - shared[items])
        distances = weight * (1.0 - of_gallery[items] @ rows[first + query]) + (1.0 - weight) * jaccard
        order = np.argsort(distances.astype(np.float32), kind="stable")[:k]
        indices[query, : len(order)] = items[order]
        similarities[query, : len(order)] = 1.0 - distances[order]
    return padded(indices, similarities, k)


def _encoded(rows, k1, k2, memory_mib, progress):
    """The weights of every item's reciprocal neighbours, summing up to 1: a sparse float64 matrix `(n, n)`."""
    own = np.arange(len(rows))
    near = own[:, None]
    if count := min(max(k1, k2 - 1), len(rows) - 1):
        found = find_neighbors(rows, rows, count, own, own, memory_mib=memory_mib, progress=progress)
        near = np.concatenate([near, found.indices], axis=1)
    reciprocal, half = (_reciprocal(near, size) for size in (k1 + 1, round(k1 / 2) + 1))
    # How much of the smaller set of each reciprocal neighbour is in the set of the item: two thirds let it join.
    overlap = reciprocal.multiply(reciprocal @ half.T).tocsr()
    sizes = np.asarray(half.sum(axis=1)).reshape(-1)
    overlap.data = (3.0 * overlap.data >= 2.0 * sizes[overlap.indices]).astype(np.float64)
    sets = ((reciprocal + overlap @ half) > 0).astype(np.float64).tocsr()
    owners = np.repeat(own, np.diff(sets.indptr))
    block = max(1, memory_mib * 2**20 // (8 * rows.shape[1]))
    for start in range(0, len(owners), block):
        part = slice(start, start + block)
        dots = np.einsum("nd,nd->n", rows[owners[part]], rows[sets.indices[part]])
        sets.data[part] = np.exp(dots - 1.0)
    totals = np.asarray(sets.sum(axis=1)).reshape(-1)
    sets.data /= totals[owners]
    return (_adjacency(near, k2) @ sets / min(k2, len(rows))).tocsr() if k2 > 1 else sets


def _adjacency(near, size):
    """A sparse matrix `(n, n)` with 1 for the `size` nearest of every item, itself among them."""
    chosen = near[:, :size]
    owners = np.repeat(np.arange(len(near)), chosen.shape[1])
    ones = np.ones(chosen.size)
    return scipy.sparse.csr_array((ones, (owners, chosen.reshape(-1))), shape=(len(near), len(near)))


def _reciprocal(near, size):
    found = _adjacency(near, size)
    return found.multiply(found.T).tocsr()


def _shared(vectors, columns, item):
    """The sum of the smaller ones of the weights of `item` and of every gallery item, float64 `(gallery,)`."""
    begin, end = vectors.indptr[item], vectors.indptr[item + 1]
    total = np.zeros(columns.shape[0])
    for column, value in zip(vectors.indices[begin:end], vectors.data[begin:end]):
        inside = slice(columns.indptr[column], columns.indptr[column + 1])
        # A column has each item once.
        total[columns.indices[inside]] += np.minimum(columns.data[inside], value)
    return total
