"""Writes `run.json` in the work directory: what is needed to reproduce a run."""

import datetime
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging
from ml_collections import config_dict

import s2sd_tf
from s2sd_tf.data import ImageSet
from s2sd_tf.distillation import fused
from s2sd_tf.distillation.similarity_kl import KERNEL_VARIABLE
from s2sd_tf.files import read_json, write_json
from s2sd_tf.keras_compat import keras_version
from s2sd_tf.models import S2SDModel
from s2sd_tf.training.checkpoints import RunState
from s2sd_tf.training.datasets import RunData

NAME = "run.json"


def fingerprint(images: ImageSet) -> str:
    """The sha256 of an image set, in hexadecimal. It changes with the images, labels, class names and teachers.

    Pixels and encoded images are hashed completely. For image files, only their sizes and their paths below the common
    folder are hashed, so the folder may be moved; for byte ranges of files also the offsets and lengths. A file that
    changes but keeps its size is not detected.

    Raises:
        OSError: a file is missing.
    """
    digest = hashlib.sha256()

    def add(*values):
        for value in values:
            value = value if isinstance(value, bytes) else str(value).encode()
            # The length comes first, so that no two lists of values give the same bytes.
            digest.update(len(value).to_bytes(8, "little"))
            digest.update(value)

    add(images.kind, len(images), images.num_classes, *images.class_names, *images.super_classes)
    add(np.ascontiguousarray(images.labels, "<i4").tobytes())
    if images.kind == "pixels":
        add(images.images.shape)
        for image in images.images:
            digest.update(np.ascontiguousarray(image).data)
    elif images.kind == "bytes":
        add(*images.images)
    elif images.kind == "paths":
        for path, name in _relative(images.images):
            add(name, os.stat(path).st_size)
    else:
        for path, name in _relative(np.unique(images.images["path"])):
            add(name, os.stat(path).st_size)
        _, places = np.unique(images.images["path"], return_inverse=True)
        add(places.astype("<i8").tobytes())
        add(*(np.ascontiguousarray(images.images[name], "<i8").tobytes() for name in ("offset", "length")))
    for teacher in images.teachers:
        add(teacher.shape, np.ascontiguousarray(teacher, "<f4").tobytes())
    return digest.hexdigest()


def record_session(
    workdir: str | os.PathLike,
    config: config_dict.ConfigDict,
    fingerprints: dict[str, dict[str, Any]],
    model: S2SDModel,
    state: RunState,
    strategy: dict[str, Any] | None = None,
) -> None:
    """Writes `run.json` before a run trains. If the file exists, adds a session to it.

    Args:
        workdir: work directory of the run; created if it does not exist.
        config: the resolved config.
        fingerprints: the result of `check_data`.
        model: the model of the run.
        state: the state that training starts from.
        strategy: how the run is distributed, as values for JSON, or None.

    Raises:
        OutOfSpace: the disk is full.
    """
    path = os.path.join(workdir, NAME)
    now: dict[str, Any] = {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "epoch": state.epoch,
        "step_in_epoch": state.step_in_epoch,
    }
    versions = _versions()
    if not os.path.exists(path):
        write_json(
            path,
            {
                "command": sys.argv,
                "versions": versions,
                "source": _source(),
                "machine": _machine(config),
                "strategy": strategy,
                "similarity_kl": _similarity_kl(model),
                "seed": config.seed,
                "data": fingerprints,
                "config": config.to_dict(),
                "sessions": [now],
            },
        )
        return
    record = read_json(path)
    before = {**record["versions"], **{k: v for s in record["sessions"] for k, v in s.get("versions", {}).items()}}
    changed = {name: version for name, version in versions.items() if before.get(name) != version}
    if changed:
        now["versions"] = changed
        logging.warning(
            "The run resumes with other versions than before and may end with different weights: %s",
            ", ".join(f"{name} {before.get(name)} -> {version}" for name, version in changed.items()),
        )
    epochs = [record["config"]["train"]["epochs"], *(s["epochs"] for s in record["sessions"] if "epochs" in s)][-1]
    if config.train.epochs != epochs:
        now["epochs"] = config.train.epochs
    write_json(path, {**record, "sessions": [*record["sessions"], now]})


def check_data(workdir: str | os.PathLike, run_data: RunData) -> dict[str, dict[str, Any]]:
    """Checks that the data of a run have not changed since it started.

    Returns:
        For every part of the data ("train", "test", ...): the number of classes and images, and the fingerprint.

    Raises:
        ValueError: the data differ from those in the record of the run, or the record cannot be read.
    """
    parts = {name: getattr(run_data, name) for name in ("train", "validation", "test", "gallery")}
    found = {
        name: {"classes": images.num_classes, "images": len(images), "sha256": fingerprint(images)}
        for name, images in parts.items()
        if images is not None
    }
    path = os.path.join(workdir, NAME)
    if not os.path.exists(path):
        return found
    try:
        before = dict(read_json(path)["data"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected the record of the run. Received: {error}. Delete it to resume without checking the data"
        ) from error
    for name in {**before, **found}:
        if before.get(name) != found.get(name):
            described = [
                f"{part['images']:,} images of {part['classes']:,} classes, {part['sha256'][:12]}" if part else "none"
                for part in (before.get(name), found.get(name))
            ]
            raise ValueError(
                f"config.data: expected the {name} images that {workdir!r} was started with ({described[0]}). "
                f"Received: others ({described[1]}). Restore the data, or start in a new folder"
            )
    return found


def _relative(paths):
    """`(absolute path, path below the common folder)` of each path."""
    paths = [os.path.abspath(path) for path in paths]
    common = os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else ""
    return [(path, pathlib.Path(path).relative_to(common).as_posix()) for path in paths]


def _versions():
    def version(name):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {
        "python": platform.python_version(),
        "s2sd_tf": s2sd_tf.__version__,
        "tensorflow": tf.__version__,
        "keras": keras_version(),
        "numpy": np.__version__,
        "scann": version("scann"),
    }


def _source():
    """The git revision of the package and whether it has uncommitted changes; None if it is not in a checkout."""
    folder = os.path.dirname(os.path.abspath(s2sd_tf.__file__))

    def git(*arguments):
        command = ["git", "-C", folder, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip()

    try:
        # The package may be in a virtual environment within the checkout of another project.
        git("ls-files", "--error-unmatch", "__init__.py")
        return {"revision": git("rev-parse", "HEAD"), "uncommitted": bool(git("status", "--porcelain", "--", "."))}
    except (OSError, subprocess.SubprocessError):
        return None


def _machine(config):
    return {
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": config.train.threads or os.cpu_count(),
        "devices": [device.name for device in tf.config.list_logical_devices()],
        "gpus": [
            tf.config.experimental.get_device_details(gpu).get("device_name", gpu.name)
            for gpu in tf.config.list_physical_devices("GPU")
        ],
        "deterministic": config.train.deterministic,
    }


def _cpu():
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _similarity_kl(model):
    """Which implementation computes the divergences, and the reason if it is not the fused op."""
    if not model.s2sd_loss.has_teachers:
        return None
    asked = model.s2sd_loss.similarity_kl_implementation
    asked = os.environ.get(KERNEL_VARIABLE, "auto") if asked == "auto" else asked
    reason = None if asked == "composed" else fused.unavailable(xla=bool(model.jit_compile))
    used = "composed" if asked == "composed" or reason else "fused"
    return {"asked": asked, "used": used, "reason": reason}
