r"""Kills runs again and again, and checks that they end as if nothing had happened: `make soak`.

    python benchmarks/soak.py --runs=30 --output=benchmarks/results/soak.json

One small run on digits is not interrupted. Then every further run of the same config is killed at random moments, by
SIGTERM and SIGKILL in alternation: some while it starts, most after training has begun. After every kill, each file in
its folder must be intact, and the exit status after SIGTERM must be 75. Then the run is started again, until it ends.
Its weights, optimizer state and averages must equal those of the uninterrupted run, bit by bit. So must its history,
except for the columns of times. Writes the JSON and a table (.md) of the same name. Fails if any check fails.

    python benchmarks/soak.py --runs=0 --pairs=20 --output=benchmarks/results/soak_pairs.json

starts two processes in one work directory instead, the second at a random moment of the first. One must run to its
end; the other must end with exit status 2 and name the process that has the folder, unless the run had ended. Of every
second pair, the process that has the folder is killed at a random moment; then the other one, or else a third, must run
to the end. Here too the run must equal one that had its folder for itself.
"""

import concurrent.futures
import csv
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
import zipfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from absl import app, flags
from machine import describe
from PIL import Image
from tqdm import tqdm

from s2sd_tf.export import load_model
from s2sd_tf.files import LEFTOVER, read_json, write_json
from s2sd_tf.training.checkpoints import UNREADABLE
from s2sd_tf.training.history import TIMES, read_history
from s2sd_tf.training.interruption import EXIT_STATUS

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
FLAGS = flags.FLAGS
flags.DEFINE_integer("runs", 30, "Runs to kill.")
flags.DEFINE_integer("pairs", 0, "Pairs of processes in one work directory.")
flags.DEFINE_integer("kills", 4, "Kills per run, at most.")
flags.DEFINE_integer("jobs", 1, "Parallel runs, one thread each.")
flags.DEFINE_integer("seed", 0, "Seed of the moments.")
flags.DEFINE_string("output", None, "JSON file to write; the table gets the same name.")

# Everything that has state: a random miner, augmentation, a schedule, averages, a best checkpoint.
CONFIG = (
    f"--config={REPOSITORY}/configs/digits.py",
    "--config.model.filters=(8,8)",
    "--config.s2sd.target_dims=(16,)",
    "--config.data.classes_per_batch=3",
    "--config.data.samples_per_class=4",
    "--config.data.augmentation=base",
    "--config.data.validation_classes=2",
    "--config.objective.name=margin",
    "--config.optimizer.schedule.name=cosine",
    "--config.optimizer.schedule.warmup_epochs=1",
    "--config.optimizer.settings.use_ema=True",
    "--config.train.epochs=6",
    "--config.train.steps_per_epoch=50",
    "--config.train.checkpoint_every=2",
    "--config.train.threads=1",
    "--config.eval.every=2",
)
# A run of a pair is short.
PAIR_CONFIG = (*CONFIG, "--config.train.epochs=2", "--config.train.steps_per_epoch=10", "--config.eval.every=1")
# The share of kills before training begins.
EARLY = 0.2
PATIENCE = 600


def start(workdir, config=CONFIG, log=".log"):
    """Starts the program in its own process, which logs to a file next to the folder."""
    command = [sys.executable, "-m", "s2sd_tf.cli.train", *config, f"--workdir={workdir}"]
    with open(f"{workdir}{log}", "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def sessions(workdir):
    """The number of times training has begun."""
    path = workdir / "run.json"
    return len(read_json(path)["sessions"]) if path.exists() else 0


def run_alone(workdir, config=CONFIG):
    """Runs without interruption. Returns `(seconds until training begins, seconds from there to the end)`."""
    begin = time.monotonic()
    process = start(workdir, config)
    while not sessions(workdir) and process.poll() is None:
        time.sleep(0.02)
    begun = time.monotonic()
    check(process.wait(PATIENCE) == 0, f"the uninterrupted run failed; its log ends with:\n{log_end(workdir)}")
    return begun - begin, time.monotonic() - begun


def run_killed(workdir, seed, times):
    """Kills a run `--kills` times or until it ends, then lets it finish. Returns a dict for every kill."""
    moments = random.Random(seed)
    happened = []
    for number in range(FLAGS.kills):
        number_of_signal = (signal.SIGTERM, signal.SIGKILL)[(seed + number) % 2]
        process, before = start(workdir), sessions(workdir)
        if moments.random() < EARLY:
            wait(process, moments.uniform(0, times[0]))
        else:
            while sessions(workdir) == before and process.poll() is None:
                time.sleep(0.02)
            # The remaining run gets shorter.
            wait(process, moments.uniform(0, times[1] / (1 + number / 2)))
        begun, ended = sessions(workdir) > before, (workdir / "results.json").exists()
        process.send_signal(number_of_signal)
        status = process.wait(PATIENCE)
        files = check_files(workdir)
        happened.append(
            {
                "signal": number_of_signal.name,
                "phase": "end" if ended else "training" if begun else "start",
                "status": status,
                "stands at": place(workdir),
                "files": files,
            }
        )
        allowed = {0, -number_of_signal}
        if number_of_signal == signal.SIGTERM:
            # Before the program handles signals, and after it has finished, SIGTERM kills it like any process.
            allowed = {0, EXIT_STATUS} if begun and not ended else {0, EXIT_STATUS, -number_of_signal}
        check(
            status in allowed,
            f"exit status {status} after {number_of_signal.name}; its log ends with:\n{log_end(workdir)}",
        )
        check(
            status != 0 or (workdir / "results.json").exists(),
            f"exit status 0 without results; its log ends with:\n{log_end(workdir)}",
        )
        if status == 0:
            break
    check(start(workdir).wait(PATIENCE) == 0, f"the run could not be finished; its log ends with:\n{log_end(workdir)}")
    check_files(workdir)
    return happened


def run_pair(workdir, seed, times, kills):
    """Two processes in one work directory, of which the one that holds it may be killed. Returns what happened."""
    moments = random.Random(seed)
    first = start(workdir, PAIR_CONFIG, ".first.log")
    offset = moments.uniform(0, sum(times))
    wait(first, offset)
    ended = first.poll() is not None
    second = start(workdir, PAIR_CONFIG, ".second.log")
    names = {first.pid: "first", second.pid: "second"}
    killed = ""
    if kills:
        wait(second, moments.uniform(0, sum(times)))
        held_by = holder(workdir)
        process = first if held_by in (None, first.pid) else second
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed = f"the {names[process.pid]}{'' if held_by else ', before it holds the folder'}"
    statuses = {names[process.pid]: process.wait(PATIENCE) for process in (first, second)}
    refused = [name for name, status in statuses.items() if status == 2]
    for name in refused:
        other = second if name == "first" else first
        check(
            f"error: workdir: expected a folder that no other process is writing. Received: '{workdir}', which process "
            f"{other.pid} on" in log_end(workdir, f".{name}.log"),
            f"the {name} does not say who holds the folder; its log ends with:\n{log_end(workdir, f'.{name}.log')}",
        )
    check(
        set(statuses.values()) <= {0, 2, *([-signal.SIGKILL] if killed else [])} and len(refused) < 2,
        f"exit statuses {statuses}; the logs end with:\n"
        + "\n".join(log_end(workdir, f".{name}.log") for name in statuses),
    )
    third = 0 not in statuses.values()
    if third:
        check(bool(killed), f"neither process ran to its end, and none was killed: {statuses}")
        check(start(workdir, PAIR_CONFIG).wait(PATIENCE) == 0, f"a killed holder blocks:\n{log_end(workdir)}")
    files = check_files(workdir)
    left = [path.name for path in workdir.rglob(f"{LEFTOVER}*")]
    check(not left, f"{workdir}: left behind: {left}")
    return {
        "offset": round(offset, 2), "first had ended": ended, "killed": killed, **statuses,
        "ran to its end": "a third" if third else next(name for name, status in statuses.items() if status == 0),
        "files": files,
    }  # fmt: skip


def holder(workdir):
    """The process that holds the work directory, or None."""
    try:
        return read_json(workdir / f"{LEFTOVER}lock")["pid"]
    except (OSError, ValueError):
        return None


def log_end(workdir, log=".log"):
    """The last lines of a run's log."""
    lines = pathlib.Path(f"{workdir}{log}").read_text(errors="replace").splitlines()
    return "\n".join(line[:300] for line in lines[-15:])


def wait(process, seconds):
    """Waits for some seconds, or until the process ends."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def place(workdir):
    """The name of the last checkpoint, or `-`."""
    folder = workdir / "checkpoints"
    names = sorted(path.name for path in folder.glob("epoch_*")) if folder.exists() else []
    return names[-1] if names else "-"


def check_files(workdir):
    """Reads every file in a run's folder, except TensorBoard's and unfinished ones. Returns how many."""
    count = 0
    for path in sorted(workdir.rglob("*")):
        parts = path.relative_to(workdir).parts
        if not path.is_file() or parts[0] == "tensorboard" or any(part.startswith(LEFTOVER) for part in parts):
            continue
        check(not any(part.startswith(UNREADABLE) for part in parts), f"{path}: a checkpoint was damaged")
        check(path.stat().st_size > 0 or path.suffix == ".index", f"{path}: empty")
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".keras":
            with zipfile.ZipFile(path) as archive:
                check(archive.testzip() is None, f"{path}: a broken archive")
        elif path.suffix == ".csv":
            with open(path, newline="") as file:
                rows = list(csv.DictReader(file))
            check(rows and all(None not in row and None not in row.values() for row in rows), f"{path}: cut off")
        elif path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
        count += 1
    return count


def check_equal(one, other):
    """Checks that two runs have equal models, histories and results."""
    models = [load_model(str(workdir / "best.keras")) for workdir in (one, other)]
    for kind in ("variables", "optimizer.variables"):
        groups = [values(model, kind) for model in models]
        check(len(groups[0]) == len(groups[1]), f"{other}: a different number of {kind}")
        for a, b in zip(*groups):
            check(np.array_equal(a, b), f"{other}: different {kind}")
    histories = [
        [{key: value for key, value in row.items() if key not in TIMES} for row in read_history(workdir)]
        for workdir in (one, other)
    ]
    check(histories[0] == histories[1], f"{other}: a different history")
    results = [read_json(workdir / "results.json") for workdir in (one, other)]
    for result in results:
        result.pop("train_seconds")
    check(results[0] == results[1], f"{other}: different results")


def values(model, kind):
    """The variables of a model (kind "variables") or of its optimizer, as arrays."""
    found = model.variables if kind == "variables" else model.optimizer.variables
    return [tf.convert_to_tensor(variable).numpy() for variable in (found() if callable(found) else found)]


def check(holds, message):
    """Raises a RuntimeError if a condition does not hold."""
    if not holds:
        raise RuntimeError(message)


def main(_):
    if FLAGS.pairs:
        run_pairs()
    if FLAGS.runs:
        run_runs()


def run_pairs():
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        times = run_alone(folder / "alone", PAIR_CONFIG)
        pairs = []
        for number in tqdm(range(FLAGS.pairs), desc="Pairs", unit="pair"):
            workdir = folder / f"pair{number:03d}"
            pairs.append(run_pair(workdir, FLAGS.seed + number, times, kills=number % 2 == 1))
            check_equal(folder / "alone", workdir)
            report_pairs(pairs, sum(times), time.monotonic() - begin)
    print(f"{table_of_pairs(pairs)}\n\nAll equal to the run that had its folder for itself")


def report_pairs(pairs, alone, seconds):
    """Writes the pairs so far."""
    if not FLAGS.output:
        return
    machine = {**describe(1), "seconds of one run": round(alone, 1), "minutes": round(seconds / 60, 1)}
    write_json(FLAGS.output, {"machine": machine, "pairs": pairs})
    about = "".join(f"- {key}: {value}\n" for key, value in machine.items())
    title = (
        f"# {len(pairs)} pairs of processes in one work directory\n\nOne ran to its end; the other said which process "
        "has the folder (exit status 2), or found the run finished or killed. All runs have the weights, optimizer "
        "state and history of a run that had its folder for itself, bit by bit. Nothing was left behind.\n\n"
    )
    pathlib.Path(FLAGS.output).with_suffix(".md").write_text(f"{title}{about}\n{table_of_pairs(pairs)}\n")


def table_of_pairs(pairs):
    """Returns a Markdown table of the pairs."""
    lines = [
        "| second starts after | the first had ended | killed | exit statuses | runs to its end |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {pair['offset']:.1f} s | {'yes' if pair['first had ended'] else 'no'} | {pair['killed'] or '-'} | "
        f"{pair['first']}, {pair['second']} | {pair['ran to its end']} |"
        for pair in pairs
    ]
    return "\n".join(lines)


def run_runs():
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        times = run_alone(folder / "alone")
        check_files(folder / "alone")

        def one(number):
            workdir = folder / f"run{number:03d}"
            return run_killed(workdir, FLAGS.seed + number, times)

        with concurrent.futures.ThreadPoolExecutor(FLAGS.jobs) as pool:
            results = list(tqdm(pool.map(one, range(FLAGS.runs)), total=FLAGS.runs, desc="Killing", unit="run"))
        for number in range(FLAGS.runs):
            check_equal(folder / "alone", folder / f"run{number:03d}")
    minutes = (time.monotonic() - begin) / 60
    text = table(results)
    print(f"{text}\n\nAll equal to the uninterrupted run; {minutes:.1f} minutes")
    if FLAGS.output:
        machine = {**describe(1), "jobs": FLAGS.jobs, "minutes": round(minutes, 1)}
        write_json(FLAGS.output, {"machine": machine, "runs": results})
        about = "".join(f"- {key}: {value}\n" for key, value in machine.items())
        title = (
            f"# {FLAGS.runs} runs, killed {sum(map(len, results))} times\n\nAll ended with the same weights, optimizer "
            "state and history as an uninterrupted run, bit by bit.\n\n"
        )
        pathlib.Path(FLAGS.output).with_suffix(".md").write_text(f"{title}{about}\n{text}\n")


def table(results):
    """Returns a Markdown table of the kills, by signal and by what the run was doing."""
    kills = [kill for run in results for kill in run]
    lines = [
        "| signal | while it | kills | exit status: times | last checkpoint within an epoch | files read |",
        "|---|---|---|---|---|---|",
    ]
    phases = {"start": "starts", "training": "trains and evaluates", "end": "has ended"}
    for name in ("SIGTERM", "SIGKILL"):
        for phase, words in phases.items():
            chosen = [kill for kill in kills if kill["signal"] == name and kill["phase"] == phase]
            if not chosen:
                continue
            statuses = [kill["status"] for kill in chosen]
            exits = ", ".join(f"{status}: {statuses.count(status)}" for status in sorted(set(statuses)))
            within = sum("step" in kill["stands at"] for kill in chosen)
            files = sum(kill["files"] for kill in chosen)
            lines.append(f"| {name} | {words} | {len(chosen)} | {exits} | {within} | {files:,} |")
    return "\n".join(lines)


if __name__ == "__main__":
    app.run(main)
