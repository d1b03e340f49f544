"""The similarity-KL by plain TensorFlow ops. It runs everywhere, and the fused op is checked against it."""

import tensorflow as tf


def composed_similarity_kl(student, teachers, temperature, weights, rows):
    """`(total, per_teacher)` in the dtype of the student, float32 or float64; `rows` is `(offset, count)` or None."""
    dtype = student.dtype
    temperature = tf.stop_gradient(tf.cast(temperature, dtype))
    log_student = _log_softmax_similarities(student, temperature, rows)
    divergences = []
    for teacher in teachers:
        log_teacher = _log_softmax_similarities(tf.stop_gradient(tf.cast(teacher, dtype)), temperature, rows)
        divergences.append(tf.reduce_sum(tf.exp(log_teacher) * (log_teacher - log_student)))
    count = tf.cast(tf.shape(log_student)[0], dtype)
    per_teacher = tf.stack(divergences) * (temperature**2) / count
    return tf.reduce_sum(tf.cast(tf.convert_to_tensor(weights), dtype) * per_teacher), per_teacher


def _log_softmax_similarities(embeddings, temperature, rows):
    anchors = embeddings if rows is None else tf.slice(embeddings, [rows[0], 0], [rows[1], -1])
    return tf.nn.log_softmax(tf.matmul(anchors, embeddings, transpose_b=True) / temperature, axis=1)
