r"""Images per second of the training input, against PyTorch's DataLoader with torchvision's transforms.

    pip install torch==2.13.0 torchvision==0.28.0
    python benchmarks/input_pipeline.py --output=benchmarks/results/input_pipeline.json

Generates JPEGs of ImageNet's size (500 x 375, about 110 KiB) and photographs of 12 megapixels (4000 x 3000), or reads
your own with `--images=<folder>`. Both sides do
the same work: read, random resized crop to 224, flip, (colours,) normalise, batches of 112; with two threads here and
two worker processes there. They take turns, each in its own process. Without torchvision, its crop and flip are done
with Pillow in the same way. The distributions of the crops' areas, aspect ratios and positions are compared. Writes the
JSON and a table (.md) of the same name.
"""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from absl import app, flags
from PIL import Image
from tqdm import tqdm

FLAGS = flags.FLAGS
flags.DEFINE_string("images", "", "Folder of JPEG files; empty: generate them.")
flags.DEFINE_list("presets", ["base", "adv", "red", "rand", "evaluation"], "Augmentations to measure.")
flags.DEFINE_list("photo_presets", ["base", "red", "evaluation"], "Augmentations to measure on the photographs.")
flags.DEFINE_integer("count", 3000, "Images per pass, at least a batch.", lower_bound=112)
flags.DEFINE_integer("photo_count", 160, "Photographs per pass, at least a batch.", lower_bound=112)
flags.DEFINE_integer("turns", 5, "Passes of each side.")
flags.DEFINE_integer("threads", 2, "Threads here; worker processes for PyTorch.")
flags.DEFINE_string("output", None, "JSON file to write; the table gets the same name.")
flags.DEFINE_enum("side", "", ["", "s2sd_tf", "torch"], "Internal: which side this process measures.")

BATCH, SIZE, RESIZE = 112, 224, 256
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Presets that torchvision can reproduce.
BOTH = ("base", "adv", "red", "evaluation")


def ours(paths, name):
    """Returns a function that makes one pass and returns the number of images."""
    import tensorflow as tf

    from s2sd_tf import data
    from s2sd_tf.data.augmentation import preset

    tf.config.threading.set_intra_op_parallelism_threads(FLAGS.threads)
    tf.config.threading.set_inter_op_parallelism_threads(FLAGS.threads)
    chosen = np.array([paths[i % len(paths)] for i in range(FLAGS.count)])
    images = data.ImageSet(chosen, np.arange(FLAGS.count, dtype=np.int32) % 8, tuple("abcdefgh"))
    preprocessing = data.Preprocessing(SIZE, SIZE, resize_size=RESIZE, mean=MEAN, std=STD)
    if name == "evaluation":
        batches = data.evaluation_batches(images, preprocessing, BATCH)
    else:
        augmentation = data.Augmentation(**preset(name))
        sampler = data.samplers.get("random", batch_size=BATCH)
        batches = data.training_batches(images, preprocessing, sampler, cache=False, augmentation=augmentation)
    return lambda: sum(int(batch[0].shape[0] if isinstance(batch, tuple) else batch.shape[0]) for batch in batches)


def torchs(paths, name):
    """Returns the same function for PyTorch."""
    import torch

    def read(path):
        with open(path, "rb") as file:
            return Image.open(file).convert("RGB")

    change = _torchvision_transforms(name) or _pillow_transforms(name)

    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return FLAGS.count

        def __getitem__(self, index):
            return change(read(paths[index % len(paths)]))

    loader = torch.utils.data.DataLoader(
        Images(), batch_size=BATCH, shuffle=name != "evaluation", num_workers=FLAGS.threads, persistent_workers=True
    )
    return lambda: sum(len(batch) for batch in loader)


def torchvision_transforms_module():
    """Returns `torchvision.transforms`, or None if it cannot be imported."""
    try:
        import torch

        # Its compiled ops do not load with a PyTorch of another build. The transforms used here need none of them.
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in ("nms(Tensor a, Tensor b, float c) -> Tensor", "qnms(Tensor a, Tensor b, float c) -> Tensor"):
            with contextlib.suppress(RuntimeError):
                library.define(schema)
        from torchvision import transforms
    except (ImportError, RuntimeError, AttributeError):
        return None
    return transforms


def _torchvision_transforms(name):
    transforms = torchvision_transforms_module()
    if transforms is None:
        return None
    crop = {
        "red": [transforms.Resize(RESIZE), transforms.RandomCrop(SIZE), transforms.RandomHorizontalFlip()],
        "evaluation": [transforms.Resize(RESIZE), transforms.CenterCrop(SIZE)],
    }.get(name, [transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip()])
    colors = [transforms.ColorJitter(0.2, 0.2, 0.2, 0.2), transforms.RandomGrayscale(0.2)] if name == "adv" else []
    return transforms.Compose([*crop, *colors, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])


def _pillow_transforms(name):
    import torch

    if name != "base":
        raise ValueError(f"presets: expected 'base', because torchvision is not installed. Received: {name!r}")
    rng = np.random.default_rng()
    mean, std = np.float32(MEAN), np.float32(STD)

    def change(image):
        top, left, height, width = loop_crop(rng, image.height, image.width)
        image = image.crop((left, top, left + width, top + height)).resize((SIZE, SIZE), Image.BILINEAR)
        if rng.random() < 0.5:
            image = image.transpose(Image.FLIP_LEFT_RIGHT)
        pixels = (np.asarray(image, np.float32) / 255 - mean) / std
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))

    return change


def loop_crop(rng, height, width):
    """A random resized crop, following the algorithm literally. Returns `(top, left, height, width)`."""
    for _ in range(10):
        area = height * width * rng.uniform(0.08, 1.0)
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w
    w, h = min(width, round(height * 4 / 3)), min(height, round(width / (3 / 4)))
    return (height - h) // 2, (width - w) // 2, h, w


def measure(paths):
    """In a separate process: prints the rate of one pass for every preset on stdin, after an uncounted first pass."""
    if FLAGS.side == "torch":
        import torch

        torch.set_num_threads(1)
    for line in sys.stdin:
        name = line.strip()
        if name not in measure.passes:
            measure.passes[name] = (ours if FLAGS.side == "s2sd_tf" else torchs)(paths, name)
            measure.passes[name]()
        begin = time.perf_counter()
        count = measure.passes[name]()
        print(json.dumps(count / (time.perf_counter() - begin)), flush=True)


measure.passes = {}


def crops(count=4000, height=375, width=500):
    """Kolmogorov-Smirnov p-values of our crops' areas, ratios and positions against torchvision's, or `loop_crop`'s."""
    import scipy.stats
    import tensorflow as tf

    from s2sd_tf import data

    augmentation = data.Augmentation()
    preprocessing = data.Preprocessing(SIZE, SIZE)
    seeds = tf.stack([tf.zeros([count], tf.int64), tf.range(count, dtype=tf.int64)], axis=1)

    def window(seed):
        return augmentation.crop_window(height, width, preprocessing, seed)

    own = tf.function(lambda: tf.map_fn(window, seeds, fn_output_signature=tf.int32))().numpy()
    transforms = torchvision_transforms_module()
    if transforms:
        image = Image.new("RGB", (width, height))
        draw = transforms.RandomResizedCrop(SIZE)
        theirs = np.array([draw.get_params(image, draw.scale, draw.ratio) for _ in range(count)])
    else:
        rng = np.random.default_rng(0)
        theirs = np.array([loop_crop(rng, height, width) for _ in range(count)])
    quantities = {
        "area": lambda w: w[:, 2] * w[:, 3],
        "aspect ratio": lambda w: w[:, 3] / w[:, 2],
        "top": lambda w: w[:, 0] / np.maximum(1, height - w[:, 2]),
        "left": lambda w: w[:, 1] / np.maximum(1, width - w[:, 3]),
    }
    p_values = {
        name: float(scipy.stats.ks_2samp(value(own), value(theirs)).pvalue) for name, value in quantities.items()
    }
    return {"against": "torchvision" if transforms else "a loop", "crops": count, "p_values": p_values}


def main(_):
    if FLAGS.side:
        measure([str(path) for path in sorted(pathlib.Path(FLAGS.images).rglob("*.jpg"))])
        return
    from machine import describe
    from photos import generate

    from s2sd_tf.files import write_json

    with tempfile.TemporaryDirectory() as folder:
        results = {"machine": describe(FLAGS.threads), "crops": crops(), "sets": {}}
        if FLAGS.images:
            results["sets"]["given images"] = _measured(FLAGS.images, FLAGS.presets, FLAGS.count)
        else:
            small, photos = os.path.join(folder, "small"), os.path.join(folder, "photos")
            os.mkdir(small)
            os.mkdir(photos)
            generate(small)
            generate(photos, 6, (4000, 3000))
            results["sets"]["500 x 375, generated"] = _measured(small, FLAGS.presets, FLAGS.count)
            results["sets"]["4000 x 3000, generated"] = _measured(photos, FLAGS.photo_presets, FLAGS.photo_count)
    for name, measured in results["sets"].items():
        for preset, rates in measured["rates"].items():
            print(name, preset, {side: round(float(np.median(values))) for side, values in rates.items()})
    print(results["crops"])
    if FLAGS.output:
        write_json(FLAGS.output, results)
        pathlib.Path(FLAGS.output).with_suffix(".md").write_text(_table(results))


def _measured(images, presets, count):
    sizes = [path.stat().st_size for path in pathlib.Path(images).rglob("*.jpg")]
    rates = _take_turns(images, presets, count)
    return {"files": len(sizes), "mean_kib": round(np.mean(sizes) / 1024, 1), "images": count, "rates": rates}


def _take_turns(images, presets, count):
    command = [sys.executable, __file__, f"--images={images}", f"--count={count}", f"--threads={FLAGS.threads}"]
    sides = {
        side: subprocess.Popen([*command, f"--side={side}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for side in ("s2sd_tf", "torch")
    }
    rates = {name: {side: [] for side in sides if side == "s2sd_tf" or name in BOTH} for name in presets}
    for _ in tqdm(range(FLAGS.turns), desc="Turns"):
        for name, by_side in rates.items():
            for side, values in by_side.items():
                process = sides[side]
                process.stdin.write(name + "\n")
                process.stdin.flush()
                values.append(json.loads(process.stdout.readline()))
    for process in sides.values():
        process.stdin.close()
        process.wait()
    return rates


def _table(results):
    lines = ["# Input pipeline: images per second", ""]
    lines += [f"- {key}: {value}" for key, value in results["machine"].items()]
    for name, measured in results["sets"].items():
        lines += [
            "",
            f"## {name}",
            "",
            f"{measured['files']} JPEGs, {measured['mean_kib']:,} KiB on average. Median (minimum to maximum) of "
            f"{FLAGS.turns} passes over {measured['images']:,} images.",
            "",
            "| augmentation | s2sd_tf | DataLoader, torchvision | ratio |",
            "|---|---|---|---|",
        ]
        for preset, rates in measured["rates"].items():
            cells = [f"{np.median(v):.0f} ({min(v):.0f} to {max(v):.0f})" for v in rates.values()]
            ratio = f"{np.median(rates['s2sd_tf']) / np.median(rates['torch']):.2f}" if "torch" in rates else ""
            lines.append(f"| {preset} | {' | '.join(cells + [''] * (2 - len(cells)))} | {ratio} |")
    crops_of = results["crops"]
    lines += [
        "",
        f"Crops, {crops_of['crops']} of each, against {crops_of['against']}; p-values of Kolmogorov-Smirnov tests: "
        + ", ".join(f"{name} {value:.2f}" for name, value in crops_of["p_values"].items()),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    app.run(main)
