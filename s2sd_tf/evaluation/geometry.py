"""Geometry of the embedding space: distances within and between classes, and use of the dimensions."""

from typing import Any

import numpy as np
import tensorflow as tf

from s2sd_tf.checks import check_bool, check_choice
from s2sd_tf.evaluation.embeddings import Rows
from s2sd_tf.evaluation.neighbors import METRICS
from s2sd_tf.evaluation.rows import checked_labels, checked_rows, scale_of, scaled, unit

_BLOCK = 2048


def embedding_geometry(
    embeddings: Rows | tf.Tensor, labels: tf.Tensor | np.ndarray, metric: str = "cosine", published: bool = False
) -> dict[str, float]:
    """Distances within and between classes, and how evenly the dimensions are used (Roth et al., "Revisiting Training
    Strategies and Generalization Performance in Deep Metric Learning", ICML 2020, section 5).

    - `intra`: mean distance over all pairs of different items of one class; NaN if no class has two items;
    - `inter`: mean distance over all pairs of class means; NaN for a single class;
    - `ratio`: intra / inter;
    - `rho`: spectral decay, KL(uniform || s), where s are the singular values of the rows scaled to sum 1. It is 0 if
      all dimensions are used equally, and infinite if one is not used at all.

    For "cosine" the distance is 1 - cosine similarity, class means are normalised, and `rho` is computed from unit
    rows. For "euclidean" the rows are used as they are.

    With `published`, the values are those of the published code: `intra` is the mean over the classes of two items or
    more of each one's mean distance; `rho` leaves out the smallest of the dim singular values; `rho@2` and `rho@10`
    also leave out the largest and the 9 largest, NaN if none is left; and `rho@-1` is KL(s || uniform).

    Args:
        embeddings: float array `(n, dim)`, n >= 1.
        labels: integer array `(n,)`.
        metric: "cosine" or "euclidean".
        published: see above.

    Returns:
        dict with the names above.

    Raises:
        ValueError: a bad argument.
    """
    check_choice("metric", metric, METRICS)
    check_bool("published", published)
    rows = np.asarray(checked_rows("embeddings", embeddings)[:])
    labels = checked_labels("labels", labels, rows)
    if not len(rows):
        raise ValueError("embeddings: expected at least one row. Received: none")
    scale = scale_of(rows)
    rows = unit(rows) if metric == "cosine" else scaled(rows, scale)
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.append(True, labels[order][1:] != labels[order][:-1]))
    ordered, counts = rows[order], np.diff(np.append(starts, len(rows)))
    means = np.add.reduceat(ordered, starts, axis=0) / counts[:, None]
    if metric == "cosine":
        means = means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)

    within = np.array([_pair_sum(ordered[start : start + count], metric) for start, count in zip(starts, counts)])
    pairs = counts * (counts - 1) / 2
    if not np.any(pairs):
        intra = float("nan")
    elif published:
        intra = np.mean(within[pairs > 0] / pairs[pairs > 0])
    else:
        intra = np.sum(within) / np.sum(pairs)
    classes = len(means)
    inter = _pair_sum(means, metric) / (classes * (classes - 1) / 2) if classes > 1 else float("nan")
    unscaled = 1.0 if metric == "cosine" else 1.0 / scale
    return {
        "intra": float(intra * unscaled),
        "inter": float(inter * unscaled),
        "ratio": float(np.divide(intra, inter)) if inter else float("nan"),
        **(_published_decays(rows) if published else {"rho": spectral_decay(rows)}),
    }


def spectral_decay(rows: np.ndarray) -> float:
    """KL(uniform || s), where s are the singular values of `rows` scaled to sum 1; see `embedding_geometry`."""
    return _decay(_singular_values(rows))


def _published_decays(rows):
    values = _singular_values(rows)[: rows.shape[1] - 1]
    shares = values / values.sum() if len(values) else values
    found = {"rho": _decay(values), "rho@2": _decay(values[1:]), "rho@10": _decay(values[9:])}
    present = shares[shares > 0]
    found["rho@-1"] = float(np.sum(present * np.log(len(shares) * present))) if len(shares) else float("nan")
    return found


def _singular_values(rows):
    """Singular values, largest first; those that only rounding keeps from 0 are 0."""
    values = np.linalg.svd(np.asarray(rows, np.float64), compute_uv=False)
    return np.where(values > values[0] * max(rows.shape) * np.finfo(np.float64).eps, values, 0.0)


def _decay(values):
    """KL(uniform || s) of singular values, largest first."""
    if not len(values):
        return float("nan")
    if not values[-1]:
        return float("inf")
    values = values / values.sum()
    return float(-np.mean(np.log(len(values) * values)))


def _pair_sum(rows, metric):
    """Sum of the distances over all pairs of different rows."""
    total: Any = 0.0
    if metric == "cosine":
        # The sum of 1 - x y over i < j needs only the sum of the products, which has a closed form.
        size = len(rows)
        return size * (size - 1) / 2 - (np.sum(np.square(rows.sum(axis=0))) - np.sum(np.square(rows))) / 2
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK]
        for other in range(start, len(rows), _BLOCK):
            there = rows[other : other + _BLOCK]
            # Subtract one of the rows first, so that small distances are not differences of large numbers.
            a, b = block - block[0], there - block[0]
            squares = np.sum(a * a, axis=1)[:, None] + np.sum(b * b, axis=1)[None] - 2.0 * (a @ b.T)
            distances = np.sqrt(np.maximum(squares, 0.0))
            if other == start:
                np.fill_diagonal(distances, 0.0)
            total += distances.sum() / (2.0 if other == start else 1.0)
    return total
