"""Whether the fused op computes on a device what the composed version does: tried on small problems."""

import dataclasses
import functools

import numpy as np
import tensorflow as tf

from s2sd_tf.distillation.composed import composed_similarity_kl

# Largest errors of the divergences and of the gradient, each relative to its largest entry.
_LIMIT = 1e-3  # of rounding there is 1e-6
_LIMIT_TF32 = 2e-2  # of rounding there is 2e-3


@dataclasses.dataclass(frozen=True)
class _Problem:
    batch: int
    dtype: tf.DType
    temperature: float
    rows: tuple = None  # all
    lengths: tuple = (1.0, 1.0)  # of the matrices' rows, from and to

    def inputs(self):
        """The student's and the teachers' matrices, already rounded to the dtype."""
        random = np.random.default_rng(self.batch)
        matrices = []
        for dim in (16, 33, 70):
            matrix = random.normal(size=(self.batch, dim))
            matrix *= random.uniform(*self.lengths, (self.batch, 1)) / np.linalg.norm(matrix, axis=1, keepdims=True)
            matrices.append(tf.cast(matrix, self.dtype))
        return matrices

    def __str__(self):
        return f"{self.dtype.name}, batch {self.batch}"


# A GPU has kernels for up to 256 rows, for more, and for so many that larger tiles keep all of its processors busy.
_DTYPES = (tf.float32, tf.float16, tf.bfloat16)
_PROBLEMS = (
    *(_Problem(41, dtype, 1.0) for dtype in _DTYPES),
    *(_Problem(300, dtype, 0.2) for dtype in _DTYPES),
    *(_Problem(2400, dtype, 0.2) for dtype in _DTYPES),
    _Problem(41, tf.float32, 0.5, rows=(7, 20)),
    _Problem(300, tf.float32, 0.5, rows=(97, 130)),
    _Problem(300, tf.float32, 1.0, lengths=(0.5, 3.0)),  # of such the kernel looks for the rows' maxima
)
_WEIGHTS = (0.5, 1.5)


def complaint(op, device, jit_compile=False):
    """None where `op` agrees with the composed version on `device`, else what was found, in one line.

    The check runs at once and eagerly, wherever it is called: inside a `tf.function`, a replica or a tape too.

    Args:
        op: the op, as `tf.load_op_library` gives it.
        device: name of a logical device.
        jit_compile: whether XLA is to compile the op.
    """
    try:
        with tf.init_scope():
            return _compare(op, device, jit_compile)
    except Exception as error:  # of CUDA, of the driver, of XLA: whatever it is, there is the composed version
        return first_line(error)


def first_line(error):
    """Of an exception's message; its type's name where it has none."""
    return (getattr(error, "message", None) or str(error) or type(error).__name__).splitlines()[0]


def _compare(op, device, jit_compile):
    allow_tf32 = tf.config.experimental.tensor_float_32_execution_enabled()
    run = _jitted if jit_compile else _run
    with tf.device("CPU:0"):
        inputs = [problem.inputs() for problem in _PROBLEMS]
        expected = [_exact(problem) for problem in _PROBLEMS]
    with tf.device(device):
        outputs = run(op, [[tf.identity(matrix) for matrix in matrices] for matrices in inputs], allow_tf32)
    ran_on = outputs[0][0].device
    if _type_and_index(ran_on) != _type_and_index(device):  # soft placement says nothing
        return f"it ran on {ran_on}"
    for problem, output, (per_teacher, gradient) in zip(_PROBLEMS, outputs, expected):
        total = np.dot(_WEIGHTS, per_teacher)
        limit = _LIMIT_TF32 if allow_tf32 and problem.dtype == tf.float32 else _LIMIT
        names = ("value", "value of a teacher", "gradient")
        for name, got, want in zip(names, output, (total, per_teacher, gradient)):
            error = np.max(np.abs(got.numpy() - want)) / np.max(np.abs(want))
            if not error <= limit:  # NaN is not
                return f"the {name} differs by {error:.1e} of the composed version's ({problem}; at most {limit:.0e})"
    return None


def _type_and_index(device):
    spec = tf.DeviceSpec.from_string(device)
    return spec.device_type, spec.device_index


def _run(op, inputs, allow_tf32):
    """`(total, per_teacher, gradient)` of every problem."""
    outputs = []
    for problem, (student, *teachers) in zip(_PROBLEMS, inputs):
        output = op(
            student=student,
            teachers=teachers,
            temperature=tf.constant(problem.temperature),
            weights=tf.constant(_WEIGHTS),
            rows=tf.constant(problem.rows or (0, problem.batch)),
            compute_gradient=True,
            allow_tf32=allow_tf32,
        )
        outputs.append(tuple(output))
    return outputs


def _jitted(op, inputs, allow_tf32):
    return tf.function(lambda inputs: _run(op, inputs, allow_tf32), autograph=False, jit_compile=True)(inputs)


@functools.cache
def _exact(problem):
    """The divergences and the gradient by the composed version in float64."""
    per_teacher, gradient = _composed([tf.cast(matrix, tf.float64) for matrix in problem.inputs()], problem)
    return per_teacher.numpy(), gradient.numpy()


@tf.function(autograph=False)
def _composed(matrices, problem):
    student, *teachers = matrices
    total, per_teacher = composed_similarity_kl(student, teachers, problem.temperature, _WEIGHTS, problem.rows)
    return per_teacher, tf.gradients(total, student)[0]  # no tape records within an init_scope
