"""Shared by all tests: quiet TensorFlow, seeds, processes and small fixtures."""

import gc
import os
import pathlib
import platform
import random
import subprocess

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# What XLA makes of a graph is the same. Only LLVM, after it, takes half the time: the tests compile a lot and compute
# very little.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

import numpy as np
import processes
import pytest
import tensorflow as tf

from s2sd_tf.evaluation.scann_searcher import usable_methods


def pytest_collection_finish():
    """Hides the imported libraries' objects from the garbage collector, which would take a tenth of the tests' time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)


# How galleries can be searched here, and the mark of tests that need ScaNN.
METHODS = usable_methods()
needs_scann = pytest.mark.skipif("scann" not in METHODS, reason="needs ScaNN, which has wheels for Linux only")
REPOSITORY = pathlib.Path(__file__).parent.parent
DATA = pathlib.Path(__file__).parent / "data"


def objective_names():
    """Names of the objectives that need no additional library."""
    from s2sd_tf import objectives

    return [name for kind in ("pair", "tuple", "proxy") for name in objectives.names(kind)]


# Golden files of the published implementation, one per variant.
GOLDENS = ("s2sd_dsd", "s2sd_msd", "s2sd_msda", "s2sd_msdf_before_delay", "s2sd_msdf_at_delay", "s2sd_msdfa")


def golden_loss(values, dtype):
    """The `S2SDLoss` of a golden file of the published implementation."""
    import s2sd_tf

    loss = s2sd_tf.S2SDLoss(
        target_dims=values["dims"].tolist(),
        temperature=float(values["temperature"]),
        distill_weight=float(values["distill_weight"]),
        feature_distill=bool(values["feature_distill"]),
        feature_distill_weight=float(values["feature_distill_weight"]),
        feature_distill_delay=int(values["feature_distill_delay"]),
        dtype=dtype,
    )
    loss.step.assign(int(values["step"]))
    return loss


def small_config(**changes):
    """The config of a small run on digits in this process, with `changes` by flattened keys."""
    from s2sd_tf.training import default_config

    config = default_config()
    config.train.deterministic = False  # it would apply to the whole process, which other tests share
    config.model.embedding_dim = 8
    config.data.classes_per_batch = 3
    config.data.samples_per_class = 2
    config.update_from_flattened_dict(changes)
    return config


def run_program(*command):
    """Runs a program, which must succeed, and returns its output."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def compile_cpu_kernel(folder, flags, more):
    """Compiles the CPU kernel and the sources of `more`, a dict from source to flags; returns all object files."""
    from s2sd_tf.distillation import libraries

    processes = []
    for source, options in {**more, **libraries.cpu_kernel_sources(platform.machine())}.items():
        path = REPOSITORY / "custom_ops" / "similarity_kl" / source
        command = [libraries.compiler(), *flags, *options, "-c", path, "-o", folder / f"{source}.o"]
        processes.append(subprocess.Popen(list(map(str, command))))
    assert [process.wait() for process in processes] == [0] * len(processes)
    return sorted(folder.glob("*.o"))


@pytest.fixture(autouse=True, scope="module")
def _tensorflow_seeded():
    """Once per file: setting TensorFlow's seed drops all its kernels, which takes longer than many tests."""
    tf.keras.utils.set_random_seed(0)


@pytest.fixture(autouse=True)
def _seeded():
    random.seed(0)
    np.random.seed(0)


@pytest.fixture
def golden():
    """Loads an npz of golden values by name."""
    return lambda name: np.load(DATA / f"{name}.npz")


@pytest.fixture(scope="session")
def run_python():
    """Runs Python code, a script or a module in a new process and returns the finished process."""
    return processes.run_python


@pytest.fixture(scope="session")
def call(run_python):
    """Runs a program and returns the finished process; checks its exit status, and that errors have no traceback."""

    def call(program, *arguments, status=0):
        done = run_python("-m", f"s2sd_tf.cli.{program}", *arguments, check=False)
        assert done.returncode == status, done.stdout + done.stderr
        assert not status or "Traceback" not in done.stderr
        return done

    return call


@pytest.fixture
def unit_rows():
    """Makes random l2-normalised float64 rows."""

    def make(batch, dim, seed=0):
        rows = np.random.default_rng(seed).normal(size=(batch, dim))
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    return make


@pytest.fixture
def small_model():
    """Makes a small built `S2SDModel` on 8 x 8 x 1 images, with targets that have the base's objective."""
    import s2sd_tf

    def make(embedding_dim=4, **settings):
        backbone = s2sd_tf.models.backbones.conv_blocks((8, 8, 1), filters=(6, 8), pools=1)
        given = {"target_dims": (8, 12), "target_objective": None, **settings}
        return s2sd_tf.S2SDModel(backbone, embedding_dim, **given)

    return make
