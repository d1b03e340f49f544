r"""Thresholds, post-processing and audit of real embeddings: emoji and Omniglot.

    python benchmarks/decisions.py --data_dir=<folder with emoji64.zip> --workdir=runs/decisions

Trains one model of `emoji_s2sd.py` with S2SD (64 dimensions) and one of `configs/omniglot.py` (16), both without the
held-out training classes. Thresholds are chosen on the held-out classes for a false accept rate and applied to the test
classes. Post-processing is `s2sd-evaluate --postprocess` on the test classes, searched among themselves, and with every
second image of each class as the gallery.

The audit is of image files: 5,000 emoji of unseen classes, among them 50 copies of others, 30 copies of a gallery's
images and 40 in the wrong class; half of the copies are the same file, the others are smaller JPEGs. Writes
`decisions.json` and `.md` into `--results`, and the audit's page into `--workdir`.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import csv
import pathlib
import shutil
import subprocess
import sys
import time

import emoji_s2sd
import numpy as np
from absl import app, flags
from omniglot_runs import arguments
from PIL import Image

from s2sd_tf import evaluation
from s2sd_tf.files import read_json, replacing, write_json
from s2sd_tf.training import load_run
from s2sd_tf.training.compare import run_all
from s2sd_tf.training.datasets import load_data
from s2sd_tf.training.embedding import embed

FLAGS = flags.FLAGS

FARS = (1e-1, 1e-2, 1e-3)
AMONG = ("whiten", "expand", "rerank")
WITH_GALLERY = ("whiten", "augment", "expand", "augment+expand", "rerank")
IMAGES, COPIES, LEAKS, WRONG = 5000, 50, 30, 40


def main(_):
    archive, images = os.path.join(FLAGS.data_dir, "emoji64.zip"), os.path.join(FLAGS.workdir, "images")
    lists = emoji_s2sd.prepare(archive, images)
    runs = {
        "emoji": [
            f"--config={emoji_s2sd.CONFIG}:msdfa",
            *emoji_s2sd.CHOSEN.split(),
            f"--config.data.validation_classes={emoji_s2sd.HELD_OUT}",
            "--config.train.threads=1",
            *lists,
        ],
        "Omniglot": [*arguments("", 16, "s2sd", 0), "--config.data.validation_classes=28", "--config.train.epochs=30"],
    }
    workdirs = {name: os.path.join(FLAGS.workdir, name) for name in runs}
    trained = run_all({workdirs[name]: given for name, given in runs.items()}, FLAGS.jobs)
    results = {"versions": trained[workdirs["emoji"]]["versions"], "thresholds": {}, "postprocessing": {}}
    for name, workdir in workdirs.items():
        parts = embedded(workdir)
        results["thresholds"][name] = thresholds(parts["validation"], parts["test"])
        results["postprocessing"][name] = postprocessing(workdir, parts)
    results["audit"] = audit(workdirs["emoji"], images)
    write_json(os.path.join(FLAGS.results, "decisions.json"), results)
    text = table(results)
    with replacing(os.path.join(FLAGS.results, "decisions.md")) as path:
        pathlib.Path(path).write_text(text)
    print(text)


def embedded(workdir):
    """Embeddings and labels of a run's parts; also written to .npz files in `workdir`."""
    model, config, preprocessing = load_run(workdir)
    data = load_data(config)
    found = {}
    for name in ("train", "validation", "test"):
        part = getattr(data, name)
        found[name] = embed(model, part, preprocessing), np.asarray(part.labels)
        save(workdir, name, *found[name])
    return found


def save(workdir, name, rows, labels):
    np.savez(os.path.join(workdir, f"{name}.npz"), embeddings=rows, labels=labels)


def thresholds(validation, test):
    """FAR and TAR on test classes of thresholds chosen on validation classes for a FAR, with 95% intervals.

    Both intervals of the FAR draw classes with replacement: of the test classes, and of the validation classes, at the
    same threshold.
    """
    chosen, there = evaluation.verification_metrics(*validation), evaluation.verification_metrics(*test)
    found = []
    for far in FARS:
        threshold = chosen.threshold(far=far)
        at = np.searchsorted(-there.thresholds, -threshold, "right") - 1
        found.append(
            {
                "stated": far,
                "threshold": threshold,
                "far": float(there.far[at]),
                "far_interval": far_interval(*test, threshold),
                "validation_interval": far_interval(*validation, threshold),
                "tar": float(there.tar[at]),
            }
        )
    return {"chosen": found, "metrics": there.values, "intervals": there.confidence_intervals()}


def far_interval(rows, labels, threshold, resamples=1000):
    """The 95% bootstrap interval of the false accept rate at a threshold, which draws classes with replacement."""
    order = np.argsort(labels, kind="stable")
    rows, labels = rows[order].astype(np.float64), labels[order]
    starts = np.flatnonzero(np.r_[True, np.diff(labels) > 0])
    sizes = np.diff(np.r_[starts, len(labels)])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    accepted = np.stack(
        [
            np.add.reduceat(np.sum(rows[start : start + size] @ rows.T >= threshold, axis=0), starts)
            for start, size in zip(starts.tolist(), sizes.tolist())
        ]
    )
    pairs = np.outer(sizes, sizes)
    for counts in (accepted, pairs):
        np.fill_diagonal(counts, 0)
    generator = np.random.default_rng(0)
    rates = []
    for _ in range(resamples):
        times = np.bincount(generator.integers(0, len(sizes), len(sizes)), minlength=len(sizes))
        rates.append((times @ accepted @ times) / (times @ pairs @ times))
    return [float(value) for value in np.quantile(rates, (0.025, 0.975))]


def postprocessing(workdir, parts):
    """Recall@1 and MAP@R of plain search and after each step."""
    rows, labels = parts["test"]
    # Every second image of each class is in the gallery.
    order = np.argsort(labels, kind="stable")
    in_class = np.arange(len(labels)) - np.searchsorted(labels[order], labels[order])
    for name, which in (("queries", in_class % 2 == 0), ("gallery", in_class % 2 == 1)):
        save(workdir, name, rows[order[which]], labels[order[which]])
    return {
        "among themselves": evaluated(workdir, "test", AMONG),
        "with a gallery": evaluated(workdir, "queries", WITH_GALLERY, f"--gallery_embeddings={workdir}/gallery.npz"),
    }


def evaluated(workdir, name, steps, *more):
    output = os.path.join(workdir, f"{name}.json")
    run(
        "evaluate",
        f"--embeddings={workdir}/{name}.npz",
        f"--training_embeddings={workdir}/train.npz",
        f"--postprocess={','.join(steps)}",
        f"--output={output}",
        "--methods=exact",
        "--noclustering",
        "--noverification",
        *more,
    )
    found = read_json(output)
    return {
        step: {metric: found[f"exact, {step}" if step else "exact"][metric] for metric in ("recall@1", "map@r")}
        for step in ("", *steps)
    }


def run(program, *arguments):
    subprocess.run([sys.executable, "-m", f"s2sd_tf.cli.{program}", *arguments], check=True, stdout=subprocess.DEVNULL)


def audit(workdir, images):
    """Plants faults among image files, embeds and audits them; returns what was found of each kind."""
    folder = os.path.join(FLAGS.workdir, "audit")
    shutil.rmtree(folder, ignore_errors=True)
    audited, gallery = os.path.join(folder, "images"), os.path.join(folder, "gallery")
    planted = plant(images, audited, gallery)
    run("export", f"--workdir={workdir}", f"--output={folder}/encoder")
    for name in ("images", "gallery"):
        run("embed", f"--encoder={folder}/encoder", f"--images={folder}/{name}", f"--output={folder}/{name}_rows")
    start = time.perf_counter()
    run(
        "audit",
        f"--embeddings={folder}/images_rows",
        f"--images={audited}",
        f"--gallery_embeddings={folder}/gallery_rows",
        f"--gallery_images={gallery}",
        f"--output={folder}/audit",
    )
    seconds = time.perf_counter() - start
    found = {
        "duplicates": {frozenset((row["image"], row["other"])) for row in listed(folder, "duplicates")},
        "leaks": {(row["image"], row["other"]) for row in listed(folder, "leaks")},
        "label_errors": {(row["image"], row["suggested_label"]) for row in listed(folder, "label_errors")},
    }
    # A pair of two designs of one emoji that are nearly one picture is a near duplicate too, planted or not.
    return {
        "seconds": seconds,
        "found": {
            kind: {
                "planted": len(planted[kind]),
                "found": len(planted[kind] & found[kind]),
                "others": len(found[kind] - planted[kind]),
            }
            for kind in found
        },
    }


def listed(folder, name):
    with open(os.path.join(folder, "audit", f"{name}.csv"), newline="") as file:
        return list(csv.DictReader(file))


def plant(images, audited, gallery):
    """Writes the two folders; returns the planted pairs, and the moved images with their right labels, by their ids."""
    generator = np.random.default_rng(0)
    names = pathlib.Path(images, "test.txt").read_text().splitlines()
    by_class = {}
    for line in names:
        name, label = line.rsplit(" ", 1)
        by_class.setdefault(label, []).append(name)
    classes = [sorted(by_class)[i] for i in generator.permutation(len(by_class))]
    kept, others = [], []
    for label in classes:
        (kept if len(kept) + len(by_class[label]) <= IMAGES - COPIES - LEAKS else others).extend(by_class[label])
    labels = sorted({name.split("/")[0] for name in kept})
    chosen = generator.permutation(len(kept))
    moved = [kept[i] for i in chosen[:WRONG]]
    copied = [kept[i] for i in chosen[WRONG : WRONG + COPIES]]
    leaked = [others[i] for i in generator.permutation(len(others))[:LEAKS]]
    planted = {"duplicates": set(), "leaks": set(), "label_errors": set()}
    for name in others:
        copy(os.path.join(images, name), gallery, name)
    for name in kept:
        label, file = name.split("/")
        if name in set(moved):
            wrong = labels[(labels.index(label) + generator.integers(1, len(labels))) % len(labels)]
            name = f"{wrong}/moved_{label}_{file}"
            planted["label_errors"].add((name, label))
        copy(os.path.join(images, f"{label}/{file}"), audited, name)
    for number, name in enumerate(copied):
        label, file = name.split("/")
        other = copy(os.path.join(images, name), audited, f"{label}/copy_{file}", smaller=number % 2 == 1)
        planted["duplicates"].add(frozenset((name, other)))
    for number, name in enumerate(leaked):
        label, file = name.split("/")
        other = copy(os.path.join(images, name), audited, f"{label}/leak_{file}", smaller=number % 2 == 1)
        planted["leaks"].add((other, name))
    return planted


def copy(path, folder, name, smaller=False):
    """Copies an image, or writes it as a JPEG of 56 pixels; returns its name."""
    target = pathlib.Path(folder, name)
    target.parent.mkdir(parents=True, exist_ok=True)
    if not smaller:
        shutil.copy(path, target)
        return name
    with Image.open(path) as image:
        image.convert("RGB").resize((56, 56), Image.Resampling.BICUBIC).save(target.with_suffix(".jpg"), quality=85)
    return str(pathlib.PurePosixPath(name).with_suffix(".jpg"))


def table(results):
    lines = ["# Thresholds, post-processing and audit", ""]
    lines += [f"- {name}: {version}" for name, version in results["versions"].items()]
    lines += ["", "## Thresholds chosen on held-out classes for a false accept rate, on the test classes", ""]
    lines += ["| data | stated FAR | threshold | FAR | its interval | interval of the held-out classes | TAR |"]
    lines += ["|---" * 7 + "|"]
    for name, found in results["thresholds"].items():
        for row in found["chosen"]:
            intervals = [f"{low:.2g} to {high:.2g}" for low, high in (row["far_interval"], row["validation_interval"])]
            cells = [f"{row['stated']:g}", f"{row['threshold']:.3f}", f"{row['far']:.2g}", *intervals]
            lines.append(f"| {name} | {' | '.join(cells)} | {100 * row['tar']:.1f}% |")
    lines += ["", "## Post-processing, recall@1 and MAP@R in percent", ""]
    lines += ["| data | search | after | recall@1 | MAP@R | change |", "|---" * 6 + "|"]
    for name, ways in results["postprocessing"].items():
        for way, steps in ways.items():
            plain = steps[""]
            for step, row in steps.items():
                change = [f"{100 * (row[metric] - plain[metric]):+.1f}" for metric in row] if step else []
                cells = [step or "nothing", *(f"{100 * value:.1f}" for value in row.values()), ", ".join(change)]
                lines.append(f"| {name} | {way} | {' | '.join(cells)} |")
    audited = results["audit"]
    lines += ["", f"## Audit of {IMAGES:,} emoji of unseen classes with planted faults", ""]
    lines += ["| | planted | found of these | others found |", "|---" * 4 + "|"]
    for kind, row in audited["found"].items():
        cells = [str(row[column]) for column in ("planted", "found", "others")]
        lines.append(f"| {kind.replace('_', ' ')} | {' | '.join(cells)} |")
    lines += ["", f"`s2sd-audit` with its page took {audited['seconds']:.0f} s."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    app.run(main)
