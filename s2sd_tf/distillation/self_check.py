"""Checks the fused op against the composed version on a device, on small problems."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from s2sd_tf.distillation.composed import composed_similarity_kl

# Largest accepted errors of the divergences and the gradient, each relative to its largest entry.
_LIMIT = 1e-3  # rounding alone gives 1e-6
_LIMIT_TF32 = 2e-2  # rounding alone gives 2e-3


@dataclasses.dataclass(frozen=True)
class _Problem:
    batch: int
    dtype: tf.DType
    temperature: float
    rows: tuple[int, int] | None = None  # offset and count; None: all
    lengths: tuple[float, float] = (1.0, 1.0)  # smallest and largest length of the matrices' rows
    tf32: bool = False  # whether products may be in TF32

    def inputs(self) -> list[tf.Tensor]:
        """Returns the student's and the teachers' matrices, rounded to `dtype`."""
        random = np.random.default_rng(self.batch)
        matrices = []
        # Different dimensions select different ways to copy rows: by 16 bytes, in several slices, and by fewer bytes.
        for dim in (128, 33, 70, 256):
            matrix = random.normal(size=(self.batch, dim))
            matrix *= random.uniform(*self.lengths, (self.batch, 1)) / np.linalg.norm(matrix, axis=1, keepdims=True)
            matrices.append(tf.cast(matrix, self.dtype))
        return matrices

    def __str__(self) -> str:
        return f"{self.dtype.name}{' in TF32' if self.tf32 else ''}, batch {self.batch}"


# The batch sizes select the different GPU kernels: two for up to 256 rows, one for more, and one for enough rows that
# larger tiles fill the GPU.
_PROBLEMS = (
    *(
        _Problem(batch, dtype, temperature, tf32=tf32)
        for batch, temperature in ((41, 1.0), (200, 0.5), (300, 0.2), (2400, 0.2))
        for dtype, tf32 in ((tf.float32, False), (tf.float32, True), (tf.float16, False), (tf.bfloat16, False))
    ),
    _Problem(41, tf.float32, 0.5, rows=(7, 20)),
    _Problem(300, tf.float32, 0.5, rows=(97, 130)),
    _Problem(300, tf.float32, 1.0, lengths=(0.5, 3.0)),  # for such lengths the kernel computes the rows' maxima
)
_WEIGHTS = (0.5, 1.5, 1.0)


def complaint(op: Callable[..., Any], device: str, jit_compile: bool = False) -> str | None:
    """Returns None if `op` agrees with the composed version on `device`, else the difference or error in one line.

    The check runs immediately and eagerly, even inside a `tf.function`, a replica or a tape.

    Args:
        op: the op, as `tf.load_op_library` returns it.
        device: name of a logical device.
        jit_compile: whether to compile the op with XLA.
    """
    try:
        with tf.init_scope():
            return _compare(op, device, jit_compile)
    except Exception as error:  # from CUDA, the driver or XLA: whatever it is, the composed version still works
        return first_line(error)


def first_line(error: Exception) -> str:
    """Returns the first line of an exception's message, or the name of its type if there is no message."""
    return (getattr(error, "message", None) or str(error) or type(error).__name__).splitlines()[0]


def _compare(op, device, jit_compile):
    allow_tf32 = tf.config.experimental.tensor_float_32_execution_enabled()
    problems = [problem for problem in _PROBLEMS if allow_tf32 or not problem.tf32]
    run = _jitted if jit_compile else _run
    with tf.device("CPU:0"):
        inputs = [problem.inputs() for problem in problems]
        expected = [_exact(dataclasses.replace(problem, tf32=False)) for problem in problems]
    with tf.device(device):
        outputs = run(op, problems, [[tf.identity(matrix) for matrix in matrices] for matrices in inputs])
    ran_on = outputs[0][0].device
    if _type_and_index(ran_on) != _type_and_index(device):  # soft placement moves an op silently
        return f"it ran on {ran_on}"
    for problem, output, (per_teacher, gradient) in zip(problems, outputs, expected):
        total = np.dot(_WEIGHTS, per_teacher)
        limit = _LIMIT_TF32 if problem.tf32 else _LIMIT
        names = ("value", "value of a teacher", "gradient")
        for name, got, want in zip(names, output, (total, per_teacher, gradient)):
            error = np.max(np.abs(got.numpy() - want)) / np.max(np.abs(want))
            if not error <= limit:  # also if it is NaN
                return f"the {name} differs from the composed version's by {error:.1e} ({problem}; at most {limit:.0e})"
    return None


def _type_and_index(device):
    spec = tf.DeviceSpec.from_string(device)
    return spec.device_type, spec.device_index


def _run(op, problems, inputs):
    """Returns `(total, per_teacher, gradient)` for each problem."""
    outputs = []
    for problem, (student, *teachers) in zip(problems, inputs):
        output = op(
            student=student,
            teachers=teachers,
            temperature=tf.constant(problem.temperature),
            weights=tf.constant(_WEIGHTS),
            rows=tf.constant(problem.rows or (0, problem.batch)),
            compute_gradient=True,
            allow_tf32=problem.tf32,
        )
        outputs.append(tuple(output))
    return outputs


def _jitted(op, problems, inputs):
    return tf.function(lambda inputs: _run(op, problems, inputs), autograph=False, jit_compile=True)(inputs)


@functools.cache
def _exact(problem):
    """Computes the divergences and the gradient with the composed version in float64."""
    per_teacher, gradient = _composed([tf.cast(matrix, tf.float64) for matrix in problem.inputs()], problem)
    return per_teacher.numpy(), gradient.numpy()


@tf.function(autograph=False)
def _composed(matrices, problem):
    student, *teachers = matrices
    total, per_teacher = composed_similarity_kl(student, teachers, problem.temperature, _WEIGHTS, problem.rows)
    return per_teacher, tf.gradients(total, student)[0]  # not a tape: it records nothing inside an init_scope
