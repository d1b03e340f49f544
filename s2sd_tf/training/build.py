"""Builds the parts of a run from its resolved config: model, optimizer, sampler, batches, evaluations."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging
from ml_collections import config_dict

from s2sd_tf import mining, objectives, registry
from s2sd_tf.data import EpochBatches, ImageSet, RetrievalSplit, evaluation_batches, samplers
from s2sd_tf.data.samplers import Sampler
from s2sd_tf.data.samplers.base import ClassSampler
from s2sd_tf.data.samplers.coreset import CoresetSampler
from s2sd_tf.evaluation import RetrievalEvaluation
from s2sd_tf.evaluation.scann_searcher import usable_methods
from s2sd_tf.keras_compat import keras
from s2sd_tf.losses import S2SDLoss
from s2sd_tf.models import S2SDModel, backbones
from s2sd_tf.models.backbones.hub import is_hub
from s2sd_tf.objectives.base import MinedObjective
from s2sd_tf.training import optimizers
from s2sd_tf.training.datasets import RunData, has_levels, hold_out


def set_threads(config: config_dict.ConfigDict) -> None:
    """Sets the threads of a resolved config. Call it before TensorFlow runs anything, or makes a strategy.

    Raises:
        ValueError: TensorFlow runs with another number of threads already.
    """
    count, threading = config.train.threads, tf.config.threading
    there = threading.get_intra_op_parallelism_threads(), threading.get_inter_op_parallelism_threads()
    if not count or there == (count, count):
        return
    try:
        threading.set_intra_op_parallelism_threads(count)
        threading.set_inter_op_parallelism_threads(count)
    except RuntimeError as error:
        raise ValueError(
            "config.train.threads: expected 0 where TensorFlow has begun to run, as in a process with a strategy; set "
            f"the threads before. Received: {count}"
        ) from error


def set_up(config: config_dict.ConfigDict) -> None:
    """Sets threads, determinism and seeds from a resolved config. Call it before TensorFlow runs anything.

    Raises:
        ValueError: as `set_threads`.
    """
    set_threads(config)
    if config.train.deterministic:
        tf.config.experimental.enable_op_determinism()
    keras.utils.set_random_seed(config.seed)
    # Says at once if the finished run will not be evaluated with ScaNN.
    usable_methods()


@contextlib.contextmanager
def precision(config: config_dict.ConfigDict) -> Iterator[None]:
    """Within the block, new layers compute in the precision of a resolved config. Keras's global policy is restored at
    the end.
    """
    before = keras.mixed_precision.global_policy()
    keras.mixed_precision.set_global_policy(config.train.precision)
    try:
        yield
    finally:
        keras.mixed_precision.set_global_policy(before)


def steps_per_epoch(config: config_dict.ConfigDict, run_data: RunData) -> int:
    """The number of batches per epoch."""
    batch = config.data.classes_per_batch * config.data.samples_per_class
    return config.train.steps_per_epoch or max(1, len(run_data.train) // batch)


def build_model(config: config_dict.ConfigDict, run_data: RunData) -> S2SDModel:
    """Builds and compiles the model."""
    settings: dict[str, Any] = {}
    if config.model.backbone == "conv_blocks":
        settings = {"filters": tuple(config.model.filters), "pools": config.model.pools}
    elif is_hub(config.model.backbone):
        settings = {"tokens": config.model.tokens}
    backbone = backbones.get(
        config.model.backbone,
        run_data.preprocessing.output_shape,
        weights=config.model.weights or None,
        frozen_bn=config.model.frozen_bn or None,
        **settings,
    )
    target = config.s2sd.target_objective or config.objective.name
    objective = _objective(config, config.objective.name, run_data)
    loss = S2SDLoss(
        objective,
        _objective(config, target, run_data, objective.relevance),
        **{key: value for key, value in config.s2sd.items() if key != "target_objective"},
        external_teachers=len(run_data.train.teachers),
        name="s2sd_loss",
    )
    own = registry.constructor_arguments([S2SDModel])
    settings = {key: value for key, value in config.model.items() if key in own and key != "backbone"}
    settings["learning_rate_multipliers"] = dict(config.model.learning_rate_multipliers)
    model = S2SDModel(backbone, loss=loss, **settings)
    learning_rate = build_schedule(config, run_data)
    optimizer = optimizers.get(config.optimizer.name, learning_rate, config.optimizer.settings.to_dict())
    model.compile(optimizer=optimizer, jit_compile=config.train.jit_compile)
    return model


def build_schedule(
    config: config_dict.ConfigDict, run_data: RunData
) -> float | keras.optimizers.schedules.LearningRateSchedule:
    """Builds the learning rate: a float if it is constant, else a schedule."""
    return optimizers.schedule(
        config.optimizer.learning_rate,
        steps_per_epoch=steps_per_epoch(config, run_data),
        epochs=config.train.epochs,
        **config.optimizer.schedule,
    )


def warn_of_short_run(config: config_dict.ConfigDict, run_data: RunData) -> None:
    """Logs a warning if a distillation term never acts in this run, or never reaches its full weight."""
    total, section = config.train.epochs * steps_per_epoch(config, run_data), config.s2sd
    found, needed = [], 0
    for term, active, weight, delay, warmup in (
        (
            "the distillation of config.data.teachers",
            bool(run_data.train.teachers),
            "external_distill_weight",
            "external_distill_delay",
            "external_distill_warmup_steps",
        ),
        ("the distillation", bool(section.target_dims), "distill_weight", "", "distill_warmup_steps"),
        (
            "the feature distillation",
            section.feature_distill,
            "feature_distill_weight",
            "feature_distill_delay",
            "feature_distill_warmup_steps",
        ),
    ):
        start, length = section[delay] if delay else 0, section[warmup]
        if not active or not section[weight] or total >= max(start + length, start + 1):
            continue
        needed = max(needed, start + length, start + 1)
        if total <= start:
            found.append(f"{term} never acts (config.s2sd.{delay} is {start})")
        else:
            share = f"{100 * (total - start) // length}%"
            found.append(f"{term} reaches only {share} of its weight (config.s2sd.{warmup} is {length})")
    if found:
        logging.warning(
            "In the %d steps of this run, %s. Train for %d steps or more (config.train.epochs), or lower these keys.",
            total,
            " and ".join(found),
            needed,
        )


def build_sampler(config: config_dict.ConfigDict, images: ImageSet | None = None, replicas: int = 1) -> Sampler:
    """Builds the sampler, which chooses the images of each batch.

    Raises:
        ValueError: no batch can be drawn from the training images `images`, or `replicas` cannot share it equally; the
            message names the keys and classes.
    """
    name = config.sampler.name
    given = {
        "classes_per_batch": config.data.classes_per_batch,
        "samples_per_class": config.data.samples_per_class,
        "batch_size": config.data.classes_per_batch * config.data.samples_per_class,
    }
    known = samplers.settings(name)
    sampler = samplers.get(name, **config.sampler[name], **{key: given[key] for key in given if key in known})
    if images is not None:
        _check_classes(config, sampler, images)
        sampler.check(images.labels)
    if given["batch_size"] % replicas:
        raise ValueError(
            "config.data.classes_per_batch, config.data.samples_per_class: expected a batch that the "
            f"{replicas} replicas share equally. Received: {config.data.classes_per_batch} x "
            f"{config.data.samples_per_class} = {given['batch_size']} images"
        )
    return sampler


def _check_classes(config, sampler, images):
    """As `ClassSampler.check`, with the keys of the config and the names of the classes."""
    ignored = isinstance(sampler, CoresetSampler) and sampler.samples_per_class == 1
    if not isinstance(sampler, ClassSampler) or ignored:
        return
    if sampler.classes_per_batch == 1 and issubclass(objectives.lookup(config.objective.name), MinedObjective):
        raise ValueError(
            f"config.data.classes_per_batch: expected at least 2 for the objective {config.objective.name!r}, which "
            "compares classes. Received: 1"
        )
    counts, usable = images.class_counts(), sampler.usable_classes(images.labels)
    present, key = np.flatnonzero(counts), f"config.sampler.{config.sampler.name}.short_classes"
    short = np.setdiff1d(present, usable)
    if sampler.short_classes == "raise" and len(short):
        some = ", ".join(f"{images.class_names[c]!r} with {counts[c]}" for c in short[:10])
        more = f" and {len(short) - 10} more classes" if len(short) > 10 else ""
        raise ValueError(
            f"config.data.samples_per_class: expected at least {sampler.samples_per_class} images in every class that "
            f"trains. Received: {some}{more}. Set it to {min(counts[present])} or less, or {key} to 'repeat' or 'skip'"
        )
    if len(usable) < sampler.classes_per_batch:
        reasons = []
        if config.data.validation_classes:
            reasons.append(f"config.data.validation_classes holds out {config.data.validation_classes}")
        if len(short):
            reasons.append(f"{key} skips {len(short)} with fewer images than config.data.samples_per_class")
        raise ValueError(
            f"config.data.classes_per_batch: expected at most {len(usable)}, the number of classes that train"
            f"{''.join(f'; {reason}' for reason in reasons)}. Received: {sampler.classes_per_batch}"
        )


def check_data_of_runs(config: config_dict.ConfigDict, split: RetrievalSplit, seeds: Iterable[int]) -> None:
    """Checks that runs with these seeds can train on a data set.

    Raises:
        ValueError: as `hold_out` and `build_sampler`.
    """
    for seed in seeds:
        build_sampler(config, hold_out(config, split.train, seed)[0])


def build_batches(config: config_dict.ConfigDict, run_data: RunData, sampler: Sampler) -> EpochBatches:
    """Builds the batches of the training images."""
    return EpochBatches(
        run_data.train,
        run_data.preprocessing,
        sampler,
        steps_per_epoch=config.train.steps_per_epoch or None,
        seed=config.seed,
        augmentation=run_data.augmentation,
        labels=run_data.train.levels() if has_levels(config) else None,
    )


def build_evaluations(config: config_dict.ConfigDict, run_data: RunData) -> list[RetrievalEvaluation]:
    """Builds the evaluations of the held-out part, if there is one, and of the test classes."""
    return [
        _evaluation(config, run_data, images, prefix, gallery)
        for images, prefix, gallery in (
            (run_data.validation, "val_", None),
            (run_data.test, "test_", run_data.gallery),
        )
        if images is not None
    ]


def _evaluation(config, run_data, images, prefix, gallery):
    searched = {}
    if gallery is not None:
        searched = {
            "gallery_images": evaluation_batches(gallery, run_data.preprocessing, cache=None),
            "gallery_labels": gallery.labels,
        }
    return RetrievalEvaluation(
        evaluation_batches(images, run_data.preprocessing, cache=None),
        images.labels,
        every=config.eval.every or config.train.epochs,
        prefix=prefix,
        ks=config.eval.ks,
        **searched,
    )


def _objective(config, name, run_data, relevance=()):
    uses_classes = objectives.lookup(name).uses_classes
    settings = dict(config.objective[name])
    if "miner" in settings:
        settings["miner"] = mining.get(settings["miner"], **config.miner.get(settings["miner"], {}))
    if "seed" in objectives.settings(name):
        settings["seed"] = config.seed
    if uses_classes:
        settings["num_classes"] = run_data.train.num_classes
    if relevance and "relevance" in settings:
        settings["relevance"] = settings["relevance"] or relevance
    return objectives.get(name, **settings)
