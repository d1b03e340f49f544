"""Graded relevance: how relevant images with several labels are to each other, from 0 to 1."""

import math
import numbers
from collections.abc import Iterable, Sequence

import tensorflow as tf

# The relevance of two sets of labels is the size of their intersection divided by that of their union.
JACCARD = "jaccard"


def checked_relevance(relevance: Sequence[float] | str) -> tuple[float, ...] | str:
    """Returns `relevance` as a tuple of floats, or as "jaccard".

    Args:
        relevance: see `relevance_matrix`; or () for labels that are one class for each image.

    Raises:
        ValueError: neither.
    """
    if isinstance(relevance, str) and relevance == JACCARD:
        return relevance
    if isinstance(relevance, Iterable) and not isinstance(relevance, (str, bytes)):
        grades = tuple(relevance)
        if not grades:
            return ()
        fits = len(grades) > 1 and all(
            isinstance(grade, numbers.Real) and not isinstance(grade, bool) and math.isfinite(grade) for grade in grades
        )
        if fits and grades[0] >= 0 and list(grades) == sorted(grades) and grades[-1] == 1:
            return tuple(map(float, grades))
    raise ValueError(
        "relevance: expected a number in [0, 1] for each level of a hierarchy, coarse to fine, not decreasing, the "
        f"last one 1, such as (0.3, 1.0); 'jaccard' for several labels; or () for one class. Received: {relevance!r}"
    )


def label_columns(relevance: tuple[float, ...] | str) -> int:
    """Returns how many labels an image has, as `labels.checked_labels` takes it: 0 for one class, -1 for any number."""
    return -1 if relevance == JACCARD else len(relevance)


def relevance_matrix(
    labels: tf.Tensor, references: tf.Tensor, relevance: tuple[float, ...] | str, dtype: tf.DType | str
) -> tf.Tensor:
    """Returns how relevant the images of two sets are to each other, `(batch, m)` in [0, 1].

    Args:
        labels: int64 `(batch, n)`. Of a hierarchy with n levels, column 0 has the coarsest classes and column n - 1 the
            finest; two images share a level if they are equal up to and including its column, so a class may be
            numbered from 0 in every class above it. For "jaccard", column c is 1 for images with label c, else 0.
        references: the same, `(m, n)`.
        relevance: n numbers, the relevance of two images whose finest common level is that of the column; without a
            common level it is 0. Or "jaccard", the share of the labels of either image that both have (Jaccard 1901;
            in contrastive losses: Lin et al., "An Effective Deployment of Contrastive Learning in Multi-label Text
            Classification", Findings of ACL 2023); it is 0 if neither has a label.
        dtype: floating dtype of the result.
    """
    if relevance == JACCARD:
        sets, others = tf.cast(labels, dtype), tf.cast(references, dtype)
        common = tf.matmul(sets, others, transpose_b=True)
        sizes = tf.reduce_sum(sets, axis=1)[:, None] + tf.reduce_sum(others, axis=1)[None, :]
        return tf.math.divide_no_nan(common, sizes - common)
    # The numbers themselves, not sums of differences, which rounding would change: a relevance of 1 is exactly 1.
    matrix: tf.Tensor | None = None
    shared: tf.Tensor | None = None
    for column, grade in enumerate(relevance):
        same = tf.equal(labels[:, column, None], references[None, :, column])
        shared = same if shared is None else shared & same
        matrix = tf.where(shared, tf.constant(grade, dtype), tf.zeros([], dtype) if matrix is None else matrix)
    assert matrix is not None
    return matrix
