"""The GPU check, as far as it can be tested without a GPU: its program in the emulator, its steps, its table."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY

from s2sd_tf.distillation import libraries

SOURCES = REPOSITORY / "custom_ops" / "similarity_kl"


@pytest.fixture(scope="module")
def gpu_check():
    spec = importlib.util.spec_from_file_location("gpu_check", SOURCES / "gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_program_passes_in_the_emulator(tmp_path):
    """All kernels: ragged edges, rectangles, rows that do not allow wide loads, every dtype, a separate stream."""
    compile_it = [libraries.compiler(), "-x", "c++", "-std=c++17", "-O1", "-w", SOURCES / "gpu_check.cu"]
    subprocess.run([*compile_it, "-o", tmp_path / "gpu_check"], check=True)
    done = subprocess.run(
        [tmp_path / "gpu_check", "--sanitize", f"--lines={tmp_path / 'lines'}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    assert done.stdout == f"{len(lines)} checks, 0 failed\n"
    for word in (
        "small 16",
        "small 32",
        "large 64",
        "large 128",
        "TF32",
        "float32",
        "float16",
        "bfloat16",
        "value only",
    ):
        assert any(word in line["check"] for line in lines), word


def test_without_a_gpu_it_says_so(tmp_path):
    environment = {**os.environ, "PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, SOURCES / "gpu_check.py", tmp_path / "out"],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith(("gpu_check: there is no nvcc", "gpu_check: nvidia-smi finds no GPU"))
    assert not (tmp_path / "out").exists()


def test_results_are_written_after_every_step(gpu_check, tmp_path):
    check = gpu_check.Check(tmp_path / "out", tmp_path, {"gpu": "a GPU"})
    good = """import json; print(json.dumps({"times": 112, "precision": "TF32", "ok": True, "mib": {},
        "ms": {"fused": 1, "fused_graph": 1, "eager": 4, "compiled_graph": 2}}))"""
    assert check.run("PyTorch", [sys.executable, "-c", good], 30)
    text = (tmp_path / "out" / "gpu_check.md").read_text()
    assert "at least 5 times as fast as PyTorch eager | 4.00 | **not met** |" in text
    assert "not slower than compiled PyTorch, both as CUDA graphs | 2.00 | met |" in text
    lines = """print('{"check": "first", "ok": false}', flush=True); print("begun", flush=True)"""
    hangs = f"import time; {lines}; time.sleep(60)"
    assert not check.run("hangs", [sys.executable, "-c", hangs], 2)
    check.not_run("sanitizer", ["sanitize"], "no GPU")
    results = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    assert [step["status"] for step in results["steps"]] == [0, "time limit", "no GPU"]
    assert results["steps"][1]["lines"] == [{"check": "first", "ok": False}]
    assert results["steps"][1]["summary"] == "begun"
    assert check.failed() == ["hangs"]
    assert '- `{"check": "first", "ok": false}`' in (tmp_path / "out" / "gpu_check.md").read_text()
