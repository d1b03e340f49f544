r"""Encoders as SavedModel, ONNX and LiteRT: whether they agree, their sizes, and the time of an image.

    python benchmarks/export_formats.py --output=benchmarks/results/export_formats.json

Exports EfficientNet-Lite0 with ImageNet weights and a random embedding layer, for 224 x 224 pixels, as each format
(`pip install '.[onnx,pretrained]' onnxruntime`). Each embeds Omniglot's drawings of 105 x 105 pixels, in color, one at
a time and in batches. The table has the largest difference to the SavedModel's embeddings, the recall@1 of each, the
bytes, and milliseconds per image; the formats take turns. Writes the JSON and a table (.md) of the same name.
"""

import os
import pathlib
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import onnxruntime
import tensorflow as tf
from absl import app, flags
from machine import describe, set_threads

import s2sd_tf
from s2sd_tf import data, evaluation, export
from s2sd_tf.files import write_json
from s2sd_tf.models import backbones

FLAGS = flags.FLAGS
flags.DEFINE_integer("threads", 2, "Threads of each runtime.", lower_bound=1)
flags.DEFINE_integer("images", 400, "Images to embed.", lower_bound=2)
flags.DEFINE_integer("batch", 20, "Images of a batch.", lower_bound=2)
flags.DEFINE_integer("turns", 5, "Turns that are timed.", lower_bound=1)
flags.DEFINE_string("output", None, "JSON file to write; the table gets the same name.")

FORMATS = ("savedmodel", "onnx", "litert")
DIM, SIZE = 128, 224


def main(_):
    set_threads(FLAGS.threads)
    images, labels = drawings()
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: os.path.join(folder, name) for name in FORMATS}
        export_all(paths)
        encoders = {name: globals()[f"{name}_encoder"](path) for name, path in paths.items()}
        results = {name: {"bytes": size_of(path), "one": [], "batch": []} for name, path in paths.items()}
        batches = [images[start : start + FLAGS.batch] for start in range(0, len(images), FLAGS.batch)]
        rows = {name: np.concatenate([encode(batch) for batch in batches]) for name, encode in encoders.items()}
        for turn in range(FLAGS.turns + 1):
            for name, encode in encoders.items():
                for key, some in (("one", [images[:1]] * 8), ("batch", batches[:2])):
                    start = time.perf_counter()
                    for batch in some:
                        encode(batch)
                    if turn:
                        count = sum(map(len, some))
                        results[name][key].append(1000 * (time.perf_counter() - start) / count)
    for name, result in results.items():
        result["difference"] = float(np.abs(rows[name] - rows["savedmodel"]).max())
        result["recall@1"] = evaluation.retrieval_metrics(rows[name], labels, ks=(1,))["recall@1"]
    found = {"machine": describe(FLAGS.threads), "images": len(images), "batch": FLAGS.batch, "formats": results}
    text = table(found)
    print(text)
    if FLAGS.output:
        write_json(FLAGS.output, found)
        pathlib.Path(FLAGS.output).with_suffix(".md").write_text(text)


def drawings():
    """`(images, labels)`: float images of Omniglot's test characters, in color, `(n, 105, 105, 3)`."""
    _, test, _ = data.load_omniglot()
    images = [tf.image.decode_png(test.images[i], channels=3).numpy() for i in range(FLAGS.images)]
    return np.stack(images).astype(np.float32) / 255.0, test.labels[: FLAGS.images]


def export_all(paths):
    given = ("efficientnet_lite0", (SIZE, SIZE, 3), "imagenet")
    model = s2sd_tf.S2SDModel(backbones.get(*given), DIM, target_dims=(256,))
    model(np.zeros((1, SIZE, SIZE, 3), np.float32))
    preprocessing = data.Preprocessing(SIZE, SIZE, 3, resize_size=256, **backbones.normalization(given[0], given[2]))
    for name, path in paths.items():
        export.export_encoder(model, preprocessing, path, name)


def savedmodel_encoder(path):
    loaded = tf.saved_model.load(path)
    return lambda images: loaded.signatures["serving_default"](images=tf.constant(images))["embedding"].numpy()


def onnx_encoder(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = FLAGS.threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["embedding"], {"images": images})[0]


def litert_encoder(path):
    encode = tf.lite.Interpreter(path, num_threads=FLAGS.threads).get_signature_runner()
    return lambda images: encode(images=images)["embedding"]


def size_of(path):
    path = pathlib.Path(path)
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def table(found):
    lines = ["# Formats of an exported encoder", ""]
    lines += [f"- {key}: {value}" for key, value in found["machine"].items()]
    lines += [
        f"- EfficientNet-Lite0 at {SIZE} x {SIZE}, {DIM} dimensions, {found['images']} drawings of 105 x 105",
        "",
        f"| format | MB | largest difference | recall@1 | ms per image | ms per image, batches of {found['batch']} |",
        "|---" * 6 + "|",
    ]
    for name, row in found["formats"].items():
        cells = [name, f"{row['bytes'] / 1e6:.1f}", f"{row['difference']:.1e}", f"{100 * row['recall@1']:.2f}"]
        cells += [f"{np.median(row[key]):.1f}" for key in ("one", "batch")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    app.run(main)
