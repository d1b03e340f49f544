"""`similarity_kl`: value, gradient, properties, precision and errors."""

import concurrent.futures

import numpy as np
import pytest
import tensorflow as tf

from s2sd_tf import similarity_kl
from s2sd_tf.losses import distillation_weight


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


@pytest.fixture(params=["composed", "fused"])
def implementation(request):
    """Both implementations; these tests fail on a machine that cannot build the fused op."""
    return request.param


def value_and_gradient(student, teachers, *arguments, dtype="float32", upstream=1.0, **keywords):
    """`(total, per_teacher, gradient)` as float64 arrays, for inputs cast to `dtype`."""
    student = tf.cast(student, dtype)
    with tf.GradientTape() as tape:
        tape.watch(student)
        total, per_teacher = similarity_kl(student, [tf.cast(t, dtype) for t in teachers], *arguments, **keywords)
        scaled = upstream * total
    gradient = tape.gradient(scaled, student)
    return tuple(tf.cast(x, tf.float64).numpy() for x in (total, per_teacher, gradient))


@pytest.mark.parametrize("batch", [1, 2, 7, 41])
@pytest.mark.parametrize("temperature", [1.0, 0.2, 3.0])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_value_against_loops(unit_rows, implementation, batch, temperature, dtype):
    if dtype == "float64" and implementation == "fused":
        implementation = "auto"  # float64 is always composed
    student = unit_rows(batch, 5)
    teachers = [unit_rows(batch, dim, seed=dim) for dim in (3, 8, 17)]
    weights = [0.5, 2.0, 0.25]
    total, per_teacher = similarity_kl(
        tf.cast(student, dtype), [tf.cast(t, dtype) for t in teachers], temperature, weights, implementation
    )
    expected = naive(student, teachers, temperature)
    tolerance = {"float64": 1e-12, "float32": 2e-6, "bfloat16": 2e-2, "float16": 3e-3}[dtype]
    np.testing.assert_allclose(per_teacher, expected, atol=tolerance)
    np.testing.assert_allclose(total, np.dot(weights, expected), atol=3 * tolerance)
    assert total.dtype == per_teacher.dtype == (tf.float64 if dtype == "float64" else tf.float32)


# With one row there is one kind of batch, with two rows there are two.
ROWS = [(1, "random"), (2, "random"), (2, "equal")]
ROWS += [(batch, rows) for batch in (41, 112, 401) for rows in ("random", "duplicates", "equal")]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("batch", "rows"), ROWS)
def test_fused_is_as_accurate_as_composed(unit_rows, batch, rows, dtype):
    """Its RMS error against float64, over dims, temperatures and numbers of teachers, is at most twice as large."""
    like = {"random": np.arange(batch), "duplicates": np.arange(batch) // 2, "equal": np.zeros(batch, int)}[rows]
    distances = {"composed": [], "fused": []}
    for case, (dim, teacher_dim) in enumerate([(1, 7), (7, 1), (7, 128), (128, 2048), (2048, 128)]):
        count = (1, 5, 8)[case % 3]
        weights = np.linspace(0.5, 1.5, count).astype(np.float32) / count
        student = tf.cast(unit_rows(batch, dim, case)[like], dtype)
        teachers = [tf.cast(unit_rows(batch, teacher_dim, 10 + k)[like], dtype) for k in range(count)]
        for temperature in (0.05, 0.2, 1.0, 4.0):
            arguments = (student, teachers, temperature, weights)
            exact = value_and_gradient(*arguments, "composed", dtype="float64")
            for implementation, found in distances.items():
                # Rounding to the gradient's dtype is not an error of the implementation.
                got = value_and_gradient(*arguments, implementation, dtype=dtype)
                rounded = tf.cast(tf.cast(exact[2], dtype), tf.float64).numpy()
                scale = temperature * np.sum(weights)
                found.append(
                    [
                        np.max(np.abs(got[1] - exact[1])) / temperature**2,
                        np.abs(got[0] - exact[0]) / temperature / scale,
                        np.linalg.norm(got[2] - rounded) / scale,
                    ]
                )
    composed, fused = (np.sqrt(np.mean(np.square(distances[name]), axis=0)) for name in ("composed", "fused"))
    assert np.all(fused <= 2 * composed + 1e-14), f"fused {fused}, composed {composed}"


def test_default_weights_are_the_mean(unit_rows, implementation):
    student, *teachers = (tf.cast(unit_rows(6, dim, dim), tf.float32) for dim in (4, 5, 9))
    total, per_teacher = similarity_kl(student, teachers, implementation=implementation)
    np.testing.assert_allclose(total, np.mean(per_teacher), rtol=1e-6)


def test_gradient_by_finite_differences(unit_rows, implementation):
    teachers = [unit_rows(6, 5, 1), unit_rows(6, 3, 2)]
    dtype, delta, tolerance = (tf.float64, 1e-5, 1e-8) if implementation == "composed" else (tf.float32, 1e-2, 2e-4)

    def total(z):
        return similarity_kl(z, [tf.cast(t, dtype) for t in teachers], 0.5, [1.0, 3.0], implementation)[0]

    theoretical, numerical = tf.test.compute_gradient(total, [tf.constant(unit_rows(6, 4), dtype)], delta=delta)
    np.testing.assert_allclose(theoretical[0], numerical[0], atol=tolerance)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_gradient_matches_the_closed_form(unit_rows, implementation, dtype):
    student, teachers, temperature, weights = unit_rows(9, 4), [unit_rows(9, 5, 1), unit_rows(9, 3, 2)], 0.7, [1.0, 3.0]

    def softmax(rows):
        exponentials = np.exp(rows @ rows.T / temperature)
        return exponentials / exponentials.sum(axis=1, keepdims=True)

    g = sum(w * (softmax(student) - softmax(t)) for w, t in zip(weights, teachers)) * temperature / len(student)
    name = "auto" if dtype == "float64" else implementation
    _, _, gradient = value_and_gradient(student, teachers, temperature, weights, name, dtype=dtype, upstream=5.0)
    tolerance = {"float64": 1e-12, "float32": 2e-6, "bfloat16": 3e-2}[dtype]
    np.testing.assert_allclose(gradient, 5.0 * (g + g.T) @ student, atol=tolerance)


def test_gradient_with_compute_gradient_false(unit_rows, implementation):
    arguments = (unit_rows(9, 4), [unit_rows(9, 5, 1)], 0.7, [2.0], implementation)
    one, other = (value_and_gradient(*arguments, compute_gradient=announced) for announced in (True, False))
    for a, b in zip(one, other):
        np.testing.assert_array_equal(a, b)


def test_gradient_of_the_weights(unit_rows, implementation):
    rows = tf.cast(unit_rows(9, 4), tf.float32)
    weights = tf.constant([1.0, 2.0])
    with tf.GradientTape() as tape:
        tape.watch(weights)
        total, per_teacher = similarity_kl(rows, [rows[::-1], rows[:, ::-1]], 0.5, weights, implementation)
    np.testing.assert_allclose(tape.gradient(total, weights), per_teacher, rtol=1e-6)


def test_no_gradient_into_teachers_or_through_the_single_values(unit_rows, implementation):
    student, teacher = (tf.constant(unit_rows(5, dim, dim), tf.float32) for dim in (3, 4))
    with tf.GradientTape(persistent=True) as tape:
        tape.watch([student, teacher])
        total, per_teacher = similarity_kl(student, [teacher], implementation=implementation)
    assert tape.gradient(total, teacher) is None
    assert tape.gradient(per_teacher, student) is None


def test_second_derivative_is_composed_only(unit_rows):
    student, teacher = (tf.constant(unit_rows(5, dim, dim), tf.float32) for dim in (3, 4))
    for implementation in ("composed", "fused"):
        with tf.GradientTape() as outer:
            outer.watch(student)
            with tf.GradientTape() as inner:
                inner.watch(student)
                total, _ = similarity_kl(student, [teacher], implementation=implementation)
            gradient = inner.gradient(total, student)
        if implementation == "composed":
            assert np.all(np.isfinite(outer.gradient(gradient, student)))
        else:
            with pytest.raises(NotImplementedError, match="second derivative"):
                outer.gradient(gradient, student)


def test_student_equal_to_teacher_is_zero(unit_rows, implementation):
    rows = unit_rows(8, 4)
    total, _, gradient = value_and_gradient(rows, [rows], implementation=implementation)
    assert abs(total) < 1e-7
    np.testing.assert_allclose(gradient, 0.0, atol=1e-7)


def test_permuting_the_batch_changes_nothing(unit_rows, implementation):
    student, teacher, order = unit_rows(130, 4), unit_rows(130, 6, 1), np.random.default_rng(2).permutation(130)
    one = value_and_gradient(student, [teacher], 0.2, implementation=implementation)
    other = value_and_gradient(student[order], [teacher[order]], 0.2, implementation=implementation)
    np.testing.assert_allclose(one[0], other[0], rtol=1e-5)
    np.testing.assert_allclose(one[2][order], other[2], atol=1e-7)


def test_the_same_input_gives_the_same_bits(unit_rows):
    arguments = (unit_rows(301, 33), [unit_rows(301, 65, 1), unit_rows(301, 7, 2)], 0.2, [1.0, 2.0], "fused")
    one, other = value_and_gradient(*arguments), value_and_gradient(*arguments)
    for a, b in zip(one, other):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("mib", ["0", "0.3", "256"])
def test_the_workspace_changes_nothing(unit_rows, monkeypatch, mib):
    arguments = (unit_rows(301, 33), [unit_rows(301, 65, 1), unit_rows(301, 7, 2)], 0.2, [1.0, 2.0])
    monkeypatch.setenv("S2SD_TF_WORKSPACE_MIB", mib)
    fused, exact = value_and_gradient(*arguments, "fused"), value_and_gradient(*arguments, "composed", dtype="float64")
    np.testing.assert_allclose(fused[0], exact[0], rtol=1e-5)
    np.testing.assert_allclose(fused[2], exact[2], atol=1e-7)


@pytest.mark.parametrize("shape", [(12, 3), (120, 40), (97, 1)])
def test_slices_of_rows_add_up_to_the_batch(unit_rows, implementation, shape):
    """Each replica of a gathered batch computes its own rows; their mean is the value of the whole batch."""
    batch, count = shape
    arguments = (
        unit_rows(batch, 7),
        [unit_rows(batch, 5, 1), unit_rows(batch, 30, 2)],
        0.3,
        [1.0, 2.0],
        implementation,
    )
    whole = value_and_gradient(*arguments)
    slices = [value_and_gradient(*arguments, rows=(first, count)) for first in range(0, batch, count)]
    for index in range(3):
        np.testing.assert_allclose(np.mean([s[index] for s in slices], axis=0), whole[index], atol=2e-6)


def test_rows_may_be_a_tensor(unit_rows, implementation):
    student, teacher = (tf.cast(unit_rows(20, dim, dim), tf.float32) for dim in (4, 9))

    @tf.function
    def part(rows):
        return similarity_kl(student, [teacher], 0.5, implementation=implementation, rows=rows)[0]

    expected = similarity_kl(student, [teacher], 0.5, implementation="composed", rows=(3, 11))[0]
    np.testing.assert_allclose(part(tf.constant([3, 11])), expected, rtol=1e-5)


def test_rows_that_are_not_normalised_are_stable(implementation):
    rows = np.random.default_rng(0).normal(size=(60, 4)) * 100
    exact = value_and_gradient(rows, [rows[::-1]], dtype="float64")
    got = value_and_gradient(rows, [rows[::-1]], implementation=implementation)
    np.testing.assert_allclose(got[0], exact[0], rtol=1e-5)
    np.testing.assert_allclose(got[2], exact[2], atol=1e-3 * np.max(np.abs(exact[2])))
    assert value_and_gradient(rows, [rows[:, ::-1]], implementation=implementation)[0] == pytest.approx(0.0, abs=1e-1)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_in_nan_out(unit_rows, implementation, bad):
    rows = unit_rows(5, 3)
    rows[2, 1] = bad
    for student, teacher in [(rows, unit_rows(5, 3)), (unit_rows(5, 3), rows)]:
        assert np.isnan(value_and_gradient(student, [teacher], implementation=implementation)[0])


@pytest.mark.parametrize("compute_gradient", [True, False])
def test_graph_and_xla_agree_with_eager(unit_rows, implementation, compute_gradient):
    student, teacher = unit_rows(57, 4).astype(np.float32), unit_rows(57, 6, 1).astype(np.float32)

    def step(student, teacher):
        with tf.GradientTape() as tape:
            tape.watch(student)
            total, _ = similarity_kl(
                student, [teacher], 0.5, implementation=implementation, compute_gradient=compute_gradient
            )
        return total, tape.gradient(total, student)

    student, teacher = tf.constant(student), tf.constant(teacher)
    total, gradient = step(student, teacher)
    for jit in (False, True):
        compiled = tf.function(step, jit_compile=jit)(student, teacher)
        np.testing.assert_allclose(compiled[0], total, atol=1e-6)
        np.testing.assert_allclose(compiled[1], gradient, atol=1e-6)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_batch_size_may_be_unknown(unit_rows, implementation, jit_compile):
    @tf.function(input_signature=[tf.TensorSpec((None, 4)), tf.TensorSpec((None, None))], jit_compile=jit_compile)
    def total(student, teacher):
        return similarity_kl(student, [teacher], 0.5, implementation=implementation)[0]

    for batch in (3, 50):
        student, teacher = unit_rows(batch, 4), unit_rows(batch, 6, 1)
        np.testing.assert_allclose(total(student, teacher), similarity_kl(student, [teacher], 0.5)[0], atol=1e-6)
    with pytest.raises(tf.errors.InvalidArgumentError):
        total(unit_rows(3, 4), unit_rows(4, 4))


def test_rows_that_a_jitted_function_computes(unit_rows):
    """XLA would have to know the values of the rows to use the fused op."""
    student, teacher = (tf.cast(unit_rows(12, dim, dim), tf.float32) for dim in (4, 9))

    @tf.function(jit_compile=True)
    def mean():
        total = 0.0
        for first in tf.range(3):
            total += similarity_kl(student, [teacher], 0.5, rows=tf.stack([4 * first, 4]))[0]
        return total / 3

    np.testing.assert_allclose(mean(), similarity_kl(student, [teacher], 0.5)[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temperature": -1.0}, "temperature: expected a finite number > 0. Received: "),
        ({"temperature": 0.0}, "temperature: expected a finite number > 0. Received: "),
        ({"temperature": np.inf}, "temperature: expected a finite number > 0. Received: "),
        ({"rows": (2, 5)}, "rows: expected offset >= 0, count >= 1 and offset + count <= "),
        ({"weights": [1.0]}, "weights: expected 2 weights, one per teacher. Received: "),
        ({"teachers": np.ones((1, 3))}, "teachers[0]: expected the batch size of the student. Received: student"),
        (
            {"student": np.ones((0, 4)), "teachers": np.ones((0, 3))},
            "student: expected at least one row and one column.",
        ),
    ],
    ids=str,
)
def test_errors_at_run_time_name_the_argument(unit_rows, implementation, change, words):
    """The composed version, the op and XLA's lowering give the same message."""
    arguments = {
        "student": unit_rows(6, 4),
        "temperature": 1.0,
        "rows": (0, 6),
        "weights": [1.0, 2.0],
        "teachers": unit_rows(6, 3),
    }
    arguments = {name: np.asarray(value, np.float32) for name, value in {**arguments, **change}.items()}
    shapes = {"student": (None, 4), "temperature": (), "rows": (2,), "weights": (None,), "teachers": (None, None)}

    def total(student, temperature, rows, weights, teachers):
        # XLA must know the values of the rows.
        rows = arguments["rows"].astype(int).tolist() if jit_compile else tf.cast(rows, tf.int32)
        return similarity_kl(student, [teachers] * 2, temperature, weights, implementation, rows=rows)[0]

    for jit_compile in (False, True) if implementation == "fused" else (False,):
        signature = [tf.TensorSpec(shapes[name]) for name in arguments]
        step = tf.function(total, input_signature=signature, jit_compile=jit_compile)
        errors = [tf.errors.InvalidArgumentError]
        if jit_compile and tf.__version__.startswith("2.15."):
            errors.append(tf.errors.InternalError)  # the only error its interface has while a custom call runs
        with pytest.raises(tuple(errors)) as refused:
            step(**arguments)
        assert f"similarity_kl: {words}" in str(refused.value)


def test_concurrent_calls(unit_rows):
    """Several Python threads share TensorFlow's thread pool."""
    data = [
        (tf.cast(unit_rows(n, 5, n), tf.float32), tf.cast(unit_rows(n, 9, n + 1), tf.float32)) for n in range(40, 72)
    ]
    step = tf.function(lambda s, t: similarity_kl(s, [t], 0.2, implementation="fused")[0], reduce_retracing=True)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda pair: float(step(*pair)), data * 4))
    expected = [float(similarity_kl(s, [t], 0.2, implementation="composed")[0]) for s, t in data]
    np.testing.assert_allclose(got, expected * 4, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"teachers": []}, "at least one teacher"),
        ({"student": np.zeros(3)}, r"student: expected shape \(batch, dim\)"),
        ({"teachers": [np.zeros((4, 3, 2))]}, r"teachers\[0\]"),
        ({"teachers": [np.zeros((5, 3))]}, "batch size"),
        (
            {"teachers": [np.zeros((4, 2)), np.zeros((5, 3))]},
            r"Received: student \(4, 3\), teachers \[\(4, 2\), \(5, 3\)\]",
        ),
        ({"student": np.zeros((4, 0))}, "student: expected at least one row and one column"),
        ({"student": np.zeros((4, 3), np.int32)}, "floating"),
        ({"temperature": tf.ones(2)}, "temperature: expected a scalar"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": np.inf}, "temperature"),
        ({"weights": [1.0, 2.0]}, "expected 1 weights"),
        ({"rows": (2, 3)}, r"rows: .*Received: \(2, 3\)"),
        ({"rows": (1, 2, 3)}, "rows: expected"),
        ({"implementation": "fused"}, "float64"),
    ],
)
def test_errors_name_the_argument(change, words):
    arguments = {"student": np.zeros((4, 3)), "teachers": [np.zeros((4, 2))], **change}
    with pytest.raises(tf.errors.InvalidArgumentError, match=words):
        similarity_kl(**arguments)


def test_implementations(monkeypatch):
    rows = tf.eye(3)
    with pytest.raises(ValueError, match="implementation"):
        similarity_kl(rows, [rows], implementation="quick")
    monkeypatch.setenv("S2SD_TF_KERNEL", "quick")
    with pytest.raises(ValueError, match="S2SD_TF_KERNEL"):
        similarity_kl(rows, [rows])

    def ops(implementation):
        function = tf.function(lambda r: similarity_kl(r, [r], implementation=implementation)[0])
        return {op.type for op in function.get_concrete_function(rows).graph.get_operations()}

    assert "S2sd>SimilarityKl" in ops("fused")
    assert "S2sd>SimilarityKl" not in ops("composed")
    for chosen in ("auto", "fused", "composed"):
        monkeypatch.setenv("S2SD_TF_KERNEL", chosen)
        assert ("S2sd>SimilarityKl" in ops("auto")) == (chosen != "composed")


def test_weight_schedule():
    weights = [float(distillation_weight(8.0, step, delay=2, warmup_steps=4)) for step in range(8)]
    assert weights == [0, 0, 2, 4, 6, 8, 8, 8]
    assert [float(distillation_weight(5.0, step, delay=1)) for step in range(3)] == [0, 5, 5]
    assert float(distillation_weight(5.0, 0)) == 5.0
