r"""Search in ten million rows on disk: exact in bounded memory, and by ScaNN, built from shards, saved and loaded.

    python benchmarks/ten_million.py --workdir=runs/ten_million --output=benchmarks/results/ten_million.json

Writes 16 shards of clustered unit rows, 10,000,000 x 128, as `s2sd-embed` does (5.1 GB; the index takes about as much
again), and searches the 10 nearest of 1,000 new rows. Every step is a process of its own. Memory is the most that the
process holds besides the files that it has mapped, which the system drops when it needs the room; and the most with
these. With `--beam`, embeds Omniglot's images by `s2sd-beam` with threads, with two worker processes, and on Dask where
it is installed, and compares what they write. Writes the JSON and a table (.md) of the same name.
"""

import itertools
import json
import os
import pathlib
import subprocess
import sys
import threading
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from absl import app, flags

FLAGS = flags.FLAGS
flags.DEFINE_integer("size", 10_000_000, "Rows.")
flags.DEFINE_integer("dim", 128, "Dimension.")
flags.DEFINE_integer("shards", 16, "Shards.")
flags.DEFINE_integer("queries", 1_000, "Queries.")
flags.DEFINE_integer("memory_mib", 1024, "Memory that exact search may take.")
flags.DEFINE_float("noise", 0.6, "Standard deviation around the centres in every dimension; theirs is 1.")
flags.DEFINE_string("workdir", "runs/ten_million", "Folder for the shards and the index.")
flags.DEFINE_bool("beam", True, "Compare Beam's runners.")
flags.DEFINE_string("output", None, "JSON file to write; the table gets the same name.")
flags.DEFINE_string("step", None, "Internal: run one step and print its result.")

K = 10
RUNNERS = {
    "DirectRunner, threads": [],
    "DirectRunner, two processes": ["--direct_running_mode=multi_processing", "--direct_num_workers=2"],
    "DaskRunner": ["--runner=apache_beam.runners.dask.dask_runner.DaskRunner"],
}


def clustered(size, seed):
    """Unit rows, `(size, dim)`, around 50 centres for every 1,000 rows of the whole set."""
    centres = np.random.default_rng(0).standard_normal((max(1, FLAGS.size // 20), FLAGS.dim), dtype=np.float32)
    generator = np.random.default_rng(seed)
    rows = centres[generator.integers(0, len(centres), size)]
    rows += np.float32(FLAGS.noise) * generator.standard_normal(rows.shape, dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def queries():
    return clustered(FLAGS.queries, 1_000_000)


def path(name):
    return os.path.join(FLAGS.workdir, name)


def write():
    from s2sd_tf.evaluation.embeddings import shard_name, write_shard

    bounds = np.linspace(0, FLAGS.size, FLAGS.shards + 1).astype(int)
    for shard, (start, end) in enumerate(itertools.pairwise(bounds)):
        ids = [f"{position:08d}.jpg" for position in range(start, end)]
        write_shard(os.path.join(path("shards"), shard_name(shard)), clustered(end - start, 1 + shard), ids)
    return {}


def exact():
    from s2sd_tf import evaluation

    rows = evaluation.read_embeddings(path("shards")).rows
    start = time.perf_counter()
    found = evaluation.find_neighbors(queries(), rows, K, memory_mib=FLAGS.memory_mib)
    seconds = time.perf_counter() - start
    np.save(path("exact.npy"), found.indices)
    return {"search_seconds": seconds}


def build():
    from s2sd_tf import evaluation

    embeddings = evaluation.read_embeddings(path("shards"))
    start = time.perf_counter()
    index = evaluation.build_index(embeddings.rows, embeddings.ids, method="scann", recall=0.99, k=K)
    built = time.perf_counter()
    index.save(path("index"))
    seconds = {"build_seconds": built - start, "save_seconds": time.perf_counter() - built}
    size = sum(file.stat().st_size for file in pathlib.Path(path("index")).rglob("*") if file.is_file())
    return {**seconds, "settings": index.settings, "tuned": index.tuned, "index_gib": size / 2**30}


def search():
    from s2sd_tf import evaluation

    start = time.perf_counter()
    index = evaluation.load_index(path("index"))
    loaded = time.perf_counter()
    index.search(queries()[:10], K)
    turns = []
    for _ in range(3):
        begin = time.perf_counter()
        found = index.search(queries(), K).indices
        turns.append(time.perf_counter() - begin)
    truth = np.load(path("exact.npy"))
    recall = np.mean([len(set(a) & set(b)) / K for a, b in zip(found.tolist(), truth.tolist())])
    nearest = float(np.mean(found[:, 0] == truth[:, 0]))
    return {
        "load_seconds": loaded - start,
        "search_seconds": float(np.median(turns)),
        "recall": float(recall),
        "nearest": nearest,
    }


def beam():
    """Seconds of each runner that is installed, and whether it writes the same."""
    import importlib.util

    import tensorflow as tf

    from s2sd_tf import data, evaluation, export

    keras = tf.keras
    layers = [keras.layers.Input((28, 28, 1)), keras.layers.Flatten(), keras.layers.Dense(16)]
    export.export_encoder(keras.Sequential(layers), data.Preprocessing(28, 28, 1), path("encoder"))
    _, images, _ = data.load_omniglot()
    for position, label in enumerate(images.labels.tolist()):
        folder = os.path.join(path("images"), f"{label:04d}")
        os.makedirs(folder, exist_ok=True)
        pathlib.Path(folder, f"{position}.png").write_bytes(images.images[position])
    results, first = {}, None
    for number, (name, options) in enumerate(RUNNERS.items()):
        if name == "DaskRunner" and not importlib.util.find_spec("distributed"):
            continue
        output = path(f"embedded{number}")
        program = [
            sys.executable,
            "-m",
            "s2sd_tf.cli.beam",
            f"--encoder={path('encoder')}",
            f"--images={path('images')}",
        ]
        more = [f"--output={output}", "--shards=4", "--method=exact", *(f"--beam={option}" for option in options)]
        start = time.perf_counter()
        subprocess.run([*program, *more], check=True, capture_output=True)
        seconds = time.perf_counter() - start
        found = evaluation.read_embeddings(output)
        rows = np.asarray(found.rows)
        first = first or (found.ids, rows)
        same = found.ids == first[0] and float(np.abs(rows - first[1]).max()) < 1e-5
        results[name] = {"seconds": seconds, "images": len(rows), "same": bool(same)}
    return results


STEPS = {"write": write, "exact": exact, "build": build, "search": search, "beam": beam}


class Memory:
    """The most memory that this process holds, sampled by a thread, in MiB: `own`, without mapped files, and `all`."""

    def __init__(self):
        self.own = self.all = 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self):
        while True:
            lines = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
            own, whole = (int(lines[name].split()[0]) / 1024 for name in ("RssAnon", "VmRSS"))
            self.own, self.all = max(self.own, own), max(self.all, whole)
            time.sleep(0.02)


def run_step(name):
    """Runs a step in a process of its own and returns its result, with its seconds and its memory."""
    start = time.perf_counter()
    given = [f"--{flag.name}={flag.value}" for flag in FLAGS.get_key_flags_for_module(__name__) if flag.present]
    command = [sys.executable, __file__, *given, f"--step={name}"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return {**json.loads(done.stdout.splitlines()[-1]), "seconds": time.perf_counter() - start}


def table(results):
    found = results["steps"]
    exact_, built, searched = found["exact"], found["build"], found["search"]
    lines = [f"# Search in {results['size']:,} x {results['dim']} on disk", ""]
    lines += [f"- {key}: {value}" for key, value in results["machine"].items()]
    lines += [f"- the {K} nearest of {results['queries']:,} queries; clustered rows, noise {results['noise']}", ""]
    lines += ["| | seconds | own memory, MiB | with mapped files, MiB |", "|---|---|---|---|"]
    for title, seconds, step in (
        ("write the shards", found["write"]["seconds"], found["write"]),
        ("exact search of the shards", exact_["search_seconds"], exact_),
        ("build ScaNN from the shards and tune it to 0.99", built["build_seconds"], built),
        ("save it", built["save_seconds"], {}),
        ("load it, in a new process", searched["load_seconds"], searched),
        ("search it", searched["search_seconds"], {}),
    ):
        memory = (f"{step['own_mib']:,.0f} | {step['all_mib']:,.0f}") if step else " | "
        lines.append(f"| {title} | {seconds:,.1f} | {memory} |")
    times = exact_["search_seconds"] / searched["search_seconds"]
    lines += [
        "",
        f"Exact search got memory_mib={results['memory_mib']}. ScaNN: {built['settings']}, {built['index_gib']:.1f} "
        f"GiB on disk; recall {searched['recall']:.4f}, the nearest {searched['nearest']:.4f}; {times:,.0f} times as "
        "fast as exact search.",
    ]
    if "beam" in found:
        lines += ["", "| `s2sd-beam` | seconds | images | the same as with threads |", "|---|---|---|---|"]
        for name, row in found["beam"]["runners"].items():
            lines.append(f"| {name} | {row['seconds']:.1f} | {row['images']:,} | {'yes' if row['same'] else 'no'} |")
    return "\n".join(lines) + "\n"


def main(_):
    if FLAGS.step:
        memory = Memory()
        result = STEPS[FLAGS.step]()
        result = {"runners": result} if FLAGS.step == "beam" else result
        print(json.dumps({**result, "own_mib": memory.own, "all_mib": memory.all}))
        return
    from machine import describe

    from s2sd_tf.files import write_json

    results = {name: FLAGS[name].value for name in ("size", "dim", "queries", "noise", "memory_mib")}
    results = {**results, "machine": describe(os.cpu_count()), "steps": {}}
    for name in STEPS:
        if name != "beam" or FLAGS.beam:
            results["steps"][name] = run_step(name)
            print(name, results["steps"][name], flush=True)
    print(table(results))
    if FLAGS.output:
        write_json(FLAGS.output, results)
        pathlib.Path(FLAGS.output).with_suffix(".md").write_text(table(results))


if __name__ == "__main__":
    app.run(main)
