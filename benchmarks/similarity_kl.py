r"""Time, memory and error of the similarity-KL: the fused op against the composed graph, composed XLA and PyTorch.

    python benchmarks/similarity_kl.py --output=benchmarks/results/similarity_kl.json

One process times everything in alternation, on the same inputs and with the same number of threads: loss and gradient
for a student of 128 dimensions and five teachers of 512 to 2048. For comparison it reports the time that the products
alone would take at the speed of a dense matrix product measured in the same run: all of them, and half of them, because
the matrices are symmetric. Memory is measured in separate processes. PyTorch is included if it is installed. Writes the
JSON, a table (.md) and a plot (.png) of the same name. Takes about 5 minutes on 2 cores.
"""

import json
import os
import pathlib
import subprocess
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from absl import app, flags
from machine import describe, set_threads, torch
from tqdm import tqdm

from s2sd_tf import similarity_kl
from s2sd_tf.files import write_json

FLAGS = flags.FLAGS
flags.DEFINE_list("sizes", ["112", "512", "2048", "4096"], "Batch sizes at which time is measured.")
flags.DEFINE_list("error_sizes", ["112", "512", "2048"], "Batch sizes at which the error against float64 is measured.")
flags.DEFINE_list("memory_sizes", ["4096", "16384", "32768"], "Batch sizes at which memory is measured.")
flags.DEFINE_integer("composed_memory_limit", 16384, "Largest batch at which the composed memory is measured.")
flags.DEFINE_integer("student_dim", 128, "Dimension of the student's embeddings.")
flags.DEFINE_list("teacher_dims", ["512", "1024", "1536", "2048", "2048"], "Dimensions of the teachers' embeddings.")
flags.DEFINE_integer("threads", 2, "Threads of every implementation.")
flags.DEFINE_integer("repeats", 9, "Turns of each, with one measurement or, for small batches, several.")
flags.DEFINE_string("output", None, "JSON file to write; table and plot get the same name.")
flags.DEFINE_string("memory_of", None, "Internal: measure the memory of IMPLEMENTATION:BATCH in this process.")

LABELS = {
    "fused": "fused",
    "fused budget 0": "fused, no workspace",
    "fused XLA": "fused inside XLA",
    "fused bfloat16": "fused, bfloat16",
    "composed": "composed graph",
    "composed XLA": "composed XLA",
    "pytorch": "PyTorch eager",
}
BASELINES = ("composed", "composed XLA", "pytorch")


def main(_):
    set_threads(FLAGS.threads)
    if FLAGS.memory_of:
        print(json.dumps(measure_memory(*FLAGS.memory_of.split(":"))))
        return
    results = {
        "machine": describe(FLAGS.threads),
        "dims": {"student": FLAGS.student_dim, "teachers": [int(dim) for dim in FLAGS.teacher_dims]},
        "time_ms": {size: time_all(int(size)) for size in FLAGS.sizes},
        "error": {size: errors(int(size)) for size in FLAGS.error_sizes},
        "memory_mib": {size: memory_of_all(int(size)) for size in FLAGS.memory_sizes},
    }
    text = table(results)
    print(text)
    if FLAGS.output:
        write_json(FLAGS.output, results)
        pathlib.Path(FLAGS.output).with_suffix(".md").write_text(text)
        plot(results, pathlib.Path(FLAGS.output).with_suffix(".png"))


def inputs(batch):
    """Returns `(student, teachers)`: float32 arrays with unit rows."""
    random = np.random.default_rng(0)

    def rows(dim):
        values = random.standard_normal((batch, dim), dtype=np.float32)
        return values / np.linalg.norm(values, axis=1, keepdims=True)

    return rows(FLAGS.student_dim), [rows(int(dim)) for dim in FLAGS.teacher_dims]


def make(implementation, student, teachers):
    """Returns a function without arguments that computes loss and gradient once and waits for them."""
    if implementation == "pytorch":
        return make_torch(student, teachers)
    dtype = tf.bfloat16 if "bfloat16" in implementation else tf.float32
    student = tf.cast(student, dtype)
    teachers = [tf.cast(teacher, dtype) for teacher in teachers]
    jit = "XLA" in implementation

    @tf.function(jit_compile=jit)
    def step(student, teachers):
        with tf.GradientTape() as tape:
            tape.watch(student)
            loss, _ = similarity_kl(student, teachers, implementation=implementation.split()[0], jit_compile=jit)
        return loss, tape.gradient(loss, student)

    # In training one function holds the whole step, so the cost of calling it is not counted.
    concrete = step.get_concrete_function(student, teachers)

    def run():
        loss, gradient = concrete(student, teachers)
        return loss.numpy(), gradient.numpy()

    return run


def make_torch(student, teachers):
    student = torch().tensor(student, requires_grad=True)
    teachers = [torch().tensor(teacher) for teacher in teachers]

    def run():
        student.grad = None
        log_student = (student @ student.T).log_softmax(1)
        loss = 0.0
        for teacher in teachers:
            with torch().no_grad():
                log_teacher = (teacher @ teacher.T).log_softmax(1)
            loss = loss + torch().nn.functional.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
        loss = loss / len(teachers)
        loss.backward()
        return loss.detach().numpy(), student.grad.numpy()

    return run


def make_product(batch=4096, dim=2048):
    """A dense product a b^T, to measure the machine's speed. Returns `(run, floating-point operations)`."""
    random = np.random.default_rng(0)
    a, b = (tf.constant(random.standard_normal((batch, dim), dtype=np.float32)) for _ in range(2))
    product = tf.function(lambda: tf.matmul(a, b, transpose_b=True))

    def run():
        return product().numpy()

    return run, 2.0 * batch * batch * dim


def time_all(batch):
    names = [name for name in LABELS if name != "pytorch" or torch()]
    data = inputs(batch)
    runs = {name: make(name, *data) for name in names}
    product, flops = make_product()
    runs["product"] = product
    times = {name: [] for name in runs}
    calls = max(1, 2048 // batch)
    for _ in tqdm(range(FLAGS.repeats), desc=f"time, batch {batch}", leave=False):
        for name, run in runs.items():
            # The previous one's threads may still be spinning, and its data may be in the caches.
            time.sleep(0.05)
            with workspace(name):
                run()
                for _ in range(1 if name == "product" else calls):
                    start = time.perf_counter()
                    run()
                    times[name].append(1000 * (time.perf_counter() - start))
    rate = flops / np.median(times.pop("product"))
    dims = FLAGS.student_dim + sum(int(dim) for dim in FLAGS.teacher_dims)
    dense = 2.0 * batch * batch * dims / rate
    quartiles = {name: [round(q, 4) for q in np.percentile(t, [25, 50, 75])] for name, t in times.items()}
    return {
        "quartiles": quartiles,
        "product_gflops": round(rate / 1e6, 1),
        "dense_floor": round(dense, 4),
        "symmetric_floor": round(dense / 2, 4),
    }


class workspace:
    """Sets the workspace budget that an implementation's name stands for."""

    def __init__(self, name):
        self.name = name

    def __enter__(self):
        if "budget 0" in self.name:
            os.environ["S2SD_TF_WORKSPACE_MIB"] = "0"

    def __exit__(self, *_):
        os.environ.pop("S2SD_TF_WORKSPACE_MIB", None)


def errors(batch):
    """Distances from the composed version in float64: the loss's, and the gradient's relative to its norm."""
    student, teachers = inputs(batch)
    reference_loss, reference = make_float64(student, teachers)
    found = {}
    for name in tqdm([n for n in LABELS if n != "pytorch" or torch()], desc=f"error, batch {batch}", leave=False):
        if name == "fused bfloat16":
            continue
        with workspace(name):
            loss, gradient = make(name, student, teachers)()
        found[name] = {
            "loss": float(abs(loss - reference_loss)),
            "gradient": float(np.linalg.norm(gradient - reference) / np.linalg.norm(reference)),
        }
    return found


def make_float64(student, teachers):
    student = tf.constant(student, tf.float64)
    with tf.GradientTape() as tape:
        tape.watch(student)
        loss, _ = similarity_kl(student, [tf.cast(t, tf.float64) for t in teachers], implementation="composed")
    return loss.numpy(), tape.gradient(loss, student).numpy()


def memory_of_all(batch):
    found = {}
    for name in tqdm(["fused", "fused budget 0", "composed"], desc=f"memory, batch {batch}", leave=False):
        if name == "composed" and batch > FLAGS.composed_memory_limit:
            continue
        command = [sys.executable, __file__, f"--memory_of={name}:{batch}", f"--threads={FLAGS.threads}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = done.stdout.splitlines()
        found[name] = json.loads(lines[-1]) if done.returncode == 0 else f"failed with exit status {done.returncode}"
    return found


def measure_memory(name, batch):
    """Peak resident memory during one computation, minus what was resident before."""
    data = inputs(int(batch))
    run = make(name, *data)
    make(name, *[values[:64] if isinstance(values, np.ndarray) else [v[:64] for v in values] for values in data])()
    with workspace(name):
        before = status("VmRSS")
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
    return {"extra_mib": round(status("VmHWM") - before), "seconds": round(seconds, 2)}


def status(field):
    """A field of /proc/self/status in MiB: VmRSS (resident memory) or VmHWM (its peak)."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def table(results):
    lines = ["# Similarity-KL: time, error and memory", ""]
    lines += [f"- {key}: {value}" for key, value in results["machine"].items()]
    lines += [f"- student {results['dims']['student']}, teachers {results['dims']['teachers']}, float32", ""]
    lines += ["Loss and gradient, milliseconds: median (quartiles).", ""]
    sizes = list(results["time_ms"])
    lines += [f"| | {' | '.join(sizes)} |", "|---" * (len(sizes) + 1) + "|"]
    names = list(results["time_ms"][sizes[0]]["quartiles"])
    for name in names:
        cells = [results["time_ms"][size]["quartiles"][name] for size in sizes]
        lines.append(f"| {LABELS[name]} | " + " | ".join(f"{m:.4g} ({a:.4g}-{b:.4g})" for a, m, b in cells) + " |")
    for floor in ("dense_floor", "symmetric_floor"):
        cells = [f"{results['time_ms'][size][floor]:.4g}" for size in sizes]
        lines.append(f"| {floor.replace('_', ' ')} of the products | " + " | ".join(cells) + " |")
    cells = [f"{results['time_ms'][size]['product_gflops']:.0f}" for size in sizes]
    lines += [
        "| dense product, GFLOP/s | " + " | ".join(cells) + " |",
        "",
        "Speed-up of the fused op over:",
        "",
    ]
    lines += [f"| | {' | '.join(sizes)} |", "|---" * (len(sizes) + 1) + "|"]
    for name in (*BASELINES, "fused budget 0"):
        if name in names:
            lines.append(f"| {LABELS[name]} | " + " | ".join(f"{ratio(results, s, name):.2f}" for s in sizes) + " |")
    cells = [
        f"{results['time_ms'][s]['quartiles']['fused'][1] / results['time_ms'][s]['symmetric_floor']:.2f}"
        for s in sizes
    ]
    lines += ["| its time / symmetric floor | " + " | ".join(cells) + " |"]
    cells = [f"{1 / ratio(results, s, 'fused bfloat16'):.2f}" for s in sizes]
    lines += ["| gain of bfloat16 inputs | " + " | ".join(cells) + " |", ""]
    lines += ["Distance from float64: loss; gradient relative to its norm.", ""]
    sizes = list(results["error"])
    if sizes:
        lines += [f"| | {' | '.join(sizes)} |", "|---" * (len(sizes) + 1) + "|"]
        for name in results["error"][sizes[0]]:
            cells = [results["error"][size][name] for size in sizes]
            row = " | ".join(f"{c['loss']:.1e}; {c['gradient']:.1e}" for c in cells)
            lines.append(f"| {LABELS[name]} | {row} |")
    lines += ["", "Peak memory besides the inputs, MiB (seconds of that run).", ""]
    sizes = list(results["memory_mib"])
    lines += [f"| | {' | '.join(sizes)} |", "|---" * (len(sizes) + 1) + "|"]
    for name in ("fused", "fused budget 0", "composed"):
        cells = [results["memory_mib"][size].get(name, "not tried") for size in sizes]
        row = " | ".join(f"{c['extra_mib']} ({c['seconds']})" if isinstance(c, dict) else c for c in cells)
        lines.append(f"| {LABELS[name]} | {row} |")
    return "\n".join(lines) + "\n"


def ratio(results, size, name):
    quartiles = results["time_ms"][size]["quartiles"]
    return quartiles[name][1] / quartiles["fused"][1]


def plot(results, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = list(results["time_ms"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    x = [int(size) for size in sizes]
    for name in results["time_ms"][sizes[0]]["quartiles"]:
        low, middle, high = zip(*(results["time_ms"][size]["quartiles"][name] for size in sizes))
        left.plot(x, middle, marker="o", label=LABELS[name])
        left.fill_between(x, low, high, alpha=0.2)
    floor = [results["time_ms"][size]["symmetric_floor"] for size in sizes]
    left.plot(x, floor, "k:", label="symmetric floor of the products")
    left.set(xscale="log", yscale="log", xlabel="batch", ylabel="loss and gradient, ms")
    left.set_xticks(x, sizes)
    left.minorticks_off()
    left.legend(fontsize=8)
    memory = results["memory_mib"]
    for offset, name in enumerate(("fused", "fused budget 0", "composed")):
        values = [memory[s][name]["extra_mib"] if isinstance(memory[s].get(name), dict) else 0 for s in memory]
        right.bar(np.arange(len(memory)) + 0.27 * (offset - 1), values, 0.25, label=LABELS[name])
    right.set(yscale="log", xlabel="batch", ylabel="peak memory besides the inputs, MiB")
    right.set_xticks(range(len(memory)), list(memory))
    right.legend(fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    app.run(main)
