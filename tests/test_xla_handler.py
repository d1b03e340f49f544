"""The XLA handler without TensorFlow: JAX calls it."""

import importlib.util
import json
import platform
import subprocess
import sys

import pytest
from conftest import REPOSITORY

from s2sd_tf.distillation import libraries

SOURCES = REPOSITORY / "custom_ops" / "similarity_kl"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("jax") is None,
    reason="needs JAX: pip install '.[jax]', with TensorFlow 2.20 only (jax.ffi needs ml_dtypes >= 0.4, 2.15 has 0.3)",
)


def run(*command):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_value_and_gradient_through_jax_ffi(tmp_path):
    """`jax_check.py` compares them with plain JAX, and refuses to run beside TensorFlow."""
    include = run(sys.executable, "-c", "import jax; print(jax.ffi.include_dir())").strip()
    handler_flags = ["-Wall", "-Wextra", "-Werror", "-isystem", include]
    sources = {"jax_handler.cc": handler_flags, **libraries.cpu_kernel_sources(platform.machine())}
    processes = []
    for source, options in sources.items():
        command = [libraries.compiler(), "-std=c++17", "-O2", "-fPIC", *options]
        command += ["-c", SOURCES / source, "-o", tmp_path / f"{source}.o"]
        processes.append(subprocess.Popen(list(map(str, command))))
    assert [process.wait() for process in processes] == [0] * len(processes)
    library = tmp_path / "library.so"
    run(libraries.compiler(), "-shared", *tmp_path.glob("*.o"), "-o", library, "-pthread")
    lines = [json.loads(line) for line in run(sys.executable, SOURCES / "jax_check.py", library, "cpu").splitlines()]
    assert lines[0]["platform"] == "cpu"
    assert len(lines) > 10
    assert all(line["ok"] for line in lines[1:])
