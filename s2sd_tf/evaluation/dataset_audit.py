"""What is probably wrong with a data set, from embeddings and labels: duplicates, leaks, wrong labels, odd items."""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from s2sd_tf.checks import check_number, check_within, checked_int
from s2sd_tf.evaluation.audit_classes import Confusions, SplitClass, confused_classes, split_classes
from s2sd_tf.evaluation.audit_items import SimilarPairs, distinct_pairs, label_scores, near_pairs, outlier_scores, reach
from s2sd_tf.evaluation.embeddings import Rows
from s2sd_tf.evaluation.neighbors import Neighbors, no_neighbors
from s2sd_tf.evaluation.rows import checked_labels, checked_rows
from s2sd_tf.evaluation.search import find_neighbors

# Near duplicates are nearer than this share of the median distance to the nearest neighbour, as in cleanlab.
_NEAR = 0.13


class Audit(NamedTuple):
    """What `audit` found. Positions are those of the rows.

    Attributes:
        neighbors: the k nearest other items of every item.
        duplicate_similarity: the similarity from which on items are near duplicates.
        duplicates: pairs of near duplicates, the most similar first; `first` < `second`.
        leaks: the same between an item, `first`, and one of the gallery, `second`. Empty without a gallery.
        label_scores: float64 `(n,)` in [0, 1], the evidence that a label is wrong.
        suggested_labels: int64 `(n,)`, the label that the neighbours have instead; its own where the score is 0.
        outlier_scores: float64 `(n,)`, by how many standard deviations an item is farther from its neighbours than the
            median item of its class.
        confusions: pairs of classes that are each other's neighbours, the most confused first.
        split_classes: classes that fall into two groups, those with the clearest groups first.
    """

    neighbors: Neighbors
    duplicate_similarity: float
    duplicates: SimilarPairs
    leaks: SimilarPairs
    label_scores: np.ndarray
    suggested_labels: np.ndarray
    outlier_scores: np.ndarray
    confusions: Confusions
    split_classes: list[SplitClass]

    def label_errors(self, score: float = 0.5) -> np.ndarray:
        """Positions of the probable label errors, int64: scores of at least `score` and above 0, the highest
        first.
        """
        return _worst(self.label_scores, score)

    def outliers(self, score: float = 3.5) -> np.ndarray:
        """Positions of the outliers, int64: scores of at least `score` and above 0, the highest first.

        The default is that of Iglewicz and Hoaglin, "How to Detect and Handle Outliers", 1993.
        """
        return _worst(self.outlier_scores, score)

    def to_exclude(self, label_score: float = 0.5) -> dict[str, np.ndarray]:
        """Positions to leave out of training, ascending int64, by reason; an item may have several.

        "duplicates" are the near duplicates of an item that is kept: the one with the most of them, or else the one
        with the lowest label score, or else the first. "leaks" are the items with a near duplicate in the gallery,
        "label_errors" those of `label_errors(label_score)`.
        """
        return {
            "duplicates": distinct_pairs(self.duplicates, self.label_scores),
            "leaks": np.unique(self.leaks.first),
            "label_errors": np.sort(self.label_errors(label_score)),
        }


def audit(
    embeddings: Rows | tf.Tensor,
    labels: tf.Tensor | np.ndarray,
    gallery: Rows | tf.Tensor | None = None,
    *,
    k: int = 20,
    duplicate_similarity: float | None = None,
    memory_mib: int = 512,
    progress: bool = False,
) -> Audit:
    """Finds what is probably wrong with a data set. All similarities are cosine similarities.

    Every item is judged by its k nearest neighbours, which are searched once. As many of them count as there are others
    of its class, but at least 3. If labels are right and classes well separated, these are all of its own class, also
    in small classes.

    - near duplicates: pairs whose similarity reaches `duplicate_similarity`. Each item has at most k of them, which
      still connects all copies of one image, as equally similar items are found in the order of their positions;
    - leaks: the same, between the embeddings and the gallery;
    - label scores: the share of one other class among the neighbours, less that of the own class, and less the median
      share of the other class over all items of the own class; the largest over classes, at least 0. So items of two
      classes that are alike do not look like label errors, and errors in the same direction stay visible unless they
      are much of a class. Shares are weighted by similarity (negative ones count 0): the vote of Dudani, "The
      Distance-Weighted k-Nearest-Neighbor Rule", 1976. Of a class with fewer items than the item's own, only so many
      neighbours count (again at least 3), as it cannot supply more. The shares estimate the probabilities of classes
      from other items only, so out of sample, as confident learning demands of its classifier; it too compares with the
      own class and with what is usual (Northcutt et al., 2021). The score is 0 for the only item of a class, whose
      label nothing can confirm;
    - outlier scores: the mean similarity to the neighbours that count, of any class, as a distance from the median of
      the items of its class (of all items, for a class of fewer than 5), in robust standard deviations (median absolute
      deviation). An item far from its own class but close to another is a label error, not an outlier;
    - confusions: see `Confusions`; split classes: see `SplitClass`.

    The embeddings should not come from a network that was trained on the same labels until it knew them by heart: it
    has moved wrong labels to where they look right.

    Args:
        embeddings: float rows `(n, dim)`, n >= 1: an array, a memory-mapped file or `EmbeddingShards`.
        labels: integer array `(n,)`.
        gallery: float rows `(gallery, dim)` that should share no image with the embeddings, such as those of test
            images if the embeddings are of training images; or None.
        k: int >= 1.
        duplicate_similarity: number in [-1, 1]. None: 1 - 0.13 (1 - s), where s is the median similarity to the nearest
            neighbour, the rule of cleanlab's Datalab.
        memory_mib: MiB that searches may take, see `find_neighbors`. Besides, the largest class is in memory at a time.
        progress: whether to show progress bars.

    Raises:
        ValueError: no rows, rows or labels that do not fit, or a bad setting; the message names it.
    """
    rows = checked_rows("embeddings", embeddings)
    if not rows.shape[0]:
        raise ValueError("embeddings: expected at least one row. Received: none")
    labels = checked_labels("labels", labels, rows)
    if gallery is not None:
        gallery = checked_rows("gallery", gallery)
        if gallery.shape[1] != rows.shape[1]:
            raise ValueError(f"gallery: expected dimension {rows.shape[1]}. Received: {gallery.shape[1]}")
    k, memory_mib = checked_int("k", k, 1), checked_int("memory_mib", memory_mib, 1)
    if duplicate_similarity is not None:
        check_within("duplicate_similarity", duplicate_similarity, -1, 1)
    positions = np.arange(rows.shape[0])
    found = find_neighbors(rows, rows, k, positions, positions, memory_mib=memory_mib, progress=progress)
    if duplicate_similarity is None:
        nearest = found.similarities[:, 0][found.indices[:, 0] >= 0]
        duplicate_similarity = 1.0 - _NEAR * (1.0 - float(np.median(nearest))) if len(nearest) else 1.0
    leaking = no_neighbors(0, k)
    if gallery is not None:
        leaking = find_neighbors(rows, gallery, k, memory_mib=memory_mib, progress=progress)
    counts = reach(labels, k)
    scores, suggested = label_scores(found, labels)
    return Audit(
        neighbors=found,
        duplicate_similarity=float(duplicate_similarity),
        duplicates=near_pairs(found, rows, rows, duplicate_similarity, once=True),
        leaks=near_pairs(leaking, rows, rows if gallery is None else gallery, duplicate_similarity),
        label_scores=scores,
        suggested_labels=suggested,
        outlier_scores=outlier_scores(found, labels, counts),
        confusions=confused_classes(found, labels, counts),
        split_classes=split_classes(rows, labels, memory_mib),
    )


def _worst(scores, least):
    check_number("score", least)
    order = np.argsort(-scores, kind="stable")
    return order[(scores[order] >= least) & (scores[order] > 0)]
