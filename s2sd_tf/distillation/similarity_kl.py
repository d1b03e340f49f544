"""The row-wise KL divergence between the similarity matrices of teachers and of a student."""

import os

import tensorflow as tf

from s2sd_tf.distillation import fused
from s2sd_tf.distillation.composed import composed_similarity_kl

IMPLEMENTATIONS = ("auto", "fused", "composed")
KERNEL_VARIABLE = "S2SD_TF_KERNEL"


def similarity_kl(
    student,
    teachers,
    temperature=1.0,
    weights=None,
    implementation="auto",
    *,
    rows=None,
    compute_gradient=True,
    jit_compile=None,
):
    """KL divergence from every teacher's in-batch similarity structure to the student's (S2SD, section 3).

    With the cosine similarities S(a) = a a^T of l2-normalised rows, diagonal kept, and P(a) the row-wise softmax of
    S(a) / T:

        KL_k = T^2 / B * sum_ij P(q_k)_ij * (log P(q_k)_ij - log P(z)_ij)

    The composed implementation makes 2 (K + 1) matrices of batch x batch and as many for the gradient. The fused one
    makes none. It takes a workspace of at most `S2SD_TF_WORKSPACE_MIB` (an environment variable, default 256) MiB; on
    the CPU some 60 MiB beside it, and all of it is kept for the next call (except by jitted functions); calls at the
    same time take as much each. Rows of other lengths than 1 give the right result too, in more time. On a GPU, NaN is
    the result of a squared length above 1e36 or a temperature that is a tensor and not > 0.

    The fused op has no second derivative. A function that is saved to be used without this package should be traced
    with `implementation="composed"`.

    Args:
        student: float tensor `(batch, dim)`, the rows l2-normalised. float64 computes in float64; float32, float16
            and bfloat16 accumulate in float32.
        teachers: sequence of K >= 1 float tensors `(batch, dim_k)`; the dims may differ. No gradient flows into them.
        temperature: float > 0. No gradient flows into it.
        weights: K floats, or a float tensor `(K,)`, by which the divergences are summed. Default: 1 / K each.
        implementation: "auto" (the fused op where it can be had, else composed), "composed" (TensorFlow ops) or
            "fused". The environment variable `S2SD_TF_KERNEL` stands in for "auto" where it is set. "auto" is composed
            in float64, for `rows` that a jitted function computes, and on a GPU for more than 64 teachers or 131,072
            rows. With GPUs the fused op is compared with the composed version on each at the first use, on small
            problems; where it fails or differs, a line is logged and it is not used.
        rows: `(offset, count)`, two ints or an int32 tensor `(2,)`: only the rows [offset, offset + count) of the
            similarity matrices are compared, over all columns, and averaged. The gradient has the part of the rows and
            that of the columns. For a replica that holds `count` of `batch` gathered embeddings: the mean over replicas
            of equal count is the divergence of the whole batch. Default: all.
        compute_gradient: False spares the fused op the gradient, where only the value is wanted.
        jit_compile: whether the surrounding `tf.function` is compiled by XLA. None, not known: the fused op is then
            used inside of a `tf.function` only where it works with XLA too.

    Returns:
        `(total, per_teacher)`: the weighted sum, a scalar differentiable in `student` and `weights`; and the K single
        divergences `(K,)`, which carry no gradient. Both are float32, or float64 for a float64 student.

    Raises:
        tf.errors.InvalidArgumentError: wrong rank, no teacher, batch sizes that differ, a weight too many or too few,
            a temperature that is not > 0 or not finite, rows outside of the batch, or "fused" asked for in float64.
            The composed version raises nothing under XLA for what only shows when it runs.
        NotImplementedError: "fused" was asked for and cannot be had, or fails its check; the message says why.
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
            fused.unavailable(xla=True)  # loads what there is
        return True
    if maybe_jitted and rows is not None and tf.get_static_value(rows) is None:
        return False  # XLA would have to know them
    if fused.on_gpu() and fused.too_large_for_a_gpu(student, teachers):
        return False
    return not fused.unavailable(xla=maybe_jitted)


def _all_rows(student):
    known = student.shape[0]
    return tf.stack([0, tf.shape(student)[0]]) if known is None else tf.constant([0, known])


def _rows(rows, student):
    """`rows` as an int32 tensor `(2,)`, or None for all of them."""
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
    """Ops that refuse what could not be seen when the function was traced; the fused op has its own."""
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
    """Refuses what shows from the arguments' static shapes, in the words of custom_ops/similarity_kl/validate.h."""
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
    return f"weights: expected {len(teachers)} weights, one a teacher. Received: "


def _refuse(message):
    raise tf.errors.InvalidArgumentError(None, None, f"similarity_kl: {message}")
