"""Similarity-KL in plain TensorFlow ops. It runs everywhere and is the reference for the fused op."""

from collections.abc import Sequence

import tensorflow as tf


def composed_similarity_kl(
    student: tf.Tensor,
    teachers: Sequence[tf.Tensor],
    temperature: float | tf.Tensor,
    weights: Sequence[float] | tf.Tensor,
    rows: tuple[int, int] | tf.Tensor | None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Computes `(total, per_teacher)` of `similarity_kl` in the student's dtype, float32 or float64."""
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
