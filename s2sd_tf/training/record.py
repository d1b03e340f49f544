"""What a run was: `run.json` in its work directory, from which it can be done again."""

import datetime
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys

import numpy as np
import tensorflow as tf
from absl import logging

import s2sd_tf
from s2sd_tf.distillation import fused
from s2sd_tf.distillation.similarity_kl import KERNEL_VARIABLE
from s2sd_tf.files import read_json, write_json
from s2sd_tf.keras_compat import keras_version

NAME = "run.json"


def fingerprint(images):
    """A sha256 of an `ImageSet`, as hexadecimal digits: other images, labels or names of classes have another one.

    Of pixels and encoded images it takes every byte. Of files it takes the paths below their common folder, which may
    be elsewhere then, and the sizes; of byte ranges of files these with the offsets and lengths. So a file that was
    changed without a change of its size is not seen.

    Raises:
        OSError: a file that is not there.
    """
    digest = hashlib.sha256()

    def add(*values):
        for value in values:
            value = value if isinstance(value, bytes) else str(value).encode()
            # With its length, so that no two lists of values are the same bytes.
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
    return digest.hexdigest()


def record_session(workdir, config, fingerprints, model, state, strategy=None):
    """Writes `run.json`, or adds a start to it, before a run trains.

    Args:
        workdir: folder of the run; made if it is missing.
        config: the resolved config.
        fingerprints: what `check_data` returns.
        model: `S2SDModel`.
        state: `RunState` from which training goes on.
        strategy: JSON-able dict that says how the run is distributed, or None.

    Raises:
        OutOfSpace: there is no room to write it.
    """
    path = os.path.join(workdir, NAME)
    now = {
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
            "The run goes on with other versions than before, and may not end with the weights it would have: %s",
            ", ".join(f"{name} {before.get(name)} -> {version}" for name, version in changed.items()),
        )
    write_json(path, {**record, "sessions": [*record["sessions"], now]})


def check_data(workdir, run_data):
    """Fingerprints of the parts of a run's data, a dict.

    Raises:
        ValueError: those that the run began with were others, or its record cannot be read.
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
            f"{path}: expected the record of the run. Received: {error}. Delete it to go on without a check of the data"
        ) from error
    for name in {**before, **found}:
        if before.get(name) != found.get(name):
            told = [
                f"{part['images']:,} images of {part['classes']:,} classes, {part['sha256'][:12]}" if part else "none"
                for part in (before.get(name), found.get(name))
            ]
            raise ValueError(
                f"config.data: expected the {name} images that {workdir!r} began with ({told[0]}). Received: others "
                f"({told[1]}). Put the data back, or begin in a new folder"
            )
    return found


def _relative(paths):
    """`(path, path below the common folder of all)` of each path."""
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
    """The git revision of the package's folder and whether it differs from that; None where it is not of a checkout."""
    folder = os.path.dirname(os.path.abspath(s2sd_tf.__file__))

    def git(*arguments):
        command = ["git", "-C", folder, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip()

    try:
        # A virtual environment may lie in the checkout of something else.
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
    """What computes the divergences, and why not the fused op where it is not that."""
    if not (model.s2sd_loss.target_dims or model.s2sd_loss.feature_distill):
        return None
    asked = model.s2sd_loss.similarity_kl_implementation
    asked = os.environ.get(KERNEL_VARIABLE, "auto") if asked == "auto" else asked
    reason = None if asked == "composed" else fused.unavailable(xla=bool(model.jit_compile))
    used = "composed" if asked == "composed" or reason else "fused"
    return {"asked": asked, "used": used, "reason": reason}
