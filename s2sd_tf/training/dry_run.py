"""Tries out a run before it starts: builds everything, takes two training steps and evaluates a sample."""

import itertools
import time

import numpy as np
import tensorflow as tf
from ml_collections import config_dict

from s2sd_tf.data import samplers
from s2sd_tf.data.image_files import naming_unreadable
from s2sd_tf.evaluation import retrieval_metrics
from s2sd_tf.keras_compat import optimizer_variables
from s2sd_tf.training.build import (
    build_batches,
    build_model,
    build_sampler,
    build_schedule,
    precision,
    set_up,
    warn_of_short_run,
)
from s2sd_tf.training.config import resolve
from s2sd_tf.training.datasets import divide, load_split
from s2sd_tf.training.embedding import embed
from s2sd_tf.training.plan import plan
from s2sd_tf.training.steps import make_train_step

STEPS = 2
SAMPLE = 64


def dry_run(config: config_dict.ConfigDict, replicas: int = 1) -> dict[str, list[tuple[str, str]]]:
    """Builds everything that `train` builds, takes two steps on one device and evaluates a sample. Writes no file.

    Args:
        config: has the keys of `default_config`.
        replicas: >= 1, the number of replicas that would share each batch; checks that they can.

    Returns:
        Lists of `(name, value)` by section title: data, model, learning rates, steps, evaluation, memory.

    Raises:
        ValueError, FileNotFoundError, ImportError: as `train`.
    """
    config = resolve(config)
    with precision(config):
        return _dry_run(config, replicas)


def _dry_run(config, replicas):
    set_up(config)
    begin = time.monotonic()
    split = load_split(config)
    config = plan(config, split, replicas)
    run_data = divide(config, split)
    sampler, drawn_by = build_sampler(config, run_data.train, replicas), config.sampler.name
    warn_of_short_run(config, run_data)
    loaded = time.monotonic()
    model = build_model(config, run_data)
    built = time.monotonic()
    if sampler.storage is not None:
        # The real sampler would first embed all training images.
        if config.data.samples_per_class == 1:
            sampler = samplers.FullyRandom(sampler.batch_size)
            drawn_by += " (random for these steps)"
        else:
            short = sampler.short_classes  # type: ignore[attr-defined]
            sampler = samplers.ClassBalanced(config.data.classes_per_batch, config.data.samples_per_class, short)
            drawn_by += " (class_balanced for these steps)"
    batches = build_batches(config, run_data, sampler)
    steps_per_epoch = batches.steps
    batch = sampler.batch_size  # type: ignore[attr-defined]
    with naming_unreadable(run_data.train):
        steps, losses = _steps(model, batches, batch)
    evaluation = _evaluation(model, run_data)
    total = config.train.epochs * steps_per_epoch
    preprocessing = run_data.preprocessing
    return {
        "data": [
            *(
                (part, f"{images.num_classes:,} classes, {len(images):,} images ({images.kind})")
                for part, images in _parts(run_data)
            ),
            ("read and checked in", f"{loaded - begin:.1f} s"),
            ("input", f"{' x '.join(str(size) for size in preprocessing.output_shape)}, {preprocessing.channel_order}"),
            ("augmentation", config.data.augmentation or "none"),
            (
                "batch",
                f"{batch} = {config.data.classes_per_batch} classes x {config.data.samples_per_class}, by {drawn_by}",
            ),
        ],
        "model": [
            ("backbone", f"{config.model.backbone}, {_parameters(model.backbone)}, {config.model.weights or 'random'}"),
            ("frozen BatchNorm", config.model.frozen_bn or "no"),
            ("embedding", f"{config.model.embedding_dim} dimensions, {_parameters(model.embedding_head)}"),
            *(("target", f"{head.dim} dimensions, {_parameters(head)}") for head in model.target_heads),
            ("objective", f"{config.objective.name}, {_parameters(model.s2sd_loss.objective)}"),
            ("weights in memory", _mib(model.variables)),
            ("optimizer's state", _mib(optimizer_variables(model.optimizer))),
            ("built in", f"{built - loaded:.1f} s"),
        ],
        "learning rates": [
            ("optimizer", f"{config.optimizer.name}, schedule {config.optimizer.schedule.name}"),
            *_learning_rates(config, build_schedule(config, run_data), total, steps_per_epoch),
            *_groups(model),
        ],
        "steps": [*steps, *losses, ("in all", f"{total:,} steps, {config.train.epochs} epochs of {steps_per_epoch:,}")],
        "evaluation": evaluation,
        "memory": [("largest so far", _peak_memory())],
    }


def _parts(run_data):
    names = ("train", "validation", "test", "gallery")
    return [(name, getattr(run_data, name)) for name in names if getattr(run_data, name) is not None]


def _steps(model, batches, batch_size):
    """Takes two steps, and measures the input pipeline alone. Returns `(rows about the steps, rows about the loss)`."""
    begin = time.monotonic()
    # An epoch may have fewer steps.
    taken = list(itertools.islice(itertools.chain.from_iterable(map(batches, range(STEPS + 1))), STEPS + 1))
    input_rate = len(taken) * batch_size / (time.monotonic() - begin)
    train_step = make_train_step(model, tf.distribute.get_strategy())
    times = [time.monotonic()]
    for batch in taken[:STEPS]:
        losses = {name: float(value) for name, value in train_step(batch).items()}
        times.append(time.monotonic())
    first, second = np.diff(times)
    if not np.isfinite(losses["loss"]):
        raise ValueError(f"loss: expected a finite number. Received: {losses}")
    limit = "images" if input_rate < 0.9 * batch_size / second else "computing"
    return [
        ("images alone", f"{input_rate:,.0f} images/s, the first batches with all that must be started"),
        ("first step", f"{first:.2f} s, with tracing"),
        ("next step", f"{second:.2f} s, {batch_size / second:,.0f} images/s; the limit: {limit}"),
    ], [("loss", ", ".join(f"{name} {value:.4g}" for name, value in losses.items()))]


def _sample(images, classes=None):
    """The first four images of each class, at most `SAMPLE` in all; `classes` limits the classes."""
    order = np.argsort(images.labels, kind="stable")
    counts = images.class_counts()
    rank = np.arange(len(images)) - np.repeat(np.cumsum(counts) - counts, counts)
    chosen = order[rank < 4]
    if classes is not None:
        chosen = chosen[np.isin(images.labels[chosen], classes)]
    return images.select_images(chosen[:SAMPLE])


def _evaluation(model, run_data):
    queries = _sample(run_data.test)
    classes = np.unique(queries.labels)
    begin = time.monotonic()
    rows = embed(model, queries, run_data.preprocessing)
    count = len(queries)
    gallery: tuple = ()
    if run_data.gallery is not None:
        searched = _sample(run_data.gallery, classes)
        gallery = (embed(model, searched, run_data.preprocessing), searched.labels)
        count += len(searched)
    seconds = time.monotonic() - begin
    metrics = retrieval_metrics(rows, queries.labels, *gallery)
    return [
        ("sample", f"{count} images of {len(classes)} classes, {seconds:.2f} s with tracing"),
        ("recall@1", f"{100 * metrics['recall@1']:.1f}% on it"),
    ]


def _learning_rates(config, rate, total, steps_per_epoch):
    if not callable(rate):
        return [("learning rate", f"{rate:g}")]
    changes = {round(epoch * steps_per_epoch) for epoch in config.optimizer.schedule.milestones}
    steps = sorted({0, *(step for step in changes if step < total), total - 1})
    return [("learning rate", ", ".join(f"{float(rate(step)):.3g} at step {step:,}" for step in steps))]


def _groups(model):
    """The number of trainable parameters per group and update factor."""
    counts: dict[tuple[str, float], int] = {}
    for name, variables, factor in model.weight_updates.groups():
        counts[name, factor] = counts.get((name, factor), 0) + sum(int(np.prod(v.shape)) for v in variables)
    return [(name, f"x {factor:g}, {count:,} parameters") for (name, factor), count in counts.items() if count]


def _parameters(layer):
    trained = sum(int(np.prod(variable.shape)) for variable in layer.trainable_variables)
    kept = sum(int(np.prod(variable.shape)) for variable in layer.non_trainable_variables)
    return f"{trained:,} parameters" + (f" and {kept:,} not trained" if kept else "")


def _mib(variables):
    size = sum(int(np.prod(v.shape)) * tf.as_dtype(v.dtype).size for v in variables)
    return f"{size / 2**20:,.1f} MiB"


def _peak_memory():
    """The peak resident memory of the process. (The `ru_maxrss` of a child starts at its parent's.)"""
    try:
        with open("/proc/self/status") as file:
            kib = next(int(line.split()[1]) for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return "unknown on this system"
    return f"{kib / 1024:,.0f} MiB of main memory"
