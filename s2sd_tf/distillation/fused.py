"""The fused similarity-KL op; its libraries are loaded at the first use, and built then where they are missing."""

import contextlib
import logging
import threading
import time

import tensorflow as tf

from s2sd_tf.distillation import libraries

DTYPES = (tf.float32, tf.float16, tf.bfloat16)
CUDA_MAX_TEACHERS, CUDA_MAX_BATCH = 64, 2**17  # see cuda_kernel.h

_LOG = logging.getLogger(__name__)
_LOADED = {}
_LOADING = threading.Lock()
_USE = {libraries.OP: "", libraries.XLA: " under jit_compile"}


def unavailable(xla=False):
    """None where the fused op can be used, else why not, in one line; the first time it is logged too.

    Args:
        xla: whether the op has to work under `jit_compile=True` too, which takes a second library.
    """
    for library in (libraries.OP, libraries.XLA)[: 2 if xla else 1]:
        _, reason = _load(library)
        if reason:
            return reason
    return None


def on_gpu():
    """Whether the op runs on a GPU where it can be used."""
    return bool(tf.config.get_visible_devices("GPU"))


def fused_similarity_kl(student, teachers, temperature, weights, rows, compute_gradient):
    """`(total, per_teacher)` by the fused op; the arguments are tensors that `similarity_kl` has checked.

    The tensors have one dtype of `DTYPES`; `rows` is int32 `(2,)`. Without `compute_gradient` the op does less, and
    whoever differentiates nevertheless has it run again.
    """
    total, per_teacher, _ = _op()(
        student=student,
        teachers=teachers,
        temperature=tf.cast(temperature, tf.float32),
        weights=tf.cast(weights, tf.float32),
        rows=rows,
        compute_gradient=compute_gradient,
        allow_tf32=tf.config.experimental.tensor_float_32_execution_enabled(),
    )
    return total, per_teacher


def _similarity_kl_gradient(op, total_gradient, *_):
    """The student's gradient was made in the forward pass: the upstream gradient is one number."""
    student, *teachers = op.inputs[:-3]
    temperature, weights, rows = op.inputs[-3:]
    per_teacher, student_gradient = op.outputs[1:]
    if not op.get_attr("compute_gradient"):
        _, per_teacher, student_gradient = _op()(
            student=student,
            teachers=teachers,
            temperature=temperature,
            weights=weights,
            rows=rows,
            compute_gradient=True,
            allow_tf32=op.get_attr("allow_tf32"),
        )
    student_gradient = tf.cast(total_gradient * _once_differentiable(student_gradient), student.dtype)
    return [student_gradient, *[None] * len(teachers), None, total_gradient * _once_differentiable(per_teacher), None]


with contextlib.suppress(KeyError):  # of a module that is loaded a second time, as notebooks do
    tf.RegisterGradient("S2sd>SimilarityKl")(_similarity_kl_gradient)


@tf.custom_gradient
def _once_differentiable(x):
    def gradient(*_):
        raise NotImplementedError(
            "similarity_kl: the fused op has no second derivative; use implementation='composed' for it."
        )

    return tf.identity(x), gradient


def _op():
    module, reason = _load(libraries.OP)
    if reason:
        raise NotImplementedError(reason)
    return module.s2sd_similarity_kl


def _load(library):
    """`(module, None)`, or `(None, why not)`; builds the library where it is missing."""
    with _LOADING:
        if library not in _LOADED:
            try:
                _LOADED[library] = _find_or_build(library), None
            except Exception as error:  # whatever it is, there is the composed version
                message = getattr(error, "message", None) or str(error) or type(error).__name__
                reason = f"no fused similarity-KL op{_USE[library]}: {message.splitlines()[0]}"
                _LOG.warning("s2sd_tf: %s. The composed version is used.", reason)
                _LOADED[library] = None, reason
        return _LOADED[library]


def _find_or_build(library):
    gpus = tf.config.get_visible_devices("GPU")
    cuda = _compute_capabilities(gpus) if gpus else False
    if library == libraries.XLA and cuda and tf.__version__.startswith("2.15."):
        raise libraries.BuildError("TensorFlow 2.15 has no interface for it on a GPU")
    path = libraries.find(library, cuda)
    if path is None:
        if cuda and not libraries.cuda_compiler():
            raise libraries.BuildError("there is a GPU, but no nvcc to build its kernels")
        libraries.compiler()
        others = libraries.others(library)
        _LOG.warning(
            "s2sd_tf: building the fused similarity-KL op%s for TensorFlow %s, once%s ...",
            _USE[library],
            tf.__version__,
            f" ({', '.join(others)} does not fit)" if others else "",
        )
        start = time.monotonic()
        path = libraries.build(library, cuda=cuda)
        _LOG.warning("s2sd_tf: built %s in %.0f s.", path, time.monotonic() - start)
    return tf.load_op_library(str(path))


def _compute_capabilities(gpus):
    """Those of the GPUs, as in `[80, 90]`."""
    found = set()
    for gpu in gpus:
        capability = tf.config.experimental.get_device_details(gpu).get("compute_capability")
        if capability is None or 10 * capability[0] + capability[1] < libraries.OLDEST_CUDA:
            least = libraries.OLDEST_CUDA / 10
            raise libraries.BuildError(f"{gpu.name} is not an NVIDIA GPU of compute capability {least} or later")
        found.add(10 * capability[0] + capability[1])
    return sorted(found)
