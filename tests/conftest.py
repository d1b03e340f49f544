"""Shared by all tests: quiet TensorFlow, seeds, processes, and small fixtures."""

import json
import os
import pathlib
import platform
import select
import signal
import subprocess
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import pytest
import tensorflow as tf

REPOSITORY = pathlib.Path(__file__).parent.parent
DATA = pathlib.Path(__file__).parent / "data"


def objective_names():
    """The objectives that need no other library, as a model takes them."""
    from s2sd_tf import objectives

    return [name for kind in ("pair", "tuple", "proxy") for name in objectives.names(kind)]


def small_config(**changes):
    """The config of a small run on digits in this process; `changes` are by flattened keys."""
    from s2sd_tf.training import default_config

    config = default_config()
    config.train.deterministic = False  # a setting of the process, which other tests share
    config.model.embedding_dim = 8
    config.data.classes_per_batch = 3
    config.data.samples_per_class = 2
    config.update_from_flattened_dict(changes)
    return config


def run_program(*command):
    """What a program prints; it has to succeed."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def compile_cpu_kernel(folder, flags, more):
    """The CPU kernel's object files in `folder`, and those of `more`: other sources, each with flags of its own."""
    from s2sd_tf.distillation import libraries

    processes = []
    for source, options in {**more, **libraries.cpu_kernel_sources(platform.machine())}.items():
        path = REPOSITORY / "custom_ops" / "similarity_kl" / source
        command = [libraries.compiler(), *flags, *options, "-c", path, "-o", folder / f"{source}.o"]
        processes.append(subprocess.Popen(list(map(str, command))))
    assert [process.wait() for process in processes] == [0] * len(processes)
    return sorted(folder.glob("*.o"))


@pytest.fixture(autouse=True)
def _seeded():
    tf.keras.utils.set_random_seed(0)


@pytest.fixture
def golden():
    """Loads an npz of golden values by name."""
    return lambda name: np.load(DATA / f"{name}.npz")


# Forks what it is asked to run: importing TensorFlow takes longer than most of that. It has done nothing with it yet.
FORKS = """
import gc, importlib, json, os, runpy, sys, types

for name in sys.argv[1:]:
    importlib.import_module(name)
gc.freeze()
for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if not child:
        break
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
os.setsid()
for descriptor, path in enumerate((os.devnull, *request["streams"])):
    os.dup2(os.open(path, os.O_WRONLY if descriptor else os.O_RDONLY), descriptor)
os.environ.clear()
os.environ.update(request["environment"])
os.chdir(request["folder"])
what, *rest = request["arguments"]
if what == "-m":
    sys.path[0], sys.argv = os.getcwd(), rest
    runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
elif what == "-c":
    sys.path[0], sys.argv = "", [what, *rest[1:]]
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    exec(rest[0], main.__dict__)
else:
    sys.path[0], sys.argv = os.path.dirname(os.path.abspath(what)), request["arguments"]
    runpy.run_path(what, run_name="__main__")
"""
PACKAGE = [*(f"s2sd_tf.{part}" for part in ("evaluation", "export", "serving", "training")), "sklearn.cluster"]


@pytest.fixture(scope="session")
def run_python(tmp_path_factory):
    """Runs Python code, a script or a module in a process of its own and returns the finished process.

    `imported` are modules that the process has imported already, "tensorflow" first of all.
    """
    quiet = {"CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "2"}
    streams = [tmp_path_factory.mktemp("streams") / name for name in ("stdout", "stderr")]
    started = {}

    def run(*arguments, cwd=None, check=True, timeout=300, imported=("tensorflow", *PACKAGE)):
        if imported not in started:
            started[imported] = subprocess.Popen(
                [sys.executable, "-c", FORKS, *imported],
                env={**os.environ, **quiet},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
            )
        forks = started[imported]
        for path in streams:
            path.write_bytes(b"")
        arguments = [str(argument) for argument in arguments]
        request = {
            "arguments": arguments,
            "folder": str(cwd or os.getcwd()),
            "streams": [str(path) for path in streams],
            "environment": {**os.environ, **quiet},
        }
        forks.stdin.write(json.dumps(request).encode() + b"\n")
        child = int(forks.stdout.readline())
        late = not select.select([forks.stdout], [], [], timeout)[0]
        if late:
            os.killpg(child, signal.SIGKILL)
        status = int(forks.stdout.readline())
        stdout, stderr = (path.read_text() for path in streams)
        assert not late, f"{arguments}: not done in {timeout} seconds\n{stdout}{stderr}"
        assert not check or status == 0, stdout + stderr
        return subprocess.CompletedProcess(arguments, status, stdout, stderr)

    yield run
    for forks in started.values():
        forks.communicate()


@pytest.fixture(scope="session")
def call(run_python):
    """Calls a program and returns the finished process, which has to have ended as expected; an error in one line."""

    def call(program, *arguments, status=0):
        done = run_python("-m", f"s2sd_tf.cli.{program}", *arguments, check=False)
        assert done.returncode == status, done.stdout + done.stderr
        assert not status or "Traceback" not in done.stderr
        return done

    return call


@pytest.fixture
def unit_rows():
    """Random l2-normalised rows, float64."""

    def make(batch, dim, seed=0):
        rows = np.random.default_rng(seed).normal(size=(batch, dim))
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    return make


@pytest.fixture
def small_model():
    """Makes a small built `S2SDModel` on 8 x 8 x 1 images."""
    import s2sd_tf

    def make(embedding_dim=4, **settings):
        backbone = s2sd_tf.models.backbones.conv_blocks((8, 8, 1), filters=(6, 8), pools=1)
        return s2sd_tf.S2SDModel(backbone, embedding_dim, **{"target_dims": (8, 12), **settings})

    return make
