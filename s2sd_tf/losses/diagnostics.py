"""Numbers that tell embeddings that have collapsed from others."""

import tensorflow as tf

# Embeddings of a batch that the rank is estimated from: the products would cost as much as the distillation.
_ROWS = 1024


def mean_similarity(embeddings):
    """Mean cosine similarity of different rows of l2-normalised `embeddings` `(batch, dim)`; 0 for a single one."""
    batch = tf.cast(tf.shape(embeddings)[0], embeddings.dtype)
    total = tf.reduce_sum(tf.square(tf.reduce_sum(embeddings, axis=0))) - tf.reduce_sum(tf.square(embeddings))
    return tf.math.divide_no_nan(tf.stop_gradient(total), batch * (batch - 1))


def effective_rank(embeddings):
    """Participation ratio of the covariance of `embeddings` `(batch, dim)`: (sum of eigenvalues)^2 / sum of their
    squares, from 1 (all on a line) to dim (alike in every direction); 0 where all rows are the same.

    At most 1,024 rows, spread evenly over the batch, are looked at.
    """
    embeddings = tf.stop_gradient(embeddings)
    if embeddings.shape[0] is None or embeddings.shape[0] > _ROWS:
        batch = tf.shape(embeddings)[0]
        embeddings = tf.gather(embeddings, tf.range(0, batch, tf.maximum(1, -(-batch // _ROWS))))
    centred = embeddings - tf.reduce_mean(embeddings, axis=0)
    # The eigenvalues are those of the products of rows too, which may be fewer.
    rows, dim = centred.shape
    fewer_rows = rows is not None and rows < dim
    products = tf.matmul(centred, centred, transpose_a=not fewer_rows, transpose_b=fewer_rows)
    total = tf.linalg.trace(products)
    squares = tf.reduce_sum(tf.square(products))
    # Of rows that are the same, rounding leaves something.
    spread = total > 1e-10 * tf.reduce_sum(tf.square(embeddings))
    return tf.where(spread, tf.math.divide_no_nan(total**2, squares), 0.0)
