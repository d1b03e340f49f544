"""The C++ tests of the kernels: the CPU kernel under sanitizers, the CUDA kernel's source in an emulator on the CPU."""

import platform
import subprocess

import pytest
from conftest import REPOSITORY

from s2sd_tf.distillation import libraries

SOURCES = REPOSITORY / "custom_ops" / "similarity_kl"


def run(*command):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """The CPU kernel's test, every vector instruction set of this processor in it."""
    folder = tmp_path_factory.mktemp("sanitized")
    flags = ["-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    sources = {"cpu_kernel_test.cc": [], **libraries.cpu_kernel_sources(platform.machine())}
    processes = []
    for source, options in sources.items():
        command = [libraries.compiler(), *flags, *options, "-c", SOURCES / source, "-o", folder / f"{source}.o"]
        processes.append(subprocess.Popen(list(map(str, command))))
    assert [process.wait() for process in processes] == [0] * len(processes)
    run(libraries.compiler(), *flags, *folder.glob("*.o"), "-o", folder / "test", "-pthread")
    return folder / "test"


@pytest.mark.parametrize("seed", [1, 2])
def test_cpu_kernel_under_sanitizers(sanitized, seed):
    assert run(sanitized, 40, seed).endswith("all passed\n")


def test_validation(tmp_path):
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    run(libraries.compiler(), *flags, SOURCES / "validate_test.cc", "-o", tmp_path / "test")
    assert run(tmp_path / "test") == "all passed\n"


def test_cuda_kernel_in_the_emulator(tmp_path):
    """The real kernels and launches: their indexing, reductions and pipelines; not their speed."""
    program = tmp_path / "test"
    run(
        libraries.compiler(),
        "-std=c++17",
        "-O2",
        "-Wno-unknown-pragmas",
        SOURCES / "cuda_kernel_test.cc",
        "-o",
        program,
    )
    run(program)
