"""Row-wise KL divergence from the similarity matrices of teachers to that of a student."""

import os
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from s2sd_tf.distillation import fused
from s2sd_tf.distillation.composed import composed_similarity_kl

IMPLEMENTATIONS = ("auto", "fused", "composed")
KERNEL_VARIABLE = "S2SD_TF_KERNEL"


def similarity_kl(
    student: tf.Tensor | np.ndarray,
    teachers: Sequence[tf.Tensor | np.ndarray],
    temperature: float | tf.Tensor = 1.0,
    weights: Sequence[float] | tf.Tensor | None = None,
    implementation: str = "auto",
    *,
    rows: tuple[int, int] | tf.Tensor | None = None,
    compute_gradient: bool = True,
    jit_compile: bool | None = None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Computes the KL divergence from each teacher's in-batch similarities to the student's (S2SD, section 3).

    With the cosine similarities S(a) = a a^T of l2-normalised rows, including the diagonal, and P(a) the row-wise
    softmax of S(a) / T:

        KL_k = T^2 / B * sum_ij P(q_k)_ij * (log P(q_k)_ij - log P(z)_ij)

    The composed implementation allocates 2 (K + 1) matrices of batch x batch, and as many again for the gradient. The
    fused op allocates none. It uses a workspace of at most `S2SD_TF_WORKSPACE_MIB` (an environment variable, default
    256) MiB, plus about 60 MiB on the CPU. On the CPU all of it is kept for the next call, except in jitted functions;
    concurrent calls need as much each. Rows that are not of length 1 give correct results too, but take longer. On a
    GPU the result is NaN for a squared length above 1e36, or for a temperature tensor that is not > 0.

    The fused op has no second derivative. To save a function for use without this package, trace it with
    `implementation="composed"`.

    Args:
        student: float `(batch, dim)`, with l2-normalised rows. A float64 student is computed in float64; float32,
            float16 and bfloat16 accumulate in float32.
        teachers: K >= 1 float matrices `(batch, dim_k)`; the dims may differ. No gradient flows into them.
        temperature: > 0. No gradient flows into it.
        weights: weights `(K,)` of the divergences in the total. Default: 1 / K each.
        implementation: "composed" (TensorFlow ops), "fused", or "auto": the fused op if it is available, else composed.
            The environment variable `S2SD_TF_KERNEL`, if set, replaces "auto". "auto" is always composed for float64,
            for `rows` that a jitted function computes, and on a GPU for more than 64 teachers, 131,072 rows or
            4,194,304 dimensions. At the first use, the fused op is compared with the composed version on every GPU, on
            small problems. If it fails or differs, one line is logged and the composed version is used.
        rows: `(offset, count)`: compares only the rows [offset, offset + count) of the similarity matrices, over all
            columns, and averages over them. The gradient includes the contributions of embeddings as rows and as
            columns. This is for a replica that holds `count` of `batch` gathered embeddings: the mean over replicas
            with equal counts is the divergence of the whole batch. Default: all rows.
        compute_gradient: False saves the fused op the work for the gradient, if only the value is needed.
        jit_compile: whether XLA compiles the surrounding `tf.function`. None means unknown: inside a `tf.function` the
            fused op is then used only if it works with XLA too.

    Returns:
        `(total, per_teacher)`: the weighted sum, a scalar that is differentiable in `student` and `weights`; and the
        K divergences `(K,)`, which carry no gradient. Both are float32, or float64 for a float64 student.

    Raises:
        tf.errors.InvalidArgumentError: wrong rank, no teacher, differing batch sizes, a wrong number of weights, a
            temperature that is not > 0 or not finite, rows outside the batch, or "fused" for float64. Under XLA the
            composed version raises nothing for values that are known only when it runs.
        NotImplementedError: "fused" was requested but is not available or fails its check; the message says why.
        ValueError: an unknown implementation.
    """
    chosen = _chosen_implementation(implementation)
    student = tf.convert_to_tensor(student)
    teachers = [tf.convert_to_tensor(teacher) for teacher in teachers]
    _check_shapes(student, teachers, temperature, weights)
    rows = _rows(rows, student)
    if weights is None:
        weights = [1.0 / len(teachers)] * len(teachers)
    if _use_fused(chosen, student, teachers, rows, jit_compile):
        dtype = student.dtype if all(teacher.dtype == student.dtype for teacher in teachers) else tf.float32
        total, per_teacher = fused.fused_similarity_kl(
            tf.cast(student, dtype),
            [tf.cast(teacher, dtype) for teacher in teachers],
            temperature,
            weights,
            _all_rows(student) if rows is None else rows,
            compute_gradient,
        )
    else:
        dtype = tf.float64 if student.dtype == tf.float64 else tf.float32
        with tf.control_dependencies(_assertions(student, teachers, temperature, weights, rows)):
            student, *teachers = (tf.cast(tf.identity(matrix), dtype) for matrix in (student, *teachers))
        total, per_teacher = composed_similarity_kl(student, teachers, temperature, weights, rows)
    return total, tf.stop_gradient(per_teacher)


def _chosen_implementation(implementation):
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: expected one of {IMPLEMENTATIONS}. Received: {implementation!r}")
    chosen = os.environ.get(KERNEL_VARIABLE, "auto") if implementation == "auto" else implementation
    if chosen not in IMPLEMENTATIONS:
        raise ValueError(f"{KERNEL_VARIABLE}: expected one of {IMPLEMENTATIONS}. Received: {chosen!r}")
    return chosen


def _use_fused(chosen, student, teachers, rows, jit_compile):
    if chosen == "composed":
        return False
    if student.dtype not in fused.DTYPES:
        if chosen == "fused":
            _refuse(f"implementation='fused': expected float32, float16 or bfloat16. Received: {student.dtype.name}")
        return False
    maybe_jitted = tf.inside_function() if jit_compile is None else jit_compile
    if chosen == "fused":
        reason = fused.unavailable(xla=bool(jit_compile))
        if reason:
            raise NotImplementedError(f"implementation='fused': {reason}")
        if maybe_jitted:
            fused.unavailable(xla=True)  # loads the XLA library if it is available
        return True
    if maybe_jitted and rows is not None and tf.get_static_value(rows) is None:
        return False  # XLA needs the rows at compile time
    if fused.on_gpu() and fused.too_large_for_a_gpu(student, teachers):
        return False
    return not fused.unavailable(xla=maybe_jitted)


def _all_rows(student):
    known = student.shape[0]
    return tf.stack([0, tf.shape(student)[0]]) if known is None else tf.constant([0, known])


def _rows(rows, student):
    """Returns `rows` as an int32 tensor `(2,)`, or None for all rows."""
    if rows is None:
        return None
    rows = tf.convert_to_tensor(rows, tf.int32)
    if not rows.shape.is_compatible_with([2]):
        _refuse(f"rows: expected (offset, count). Received: shape {rows.shape}")
    known, batch = tf.get_static_value(rows), student.shape[0]
    if known is not None:
        offset, count = known.tolist()
        if offset < 0 or count < 1 or (batch is not None and offset + count > batch):
            _refuse(_expected_rows("the batch size" if batch is None else batch) + f"({offset}, {count})")
    return rows


def _expected_rows(batch):
    return f"rows: expected offset >= 0, count >= 1 and offset + count <= {batch}. Received: "


def _assertions(student, teachers, temperature, weights, rows):
    """Returns assertions for what is unknown while tracing; the fused op has its own."""
    assertions = []

    def expect(condition, message, *received):
        assertions.append(tf.debugging.Assert(condition, [f"similarity_kl: {message}", *received]))

    batch = tf.shape(student)[0]
    for k, teacher in enumerate(teachers):
        if student.shape[0] is None or teacher.shape[0] is None:
            received = (tf.shape(student), tf.shape(teacher))
            message = f"teachers[{k}]: expected the batch size of the student. Received: student and teacher"
            expect(tf.equal(received[0][0], received[1][0]), message, *received)
    if student.shape[0] is None:
        expect(batch >= 1, "student: expected at least one row and one column. Received: student", tf.shape(student))
    if tf.is_tensor(temperature):
        valid = tf.reduce_all((temperature > 0) & tf.math.is_finite(temperature))
        expect(valid, "temperature: expected a finite number > 0. Received: ", temperature)
    if tf.is_tensor(weights) and not weights.shape.is_fully_defined():
        valid = tf.equal(tf.rank(weights), 1) & tf.equal(tf.size(weights), len(teachers))
        expect(valid, _expected_weights(teachers), tf.shape(weights))
    if rows is not None and (tf.get_static_value(rows) is None or student.shape[0] is None):
        valid = (rows[0] >= 0) & (rows[1] >= 1) & (rows[0] + rows[1] <= batch)
        expect(valid, _expected_rows("the batch size"), rows, batch)
    return assertions


def _check_shapes(student, teachers, temperature, weights):
    """Checks the static shapes of the arguments, with the messages of custom_ops/similarity_kl/validate.h."""
    shapes = f"student {student.shape}, teachers [{', '.join(str(teacher.shape) for teacher in teachers)}]"
    if not teachers:
        _refuse(f"teachers: expected at least one teacher. Received: {shapes}")
    for name, tensor in [("student", student), *((f"teachers[{k}]", t) for k, t in enumerate(teachers))]:
        if tensor.shape.rank != 2:
            _refuse(f"{name}: expected shape (batch, dim). Received: {shapes}")
        if not tensor.dtype.is_floating:
            _refuse(f"{name}: expected a floating dtype. Received: {tensor.dtype.name}")
        if not student.shape[:1].is_compatible_with(tensor.shape[:1]):
            _refuse(f"{name}: expected the batch size of the student. Received: {shapes}")
        if 0 in tensor.shape.as_list():
            _refuse(f"{name}: expected at least one row and one column. Received: {shapes}")
    if tf.is_tensor(temperature):
        if not temperature.shape.is_compatible_with([]):
            _refuse(f"temperature: expected a scalar. Received: shape {temperature.shape}")
    elif not 0 < temperature < float("inf"):
        _refuse(f"temperature: expected a finite number > 0. Received: {temperature}")
    if weights is not None:
        shape = tf.convert_to_tensor(weights).shape
        if not shape.is_compatible_with([len(teachers)]):
            _refuse(f"{_expected_weights(teachers)}shape {shape}")


def _expected_weights(teachers):
    return f"weights: expected {len(teachers)} weights, one per teacher. Received: "


def _refuse(message):
    raise tf.errors.InvalidArgumentError(None, None, f"similarity_kl: {message}")
