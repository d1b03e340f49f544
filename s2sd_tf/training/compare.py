"""Trains several runs in parallel and summarises their metrics over seeds."""

import concurrent.futures
import os
import re
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from s2sd_tf.files import read_json
from s2sd_tf.training.interruption import Interrupted, Interruption

# How a run's log begins the line of an epoch, see `console`.
_EPOCH = re.compile(r"^epoch (\d+)/(\d+)  ", re.MULTILINE)
_POLL_SECONDS = 1.0


class RunFailed(Exception):
    """A run failed; the message contains the end of its log."""


def run_all(runs: Mapping[str, Sequence[str]], jobs: int | None = None) -> dict[str, dict[str, Any]]:
    """Trains every run in its own process and returns the results.

    Prints a line per finished run, and on a terminal a progress bar. Finished runs are only read, unfinished runs are
    resumed, and a work directory written by a different config is an error. The output of a run goes to
    `<work directory>.log.txt`.

    Args:
        runs: maps a work directory to the `--config...` flags of `s2sd-train`.
        jobs: processes at a time, >= 1. Default: one per core; then pass `--config.train.threads=1` in the flags.

    Returns:
        The content of `results.json` by work directory.

    Raises:
        RunFailed: a run failed. Those that had begun have ended, the others have not begun.
        Interrupted: this process was asked to stop. The runs were too, and have saved what they resume from.
    """
    jobs = jobs or os.cpu_count() or 1
    processes: set[subprocess.Popen] = set()
    bar = tqdm(
        total=len(runs),
        desc="Training",
        bar_format="{desc}: {percentage:.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        disable=None,
    )
    failed: RunFailed | None = None
    stopping = threading.Event()
    with Interruption() as interruption, concurrent.futures.ThreadPoolExecutor(jobs) as pool:

        def run(workdir):
            # After a failure or a signal no other run begins; those that have begun end.
            if stopping.is_set() or interruption.requested:
                return False
            try:
                _run(workdir, runs[workdir], processes, interruption)
            except BaseException:
                stopping.set()
                raise
            return True

        futures = {pool.submit(run, workdir): workdir for workdir in runs}
        running = set(futures)
        try:
            while running:
                finished, running = concurrent.futures.wait(running, _POLL_SECONDS, concurrent.futures.FIRST_COMPLETED)
                interruption.check()
                for future in finished:
                    try:
                        if not future.result():
                            continue
                    except RunFailed as error:
                        failed = failed or error
                        continue
                    found = summarize([_results(futures[future])])
                    line = ", ".join(
                        f"{name} {100 * found[name][0]:.1f}" for name in ("recall@1", "map@r") if name in found
                    )
                    bar.write(f"{futures[future]}: {line}", file=sys.stdout)
                    sys.stdout.flush()
                bar.set_postfix_str(f"{len(futures) - len(running)} of {len(futures)} runs", refresh=False)
                bar.n = len(futures) - len(running) + sum(_fraction(futures[future]) for future in running)
                bar.refresh()
        except BaseException as error:
            stopping.set()
            if isinstance(error, Interrupted):
                # Not all have received the signal: Ctrl-C goes to all processes of a terminal, SIGTERM to one.
                for process in list(processes):
                    process.terminate()
                raise Interrupted(f"{error}; the runs stop too, and the same command resumes them") from error
            raise
        finally:
            bar.close()
    if failed:
        raise failed
    return {workdir: _results(workdir) for workdir in runs}


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


def _fraction(workdir):
    """Returns the fraction of a run's epochs that its log reports as finished."""
    try:
        with open(_log_path(workdir)) as log:
            epochs = _EPOCH.findall(log.read())
    except FileNotFoundError:
        return 0.0
    return int(epochs[-1][0]) / int(epochs[-1][1]) if epochs else 0.0


def _results(workdir):
    return read_json(os.path.join(workdir, "results.json"))


def _log_path(workdir):
    return f"{os.path.abspath(workdir)}.log.txt"


def _run(workdir, arguments, processes, interruption):
    os.makedirs(os.path.dirname(os.path.abspath(workdir)), exist_ok=True)
    command = [sys.executable, "-m", "s2sd_tf.cli.train", *arguments, f"--workdir={workdir}"]
    log_path = _log_path(workdir)
    with open(log_path, "w") as log, subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as process:
        processes.add(process)
        if interruption.requested:
            process.terminate()
        status = process.wait()
        processes.remove(process)
    if status:
        with open(log_path) as log:
            lines = log.readlines()
        errors = [line for line in lines if ": error: " in line and not line[:1].isdigit()][-1:]
        end = "".join(errors or lines[-15:])
        raise RunFailed(f"{' '.join(command)} failed with status {status}; {log_path} ends with:\n{end}")
