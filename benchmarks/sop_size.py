r"""The size of Stanford Online Products: start-up, input, samplers, evaluation, all pairs, audit, and memory.

    python benchmarks/sop_size.py --output=benchmarks/results/sop_size.json

Makes the archive's layout, 59,551 training images of 11,318 classes and 60,502 test images of 11,316, out of 64
generated JPEGs of 500 x 375 pixels under many names. Every part runs in a process of its own, with the whole size and
with a quarter of the classes; a part whose time grows with the square would take 16 times as long. Writes the JSON and
a table (.md) of the same name.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from absl import app, flags

FLAGS = flags.FLAGS
flags.DEFINE_string("output", None, "JSON file to write; the table gets the same name.")
flags.DEFINE_integer("batches", 60, "Batches of the input to time, after the first.")
flags.DEFINE_integer("threads", 2, "Threads.")
flags.DEFINE_string("root", None, "Internal: folder of the images.")
flags.DEFINE_string("part", None, "Internal: run one part and print its result.")

COUNTS = {"train": (59_551, 11_318), "test": (60_502, 11_316)}
SAMPLERS = ("random", "class_balanced", "greedy_coreset", "d2_coreset", "distance_matching", "fid_matching")
DIM, SIZE, BATCH = 128, 224, 112
BALANCED = {"classes_per_batch": 56, "samples_per_class": 2}


def make(root, divisor):
    """Writes the layout, with a part of the classes and images."""
    from photos import generate

    sources = os.path.join(root, "sources")
    os.makedirs(sources)
    generate(sources)
    files = sorted(pathlib.Path(sources).iterdir())
    generator, first = np.random.default_rng(0), 1
    for part, (images, classes) in COUNTS.items():
        images, classes = images // divisor, classes // divisor
        # At least two images a class, the others anywhere.
        labels = np.sort(
            np.r_[np.arange(classes), np.arange(classes), generator.integers(0, classes, images - 2 * classes)]
        )
        lines = ["image_id class_id super_class_id path"]
        for number, label in enumerate(labels.tolist()):
            folder = f"kind{label % 12}_final"
            name = f"{folder}/{part}_{label}_{number}.jpg"
            os.makedirs(os.path.join(root, folder), exist_ok=True)
            os.link(files[number % len(files)], os.path.join(root, name))
            lines.append(f"{number + 1} {first + label} {label % 12 + 1} {name}")
        pathlib.Path(root, f"Ebay_{part}.txt").write_text("\n".join(lines) + "\n")
        first += classes


def load(check="none"):
    from s2sd_tf import data

    return data.load_sop(FLAGS.root, check=check)


def startup():
    found = {}
    for check in ("none", "files"):
        start = time.perf_counter()
        split = load(check)
        found[f"load, check={check}"] = time.perf_counter() - start
    return {"seconds": found, "images": len(split.train)}


def inputs():
    """Seconds until the first batch of two epochs, and images per second."""
    from s2sd_tf import data
    from s2sd_tf.data.augmentation import preset

    train = load().train
    sampler = data.samplers.get("class_balanced", **BALANCED)
    augmentation = data.Augmentation(**preset("base"))
    batches = data.EpochBatches(train, data.Preprocessing(SIZE, SIZE), sampler, augmentation=augmentation)
    found = {}
    for epoch, name in enumerate(("first batch, first epoch", "first batch, next epoch")):
        start = time.perf_counter()
        epoch_batches = iter(batches(epoch))
        next(epoch_batches)
        found[name] = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(FLAGS.batches):
        next(epoch_batches)
    rate = FLAGS.batches * sampler.batch_size / (time.perf_counter() - start)
    return {"seconds": found, "images_per_second": rate, "steps": batches.steps}


def samplers():
    """Seconds of each sampler for the positions of a whole epoch, and of a refill of its storage."""
    from s2sd_tf import data

    labels = load().train.labels
    rows = np.random.default_rng(0).standard_normal((len(labels), DIM), dtype=np.float32)
    steps, found = len(labels) // BATCH, {}
    for name in SAMPLERS:
        sampler = data.samplers.get(name, **({"batch_size": BATCH} if name == "random" else BALANCED))
        start = time.perf_counter()
        if sampler.storage is not None:
            stored = sampler.images_to_store(labels, DIM, 0, 0)
            sampler.storage.refill(stored, DIM, np.array_split(rows[stored], 500))
        filled = time.perf_counter()
        drawn = sampler.epoch(labels, steps, 0, 0)
        found[name] = time.perf_counter() - filled
        if sampler.storage is not None:
            found[f"{name}, refill"] = filled - start
        assert drawn.shape == (steps, BATCH)
    return {"seconds": found, "steps": steps}


def clustered(labels):
    """Rows around a centre for each class."""
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((labels.max() + 1, DIM), dtype=np.float32)
    return centres[labels] + generator.standard_normal((len(labels), DIM), dtype=np.float32)


def evaluate():
    from s2sd_tf import evaluation

    labels = load().test.labels
    rows = clustered(labels)
    start = time.perf_counter()
    evaluation.evaluate_retrieval(rows, labels, ks=(1, 10, 100, 1000))
    return {"seconds": {"retrieval metrics of the test set": time.perf_counter() - start}}


def verify():
    from s2sd_tf import evaluation

    labels = load().test.labels
    rows = clustered(labels)
    start = time.perf_counter()
    found = evaluation.verification_metrics(rows, labels)
    measured = time.perf_counter()
    found.confidence_intervals()
    seconds = {"verification metrics of all pairs": measured - start, "their intervals": time.perf_counter() - measured}
    return {"seconds": seconds, "pairs": int(found.true_accepts[-1] + found.false_accepts[-1])}


def audited():
    from s2sd_tf import evaluation

    split = load()
    rows = clustered(np.concatenate([split.train.labels, split.test.labels]))
    train, test = np.split(rows, [len(split.train)])
    start = time.perf_counter()
    evaluation.audit(train, split.train.labels, test)
    return {"seconds": {"audit of the training set, with leaks": time.perf_counter() - start}}


PARTS = {
    "startup": startup,
    "inputs": inputs,
    "samplers": samplers,
    "evaluate": evaluate,
    "verify": verify,
    "audit": audited,
}


def run_part(root, name):
    command = [sys.executable, __file__, f"--root={root}", f"--part={name}", f"--batches={FLAGS.batches}"]
    done = subprocess.run([*command, f"--threads={FLAGS.threads}"], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(results):
    lines = ["# Data at the size of Stanford Online Products", ""]
    lines += [f"- {key}: {value}" for key, value in results["machine"].items()]
    whole, quarter = results["whole"], results["quarter"]
    lines += [
        f"- {whole['startup']['images']:,} training images; batches of 56 classes x 2, "
        f"{whole['samplers']['steps']:,} in an epoch; {DIM} dimensions",
        "",
        "| | seconds | with a quarter | ratio |",
        "|---|---|---|---|",
    ]
    for part in PARTS:
        for name, seconds in whole[part]["seconds"].items():
            less = quarter[part]["seconds"][name]
            title = f"an epoch's positions: {name}" if part == "samplers" else name
            lines.append(f"| {title} | {seconds:.2f} | {less:.2f} | {seconds / less:.1f} |")
    lines += ["", f"All pairs are {whole['verify']['pairs']:,}, with a quarter {quarter['verify']['pairs']:,}."]
    lines += ["", f"The input gives {whole['inputs']['images_per_second']:,.0f} images a second, with a quarter "]
    lines[-1] += f"{quarter['inputs']['images_per_second']:,.0f}. Peak memory of the processes in MiB: "
    lines[-1] += ", ".join(f"{part} {whole[part]['mib']:,.0f} ({quarter[part]['mib']:,.0f})" for part in PARTS) + "."
    return "\n".join(lines) + "\n"


def main(_):
    from machine import describe, peak, set_threads

    from s2sd_tf.files import write_json

    if FLAGS.part:
        set_threads(FLAGS.threads)
        result = PARTS[FLAGS.part]()
        print(json.dumps({**result, "mib": peak()}))
        return
    results = {"machine": describe(FLAGS.threads)}
    for name, divisor in (("quarter", 4), ("whole", 1)):
        with tempfile.TemporaryDirectory() as root:
            make(root, divisor)
            results[name] = {part: run_part(root, part) for part in PARTS}
    print(table(results))
    if FLAGS.output:
        write_json(FLAGS.output, results)
        pathlib.Path(FLAGS.output).with_suffix(".md").write_text(table(results))


if __name__ == "__main__":
    app.run(main)
