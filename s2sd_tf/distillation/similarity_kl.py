"""The row-wise KL divergence between the similarity matrices of teachers and of a student."""

import os

import tensorflow as tf

IMPLEMENTATIONS = ("auto", "fused", "composed")
KERNEL_VARIABLE = "S2SD_TF_KERNEL"


def similarity_kl(student, teachers, temperature=1.0, weights=None, implementation="auto"):
    """KL divergence from every teacher's in-batch similarity structure to the student's (S2SD, section 3).

    With the cosine similarities S(a) = a a^T of l2-normalised rows, diagonal kept, and P(a) the row-wise softmax of
    S(a) / T:

        KL_k = T^2 / B * sum_ij P(q_k)_ij * (log P(q_k)_ij - log P(z)_ij)

    Args:
        student: float tensor `(batch, dim)`, the rows l2-normalised. float64 computes in float64; float32, float16
            and bfloat16 accumulate in float32.
        teachers: sequence of K >= 1 float tensors `(batch, dim_k)`; the dims may differ. No gradient flows into them.
        temperature: float > 0.
        weights: K floats, or a float tensor `(K,)`, by which the divergences are summed. Default: 1 / K each.
        implementation: "auto" (the fused op where it can be had, else composed), "composed" (TensorFlow ops) or
            "fused". The environment variable `S2SD_TF_KERNEL` stands in for "auto" where it is set.

    Returns:
        `(total, per_teacher)`: the weighted sum, a scalar differentiable in `student`; and the K single divergences
        `(K,)`, which carry no gradient. Both are float32, or float64 for a float64 student.

    Raises:
        tf.errors.InvalidArgumentError: wrong rank, no teacher, batch sizes that differ, a weight too many or too few,
            or a temperature that is not > 0.
        NotImplementedError: "fused" was asked for and there is no fused op in this installation.
        ValueError: an unknown implementation.
    """
    _check_implementation(implementation)
    student = tf.convert_to_tensor(student)
    teachers = [tf.convert_to_tensor(teacher) for teacher in teachers]
    _check_shapes(student, teachers, temperature, weights)

    dtype = tf.float64 if student.dtype == tf.float64 else tf.float32
    if weights is None:
        weights = [1.0 / len(teachers)] * len(teachers)
    per_teacher = _composed(
        tf.cast(student, dtype), [tf.stop_gradient(tf.cast(teacher, dtype)) for teacher in teachers], temperature
    )
    total = tf.reduce_sum(tf.cast(tf.convert_to_tensor(weights), dtype) * per_teacher)
    return total, tf.stop_gradient(per_teacher)


def _composed(student, teachers, temperature):
    """The K divergences `(K,)` by plain TensorFlow ops: 2 (K + 1) matrices of batch x batch."""
    log_student = _log_softmax_similarities(student, temperature)
    divergences = []
    for teacher in teachers:
        log_teacher = _log_softmax_similarities(teacher, temperature)
        divergences.append(tf.reduce_sum(tf.exp(log_teacher) * (log_teacher - log_student)))
    batch = tf.cast(tf.shape(student)[0], student.dtype)
    return tf.stack(divergences) * (temperature**2) / batch


def _log_softmax_similarities(embeddings, temperature):
    return tf.nn.log_softmax(tf.matmul(embeddings, embeddings, transpose_b=True) / temperature, axis=1)


def _check_implementation(implementation):
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: expected one of {IMPLEMENTATIONS}. Received: {implementation!r}")
    chosen = os.environ.get(KERNEL_VARIABLE, "auto") if implementation == "auto" else implementation
    if chosen not in IMPLEMENTATIONS:
        raise ValueError(f"{KERNEL_VARIABLE}: expected one of {IMPLEMENTATIONS}. Received: {chosen!r}")
    if chosen == "fused":
        raise NotImplementedError(
            "implementation='fused': this installation has no fused similarity-KL op; use 'auto' or 'composed'."
        )


def _check_shapes(student, teachers, temperature, weights):
    shapes = f"student {student.shape}, teachers {[tuple(teacher.shape.as_list()) for teacher in teachers]}"
    if not teachers:
        _refuse(f"teachers: expected at least one teacher. Received: {shapes}")
    for name, tensor in [("student", student), *((f"teachers[{k}]", t) for k, t in enumerate(teachers))]:
        if tensor.shape.rank != 2:
            _refuse(f"{name}: expected shape (batch, dim). Received: {shapes}")
        if not tensor.dtype.is_floating:
            _refuse(f"{name}: expected a floating dtype. Received: {tensor.dtype.name}")
        if not student.shape[:1].is_compatible_with(tensor.shape[:1]):
            _refuse(f"{name}: expected the batch size of the student. Received: {shapes}")
    if not tf.is_tensor(temperature) and not temperature > 0:
        _refuse(f"temperature: expected a number > 0. Received: {temperature}")
    if weights is not None:
        shape = tf.convert_to_tensor(weights).shape
        if not shape.is_compatible_with([len(teachers)]):
            _refuse(f"weights: expected {len(teachers)} weights, one a teacher. Received: shape {shape}")


def _refuse(message):
    raise tf.errors.InvalidArgumentError(None, None, f"similarity_kl: {message}")
