r"""Dry runs of every config, on generated data in the layouts of the data sets: `make dryrun`.

    python benchmarks/dry_runs.py --output=benchmarks/results/dry_runs.json

Writes a small copy of every data set that does not come with the package (CUB200-2011 with its 200 classes, CARS196
with 196, the others with 200, a few noise images each). Then runs `s2sd-train --dry_run` with every file in configs/
and every setting of published.py, each in its own process: it reads and checks the data, builds the model with random
weights, takes two steps with the config's batch size, and evaluates a sample. Step times are real, retrieval results
are not. Writes the JSON and a table (.md) of the same name.
"""

import os
import pathlib
import re
import subprocess
import sys
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from absl import app, flags
from machine import describe
from tqdm import tqdm

from s2sd_tf.data import datasets
from s2sd_tf.files import write_json
from s2sd_tf.training.protocol import published_settings

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
FLAGS = flags.FLAGS
flags.DEFINE_string("only", "", "A part of the names of configs, such as digits or cub200,bn_inception; empty: all.")
flags.DEFINE_integer("images_per_class", 4, "Images per class.")
flags.DEFINE_string("output", None, "JSON file to write; the table gets the same name.")

CONFIGS = [
    *sorted(path.stem for path in (REPOSITORY / "configs").glob("*.py") if path.stem != "published"),
    *(f"published:{options}" for options in published_settings()),
]
# The largest number of classes to write.
CLASSES = 200
SIZE = (300, 400)
SHOWN = {
    "next step": r"([\d.]+) s",
    "images alone": r"([\d,]+) images/s",
    "backbone": r"([\d,]+) parameters",
    "largest so far": r"([\d,]+) MiB",
}


def write_data(root):
    """Writes every data set. Returns a dict from its name to its folder."""
    sys.path.insert(0, str(REPOSITORY / "tests"))
    import dataset_layouts

    folders = {}
    for name in tqdm(dataset_layouts.LAYOUTS, desc="Writing data", unit="set"):
        folders[name] = root / name
        counts = datasets.counts(name)
        classes = min(CLASSES, counts["train"][1] + counts["test"][1])
        dataset_layouts.write(name, folders[name], classes=classes, images_per_class=FLAGS.images_per_class, size=SIZE)
    folders["folder"] = folders["cub200"] / "CUB_200_2011" / "images"
    return folders


def run(config, folders):
    """Dry-runs one config. Returns the program's output."""
    file, _, options = config.partition(":")
    path = REPOSITORY / "configs" / f"{file}.py"
    arguments = [f"--config={path}:{options}" if options else f"--config={path}", "--dry_run"]
    data = options.split(",")[0] or file
    if data in folders:
        arguments.append(f"--config.data.root={folders[data]}")
    if options:
        arguments.append("--config.model.weights=")
    command = [sys.executable, "-m", "s2sd_tf.cli.train", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr[-3000:]}")
    return done.stdout


def main(_):
    configs = [config for config in CONFIGS if FLAGS.only in config]
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        folders = write_data(pathlib.Path(folder))
        for config in tqdm(configs, desc="Configs", unit="run"):
            output = run(config, folders)
            results[config] = {}
            for key, pattern in SHOWN.items():
                value = re.search(rf"^{key} +.*?{pattern}", output, re.MULTILINE).group(1)
                results[config][key] = float(value.replace(",", ""))
            tqdm.write(f"\n== {config}\n{output}")
    text = table(results)
    print(text)
    if FLAGS.output:
        write_json(FLAGS.output, {"machine": describe(os.cpu_count()), "configs": results})
        machine = "".join(f"- {key}: {value}\n" for key, value in describe(os.cpu_count()).items())
        title = "# Dry runs of all configs, on generated images\n\n"
        pathlib.Path(FLAGS.output).with_suffix(".md").write_text(f"{title}{machine}\n{text}\n")


def table(results):
    """Returns the runs as a Markdown table."""
    lines = [
        "| config | backbone's parameters | seconds per step | input alone, images/s | peak memory, MiB |",
        "|---|---|---|---|---|",
    ]
    for name, row in results.items():
        lines.append(
            f"| {name} | {row['backbone']:,.0f} | {row['next step']:.2f} | {row['images alone']:,.0f} "
            f"| {row['largest so far']:,.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    app.run(main)
