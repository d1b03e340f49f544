r"""Memory and time of a training step whose backbone processes the batch in parts (`micro_batch_size`).

    python benchmarks/gradient_caching.py --output=benchmarks/results/gradient_caching.json

Takes an S2SD step (ResNet-50 with frozen statistics, targets of 512 to 2,048 dimensions, multi-similarity) with the
whole batch at once and in parts, each in its own process, and reads the process's peak resident memory. That both give
the same gradients is tested in `tests/test_train_step.py`. Writes the JSON and a table (.md) of the same name.
"""

import json
import os
import pathlib
import subprocess
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from absl import app, flags
from machine import describe, peak
from tqdm import tqdm

from s2sd_tf.files import replacing, write_json

FLAGS = flags.FLAGS
flags.DEFINE_integer("size", 64, "Side of the images in pixels.")
flags.DEFINE_integer("micro", 64, "Images at a time.")
flags.DEFINE_list("batches", ["64", "512", "2048", "4096"], "Batch sizes taken in parts; the first also at once.")
flags.DEFINE_string("output", None, "JSON file to write; the table gets the same name.")
flags.DEFINE_string("one", None, "Internal: measure 'batch,micro' in this process.")


def main(_):
    if FLAGS.one:
        batch, micro = map(int, FLAGS.one.split(","))
        print(json.dumps(_measure(batch, micro)))
        return
    batches = [int(batch) for batch in FLAGS.batches]
    cases = [(batches[0], 0), *((batch, FLAGS.micro) for batch in batches)]
    rows = []
    for batch, micro in tqdm(cases, desc="Measuring", unit="case"):
        command = [sys.executable, __file__, f"--size={FLAGS.size}", f"--one={batch},{micro}"]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows.append({"batch": batch, "micro_batch_size": micro, **json.loads(output.splitlines()[-1])})
    machine = describe(os.cpu_count())
    lines = [
        f"ResNet-50, {FLAGS.size} x {FLAGS.size}, one S2SD step; TensorFlow {machine['tensorflow']}, {machine['cpu']}",
        "",
        "| batch | images at a time | peak MiB | relative to the first row | seconds per step | images/s |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        seconds = row["seconds"]
        lines.append(
            f"| {row['batch']:,} | {row['micro_batch_size'] or 'all'} | {row['peak_mib']:,.0f} | "
            f"{row['peak_mib'] / rows[0]['peak_mib']:.2f} | {seconds:.1f} | {row['batch'] / seconds:.1f} |"
        )
    print("\n".join(lines))
    if FLAGS.output:
        write_json(FLAGS.output, {"machine": machine, "size": FLAGS.size, "rows": rows})
        with replacing(pathlib.Path(FLAGS.output).with_suffix(".md")) as path, open(path, "w") as file:
            file.write("\n".join(lines) + "\n")


def _measure(batch, micro):
    import tensorflow as tf

    import s2sd_tf

    shape = (FLAGS.size, FLAGS.size, 3)
    backbone = s2sd_tf.models.backbones.get("resnet50_v1_5", shape, frozen_bn="statistics")
    model = s2sd_tf.S2SDModel(backbone, 128, feature_distill_delay=0, micro_batch_size=micro)
    model.compile(optimizer="adam")
    images = tf.random.stateless_normal((batch, *shape), [0, 0])
    labels = tf.range(batch) // 4
    step = tf.function(lambda: model.train_step((images, labels)))
    step()
    begin = time.monotonic()
    step()
    seconds = time.monotonic() - begin
    return {"peak_mib": peak(), "seconds": seconds}


if __name__ == "__main__":
    app.run(main)
