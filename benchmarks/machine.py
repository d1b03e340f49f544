"""Helpers shared by the benchmarks: the machine, PyTorch if it is installed, thread counts, and peak memory."""

import datetime
import functools
import pathlib
import platform

import numpy as np
import tensorflow as tf


def describe(threads):
    """Returns a dict with the date, processor, threads, GPUs and versions."""
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
    """Returns the module torch, or None if it is not installed."""
    try:
        import torch
    except ImportError:
        return None
    return torch


def set_threads(threads):
    """Sets the number of threads of TensorFlow and PyTorch. Call it before either has computed anything."""
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    if torch():
        torch().set_num_threads(threads)


def peak():
    """This process's peak memory so far in MiB. `getrusage` would start with the parent process's peak."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024
