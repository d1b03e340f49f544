"""Open-set identification: queries whose class is not in the gallery should find nothing."""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from s2sd_tf.checks import check_choice, checked_int
from s2sd_tf.evaluation.embeddings import Rows
from s2sd_tf.evaluation.exact import exact_neighbors
from s2sd_tf.evaluation.neighbors import METRICS
from s2sd_tf.evaluation.rows import checked_labeled_sets
from s2sd_tf.evaluation.verification import checked_fars


def open_set_metrics(
    queries: Rows | tf.Tensor,
    query_labels: tf.Tensor | np.ndarray,
    gallery: Rows | tf.Tensor | None = None,
    gallery_labels: tf.Tensor | np.ndarray | None = None,
    *,
    fars: Sequence[float] = (1e-1, 1e-2, 1e-3),
    query_ids: np.ndarray | None = None,
    gallery_ids: np.ndarray | None = None,
    metric: str = "cosine",
    memory_mib: int = 512,
    progress: bool = False,
) -> dict[str, float | int]:
    """Evaluates a search that answers with the nearest item if its similarity is at least a threshold.

    A query is known if it has a positive in the gallery. The false-alarm rate of a threshold is the share of unknown
    queries that get an answer: ISO/IEC 19795-1 calls it the false-positive identification rate, FPIR. It grows with the
    gallery, unlike the false accept rate of `verification_metrics`, which is of single pairs.

    - `auroc`: the probability that a known query is more similar to its nearest item than an unknown one to its own; a
      tie counts 1/2;
    - `dir@f`: the detection-and-identification rate, the share of known queries that get an answer of their class, at
      the lowest threshold whose false-alarm rate is at most f;
    - `threshold@f`: that threshold; infinity if every similarity that occurs has a larger rate;
    - `known`, `unknown`: the numbers of queries.

    Args:
        queries, query_labels, gallery, gallery_labels, query_ids, gallery_ids, metric: see `evaluate_retrieval`.
            Without a gallery, the classes of one image are unknown.
        fars: false-alarm rates, numbers in (0, 1].
        memory_mib, progress: see `find_neighbors`.

    Returns:
        dict with the names above, such as `dir@0.01`.

    Raises:
        ValueError: arguments that do not fit, or no known query, or no unknown one.
    """
    fars = checked_fars(fars)
    check_choice("metric", metric, METRICS)
    memory_mib = checked_int("memory_mib", memory_mib, 1)
    sets = checked_labeled_sets(queries, query_labels, gallery, gallery_labels, query_ids, gallery_ids)
    known = sets.counts()[0] > 0
    if known.all() or not known.any():
        raise ValueError(
            "gallery_labels: expected some queries to have a positive in the gallery, and some none. Received: "
            f"{int(known.sum())} with and {int((~known).sum())} without"
        )
    found = exact_neighbors(sets.queries, sets.gallery, 1, metric, sets.keys, memory_mib, progress)
    nearest, similarities = found.indices[:, 0], found.similarities[:, 0].astype(np.float64)
    right = known & (sets.gallery_labels[nearest] == sets.query_labels) & (nearest >= 0)
    # All similarities that occur, descending, and how many queries of each kind reach them.
    thresholds = np.append(np.inf, np.unique(similarities[nearest >= 0])[::-1])

    def reaching(chosen):
        values = np.sort(similarities[chosen])
        return (len(values) - np.searchsorted(values, thresholds, "left")) / len(values)

    alarms = reaching(~known)
    answered = reaching(right) * right.sum() / known.sum() if right.any() else np.zeros(len(thresholds))
    values: dict[str, float | int] = {"auroc": _auroc(similarities, known)}
    for far in fars:
        last = np.searchsorted(alarms, far, "right") - 1
        values[f"dir@{far:g}"], values[f"threshold@{far:g}"] = float(answered[last]), float(thresholds[last])
    return {**values, "known": int(known.sum()), "unknown": int((~known).sum())}


def _auroc(similarities, known):
    from sklearn.metrics import roc_auc_score

    # It refuses infinity, the similarity of a query that may find nothing.
    return float(roc_auc_score(known, np.maximum(similarities, np.finfo(np.float32).min)))
