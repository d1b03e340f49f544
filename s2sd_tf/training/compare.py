"""Runs side by side: the plain objective against S2SD, over seeds."""

import concurrent.futures
import os
import subprocess
import sys

import numpy as np
from tqdm import tqdm

from s2sd_tf.files import read_json


class RunFailed(Exception):
    """A run ended with an error; the message holds the end of its log."""


def run_all(runs, jobs=None):
    """Trains every run in a process of its own, and returns their results.

    Runs that are finished are only read, unfinished ones are resumed, and those of another config are refused. A run's
    output goes to `<work directory>.log.txt`.

    Args:
        runs: dict from work directory to the list of `--config...` flags of `s2sd-train`.
        jobs: int >= 1, processes at a time. Default: one a core, so the flags should say `--config.train.threads=1`.

    Returns:
        dict from work directory to the content of its `results.json`.

    Raises:
        RunFailed: a run ended with an error.
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


def summarize(results):
    """`(mean, standard deviation)` of each test metric over runs, from their results (exact search).

    The deviation is that of the sample (n - 1), 0 for one run.
    """
    metrics = [result["test"]["exact"] for result in results]
    names = [name for name, value in metrics[0].items() if isinstance(value, float)]
    means, deviations = mean_and_deviation([[row[name] for name in names] for row in metrics])
    return dict(zip(names, zip(means.tolist(), deviations.tolist())))


def mean_and_deviation(values):
    """Mean and sample deviation over the rows of `(runs, n)`, two arrays `(n,)`; the deviation of one run is 0."""
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
        told = [line for line in lines if ": error: " in line and not line[:1].isdigit()][-1:]
        end = "".join(told or lines[-15:])
        raise RunFailed(f"{' '.join(command)} failed with status {status}; {log_path} ends with:\n{end}")
