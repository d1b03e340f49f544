"""The XLA handler without TensorFlow: JAX calls it."""

import importlib.util
import json
import sys

import pytest
from conftest import REPOSITORY, compile_cpu_kernel, run_program

from s2sd_tf.distillation import libraries

SOURCES = REPOSITORY / "custom_ops" / "similarity_kl"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("jax") is None,
    reason="needs JAX: pip install '.[jax]', with TensorFlow 2.20 only (jax.ffi needs ml_dtypes >= 0.4, 2.15 has 0.3)",
)


def test_value_and_gradient_through_jax_ffi(tmp_path):
    """Runs `jax_check.py`, which compares them with plain JAX and refuses to run in a process with TensorFlow."""
    include = run_program(sys.executable, "-c", "import jax; print(jax.ffi.include_dir())").strip()
    handler_flags = ["-Wall", "-Wextra", "-Werror", "-isystem", include]
    objects = compile_cpu_kernel(tmp_path, ["-std=c++17", "-O2", "-fPIC"], {"jax_handler.cc": handler_flags})
    library = tmp_path / "library.so"
    run_program(libraries.compiler(), "-shared", *objects, "-o", library, "-pthread")
    lines = [
        json.loads(line) for line in run_program(sys.executable, SOURCES / "jax_check.py", library, "cpu").splitlines()
    ]
    assert lines[0]["platform"] == "cpu"
    assert len(lines) > 10
    assert all(line["ok"] for line in lines[1:])
