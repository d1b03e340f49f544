r"""Peak memory of decoding one image, by its shape, in training, `s2sd-embed` and an exported encoder.

    python benchmarks/decoding_memory.py --output=benchmarks/results/decoding_memory.json

Every image is a PNG, decoded to a model's input of 224 x 224 in its own process: by the training pipeline with the
augmentation `base` and by the one of evaluation, by `serving.Encoder`, as `s2sd-embed` calls it, and by the signature
`encoded_images` of a SavedModel that plain TensorFlow loads. The peak is the largest resident memory while the image is
decoded, less that before it, after a small image was decoded in the same way. Fails if a peak is above the bound: 1
GiB, or 64 MiB for images of at most a million pixels. Writes the JSON and a table (.md) of the same name.
"""

import io
import multiprocessing
import os
import pathlib
import re
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow as tf
from absl import app, flags
from machine import describe
from PIL import Image
from tqdm import tqdm

import s2sd_tf
from s2sd_tf import data, export, serving
from s2sd_tf.data import augmentation
from s2sd_tf.files import write_json

FLAGS = flags.FLAGS
flags.DEFINE_string("output", None, "JSON file to write; the table gets the same name.")

# Width and height.
SHAPES = (
    (1, 1), (1500, 1), (4000, 1), (30_000, 1), (1, 30_000), (1, 60_000), (1000, 1000), (9400, 9400), (13_000, 13_000),
)  # fmt: skip
MOST_PIXELS = 89_478_485
SIZE, RESIZE = 224, 256


def bound_mib(width, height):
    """The most memory that decoding an image of this size may take."""
    return 64 if width * height <= 10**6 else 1024


def png(width, height):
    buffer = io.BytesIO()
    Image.new("L", (width, height), 128).save(buffer, "PNG")
    return buffer.getvalue()


def preprocessing():
    return data.Preprocessing(SIZE, SIZE, 3, resize_size=RESIZE)


def save_encoder(folder):
    backbone = s2sd_tf.models.backbones.conv_blocks((SIZE, SIZE, 3), filters=(4,), pools=1)
    export.export_encoder(s2sd_tf.S2SDModel(backbone, 4), preprocessing(), folder)


def by_pipeline(batches):
    def decode(content):
        images = data.ImageSet([content], [0])
        for _ in batches(images).take(1):
            pass

    return decode


def training(_):
    sampler = data.samplers.get("class_balanced", classes_per_batch=1, samples_per_class=1)
    chosen = {"cache": False, "augmentation": data.Augmentation(**augmentation.preset("base"))}
    return by_pipeline(lambda images: data.training_batches(images, preprocessing(), sampler, 1, **chosen))


def evaluation(_):
    return by_pipeline(lambda images: data.evaluation_batches(images, preprocessing(), 1))


def embedding(folder):
    encoder = serving.Encoder(folder)

    def decode(content):
        _, errors = encoder.embed([content])
        if errors:
            raise ValueError(errors[0])

    return decode


def saved_model(folder):
    model = tf.saved_model.load(str(folder))
    return lambda content: model.signatures["encoded_images"](encoded_images=tf.constant([content]))


WAYS = {
    "training, `base`": training, "evaluation": evaluation, "`s2sd-embed`": embedding, "SavedModel": saved_model,
}  # fmt: skip


def memory(name):
    """A figure of this process's memory in KiB: VmRSS (now) or VmHWM (the peak)."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+) kB", status)[1])


def measure(way, folder, width, height, results):
    """Puts `(peak in MiB, refused)` of one image into `results`."""
    decode, content = WAYS[way](folder), png(width, height)
    decode(png(64, 64))
    before = memory("VmRSS")
    # Resets the peak.
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    refused = ""
    try:
        decode(content)
    except (ValueError, tf.errors.InvalidArgumentError) as error:
        refused = str(error)
        if "89,478,485" not in refused and "89478485" not in refused:
            raise
    results.put(((memory("VmHWM") - before) / 1024, bool(refused)))


def in_own_process(function, *arguments):
    """Calls a function that puts its result into its last argument in a new process."""
    # Forked, as importing TensorFlow takes long. The parent has not used it.
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=function, args=(*arguments, results))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{arguments}: exit status {process.exitcode}")
    return results.get()


def saved(folder, results):
    save_encoder(folder)
    results.put(None)


def main(_):
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        in_own_process(saved, f"{folder}/encoder")
        for width, height in tqdm(SHAPES, unit="shape", disable=None):
            row = {
                "width": width,
                "height": height,
                "bytes": len(png(width, height)),
                "bound": bound_mib(width, height),
            }
            for way in WAYS:
                peak, refused = in_own_process(measure, way, f"{folder}/encoder", width, height)
                row[way] = {"peak_mib": round(peak, 1), "refused": refused}
            rows.append(row)
    lines = [f"| image | bytes | {' | '.join(WAYS)} | bound |", "|---|---|" + "---|" * (len(WAYS) + 1)]
    for row in rows:
        found = [f"{row[way]['peak_mib']:,.0f} MiB{', refused' if row[way]['refused'] else ''}" for way in WAYS]
        lines.append(
            f"| {row['width']} x {row['height']} | {row['bytes']:,} | {' | '.join(found)} | {row['bound']:,} MiB |"
        )
    text = "\n".join(lines)
    print(text)
    for row in rows:
        for way in WAYS:
            above = row[way]["peak_mib"] > row["bound"]
            if above or row[way]["refused"] != (row["width"] * row["height"] > MOST_PIXELS):
                raise RuntimeError(f"{way}, {row['width']} x {row['height']}: {row[way]}")
    if FLAGS.output:
        machine = describe(os.cpu_count())
        write_json(FLAGS.output, {"machine": machine, "rows": rows})
        about = "".join(f"- {key}: {value}\n" for key, value in machine.items())
        title = "# Peak memory of decoding one image\n\nPNG to 224 x 224, beyond the memory before it.\n\n"
        pathlib.Path(FLAGS.output).with_suffix(".md").write_text(f"{title}{about}\n{text}\n")


if __name__ == "__main__":
    app.run(main)
