"""The fused similarity-KL op; its libraries are loaded at the first use, and built then where they are missing."""

import contextlib
import logging
import threading
import time

import tensorflow as tf

from s2sd_tf.distillation import libraries, self_check

DTYPES = (tf.float32, tf.float16, tf.bfloat16)
CUDA_MAX_TEACHERS, CUDA_MAX_BATCH, CUDA_MAX_DIM = 64, 2**17, 2**22  # see validate.h

_LOG = logging.getLogger(__name__)
_LOADED = {}
_CHECKED = {}  # by library: None, or why it is not trusted
_LOADING = threading.RLock()
_USE = {libraries.OP: "", libraries.XLA: " under jit_compile"}


@tf.autograph.experimental.do_not_convert
def unavailable(xla=False):
    """None where the fused op can be used, else why not, in one line; the first time it is logged too.

    With GPUs it can be used only where, on each of them, it agrees with the composed version on small problems. That is
    tried once.

    Args:
        xla: whether the op has to work under `jit_compile=True` too, which takes a second library.
    """
    for library in (libraries.OP, libraries.XLA)[: 2 if xla else 1]:
        reason = _load(library)[1] or _failed_check(library)
        if reason:
            return reason
    return None


def on_gpu():
    """Whether the op runs on a GPU where it can be used."""
    return bool(tf.config.get_visible_devices("GPU"))


def too_large_for_a_gpu(student, teachers):
    """Whether the CUDA kernels refuse the shapes, as far as these are known."""
    dims = [matrix.shape[1] or 0 for matrix in (student, *teachers)]
    return len(teachers) > CUDA_MAX_TEACHERS or (student.shape[0] or 0) > CUDA_MAX_BATCH or max(dims) > CUDA_MAX_DIM


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
                reason = f"no fused similarity-KL op{_USE[library]}: {self_check.first_line(error)}"
                _LOADED[library] = None, _give_up(reason)
        return _LOADED[library]


def _failed_check(library):
    """None, or on which GPU the op differs from the composed version, and in what."""
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
    """Names of this process's GPUs; a cluster has others too."""
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
