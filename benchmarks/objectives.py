r"""Times loss and gradients of every objective against pytorch-metric-learning.

    pip install torch pytorch-metric-learning
    python benchmarks/objectives.py --output=benchmarks/results/objectives.json

Embeddings have 128 dimensions in float32, with 4 images per class; proxy objectives have 100 and 10,000 classes. The
objectives of this package run in a `tf.function`, as in `fit`; pytorch-metric-learning runs eagerly, as usual. Both do
the same work, all pairs or triplets of the batch, except where `counterparts` says otherwise. They take turns in one
process, with the same number of threads. Writes the JSON and a table (.md) of the same name.
"""

import os
import pathlib
import resource
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from absl import app, flags
from machine import describe, set_threads, torch
from tqdm import tqdm

from s2sd_tf import objectives
from s2sd_tf.files import write_json

FLAGS = flags.FLAGS
flags.DEFINE_list("batches", ["112", "1024"], "Batch sizes.")
flags.DEFINE_list("classes", ["100", "10000"], "Numbers of classes for proxy objectives.")
flags.DEFINE_list("only", [], "Names of objectives; default: all.")
flags.DEFINE_integer("dim", 128, "Dimension of the embeddings.")
flags.DEFINE_integer("threads", 2, "Threads of both libraries.")
flags.DEFINE_float("seconds", 2.0, "Minimum time to measure an objective, with at least 5 turns.")
flags.DEFINE_float("memory_gib", 10.0, "Memory that either may take on top of what the process has at the start.")
flags.DEFINE_string("output", None, "JSON file to write; the table gets the same name.")

# Settings with which our objectives take all pairs or triplets, if that is not the default.
SETTINGS = {
    "angular": {"miner": "all"},
    "contrastive": {"miner": "all"},
    "margin": {"miner": "all"},
    "n_pair": {},
    "proxy_nca": {"own_class_in_sum": True},
    "snr": {"miner": "all"},
    "triplet": {"miner": "all"},
}

# Theirs compares every positive with every negative pair of a batch, which takes minutes at 1,024 images.
LARGEST_BATCH = {"histogram": 512}


def counterparts():
    """A dict from our name to a function `(num_classes, dim)` that makes pytorch-metric-learning's objective."""
    from pytorch_metric_learning import distances, losses, miners

    def proxies(cls, **settings):
        return lambda classes, dim: cls(num_classes=classes, embedding_size=dim, **settings)

    def plain(cls, **settings):
        return lambda classes, dim: cls(**settings)

    def multi_similarity(classes, dim):
        loss, miner = losses.MultiSimilarityLoss(alpha=2, beta=40, base=0.5), miners.MultiSimilarityMiner(epsilon=0.1)
        return _Mined(loss, miner)

    squared = distances.LpDistance(power=2)
    return {
        # Its angular loss alone; ours adds an N-pair loss, as in the paper.
        "angular": plain(losses.AngularLoss, alpha=45),
        "arcface": proxies(losses.ArcFaceLoss, margin=28.6, scale=16),
        "circle": plain(losses.CircleLoss),
        "contrastive": plain(losses.ContrastiveLoss),
        "cosface": proxies(losses.CosFaceLoss),
        "fast_ap": plain(losses.FastAPLoss),
        "generalized_lifted": plain(losses.GeneralizedLiftedStructureLoss),
        "histogram": plain(losses.HistogramLoss, n_bins=65),
        "lifted_structure": plain(losses.LiftedStructureLoss),
        "margin": lambda classes, dim: losses.MarginLoss(beta=1.2, learn_beta=True, num_classes=classes),
        "multi_similarity": multi_similarity,
        # One pair per class, like ours.
        "n_pair": plain(losses.NPairsLoss),
        "normalized_softmax": proxies(losses.NormalizedSoftmaxLoss),
        "nt_xent": plain(losses.NTXentLoss),
        "proxy_anchor": proxies(losses.ProxyAnchorLoss),
        "proxy_nca": proxies(losses.ProxyNCALoss),
        "snr": plain(losses.TripletMarginLoss, margin=0.2, distance=distances.SNRDistance()),
        "soft_triple": proxies(losses.SoftTripleLoss, centers_per_class=2),
        "supcon": plain(losses.SupConLoss),
        "triplet": plain(losses.TripletMarginLoss, margin=0.2, distance=squared),
    }


class _Mined:
    def __init__(self, loss, miner):
        self.loss, self.miner = loss, miner

    def __call__(self, embeddings, labels):
        return self.loss(embeddings, labels, self.miner(embeddings, labels))

    def parameters(self):
        return self.loss.parameters()


def main(_):
    set_threads(FLAGS.threads)
    limit_memory(FLAGS.memory_gib)
    try:
        theirs = counterparts() if torch() else {}
    except ImportError:
        theirs = {}
    names = FLAGS.only or [name for kind in ("pair", "tuple", "proxy") for name in objectives.names(kind)]
    rows = []
    for batch in map(int, FLAGS.batches):
        for name in tqdm(names, desc=f"batch {batch}"):
            proxy = objectives.lookup(name).kind == "proxy"
            for classes in map(int, FLAGS.classes if proxy else FLAGS.classes[:1]):
                make_theirs = theirs.get(name) if batch <= LARGEST_BATCH.get(name, batch) else None
                times = measure(name, batch, classes, make_theirs)
                row = {"objective": name, "batch": batch, "classes": classes if proxy else None}
                for who, found in times.items():
                    row[who] = np.percentile(found, [25, 50, 75]).tolist() if found else None
                rows.append(row)
    results = {"machine": describe(FLAGS.threads), "dim": FLAGS.dim, "time_ms": rows}
    text = table(results)
    print(text)
    if FLAGS.output:
        write_json(FLAGS.output, results)
        pathlib.Path(FLAGS.output).with_suffix(".md").write_text(text)


def limit_memory(gib):
    """Makes allocations beyond the limit fail, so that running out of memory is reported and nothing is killed."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + int(gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def measure(name, batch, classes, make_theirs):
    """Milliseconds of each turn, a list per implementation; None if it runs out of memory."""
    random = np.random.default_rng(0)
    rows = random.standard_normal((batch, FLAGS.dim), dtype=np.float32)
    labels = np.repeat(np.arange(batch // 4), 4) % classes
    runs = {"ours": ours(name, rows, labels, classes)}
    if make_theirs:
        runs["pml"] = pml(make_theirs(classes, FLAGS.dim), rows, labels)
    times = {who: [] for who in runs}
    for who, run in list(runs.items()):
        try:
            run()
        except (RuntimeError, MemoryError) as error:
            if "alloc" not in str(error).lower() and not isinstance(error, MemoryError):
                raise
            del runs[who]
            times[who] = None
    begin = time.perf_counter()
    while len(times["ours"]) < 5 or time.perf_counter() - begin < FLAGS.seconds:
        for who, run in runs.items():
            # The previous one's threads may still be spinning, and its data may be in the caches.
            time.sleep(0.01)
            run()
            start = time.perf_counter()
            run()
            times[who].append(1000 * (time.perf_counter() - start))
    return times


def ours(name, rows, labels, classes):
    settings = {"num_classes": classes} if objectives.lookup(name).uses_classes else {}
    objective = objectives.get(name, **settings, **SETTINGS.get(name, {}))
    objective.build((None, FLAGS.dim))
    weights = objective.trainable_variables

    @tf.function
    def step(embeddings, labels):
        with tf.GradientTape() as tape:
            tape.watch(embeddings)
            loss = objective(embeddings, labels, training=True)
        gradients = tape.gradient(loss, [embeddings, *weights], unconnected_gradients="zero")
        return loss, [tf.convert_to_tensor(gradient) for gradient in gradients]

    embeddings, labels = tf.constant(rows), tf.constant(labels)
    concrete = step.get_concrete_function(embeddings, labels)

    def run():
        loss, gradients = concrete(embeddings, labels)
        return loss.numpy(), gradients

    return run


def pml(loss, rows, labels):
    embeddings = torch().tensor(rows, requires_grad=True)
    labels = torch().tensor(labels)
    parameters = list(loss.parameters())

    def run():
        embeddings.grad = None
        for parameter in parameters:
            parameter.grad = None
        value = loss(embeddings, labels)
        value.backward()
        return value.item(), embeddings.grad

    return run


def table(results):
    lines = ["# Objectives: time of loss and gradients", ""]
    lines += [f"- {key}: {value}" for key, value in results["machine"].items()]
    lines += [f"- {results['dim']} dimensions, 4 images per class, float32", ""]
    limit = f"{FLAGS.memory_gib:g} GiB"
    lines += [f"Milliseconds, median (quartiles). PML is pytorch-metric-learning; both may take {limit} of memory.", ""]
    lines += ["| objective | batch | classes | s2sd_tf | PML | PML / s2sd_tf |", "|---|---|---|---|---|---|"]
    for row in results["time_ms"]:
        cells = [cell(row[who]) if who in row else "" for who in ("ours", "pml")]
        ratio = f"{row['pml'][1] / row['ours'][1]:.2f}" if row.get("pml") else ""
        line = [row["objective"], str(row["batch"]), str(row["classes"] or ""), *cells, ratio]
        lines.append(f"| {' | '.join(line)} |")
    for batch in sorted({row["batch"] for row in results["time_ms"]}):
        ratios = [r["pml"][1] / r["ours"][1] for r in results["time_ms"] if r["batch"] == batch and r.get("pml")]
        if ratios:
            twice = sum(ratio >= 2 for ratio in ratios)
            lines += ["", f"Batch {batch}: {twice} of {len(ratios)} at least 2x faster, minimum {min(ratios):.2f}x."]
    return "\n".join(lines) + "\n"


def cell(quartiles):
    if quartiles is None:
        return "out of memory"
    low, median, high = quartiles
    return f"{median:.3g} ({low:.3g}-{high:.3g})"


if __name__ == "__main__":
    app.run(main)
