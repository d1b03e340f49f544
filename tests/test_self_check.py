"""The comparison of the fused op with the composed version before its use on a GPU; the CPU stands in for one here."""

import re

import numpy as np
import pytest
import tensorflow as tf

from s2sd_tf import similarity_kl
from s2sd_tf.distillation import fused, libraries, self_check

GPU = "/device:CPU:0"


def other_value(op, **arguments):
    total, per_teacher, gradient = op(**arguments)
    return total * 1.01, per_teacher, gradient


def other_single_value(op, **arguments):
    total, per_teacher, gradient = op(**arguments)
    return total, per_teacher[::-1], gradient


def other_gradient(op, **arguments):
    """Differs in one entry, and only for larger batches."""
    total, per_teacher, gradient = op(**arguments)
    if gradient.shape[0] > 256:
        gradient = tf.tensor_scatter_nd_add(gradient, [[270, 3]], [0.05 * tf.reduce_max(gradient)])
    return total, per_teacher, gradient


def nan(op, **arguments):
    total, per_teacher, gradient = op(**arguments)
    return total, per_teacher, gradient * np.nan


def raises(op, **arguments):
    raise tf.errors.InternalError(None, None, "CUDA driver version is insufficient\nand a second line")


def only_xla_is_wrong(op, **arguments):
    total, per_teacher, gradient = op(**arguments)
    return total if tf.executing_eagerly() else total + 1.0, per_teacher, gradient


@pytest.fixture
def lines(caplog):
    """Returns the lines that the package has logged."""
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("s2sd_tf")]


@pytest.fixture
def checked(monkeypatch):
    """Presents the CPU as a GPU whose op is `change`; returns the list of checks made."""
    monkeypatch.delenv("S2SD_TF_KERNEL", raising=False)
    assert fused.unavailable(xla=True) is None
    real, complaint, made = fused._op(), self_check.complaint, []

    def count(op, device, jit_compile=False):
        made.append((device, jit_compile))
        return complaint(op, device, jit_compile)

    def present(change=None, devices=(GPU,)):
        op = real if change is None else lambda **arguments: change(real, **arguments)
        monkeypatch.setattr(fused, "_op", lambda: op)
        monkeypatch.setattr(fused, "_CHECKED", {})
        monkeypatch.setattr(fused, "_devices_to_check", lambda: list(devices))
        monkeypatch.setattr(self_check, "complaint", count)
        return made

    return present


def rows():
    return tf.math.l2_normalize(tf.random.stateless_normal((20, 5), [1, 2]), 1)


def is_fused(student, jit_compile=False, implementation="auto"):
    """Whether such a function, called within a tape, uses the op."""

    @tf.function(jit_compile=jit_compile)
    def step(student):
        return similarity_kl(student, [student[::-1]], implementation=implementation, jit_compile=jit_compile)[0]

    with tf.GradientTape() as tape:
        tape.watch(student)
        total = step(student)
    expected = similarity_kl(student, [student[::-1]], implementation="composed")[0]
    np.testing.assert_allclose(total, expected, atol=1e-6)
    assert np.all(np.isfinite(tape.gradient(total, student)))
    graph = step.get_concrete_function(student).graph
    return "S2sd>SimilarityKl" in {op.type for op in graph.get_operations()}


def test_a_correct_op_is_used_and_checked_once_per_device(checked, lines):
    made = checked(devices=(GPU, "/CPU:0"))
    for _ in range(2):
        assert is_fused(rows())
        assert is_fused(rows(), jit_compile=True)
        similarity_kl(rows(), [rows()])
    assert made == [(GPU, False), ("/CPU:0", False), (GPU, True), ("/CPU:0", True)]
    assert lines() == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_value, r"the value differs from .* by 1.0e-02 \(float32, batch 41; at most 1e-03\)"),
        (other_single_value, "the value of a teacher differs from"),
        (other_gradient, r"the gradient differs from .*\(float32, batch 300; at most"),
        (nan, "the gradient differs from the composed version's by nan"),
        (raises, r": CUDA driver version is insufficient\. The composed version is used\.$"),
    ],
)
def test_a_wrong_op_logs_one_line_and_is_not_used(checked, lines, change, words, monkeypatch):
    monkeypatch.setattr(tf.config.experimental, "tensor_float_32_execution_enabled", lambda: False)
    made = checked(change)
    assert not is_fused(rows(), jit_compile=True)  # the first use, while a function is traced
    assert not is_fused(rows())
    similarity_kl(rows(), [rows()])
    assert made == [(GPU, False)]
    (line,) = lines()
    assert line.startswith(f"s2sd_tf: the fused similarity-KL op fails its check on {GPU}: ")
    assert re.search(words, line), line
    with pytest.raises(NotImplementedError, match="implementation='fused': the fused similarity-KL op fails its check"):
        similarity_kl(rows(), [rows()], implementation="fused")
    assert len(lines()) == 1


def test_an_op_that_is_wrong_under_xla_only(checked, lines):
    checked(only_xla_is_wrong)
    assert not is_fused(rows(), jit_compile=True)
    (line,) = lines()
    assert "op under jit_compile fails its check on" in line
    similarity_kl(rows(), [rows()], implementation="fused")
    with pytest.raises(NotImplementedError, match="under jit_compile"):
        is_fused(rows(), jit_compile=True, implementation="fused")
    assert len(lines()) == 1


def test_a_device_that_the_op_does_not_run_on(checked, lines):
    """TensorFlow would run the op elsewhere."""
    made = checked(devices=(GPU, "/device:GPU:7"))
    assert not is_fused(rows())
    assert made == [(GPU, False), ("/device:GPU:7", False)]
    (line,) = lines()
    assert "fails its check on /device:GPU:7: it ran on /job:localhost/replica:0/task:0/device:CPU:0." in line


@pytest.mark.parametrize("jit_compile", ["auto", False])
def test_training_continues(checked, lines, small_model, jit_compile):
    calls = []

    def wrong(op, **arguments):
        calls.append(arguments)
        return nan(op, **arguments)

    checked(wrong)
    model = small_model(num_classes=3)
    compiled = {} if jit_compile == "auto" else {"jit_compile": jit_compile}
    model.compile("adam", **compiled)
    images, labels = np.random.default_rng(0).random((12, 8, 8, 1), np.float32), np.arange(12) % 3
    history = model.fit(images, labels, batch_size=6, epochs=2, verbose=0)
    assert np.all(np.isfinite(history.history["loss"]))
    assert len(lines()) == 1
    assert len(calls) == len(self_check._PROBLEMS)  # the check, and nothing after it


def test_no_check_if_the_op_is_not_requested(checked, lines, monkeypatch):
    made = checked(raises)
    similarity_kl(tf.cast(rows(), tf.float64), [rows()])
    similarity_kl(rows(), [rows()], implementation="composed")
    monkeypatch.setenv("S2SD_TF_KERNEL", "composed")
    similarity_kl(rows(), [rows()])
    assert made == []
    assert lines() == []


def test_devices_to_check(monkeypatch):
    """Only the GPUs of this process are checked; a cluster lists those of all processes."""
    if not tf.config.get_visible_devices("GPU"):
        assert fused._devices_to_check() == []
    here, elsewhere = "/job:localhost/replica:0/task:0", "/job:worker/replica:0/task:1"
    names = ["/device:GPU:0", f"{here}/device:GPU:1", f"{elsewhere}/device:GPU:0"]
    devices = [tf.config.LogicalDevice(name, "GPU") for name in names]
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda _: devices)
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda _: devices)
    assert fused._devices_to_check() == names[:2]


def test_limits_match_the_kernel():
    text = (libraries.sources() / "validate.h").read_text()
    written = dict(re.findall(r"kCudaMax(\w+) = (.+);", text))
    assert written == {"Teachers": "64", "Columns": "int64_t{1} << 17", "Dim": "1 << 22"}
    assert (fused.CUDA_MAX_TEACHERS, fused.CUDA_MAX_BATCH, fused.CUDA_MAX_DIM) == (64, 1 << 17, 1 << 22)
