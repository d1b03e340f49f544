r"""Funnel search against exact search: recall, throughput and bytes, with prefixes in float32, int8, bits and by ScaNN.

    python benchmarks/funnel.py --output=benchmarks/results/funnel.json

The rows are those of `retrieval.py`, 50,000 centres with noise of 0.6, but dimension i is divided by i^0.75 before they
are normalised. So prefixes mean something: of 128 dimensions, the first 16 have 87% of the variance, the first 32 have
93%. Queries are drawn in the same way and are not in the gallery. Every funnel is tuned to a recall@k of 0.99. With
--embeddings, the rows are those of a nested model instead.

The search methods take turns in one process. The table has the time of the process (all threads) beside the time on the
clock, because other programs disturb it less. Writes the JSON and a table (.md) of the same name.
"""

import os
import pathlib
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from absl import app, flags
from machine import describe, set_threads

from s2sd_tf import evaluation
from s2sd_tf.files import write_json

FLAGS = flags.FLAGS
flags.DEFINE_integer("threads", 2, "Threads of TensorFlow.")
flags.DEFINE_integer("turns", 3, "Turns that are counted.", lower_bound=1)
flags.DEFINE_integer("size", 1_000_000, "Rows of the gallery.", lower_bound=1)
flags.DEFINE_integer("queries", 2048, "Queries.", lower_bound=1)
flags.DEFINE_list("funnels", ["16:float32", "32:float32", "32:int8", "128:bits", "32:scann"], "dim:codes.")
flags.DEFINE_integer("k", 10, "Neighbours to find, and to tune the recall for.", lower_bound=1)
flags.DEFINE_bool("scann", True, "Whether to time a ScaNN index of the whole embeddings.")
flags.DEFINE_string("embeddings", None, "File or folder with rows to divide into queries and gallery.")
flags.DEFINE_string("output", None, "JSON file to write; the table gets the same name.")

DIM, CLASSES, NOISE, DECAY, RECALL = 128, 50_000, 0.6, 0.75, 0.99


def main(_):
    set_threads(FLAGS.threads)
    if FLAGS.embeddings:
        rows = np.asarray(evaluation.read_embeddings(FLAGS.embeddings).rows[:], np.float32)
        rows = rows[np.random.default_rng(0).permutation(len(rows))]
    else:
        rows = rows_of(FLAGS.size + FLAGS.queries)
    queries, rows = rows[-FLAGS.queries :], rows[: -FLAGS.queries]
    indexes = {"exact": evaluation.build_index(rows, method="exact")}
    built = {"exact": 0.0}
    for name in FLAGS.funnels:
        dim, codes = name.split(":")
        built[name], indexes[name] = build(rows, method="funnel", dim=int(dim), codes=codes)
    if FLAGS.scann:
        built["ScaNN"], indexes["ScaNN"] = build(rows, method="scann")
    seconds = {name: [] for name in indexes}
    cpu_seconds = {name: [] for name in indexes}
    found = {}
    for turn in range(FLAGS.turns + 1):
        for name, index in indexes.items():
            wall, cpu = time.perf_counter(), time.process_time()
            found[name] = index.search(queries, FLAGS.k).indices
            if turn:
                seconds[name].append(time.perf_counter() - wall)
                cpu_seconds[name].append(time.process_time() - cpu)
    truth = found["exact"]
    results = {
        "machine": describe(FLAGS.threads),
        "size": len(rows),
        "dim": rows.shape[1],
        "queries": len(queries),
        "k": FLAGS.k,
        "methods": {
            name: {
                "seconds": seconds[name],
                "cpu_seconds": cpu_seconds[name],
                "agreement@1": float(np.mean(found[name][:, 0] == truth[:, 0])),
                f"recall@{FLAGS.k}": float(
                    np.mean([len(set(a) & set(b)) / FLAGS.k for a, b in zip(found[name], truth)])
                ),
                "bytes": getattr(getattr(index, "shortlist", None), "bytes_per_item", None),
                "build_seconds": built[name],
                "settings": getattr(index, "settings", {}),
                "tuned": getattr(index, "tuned", {}),
            }
            for name, index in indexes.items()
        },
    }
    text = table(results)
    print(text)
    if FLAGS.output:
        write_json(FLAGS.output, results)
        pathlib.Path(FLAGS.output).with_suffix(".md").write_text(text)


def rows_of(size, seed=0):
    """Returns unit rows around centres, with a variance that falls over the dimensions."""
    generator = np.random.default_rng(seed)
    centres = generator.standard_normal((CLASSES, DIM), dtype=np.float32)
    rows = centres[generator.integers(0, CLASSES, size)]
    rows += NOISE * generator.standard_normal((size, DIM), dtype=np.float32)
    rows /= np.arange(1, DIM + 1, dtype=np.float32) ** DECAY
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def build(rows, **settings):
    start = time.perf_counter()
    index = evaluation.build_index(rows, recall=RECALL, k=FLAGS.k, **settings)
    if settings["method"] == "funnel":
        index.shortlist  # noqa: B018 -- made now, not by the first search
    print(settings, index.settings, index.tuned, flush=True)
    return time.perf_counter() - start, index


def table(results):
    lines = ["# Funnel search", ""]
    lines += [f"- {key}: {value}" for key, value in results["machine"].items()]
    lines += [
        f"- the {results['k']} nearest of {results['queries']:,} queries among {results['size']:,} x {results['dim']}",
        "- medians; ratios are of times in the same turn",
        "",
        "| search | clusters searched | shortlist | bytes per item for it | agreement@1 | recall@10 | seconds | CPU "
        "seconds | exact / it | exact / it, CPU |",
        "|---" * 10 + "|",
    ]
    exact = results["methods"]["exact"]
    for name, row in results["methods"].items():
        ratios = [np.median(np.array(exact[key]) / np.array(row[key])) for key in ("seconds", "cpu_seconds")]
        title = name
        if ":" in name:
            dim, codes = name.split(":")
            title = f"funnel, {dim} dimensions, {codes}"
        settings = row["settings"]
        cells = [
            title,
            f"{settings['clusters_to_search']} of {settings['clusters']}" if "clusters" in settings else "",
            f"{settings['shortlist'] or 'exact'}" if "shortlist" in settings else "",
            f"{row['bytes']:.1f}" if row["bytes"] else "",
            f"{row['agreement@1']:.4f}",
            f"{row['recall@10']:.4f}",
            f"{np.median(row['seconds']):.3g}",
            f"{np.median(row['cpu_seconds']):.3g}",
            *(f"{ratio:.2f}" for ratio in ratios),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    app.run(main)
