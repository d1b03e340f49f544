"""Calls the kernels through `jax.ffi`, without TensorFlow, and compares them with the same function in plain JAX.

    python jax_check.py LIBRARY cpu|CUDA

LIBRARY is a shared library of jax_handler.cc and the kernels. Prints one line of JSON per case: the absolute error of
the values and the relative error of the gradient (norm of the difference / norm), against log-softmaxes in jnp with
matrix products of the highest precision, and the errors of both against float64 in NumPy. Exits with 1 if a value
differs by more than 1e-6 or a gradient by more than 1e-5 (16-bit inputs: 1e-3 and 1e-2), if a repeated call gives
different bits, or if a wrong argument is not rejected with the right message.
"""

import argparse
import ctypes
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

# Largest errors of value and gradient.
LIMITS = {"float32": (1e-6, 1e-5), "float16": (1e-3, 1e-2), "bfloat16": (1e-3, 1e-2)}
SYMBOLS = {"cpu": "S2sdSimilarityKlCpu", "CUDA": "S2sdSimilarityKlCuda"}
TARGET = "s2sd_tf_similarity_kl"
# Batch size, dimensions of student and teachers, (offset, count) of the rows.
SHAPES = [
    (112, (128, 512, 1024), (0, 112)),
    (300, (33, 65), (0, 300)),
    (512, (128, 512, 1024, 1536, 2048, 2048), (0, 512)),
    (401, (64, 130, 7), (97, 211)),
]
TEMPERATURES = (0.2, 1.0)
CASES = [
    *((*shape, temperature, "float32") for shape in SHAPES for temperature in TEMPERATURES),
    *((*SHAPES[-1], 1.0, dtype) for dtype in ("float16", "bfloat16")),
]
# Changes that must be rejected, and a part of the message. None of them reaches a kernel.
WRONG = [
    ({"rows": 113}, r"rows: expected offset >= 0, count >= 1 and offset + count <= 112. Received: (0, 113)"),
    ({"row_offset": -1}, "rows: expected"),
    ({"teachers": [(111, 8)]}, "teachers[0]: expected the batch size of the student. Received: student (112, 16)"),
    ({"teachers": [(112,)]}, "teachers[0]: expected shape (batch, dim)"),
    ({"teachers": []}, "teachers: expected at least one teacher"),
    ({"weights": (2,)}, "weights: expected 1 weights, one per teacher. Received: shape (2,)"),
    ({"gradient": (112, 15)}, "gradient: expected shape (112, 16). Received: (112, 15)"),
]


def fused(student, teachers, temperature, weights, row_offset, rows, gradient=None):
    """Returns the kernel's `(total, per_teacher, gradient)`."""
    results = [(), (len(teachers),), student.shape if gradient is None else gradient]
    call = jax.ffi.ffi_call(TARGET, [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in results])
    attributes = {"row_offset": np.int64(row_offset), "rows": np.int64(rows), "allow_tf32": False}
    return call(student, *teachers, temperature, weights, **attributes)


def composed(student, teachers, temperature, weights, row_offset, rows):
    """Returns `(total, per_teacher)`: the weighted sum, and each teacher's divergence."""
    log_student = _log_softmax(student, temperature, row_offset, rows)
    divergences = []
    for teacher in teachers:
        log_teacher = _log_softmax(teacher, temperature, row_offset, rows)
        divergences.append(jnp.sum(jnp.exp(log_teacher) * (log_teacher - log_student)) * temperature**2 / rows)
    per_teacher = jnp.stack(divergences)
    return jnp.dot(per_teacher, weights, precision="highest"), per_teacher


def _log_softmax(embeddings, temperature, row_offset, rows):
    anchors = embeddings[row_offset : row_offset + rows]
    return jax.nn.log_softmax(jnp.matmul(anchors, embeddings.T, precision="highest") / temperature, axis=1)


def _rows(seed, batch, dim, alike):
    """l2-normalised random rows. With `alike`, every second row is similar to the one before it."""
    random = np.random.default_rng(seed)
    rows = random.standard_normal((batch, dim))
    if alike:
        rows[1::2] += rows[: batch // 2 * 2 : 2]
    return jnp.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), jnp.float32)


def exact(student, teachers, temperature, weights, row_offset, rows):
    """Returns the K divergences and the gradient in float64, by the formulas in similarity_kl.h."""
    chosen = slice(row_offset, row_offset + rows)

    def logs(embeddings):
        logits = embeddings[chosen] @ embeddings.T / temperature
        logits -= logits.max(axis=1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    student, *teachers = (np.float64(matrix) for matrix in (student, *teachers))
    log_student, log_teachers = logs(student), [logs(teacher) for teacher in teachers]
    weights, temperature = np.float64(weights), float(temperature)
    divergences = [np.sum(np.exp(log) * (log - log_student)) * temperature**2 / rows for log in log_teachers]
    factors = sum(w * (np.exp(log_student) - np.exp(log)) for w, log in zip(weights, log_teachers)) * temperature / rows
    gradient = factors.T @ student[chosen]
    gradient[chosen] += factors @ student
    return np.array(divergences), gradient


def errors(divergences, gradient, expected_divergences, expected_gradient):
    """The largest absolute error of the values, and the gradient's error relative to its norm."""
    difference = np.linalg.norm(np.float64(gradient) - np.float64(expected_gradient))
    return {
        "value": float(np.max(np.abs(np.float64(divergences) - np.float64(expected_divergences)))),
        "gradient": float(difference / np.linalg.norm(np.float64(expected_gradient))),
    }


def compare(batch, dims, rows, temperature, dtype):
    """Runs one case. Returns what is printed for it."""
    # Teachers have similar pairs that the student lacks, so that the gradient is well above rounding errors.
    student, *teachers = (_rows(seed, batch, dim, alike=seed > 0).astype(dtype) for seed, dim in enumerate(dims))
    weights = jnp.linspace(0.5, 1.5, len(teachers), dtype=jnp.float32) / len(teachers)
    arguments = (student, teachers, np.float32(temperature), weights, *rows)
    run = jax.jit(fused, static_argnums=(4, 5))
    total, per_teacher, gradient = run(*arguments)
    again = run(*arguments)
    reference = jax.jit(jax.value_and_grad(composed, has_aux=True), static_argnums=(4, 5))
    student, *teachers = (matrix.astype(jnp.float32) for matrix in (student, *teachers))
    arguments = (student, teachers, *arguments[2:])
    (_, composed_per_teacher), composed_gradient = reference(*arguments)
    true_per_teacher, true_gradient = exact(*arguments)

    against_composed = errors(per_teacher, gradient, composed_per_teacher, composed_gradient)
    sums_up = abs(float(total) - np.dot(np.float64(per_teacher), np.float64(weights))) <= 1e-6
    same_bits = all(np.array_equal(a, b) for a, b in zip((total, per_teacher, gradient), again))
    within = all(error <= limit for error, limit in zip(against_composed.values(), LIMITS[dtype]))
    return {
        "ok": within and bool(sums_up) and same_bits,
        "against_composed": against_composed,
        "against_float64": errors(per_teacher, gradient, true_per_teacher, true_gradient),
        "composed_against_float64": errors(composed_per_teacher, composed_gradient, true_per_teacher, true_gradient),
        "same_bits": same_bits,
    }


def refusal(change):
    """Returns the message that JAX raises for one wrong argument."""
    shapes = {"teachers": [(112, 8)], "weights": (1,), "row_offset": 0, "rows": 112, "gradient": None, **change}
    teachers = [jnp.ones(shape) for shape in shapes["teachers"]]
    arguments = (jnp.ones((112, 16)), teachers, jnp.float32(1.0), jnp.ones(shapes["weights"]))
    try:
        jax.block_until_ready(fused(*arguments, shapes["row_offset"], shapes["rows"], shapes["gradient"]))
    except Exception as error:  # JAX does not document the exception class
        return str(error)
    return "nothing was raised"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library")
    parser.add_argument("platform", choices=sorted(SYMBOLS))
    arguments = parser.parse_args()
    platform = arguments.platform
    handler = getattr(ctypes.CDLL(arguments.library), SYMBOLS[platform])
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(handler), platform=platform)
    jax.config.update("jax_default_device", jax.devices("cpu" if platform == "cpu" else "gpu")[0])
    assert "tensorflow" not in sys.modules

    print(json.dumps({"jax": jax.__version__, "platform": platform, "device": str(jax.devices()[0])}), flush=True)
    failed = 0
    for case in CASES:
        found = compare(*case)
        failed += not found["ok"]
        names = ("batch", "dims", "rows", "temperature", "dtype")
        print(json.dumps({**dict(zip(names, case)), **found}), flush=True)
    for change, words in WRONG:
        message = refusal(change)
        ok = words in message and "INVALID_ARGUMENT" in message
        failed += not ok
        print(json.dumps({"wrong": change, "ok": ok, "message": message.splitlines()[0]}), flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
