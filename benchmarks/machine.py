"""What the benchmarks say about the machine, and PyTorch where it is installed."""

import datetime
import functools
import pathlib
import platform

import numpy as np
import tensorflow as tf


def describe(threads):
    """Date, processor, threads and versions, as a dict."""
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    versions = {"tensorflow": tf.__version__, "numpy": np.__version__}
    if torch():
        versions["torch"] = torch().__version__
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu,
        "threads": threads,
        "gpus": [gpu.name for gpu in tf.config.list_physical_devices("GPU")],
        **versions,
    }


@functools.lru_cache(maxsize=1)
def torch():
    """The module, or None."""
    try:
        import torch
    except ImportError:
        return None
    return torch


def set_threads(threads):
    """The same number of threads for TensorFlow and PyTorch; before either has computed anything."""
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    if torch():
        torch().set_num_threads(threads)
