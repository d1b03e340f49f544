r"""What nested embeddings cost: the time of a training step with `nested_dims` over the same step without.

    python benchmarks/nested_cost.py --output=benchmarks/results/nested_cost.json

Times the networks of `train_step.py` with S2SD, in turns in one process, single and with four nested dimensions. The
prefixes share their teachers, but each calls `similarity_kl` on its own. So it also times the calls of a step alone,
with their gradients, on 112 images; a step on that many is taken to last in proportion to the images. Writes the JSON
and a table (.md) of the same name. On a machine with other work, --cpu_time measures the process, all threads.
"""

import os
import pathlib
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
import train_step
from absl import app, flags
from machine import describe, set_threads
from train_step import (
    AGREEMENT_STEPS,
    FLAGS,
    FUSED,
    NETWORKS,
    SMALL,
    batch_of,
    make_model,
    make_step,
    share_freed_memory,
    take_turns,
    variants,
)
from train_step import _gradients as gradients_of
from train_step import _spread as spread

from s2sd_tf import similarity_kl
from s2sd_tf.files import write_json

flags.DEFINE_bool("cpu_time", False, "Measure the time of the process instead of that on the clock.")

NESTED_DIMS = {"four convolution blocks": (4, 8, 16, 32), "ResNet-50": (16, 32, 64, 128)}
KL_BATCH = 112
SINGLE, NESTED = "single", "nested"
KL_SINGLE, KL_NESTED = "similarity-KL, single", "similarity-KL, nested"


def main(_):
    share_freed_memory()
    set_threads(FLAGS.threads)
    if FLAGS.cpu_time:
        train_step.timed = cpu_milliseconds
    names = SMALL if FLAGS.small_only else NETWORKS
    results = {
        "machine": describe(FLAGS.threads),
        "turns": FLAGS.repeats,
        "time": "of the process, all threads" if FLAGS.cpu_time else "on the clock",
        "networks": {name: measure(name, NETWORKS[name], NESTED_DIMS[name]) for name in names},
    }
    text = table(results)
    print(text)
    if FLAGS.output:
        write_json(FLAGS.output, results)
        pathlib.Path(FLAGS.output).with_suffix(".md").write_text(text)


def cpu_milliseconds(call):
    """Runs `call` and returns the milliseconds that the threads of this process took."""
    start = time.process_time()
    call()
    return 1000 * (time.process_time() - start)


def measure(name, network, nested_dims):
    """Measures a network. Returns a dict with the milliseconds of every turn."""
    images, labels = batch_of(network)
    settings = variants(network)[FUSED]
    models = {
        SINGLE: make_model(network, settings),
        NESTED: make_model(network, {**settings, "nested_dims": nested_dims}),
    }
    steps = {kind: make_step(model, images, labels) for kind, model in models.items()}
    for step in steps.values():
        # They compile and warm up.
        for _ in range(AGREEMENT_STEPS):
            step()
    features = models[SINGLE].backbone.output_shape[-1]
    calls = kl_calls(nested_dims, (*network.target_dims, features))
    return {
        "batch": network.batch,
        "image_shape": network.image_shape,
        "target_dims": network.target_dims,
        "nested_dims": nested_dims,
        "kl_batch": KL_BATCH,
        "ms": take_turns(name, {**steps, **calls}),
    }


def kl_calls(nested_dims, teacher_dims):
    """Returns the calls of `similarity_kl` of a step with `nested_dims` and of one without, with their gradients."""
    random = np.random.default_rng(0)

    def rows(dim):
        return tf.math.l2_normalize(tf.constant(random.standard_normal((KL_BATCH, dim), dtype=np.float32)), axis=1)

    embedding, teachers = rows(nested_dims[-1]), [rows(dim) for dim in teacher_dims]

    def calls(dims):
        def total(embedding, *teachers):
            prefixes = [tf.math.l2_normalize(embedding[:, :dim], axis=1) for dim in dims]
            return tf.add_n([similarity_kl(prefix, teachers, implementation="fused")[0] for prefix in prefixes])

        return gradients_of(total, [embedding, *teachers], [], 1)

    return {KL_SINGLE: calls(nested_dims[-1:]), KL_NESTED: calls(nested_dims)}


def table(results):
    lines = ["# What nested embeddings cost", ""]
    lines += [f"- {key}: {value}" for key, value in results["machine"].items()]
    lines += [
        "",
        f"Median (minimum to maximum) of {results['turns']} turns, time {results['time']}.",
        "Ratios are of times in the same turn.",
        "",
    ]
    lines += ["| | single, ms | nested, ms | nested / single |", "|---|---|---|---|"]
    for name, found in results["networks"].items():
        ms = {kind: np.array(values) for kind, values in found["ms"].items()}
        shape = " x ".join(map(str, found["image_shape"]))
        dims = f"{list(found['nested_dims'])}, targets {list(found['target_dims'])}"
        for title, (single, nested) in {
            f"step, {name}, {found['batch']} images of {shape}, {dims}": (SINGLE, NESTED),
            f"`similarity_kl` of {found['kl_batch']} images": (KL_SINGLE, KL_NESTED),
        }.items():
            ratio = spread(ms[nested] / ms[single], ".3f")
            lines.append(f"| {title} | {spread(ms[single])} | {spread(ms[nested])} | {ratio} |")
    lines += ["", f"Of a step on {KL_BATCH} images, which is that above times {KL_BATCH} / its images:", ""]
    lines += ["| | all calls of `similarity_kl`, % of the step | those of the shorter prefixes |", "|---|---|---|"]
    for name, found in results["networks"].items():
        ms = {kind: np.array(values) for kind, values in found["ms"].items()}
        step = ms[SINGLE] * found["kl_batch"] / found["batch"]
        shares = (100 * values / step for values in (ms[KL_NESTED], ms[KL_NESTED] - ms[KL_SINGLE]))
        lines.append(f"| {name} | {' | '.join(spread(share, '.2f') for share in shares)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    app.run(main)
