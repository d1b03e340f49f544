"""Query expansion and database augmentation: embeddings averaged with those of their nearest neighbours."""

import numpy as np
import tensorflow as tf

from s2sd_tf.checks import check_at_least, checked_int
from s2sd_tf.evaluation.embeddings import Rows
from s2sd_tf.evaluation.rows import checked_sets, normalized
from s2sd_tf.evaluation.search import find_neighbors


def expand(
    queries: Rows | tf.Tensor,
    gallery: Rows | tf.Tensor,
    k: int = 5,
    alpha: float = 3.0,
    query_ids: np.ndarray | None = None,
    gallery_ids: np.ndarray | None = None,
    *,
    memory_mib: int = 512,
) -> np.ndarray:
    """Averages unit rows with their k nearest gallery items, weighted by the similarity to the power of `alpha`.

    Alpha query expansion (Radenović et al., "Fine-tuning CNN Image Retrieval with No Human Annotation", TPAMI 2019,
    section 3.4): search with the result instead of the queries. With alpha 0 it is average query expansion (Chum et
    al., ICCV 2007). Database augmentation (Arandjelović and Zisserman, CVPR 2012) is the same for the gallery itself:
    `expand(gallery, gallery, k, alpha, ids, ids)` with different ids, so that no item counts twice.

    Args:
        queries, gallery, query_ids, gallery_ids, memory_mib: see `find_neighbors`. Labels are not used. To expand
            queries that are in the gallery, pass ids, so that none is its own neighbour.
        k: int >= 1.
        alpha: float >= 0. Neighbours of negative similarity have weight 0.

    Returns:
        Unit rows, float32 `(queries, dim)`. The weight of the query itself is 1.

    Raises:
        ValueError: a bad argument.
    """
    check_at_least("alpha", alpha, 0.0)
    k = checked_int("k", k, 1)
    queries, gallery = checked_sets(queries, gallery)
    found = find_neighbors(queries, gallery, k, query_ids, gallery_ids, memory_mib=memory_mib)
    # Missing neighbours have the similarity -inf.
    weights = np.where(found.similarities > 0, np.maximum(found.similarities, 0.0) ** alpha, 0.0)
    expanded = normalized(np.asarray(queries[:]))
    # The rows of neighbours are float64 while they are normalised.
    block = max(1, memory_mib * 2**20 // (32 * k * expanded.shape[1]))
    for start in range(0, len(expanded) if gallery.shape[0] else 0, block):
        part = slice(start, start + block)
        near = found.indices[part]
        rows = normalized(np.asarray(gallery[near.reshape(-1)])).reshape(*near.shape, -1)
        expanded[part] += np.einsum("qk,qkd->qd", weights[part], rows, dtype=np.float32)
    return normalized(expanded)
