"""Numbers that show whether embeddings have collapsed."""

import tensorflow as tf

# Rows used to estimate the rank. With all rows of a large batch, the products would cost as much as the distillation.
_ROWS = 1024


def mean_similarity(embeddings: tf.Tensor) -> tf.Tensor:
    """Mean cosine similarity between different rows of l2-normalised `embeddings` `(batch, dim)`; 0 for one row."""
    batch = tf.cast(tf.shape(embeddings)[0], embeddings.dtype)
    total = tf.reduce_sum(tf.square(tf.reduce_sum(embeddings, axis=0))) - tf.reduce_sum(tf.square(embeddings))
    return tf.math.divide_no_nan(tf.stop_gradient(total), batch * (batch - 1))


def effective_rank(embeddings: tf.Tensor) -> tf.Tensor:
    """Participation ratio of the covariance of `embeddings` `(batch, dim)`: (sum of eigenvalues)^2 / sum of their
    squares, from 1 (all on a line) to dim (equal spread in every direction); 0 if all rows are equal.

    Uses at most 1,024 rows, spread evenly over the batch.
    """
    embeddings = tf.stop_gradient(embeddings)
    if embeddings.shape[0] is None or embeddings.shape[0] > _ROWS:
        batch = tf.shape(embeddings)[0]
        embeddings = tf.gather(embeddings, tf.range(0, batch, tf.maximum(1, -(-batch // _ROWS))))
    centred = embeddings - tf.reduce_mean(embeddings, axis=0)
    # X X^T and X^T X have the same nonzero eigenvalues; take the smaller product.
    rows, dim = centred.shape
    fewer_rows = rows is not None and rows < dim
    products = tf.matmul(centred, centred, transpose_a=not fewer_rows, transpose_b=fewer_rows)
    total = tf.linalg.trace(products)
    squares = tf.reduce_sum(tf.square(products))
    # Rounding leaves a small variance even if all rows are equal.
    spread = total > 1e-10 * tf.reduce_sum(tf.square(embeddings))
    return tf.where(spread, tf.math.divide_no_nan(total**2, squares), 0.0)
