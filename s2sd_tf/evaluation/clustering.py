"""Clustering metrics: how well k-means clusters of the embeddings match the classes."""

import logging
from typing import Any

import numpy as np
import tensorflow as tf

from s2sd_tf.checks import check_choice, checked_int
from s2sd_tf.evaluation.embeddings import Rows
from s2sd_tf.evaluation.neighbors import METRICS
from s2sd_tf.evaluation.rows import checked_labels, checked_rows, normalized, scale_of, scaled


def clustering_metrics(
    embeddings: Rows | tf.Tensor,
    labels: tf.Tensor | np.ndarray,
    num_clusters: int | None = None,
    metric: str = "cosine",
    iterations: int = 20,
    restarts: int = 1,
    seed: int = 0,
) -> dict[str, float]:
    """NMI, AMI and pair F1 between classes and the clusters that k-means finds.

    - `nmi`: mutual information, normalised by the arithmetic mean of the entropies;
    - `ami`: mutual information adjusted for chance, 0 for random clusters;
    - `f1`: F1 over pairs of items. Precision is the share of pairs in one cluster that are of one class, recall the
      share of pairs of one class that are in one cluster.

    Args:
        embeddings: float array `(n, dim)`.
        labels: integer array `(n,)`.
        num_clusters: int >= 1. Default: the number of classes in `labels`.
        metric: "cosine" (unit rows, unit centroids) or "euclidean".
        iterations, restarts: ints >= 1, of k-means. The restart with the smallest error is used.
        seed: int >= 0.

    Returns:
        dict with the names above.

    Raises:
        ValueError: a bad argument, or fewer items than clusters.
        ImportError: faiss is missing.
    """
    check_choice("metric", metric, METRICS)
    rows = np.asarray(checked_rows("embeddings", embeddings)[:])
    labels = checked_labels("labels", labels, rows)
    if num_clusters is None:
        num_clusters = max(1, len(np.unique(labels)))
    num_clusters = checked_int("num_clusters", num_clusters, 1)
    if num_clusters > len(rows):
        raise ValueError(f"num_clusters: expected at most the number of rows, {len(rows)}. Received: {num_clusters}")
    iterations, restarts = checked_int("iterations", iterations, 1), checked_int("restarts", restarts, 1)
    rows = normalized(rows) if metric == "cosine" else np.ascontiguousarray(scaled(rows, scale_of(rows)), np.float32)
    search = kmeans(rows, num_clusters, metric == "cosine", iterations, restarts, checked_int("seed", seed, 0))
    return cluster_agreement(labels, search.index.search(rows, 1)[1][:, 0].astype(np.int64))


def cluster_agreement(labels: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    """`nmi`, `ami` and `f1` of a given clustering; see `clustering_metrics`.

    Args:
        labels, clusters: integer arrays `(n,)`, the class and the cluster of each item.
    """
    from sklearn.metrics import mutual_info_score
    from sklearn.metrics.cluster import contingency_matrix

    table = contingency_matrix(labels, clusters, sparse=True).astype(np.float64)
    sizes = [np.ravel(table.sum(axis=axis)) for axis in (1, 0)]
    together, of_class, of_cluster = (np.sum(counts * (counts - 1)) for counts in (table.data, *sizes))
    # Without any pair in a class or a cluster there was nothing to find, so F1 is 1.
    f1 = 2.0 * together / (of_class + of_cluster) if of_class + of_cluster else 1.0
    information = mutual_info_score(None, None, contingency=table)
    by_chance = _expected_information(*sizes)
    most = np.mean([_entropy(counts) for counts in sizes])
    return {
        "nmi": _share(information, most),
        "ami": _share(information - by_chance, most - by_chance),
        "f1": float(f1),
    }


def _share(part, whole):
    """`part / whole`, where 0 of 0 is all."""
    return float(part / whole) if whole > 1e-12 else 1.0


def _entropy(counts):
    shares = counts / counts.sum()
    return -np.sum(shares * np.log(shares))


def _expected_information(of_class, of_cluster):
    """The mutual information that classes and clusters of these sizes have on average by chance.

    Vinh, Epps and Bailey, "Information Theoretic Measures for Clusterings Comparison", JMLR 2010, eq. 24a. How many
    items of a class are in a cluster has a hypergeometric distribution. scikit-learn computes it for every class and
    cluster, which takes 20 s for ten thousand; here once for equal sizes.
    """
    from scipy.special import gammaln

    of_class, of_cluster = of_class.astype(np.int64), of_cluster.astype(np.int64)
    total, expected = of_class.sum(), 0.0
    logs = gammaln(np.arange(total + 1) + 1.0)  # of factorials
    clusters, times = np.unique(of_cluster, return_counts=True)
    block = max(1, 2**20 // len(clusters))
    for size, classes in zip(*np.unique(of_class, return_counts=True)):
        for first in range(1, min(size, clusters[-1]) + 1, block):
            shared = np.arange(first, min(first + block, size + 1))[:, None]
            left = total - size - clusters + shared
            possible = (shared <= clusters) & (left >= 0)
            likely = logs[size] + logs[total - size] - logs[total] - logs[shared] - logs[size - shared]
            likely = likely + logs[clusters] + logs[total - clusters]
            likely -= logs[np.where(possible, clusters - shared, 0)] + logs[np.where(possible, left, 0)]
            information = shared / total * np.log(total * shared / (size * clusters))
            expected += classes * np.sum(np.exp(np.where(possible, likely, -np.inf)) * information @ times)
    return expected


def kmeans(
    rows: np.ndarray, num_clusters: int, spherical: bool, iterations: int = 20, restarts: int = 1, seed: int = 0
) -> Any:
    """Returns `faiss.Kmeans`, trained on all rows, float32 `(n, dim)`; `spherical`: with unit centroids."""
    # Otherwise faiss logs which of its libraries it loads.
    logging.getLogger("faiss.loader").setLevel(logging.WARNING)
    try:
        import faiss
    except ImportError as error:
        raise ImportError("clustering needs faiss: `pip install faiss-cpu`") from error
    search = faiss.Kmeans(
        rows.shape[1],
        num_clusters,
        niter=iterations,
        nredo=restarts,
        seed=seed,
        spherical=spherical,
        # Train on all rows, however few there are for each cluster.
        min_points_per_centroid=1,
        max_points_per_centroid=len(rows),
    )
    search.train(rows)
    return search
