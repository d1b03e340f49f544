"""Shared by all tests: quiet TensorFlow, seeds, and small fixtures."""

import os
import pathlib
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


@pytest.fixture(autouse=True)
def _seeded():
    tf.keras.utils.set_random_seed(0)


@pytest.fixture
def golden():
    """Loads an npz of golden values by name."""
    return lambda name: np.load(DATA / f"{name}.npz")


@pytest.fixture(scope="session")
def run_python():
    """Runs Python code or a module in a process of its own and returns the finished process."""

    def run(*arguments, cwd=None, check=True, timeout=300):
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "2"}
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    return run


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
