r"""This package's exact search and ScaNN against faiss-cpu and scikit-learn: time, memory, recall.

    python benchmarks/retrieval.py --output=benchmarks/results/retrieval.json

Searches clustered unit rows of the size of Stanford Online Products' test set (60,502 images of 11,316 classes, 128 and
512 dimensions), and a million rows of 50,000 clusters. All rows are queries, or 4,000 of the million. The programs take
turns in one process with the same number of threads. The first turn is not counted. Memory is the peak of a separate
run, besides the rows. `--part` chooses parts: search, large, metrics. Writes the JSON and a table (.md) of the same
name.
"""

import json
import os
import pathlib
import subprocess
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_CPP_MIN_VLOG_LEVEL", "0")

import faiss
import numpy as np
from absl import app, flags
from machine import describe, peak, set_threads
from tqdm import tqdm

from s2sd_tf import evaluation
from s2sd_tf.evaluation.clustering import cluster_agreement
from s2sd_tf.files import read_json, write_json

FLAGS = flags.FLAGS
flags.DEFINE_list("part", ["search", "large", "metrics"], "Parts to run.")
flags.DEFINE_integer("threads", 2, "Threads of every program.")
flags.DEFINE_integer("turns", 3, "Turns that are counted.", lower_bound=1)
flags.DEFINE_integer("size", 60_502, "Rows of the smaller set.")
flags.DEFINE_integer("large_size", 1_000_000, "Rows of the larger set.")
flags.DEFINE_integer("large_queries", 4_000, "Queries of the larger set.")
flags.DEFINE_float("noise", 0.6, "Standard deviation around the centres in every dimension; theirs is 1.")
flags.DEFINE_string("output", None, "JSON file to write after every part; the table gets the same name.")
flags.DEFINE_string("memory_of", None, "Internal: run PATH:PROGRAM alone and print its peak memory.")

K = 11
# These take one turn only.
SLOW = ("scikit-learn brute",)


def rows_of(size, dim, classes, seed=0):
    """Returns `(rows, labels)`: unit rows around class centres."""
    generator = np.random.default_rng(seed)
    centres = generator.standard_normal((classes, dim), dtype=np.float32)
    labels = generator.integers(0, classes, size)
    rows = centres[labels] + FLAGS.noise * generator.standard_normal((size, dim), dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True), labels


def programs(rows, queries):
    """Returns a dict from name to a function that returns the neighbours' indices, `(queries, K)`."""

    def ours():
        return evaluation.find_neighbors(queries, rows, K).indices

    def faiss_flat():
        index = faiss.IndexFlatIP(rows.shape[1])
        index.add(rows)
        return index.search(queries, K)[1]

    def scikit_learn():
        from sklearn.neighbors import NearestNeighbors

        search = NearestNeighbors(n_neighbors=K, algorithm="brute", n_jobs=FLAGS.threads).fit(rows)
        return search.kneighbors(queries, return_distance=False)

    def scann_brute_force():
        import scann

        searcher = scann.scann_ops_pybind.builder(rows, K, "dot_product").score_brute_force().build()
        return searcher.search_batched_parallel(queries)[0]

    return {
        "s2sd_tf exact": ours,
        "faiss-cpu IndexFlatIP": faiss_flat,
        "ScaNN brute force": scann_brute_force,
        "scikit-learn brute": scikit_learn,
    }


def compare(rows, queries, without=()):
    """Times the exact programs and tuned ScaNN. Returns each one's seconds per turn and agreement with faiss."""
    runs = {name: run for name, run in programs(rows, queries).items() if name not in without}
    start = time.perf_counter()
    index = evaluation.build_index(rows, recall=0.99, k=K)
    build = time.perf_counter() - start
    runs["s2sd_tf ScaNN, tuned to 0.99"] = lambda: index.search(queries, K).indices
    times, found = {name: [] for name in runs}, {}
    for turn in tqdm(range(FLAGS.turns + 1), desc=f"{len(queries)} of {rows.shape}"):
        for name, run in runs.items():
            if name in SLOW and turn != 1:
                continue
            # The previous one's threads may still be spinning.
            time.sleep(0.2)
            start = time.perf_counter()
            found[name] = run()
            if turn:
                times[name].append(time.perf_counter() - start)
    truth = found["faiss-cpu IndexFlatIP"]
    best = np.einsum("ij,ij->i", queries, rows[truth[:, 1]])
    results = {}
    for name, indices in found.items():
        indices = np.asarray(indices, np.int64)
        # The nearest row besides the query itself; an equally near one counts too.
        nearest = np.einsum("ij,ij->i", queries, rows[indices[:, 1]])
        results[name] = {
            "seconds": times[name],
            "nearest": float(np.mean(nearest >= best - 1e-6)),
            "recall": float(np.mean([len(set(a) & set(b)) / K for a, b in zip(indices.tolist(), truth.tolist())])),
        }
    results["s2sd_tf ScaNN, tuned to 0.99"].update(build_seconds=build, settings=index.settings, tuned=index.tuned)
    return results


def search_part():
    found = {}
    for dim in (128, 512):
        rows, _ = rows_of(FLAGS.size, dim, 11_316)
        found[f"{FLAGS.size:,} x {dim}"] = compare(rows, rows)
        add_memory(found[f"{FLAGS.size:,} x {dim}"], rows)
    return found


def large_part():
    rows, _ = rows_of(FLAGS.large_size, 128, 50_000)
    # scikit-learn would take minutes.
    found = compare(rows, rows[: FLAGS.large_queries], without=("scikit-learn brute",))
    return {f"{FLAGS.large_queries:,} of {FLAGS.large_size:,} x 128": found}


def add_memory(results, rows):
    """Adds each program's peak memory in a separate process, in MiB besides the rows."""
    path = f"/tmp/retrieval_{os.getpid()}.npy"
    np.save(path, rows)
    try:
        for name, result in results.items():
            if "tuned" not in result and name not in SLOW:
                arguments = [f"--memory_of={path}:{name}", f"--threads={FLAGS.threads}"]
                done = subprocess.run(
                    [sys.executable, __file__, *arguments], capture_output=True, text=True, check=True
                )
                result["mib"] = json.loads(done.stdout.splitlines()[-1])
    finally:
        os.remove(path)


def print_memory():
    path, name = FLAGS.memory_of.split(":")
    rows = np.load(path)
    run = programs(rows, rows)[name]
    programs(rows[:500], rows[:500])[name]()
    before = peak()
    run()
    print(json.dumps(peak() - before))


def metrics_part():
    """Times all metrics against the same ones computed with faiss, NumPy and scikit-learn."""
    rows, labels = rows_of(FLAGS.size, 128, 11_316)
    noisy = rows + 2.0 * FLAGS.noise * rows_of(FLAGS.size, 128, 1, seed=1)[0]
    rows = (noisy / np.linalg.norm(noisy, axis=1, keepdims=True)).astype(np.float32)
    ks, depth = (1, 10, 100, 1000), 1000
    generator = np.random.default_rng(0)
    clusters = np.where(generator.random(len(labels)) < 0.5, labels, generator.integers(0, 11_316, len(labels)))

    def ours():
        result = evaluation.evaluate_retrieval(rows, labels, ks=ks, precision_ks=(1, 10), map_ks=(depth,))
        result.confidence_intervals()
        result.per_class()
        return {
            **result.means(),
            **cluster_agreement(labels, clusters),
            **evaluation.embedding_geometry(rows, labels),
        }

    def by_faiss():
        index = faiss.IndexFlatIP(rows.shape[1])
        index.add(rows)
        relevant = np.bincount(labels)[labels] - 1
        sums = {}
        for start in range(0, len(rows), 1000):
            part = slice(start, start + 1000)
            found = index.search(rows[part], depth + 1)[1]
            # Drop the row itself, which need not come first if others are equal to it.
            own = found == np.arange(len(rows))[part, None]
            own[~own.any(axis=1), -1] = True
            found = found[~own].reshape(-1, depth)
            hits = labels[found] == labels[part, None]
            r = relevant[part]
            precision = np.cumsum(hits, axis=1) / np.arange(1, depth + 1) * hits
            in_r = np.arange(depth)[None] < r[:, None]
            values = {f"recall@{k}": hits[:, :k].any(axis=1) for k in ks}
            values.update({f"precision@{k}": hits[:, :k].mean(axis=1) for k in (1, 10)})
            values["r_precision"] = (hits & in_r).sum(axis=1) / np.maximum(r, 1)
            values["map@r"] = (precision * in_r).sum(axis=1) / np.maximum(r, 1)
            values[f"map@{depth}"] = precision.sum(axis=1) / np.maximum(np.minimum(r, depth), 1)
            # Only within the searched depth.
            values["mrr"] = np.where(hits.any(axis=1), 1 / (1 + np.argmax(hits, axis=1)), 0)
            for name, value in values.items():
                sums[name] = sums.get(name, 0) + value[r > 0].sum()
        means = {name: float(total / np.sum(relevant > 0)) for name, total in sums.items()}
        return {**means, **cluster_agreement(labels, clusters), **evaluation.embedding_geometry(rows, labels)}

    results, runs = {}, {"s2sd_tf": ours, "faiss": by_faiss}
    before = peak()
    for name, run in runs.items():
        start = time.perf_counter()
        found = run()
        results[name] = {"seconds": time.perf_counter() - start, "peak_mib": peak(), "before_mib": before}
        results[name]["metrics"] = {key: found[key] for key in found if isinstance(found[key], float)}
        print(name, results[name], flush=True)
    start = time.perf_counter()
    evaluation.clustering_metrics(rows, labels)
    results["kmeans_and_agreement_seconds"] = time.perf_counter() - start
    return results


def table(results):
    lines = ["# Retrieval: time, memory and recall", ""]
    lines += [f"- {key}: {value}" for key, value in results["machine"].items()]
    lines += [f"- the {K} nearest of every row, including itself; clustered rows, noise {results['noise']}", ""]
    for title, found in {**results.get("search", {}), **results.get("large", {})}.items():
        base = np.median(found["faiss-cpu IndexFlatIP"]["seconds"])
        exact = np.median(found["s2sd_tf exact"]["seconds"])
        lines += [f"## {title}", ""]
        lines += ["| program | seconds (range) | faiss / it | exact / it | nearest | recall | MiB |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for name, row in found.items():
            seconds = np.median(row["seconds"])
            cells = [
                f"{seconds:.3g} ({min(row['seconds']):.3g}-{max(row['seconds']):.3g})",
                f"{base / seconds:.2f}",
                f"{exact / seconds:.2f}",
                f"{row['nearest']:.4f}",
                f"{row['recall']:.4f}",
                f"{row['mib']:.0f}" if "mib" in row else "",
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        tuned = found["s2sd_tf ScaNN, tuned to 0.99"]
        lines += ["", f"ScaNN: {tuned['settings']}, built and tuned in {tuned['build_seconds']:.1f} s.", ""]
    if "metrics" in results:
        found = results["metrics"]
        lines += ["## All metrics at the size of Stanford Online Products' test set", ""]
        lines += ["Without k-means: both sides get the same given clustering.", "", "| | s2sd_tf | faiss and NumPy |"]
        lines += ["|---|---|---|"]
        ours, theirs = found["s2sd_tf"], found["faiss"]
        lines.append(f"| seconds | {ours['seconds']:.1f} | {theirs['seconds']:.1f} |")
        lines.append(f"| peak of the process with `--part=metrics` alone, MiB | {ours['peak_mib']:.0f} | |")
        for name, value in ours["metrics"].items():
            lines.append(f"| {name} | {value:.6f} | {theirs['metrics'][name]:.6f} |")
        lines += ["", f"k-means and its metrics: {found['kmeans_and_agreement_seconds']:.0f} s."]
    return "\n".join(lines) + "\n"


def main(_):
    set_threads(FLAGS.threads)
    faiss.omp_set_num_threads(FLAGS.threads)
    if FLAGS.memory_of:
        print_memory()
        return
    results = read_json(FLAGS.output) if FLAGS.output and os.path.exists(FLAGS.output) else {}
    results.update(machine={**describe(FLAGS.threads), "faiss": faiss.__version__}, noise=FLAGS.noise)
    for part in FLAGS.part:
        results[part] = {"search": search_part, "large": large_part, "metrics": metrics_part}[part]()
        if FLAGS.output:
            write_json(FLAGS.output, results)
            pathlib.Path(FLAGS.output).with_suffix(".md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    app.run(main)
