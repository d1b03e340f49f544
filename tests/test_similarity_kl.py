"""`similarity_kl`: value, gradient, properties, precision and errors."""

import numpy as np
import pytest
import tensorflow as tf

from s2sd_tf import similarity_kl
from s2sd_tf.distillation import distillation_weight


def naive(student, teachers, temperature):
    """The divergences by Python loops in float64."""
    batch = len(student)
    divergences = []
    for teacher in teachers:
        total = 0.0
        for i in range(batch):
            p = np.exp([teacher[i] @ teacher[j] / temperature for j in range(batch)])
            q = np.exp([student[i] @ student[j] / temperature for j in range(batch)])
            p, q = p / p.sum(), q / q.sum()
            total += sum(p[j] * (np.log(p[j]) - np.log(q[j])) for j in range(batch))
        divergences.append(temperature**2 * total / batch)
    return np.array(divergences)


@pytest.mark.parametrize("batch", [1, 2, 7, 41])
@pytest.mark.parametrize("temperature", [1.0, 0.2, 3.0])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_value_against_loops(unit_rows, batch, temperature, dtype):
    student = unit_rows(batch, 5)
    teachers = [unit_rows(batch, dim, seed=dim) for dim in (3, 8, 17)]
    weights = [0.5, 2.0, 0.25]
    total, per_teacher = similarity_kl(
        tf.cast(student, dtype), [tf.cast(t, dtype) for t in teachers], temperature, weights
    )
    expected = naive(student, teachers, temperature)
    tolerance = {"float64": 1e-12, "float32": 1e-6, "bfloat16": 2e-2, "float16": 3e-3}[dtype]
    np.testing.assert_allclose(per_teacher, expected, atol=tolerance)
    np.testing.assert_allclose(total, np.dot(weights, expected), atol=3 * tolerance)
    assert total.dtype == per_teacher.dtype == (tf.float64 if dtype == "float64" else tf.float32)


def test_default_weights_are_the_mean(unit_rows):
    total, per_teacher = similarity_kl(unit_rows(6, 4), [unit_rows(6, 4, 1), unit_rows(6, 9, 2)])
    np.testing.assert_allclose(total, np.mean(per_teacher), rtol=1e-12)


def test_gradient_by_finite_differences(unit_rows):
    student, teachers = unit_rows(6, 4), [unit_rows(6, 5, 1), unit_rows(6, 3, 2)]

    def total(z):
        return similarity_kl(z, teachers, 0.5, [1.0, 3.0])[0]

    theoretical, numerical = tf.test.compute_gradient(total, [tf.constant(student)], delta=1e-5)
    np.testing.assert_allclose(theoretical[0], numerical[0], atol=1e-8)


def test_gradient_is_that_of_the_closed_form(unit_rows):
    student, teachers, temperature, weights = unit_rows(9, 4), [unit_rows(9, 5, 1), unit_rows(9, 3, 2)], 0.7, [1.0, 3.0]

    def softmax(rows):
        exponentials = np.exp(rows @ rows.T / temperature)
        return exponentials / exponentials.sum(axis=1, keepdims=True)

    g = sum(w * (softmax(student) - softmax(t)) for w, t in zip(weights, teachers)) * temperature / len(student)
    z = tf.constant(student)
    with tf.GradientTape() as tape:
        tape.watch(z)
        total = 5.0 * similarity_kl(z, teachers, temperature, weights)[0]
    np.testing.assert_allclose(tape.gradient(total, z), 5.0 * (g + g.T) @ student, atol=1e-12)


def test_no_gradient_into_teachers_or_through_the_single_values(unit_rows):
    student, teacher = tf.constant(unit_rows(5, 3)), tf.constant(unit_rows(5, 4, 1))
    with tf.GradientTape(persistent=True) as tape:
        tape.watch([student, teacher])
        total, per_teacher = similarity_kl(student, [teacher])
    assert tape.gradient(total, teacher) is None
    assert tape.gradient(per_teacher, student) is None


def test_student_equal_to_teacher_is_zero(unit_rows):
    rows = tf.constant(unit_rows(8, 4))
    with tf.GradientTape() as tape:
        tape.watch(rows)
        total = similarity_kl(rows, [tf.identity(rows)])[0]
    assert abs(float(total)) < 1e-15
    np.testing.assert_allclose(tape.gradient(total, rows), 0.0, atol=1e-15)


def test_permuting_the_batch_changes_nothing(unit_rows):
    student, teacher, order = unit_rows(10, 4), unit_rows(10, 6, 1), np.random.default_rng(2).permutation(10)
    one, other = similarity_kl(student, [teacher])[0], similarity_kl(student[order], [teacher[order]])[0]
    np.testing.assert_allclose(one, other, rtol=1e-12)


def test_rows_that_are_not_normalised_stay_stable():
    rows = np.random.default_rng(0).normal(size=(6, 4)) * 100
    np.testing.assert_allclose(similarity_kl(rows, [rows[:, ::-1]])[0], 0.0, atol=1e-9)
    assert np.isfinite(similarity_kl(rows.astype(np.float32), [rows[::-1].astype(np.float32)])[0])


def test_nan_in_nan_out(unit_rows):
    rows = unit_rows(5, 3)
    rows[2, 1] = np.nan
    assert np.isnan(similarity_kl(rows, [unit_rows(5, 3)])[0])


def test_graph_and_xla_agree_with_eager(unit_rows):
    student, teacher = unit_rows(7, 4).astype(np.float32), unit_rows(7, 6, 1).astype(np.float32)
    eager = similarity_kl(student, [teacher], 0.5)[0]
    for jit in (False, True):
        compiled = tf.function(lambda s, t: similarity_kl(s, [t], 0.5)[0], jit_compile=jit)
        np.testing.assert_allclose(compiled(student, teacher), eager, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"teachers": []}, "at least one teacher"),
        ({"student": np.zeros(3)}, r"student: expected shape \(batch, dim\)"),
        ({"teachers": [np.zeros((4, 3, 2))]}, r"teachers\[0\]"),
        ({"teachers": [np.zeros((5, 3))]}, "batch size"),
        ({"student": np.zeros((4, 3), np.int32)}, "floating"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"weights": [1.0, 2.0]}, "expected 1 weights"),
    ],
)
def test_errors_name_the_argument(change, words):
    arguments = {"student": np.zeros((4, 3)), "teachers": [np.zeros((4, 2))], **change}
    with pytest.raises(tf.errors.InvalidArgumentError, match=words):
        similarity_kl(**arguments)


def test_implementations(monkeypatch):
    rows = np.eye(3)
    with pytest.raises(ValueError, match="implementation"):
        similarity_kl(rows, [rows], implementation="quick")
    with pytest.raises(NotImplementedError, match="fused"):
        similarity_kl(rows, [rows], implementation="fused")
    similarity_kl(rows, [rows], implementation="composed")
    monkeypatch.setenv("S2SD_TF_KERNEL", "composed")
    similarity_kl(rows, [rows])
    monkeypatch.setenv("S2SD_TF_KERNEL", "quick")
    with pytest.raises(ValueError, match="S2SD_TF_KERNEL"):
        similarity_kl(rows, [rows])


def test_weight_schedule():
    weights = [float(distillation_weight(8.0, step, delay=2, warmup_steps=4)) for step in range(8)]
    assert weights == [0, 0, 2, 4, 6, 8, 8, 8]
    assert [float(distillation_weight(5.0, step, delay=1)) for step in range(3)] == [0, 5, 5]
    assert float(distillation_weight(5.0, 0)) == 5.0
