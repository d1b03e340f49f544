"""Building, finding and refusing the fused op's libraries, and the messages that users see."""

import os
import shutil
import signal
import sys
import time
import types

import pytest
import tensorflow as tf
from conftest import REPOSITORY
from processes import start_python

from s2sd_tf.distillation import fused, libraries

SCRIPT = """
import logging, pathlib, sys
import tensorflow as tf
from s2sd_tf import similarity_kl
from s2sd_tf.distillation import libraries
prebuilt, implementation, mode = sys.argv[1:]
libraries.PREBUILT = pathlib.Path(prebuilt)
rows = tf.math.l2_normalize(tf.random.stateless_normal((20, 5), [1, 2]), 1)
jit_compile = {"graph": False, "jit": True, "unknown": None}[mode]

@tf.function(jit_compile=mode == "jit")
def step(rows):
    return similarity_kl(rows, [rows[::-1]], implementation=implementation, jit_compile=jit_compile)[0]

function = step.get_concrete_function(rows)
value = float(step(rows))
similarity_kl(rows, [rows])  # a second decision, eagerly
composed = float(similarity_kl(rows, [rows[::-1]], implementation="composed")[0])
assert abs(value - composed) < 1e-6, (value, composed)
print("FUSED" if "S2sd>SimilarityKl" in {op.type for op in function.graph.get_operations()} else "COMPOSED")
"""


@pytest.fixture
def run(tmp_path, run_python, monkeypatch):
    """Runs the script in a process with an empty cache and its own folder of prebuilt libraries."""
    (tmp_path / "prebuilt").mkdir()
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.setenv(libraries.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv("S2SD_TF_KERNEL", raising=False)

    def run(implementation="auto", mode="graph", check=True):
        done = run_python(tmp_path / "script.py", tmp_path / "prebuilt", implementation, mode, check=check)
        ours = [line for line in done.stderr.splitlines() if "s2sd_tf: " in line]
        return done, ours

    return run


@pytest.fixture(scope="module")
def built():
    """The matching libraries by name, built in the user's cache if necessary."""
    return {name: libraries.find(name) or libraries.build(name) for name in (libraries.OP, libraries.XLA)}


def fill(folder, built):
    folder.mkdir(exist_ok=True)
    for path in built.values():
        shutil.copy(path, folder)


def without_compiler(monkeypatch):
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable))
    monkeypatch.delenv("CXX", raising=False)


@pytest.fixture
def quick_compiler(tmp_path_factory, monkeypatch):
    """A compiler that does not optimize. It halves the build time, and these tests compute very little."""
    script = tmp_path_factory.mktemp("compiler") / "c++"
    script.write_text(f'#!/bin/sh\nexec {libraries.compiler()} "$@" -O0\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))


def test_a_matching_library_is_loaded_silently(run, built, tmp_path, monkeypatch):
    without_compiler(monkeypatch)
    fill(tmp_path / "prebuilt", built)
    for mode in ("graph", "jit", "unknown"):
        done, lines = run(mode=mode)
        assert done.stdout.strip() == "FUSED"
        assert lines == []


def test_without_a_compiler_one_line_and_the_composed_version(run, monkeypatch):
    without_compiler(monkeypatch)
    for mode in ("graph", "unknown"):
        done, lines = run(mode=mode)
        assert done.stdout.strip() == "COMPOSED"
        assert len(lines) == 1
        assert "no C++ compiler" in lines[0]
    done, _ = run("fused", check=False)
    assert done.returncode != 0
    assert "NotImplementedError: implementation='fused': no fused similarity-KL op: there is no C++" in done.stderr


def test_nothing_is_logged_if_composed_is_requested(run, monkeypatch):
    without_compiler(monkeypatch)
    monkeypatch.setenv("S2SD_TF_KERNEL", "composed")
    done, lines = run()
    assert done.stdout.strip() == "COMPOSED"
    assert lines == []


def test_a_library_for_another_tensorflow_is_not_loaded(run, built, tmp_path, monkeypatch, quick_compiler):
    """The file name gives the version. The op is then built in the cache, or composed if there is no compiler."""
    minor = ".".join(tf.__version__.split(".")[:2])
    for path in built.values():
        (tmp_path / "prebuilt" / path.name.replace(f"tf{minor}", "tf2.9")).write_text("would not load")
    with monkeypatch.context() as context:
        without_compiler(context)
        done, lines = run()
        assert done.stdout.strip() == "COMPOSED"
        assert len(lines) == 1
    done, lines = run()
    assert done.stdout.strip() == "FUSED"
    assert len(lines) == 2  # one that names the unsuitable library and announces the build, one that reports its end
    assert "tf2.9" in lines[0]
    assert [path.name for path in (tmp_path / "cache").glob("*.so")] == [built[libraries.OP].name]
    done, lines = run()
    assert done.stdout.strip() == "FUSED"
    assert lines == []


def test_a_library_that_does_not_load_logs_one_line(run, built, tmp_path):
    """For instance a renamed one."""
    for path in built.values():
        (tmp_path / "prebuilt" / path.name).write_text("would not load")
    done, lines = run()
    assert done.stdout.strip() == "COMPOSED"
    assert len(lines) == 1
    assert lines[0].endswith("The composed version is used.")


def test_without_the_library_for_xla(run, built, tmp_path, monkeypatch):
    """Functions that are or might be jitted use the composed version; those known not to be jitted use the fused op."""
    without_compiler(monkeypatch)
    fill(tmp_path / "prebuilt", {libraries.OP: built[libraries.OP]})
    for mode in ("jit", "unknown"):
        done, lines = run(mode=mode)
        assert done.stdout.strip() == "COMPOSED"
        assert len(lines) == 1
    done, _ = run()
    assert done.stdout.strip() == "FUSED"


def test_killed_while_building(tmp_path, monkeypatch, run_python, quick_compiler):
    monkeypatch.setenv(libraries.CACHE_VARIABLE, str(tmp_path))
    code = "from s2sd_tf.distillation import libraries; libraries.build(libraries.OP)"
    with start_python("-c", code) as process:
        while not list(tmp_path.glob(".writing-*")):
            assert process.is_alive()
            time.sleep(0.01)
        time.sleep(0.5)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert libraries.find(libraries.OP) is None or libraries.find(libraries.OP).parent != tmp_path
    path = libraries.build(libraries.OP)
    assert path.parent == tmp_path
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([".lock", path.name])
    # In a new process, because a process registers the op from the first library that it loads.
    run_python("-c", f"import tensorflow as tf; tf.load_op_library('{path}').s2sd_similarity_kl")


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(libraries.BuildError, match="cannot be written"):
        libraries.build(libraries.OP, tmp_path / "file")


def test_a_failing_compiler(tmp_path, monkeypatch):
    fake = tmp_path / "fake-compiler"
    fake.write_text("#!/bin/sh\necho 'fatal error: no such header' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    with pytest.raises(libraries.BuildError, match=r"\.cc: fatal error: no such header"):
        libraries.build(libraries.OP, tmp_path / "folder")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == [".lock"]


def test_the_name_of_a_library_has_its_gpus(tmp_path, monkeypatch):
    monkeypatch.setenv(libraries.CACHE_VARIABLE, str(tmp_path))
    names = [libraries.file_name(libraries.OP, cuda) for cuda in (False, True, [90], [80, 90])]
    assert len(set(names)) == 4
    (tmp_path / names[2]).write_text("")
    assert libraries.find(libraries.OP, [90]).name == names[2]
    assert libraries.find(libraries.OP, [80, 90]) is None
    (tmp_path / names[1]).write_text("")
    assert libraries.find(libraries.OP, [80, 90]).name == names[1]


def test_a_gpu_that_is_too_old_uses_the_composed_version(monkeypatch):
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda _: [types.SimpleNamespace(name="GPU:0")])
    monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda _: {"compute_capability": (7, 5)})
    monkeypatch.setattr(fused, "_LOADED", {})
    assert "GPU:0 is not an NVIDIA GPU of compute capability 8.0 or later" in fused.unavailable()


def test_no_home_directory(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(libraries.pathlib.Path, "home", home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv(libraries.CACHE_VARIABLE, raising=False)
    with pytest.raises(libraries.BuildError, match="Set S2SD_TF_CACHE_DIR"):
        libraries.cache_folder()


def test_a_missing_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(libraries.BuildError, match=r"\$CXX, no-such-compiler"):
        libraries.compiler()


@pytest.mark.parametrize(
    ("known", "cuda", "code", "ptx"),
    [
        ((75, 80, 86, 89, 90, 100, 120), True, [80, 86, 89, 90, 100, 120], [80, 120]),
        ((75, 80, 86, 89, 90), True, [80, 86, 89, 90], [80, 90]),
        ((90, 100, 120), True, [90, 100, 120], [90, 120]),
        ((75, 80, 90), [90], [90], [90]),
        ((75, 80, 90), [80, 90], [80, 90], [90]),
        # GPUs that are newer than the compiler compile its newest PTX.
        ((75, 80, 89, 90), [120], [], [90]),
        ((75, 80, 90), [80, 120], [80], [90]),
        ((70, 75), [80], None, None),
        ((70, 75), True, None, None),
    ],
)
def test_code_for_gpus(tmp_path, known, cuda, code, ptx):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho " + " ".join(f"sm_{number} sm_{number}a" for number in known))
    nvcc.chmod(0o755)
    if code is None:
        with pytest.raises(libraries.BuildError, match="cannot build for the compute capabilities"):
            libraries._cuda_targets(nvcc, cuda)
        return
    found = [target.rpartition("=")[2] for target in libraries._cuda_targets(nvcc, cuda)]
    assert found == [*(f"sm_{number}" for number in code), *(f"compute_{number}" for number in ptx)]


def test_the_build_command(run_python, built):
    done = run_python("-m", "s2sd_tf.distillation.build")
    assert done.stdout.count("already built") == 2
    assert "tested with jit_compile=True: within" in done.stdout


def test_installed_sources_give_the_same_library_name(tmp_path, monkeypatch):
    """`setup.py` builds from the source tree; the installed package must find the result."""
    source_tree = REPOSITORY / "custom_ops" / libraries.OP
    names = []
    for folder in (source_tree, tmp_path / libraries.OP):
        if folder != source_tree:
            shutil.copytree(source_tree, folder, ignore=shutil.ignore_patterns(*libraries.NOT_BUILT))
        monkeypatch.setattr(libraries, "sources", lambda folder=folder: folder)
        libraries._digest.cache_clear()
        names.append(libraries.file_name(libraries.OP, False))
    libraries._digest.cache_clear()
    assert names[0] == names[1]
    assert {path.name for path in source_tree.iterdir()} >= set(libraries.NOT_BUILT)
