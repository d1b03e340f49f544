"""Trains several runs in parallel and summarises their metrics over seeds."""

import concurrent.futures
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from s2sd_tf.files import read_json


class RunFailed(Exception):
    """A run failed; the message contains the end of its log."""


def run_all(runs: Mapping[str, Sequence[str]], jobs: int | None = None) -> dict[str, dict[str, Any]]:
    """Trains every run in its own process and returns the results.

    Finished runs are only read, unfinished runs are resumed, and a work directory written by a different config is an
    error. The output of a run goes to `<work directory>.log.txt`.

    Args:
        runs: maps a work directory to the `--config...` flags of `s2sd-train`.
        jobs: processes at a time, >= 1. Default: one per core; then pass `--config.train.threads=1` in the flags.

    Returns:
        The content of `results.json` by work directory.

    Raises:
        RunFailed: a run failed.
    """
    jobs = jobs or os.cpu_count() or 1
    bar = tqdm(total=len(runs), desc="Training", unit="run")
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(_run, workdir, arguments): workdir for workdir, arguments in runs.items()}
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            bar.close()
    return {workdir: read_json(os.path.join(workdir, "results.json")) for workdir in runs}


def summarize(results: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """`(mean, standard deviation)` of each test metric (exact search) over the results of several runs.

    This is the sample standard deviation (n - 1); it is 0 for one run.
    """
    metrics = [result["test"]["exact"] for result in results]
    names = [name for name, value in metrics[0].items() if isinstance(value, float)]
    means, deviations = mean_and_deviation([[row[name] for name in names] for row in metrics])
    return dict(zip(names, zip(means.tolist(), deviations.tolist())))


def mean_and_deviation(values: Sequence[Sequence[float]] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sample standard deviation over the rows of `(runs, n)`, each `(n,)`; the deviation of one run is 0."""
    values = np.asarray(values, np.float64)
    return values.mean(axis=0), values.std(axis=0, ddof=min(1, len(values) - 1))


def _run(workdir, arguments):
    os.makedirs(os.path.dirname(os.path.abspath(workdir)), exist_ok=True)
    command = [sys.executable, "-m", "s2sd_tf.cli.train", *arguments, f"--workdir={workdir}"]
    log_path = f"{os.path.abspath(workdir)}.log.txt"
    with open(log_path, "w") as log:
        status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    if status:
        with open(log_path) as log:
            lines = log.readlines()
        errors = [line for line in lines if ": error: " in line and not line[:1].isdigit()][-1:]
        end = "".join(errors or lines[-15:])
        raise RunFailed(f"{' '.join(command)} failed with status {status}; {log_path} ends with:\n{end}")
