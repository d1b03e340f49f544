"""The C++ tests of the kernels: the CPU kernel under sanitizers, the CUDA kernel's source in an emulator on the CPU."""

from conftest import REPOSITORY, compile_cpu_kernel, run_program

from s2sd_tf.distillation import libraries

SOURCES = REPOSITORY / "custom_ops" / "similarity_kl"


def test_cpu_kernel_under_sanitizers(tmp_path):
    """The CPU kernel's test program, with every vector instruction set of this processor."""
    flags = ["-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    objects = compile_cpu_kernel(tmp_path, flags, {"cpu_kernel_test.cc": []})
    run_program(libraries.compiler(), *flags, *objects, "-o", tmp_path / "test", "-pthread")
    cases, seed = 60, 1
    assert run_program(tmp_path / "test", cases, seed).endswith("all passed\n")


def test_validation(tmp_path):
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    run_program(libraries.compiler(), *flags, SOURCES / "validate_test.cc", "-o", tmp_path / "test")
    assert run_program(tmp_path / "test") == "all passed\n"


def test_cuda_kernel_in_the_emulator(tmp_path):
    """Runs the real kernels and launches: tests their indexing, reductions and pipelines, not their speed."""
    program = tmp_path / "test"
    run_program(
        libraries.compiler(),
        "-std=c++17",
        "-O2",
        "-Wno-unknown-pragmas",
        SOURCES / "cuda_kernel_test.cc",
        "-o",
        program,
    )
    run_program(program)
