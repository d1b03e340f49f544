"""The fused similarity-KL op. Its libraries are loaded at the first use, and built first if they are missing."""

import contextlib
import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from s2sd_tf.distillation import libraries, self_check

DTYPES = (tf.float32, tf.float16, tf.bfloat16)
CUDA_MAX_TEACHERS, CUDA_MAX_BATCH, CUDA_MAX_DIM = 64, 2**17, 2**22  # see validate.h

_LOG = logging.getLogger(__name__)
_LOADED: dict[str, tuple[Any, str | None]] = {}  # by library: what `_load` returns
_CHECKED: dict[str, str | None] = {}  # by library: None, or why it is not trusted
_LOADING = threading.RLock()
_USE = {libraries.OP: "", libraries.XLA: " under jit_compile"}


@tf.autograph.experimental.do_not_convert
def unavailable(xla: bool = False) -> str | None:
    """Returns None if the fused op can be used, else the reason in one line, which is also logged the first time.

    On a machine with GPUs the op can be used only if it agrees with the composed version on small problems on every
    GPU. This is checked once.

    Args:
        xla: whether the op must also work under `jit_compile=True`, which needs a second library.
    """
    for library in (libraries.OP, libraries.XLA)[: 2 if xla else 1]:
        reason = _load(library)[1] or _failed_check(library)
        if reason:
            return reason
    return None


def on_gpu() -> bool:
    """Whether the op, if it can be used, runs on a GPU."""
    return bool(tf.config.get_visible_devices("GPU"))


def too_large_for_a_gpu(student: tf.Tensor, teachers: Sequence[tf.Tensor]) -> bool:
    """Whether the CUDA kernels refuse these shapes; unknown sizes count as small enough."""
    dims = [matrix.shape[1] or 0 for matrix in (student, *teachers)]
    return len(teachers) > CUDA_MAX_TEACHERS or (student.shape[0] or 0) > CUDA_MAX_BATCH or max(dims) > CUDA_MAX_DIM


def fused_similarity_kl(
    student: tf.Tensor,
    teachers: Sequence[tf.Tensor],
    temperature: float | tf.Tensor,
    weights: Sequence[float] | tf.Tensor,
    rows: tf.Tensor,
    compute_gradient: bool,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Runs the fused op and returns `(total, per_teacher)`. `similarity_kl` has checked the arguments.

    The tensors share one dtype of `DTYPES`; `rows` is int32 `(2,)`. With `compute_gradient=False` the op does less
    work, and runs again if it is differentiated after all.
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
    """Scales the student's gradient from the forward pass: the upstream gradient is a single number."""
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


with contextlib.suppress(KeyError):  # already registered if the module is reloaded, as in notebooks
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
    """Returns `(module, None)`, or `(None, reason)`; builds the library if it is missing."""
    with _LOADING:
        if library not in _LOADED:
            try:
                _LOADED[library] = _find_or_build(library), None
            except Exception as error:  # whatever went wrong, the composed version still works
                reason = f"no fused similarity-KL op{_USE[library]}: {self_check.first_line(error)}"
                _LOADED[library] = None, _give_up(reason)
        return _LOADED[library]


def _failed_check(library):
    """Returns None, or the GPU on which the op differs from the composed version and how it differs."""
    with _LOADING:
        if library not in _CHECKED:
            _CHECKED[library] = _check(library)
        return _CHECKED[library]


def _check(library):
    for device in _devices_to_check():
        complaint = self_check.complaint(_op(), device, jit_compile=library == libraries.XLA)
        if complaint:
            return _give_up(f"the fused similarity-KL op{_USE[library]} fails its check on {device}: {complaint}")
    return None


def _give_up(reason):
    _LOG.warning("s2sd_tf: %s. The composed version is used.", reason)
    return reason


def _devices_to_check():
    """Returns the names of this process's GPUs, without those of other processes in a cluster."""
    if not on_gpu():
        return []
    with tf.init_scope(), tf.device("CPU:0"):
        here = tf.DeviceSpec.from_string(tf.constant(0).device)
    gpus = [tf.DeviceSpec.from_string(device.name) for device in tf.config.list_logical_devices("GPU")]
    return [gpu.to_string() for gpu in gpus if gpu.job is None or (gpu.job, gpu.task) == (here.job, here.task)]


def _find_or_build(library):
    gpus = tf.config.get_visible_devices("GPU")
    cuda = _compute_capabilities(gpus) if gpus else False
    if library == libraries.XLA and cuda and tf.__version__.startswith("2.15."):
        raise libraries.BuildError("TensorFlow 2.15 has no XLA interface for it on a GPU")
    path = libraries.find(library, cuda)
    if path is None:
        if cuda and not libraries.cuda_compiler():
            raise libraries.BuildError("there is a GPU, but no nvcc to build its kernels")
        libraries.compiler()
        others = libraries.others(library)
        _LOG.warning(
            "s2sd_tf: building the fused similarity-KL op%s for TensorFlow %s%s; this happens only once ...",
            _USE[library],
            tf.__version__,
            f" ({', '.join(others)} does not fit)" if others else "",
        )
        start = time.monotonic()
        path = libraries.build(library, cuda=cuda)
        _LOG.warning("s2sd_tf: built %s in %.0f s.", path, time.monotonic() - start)
    return tf.load_op_library(str(path))


def _compute_capabilities(gpus):
    """Returns the GPUs' compute capabilities, sorted, such as `[80, 90]`."""
    found = set()
    for gpu in gpus:
        capability = tf.config.experimental.get_device_details(gpu).get("compute_capability")
        if capability is None or 10 * capability[0] + capability[1] < libraries.OLDEST_CUDA:
            least = libraries.OLDEST_CUDA / 10
            raise libraries.BuildError(
                f"{gpu.name} is not an NVIDIA GPU of compute capability {least} or later (CUDA_VISIBLE_DEVICES can "
                "leave it out)"
            )
        found.add(10 * capability[0] + capability[1])
    return sorted(found)
