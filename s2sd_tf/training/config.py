"""The configuration of a training run: all keys, with their defaults."""

import functools
import json
from collections.abc import Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

from s2sd_tf import mining, objectives
from s2sd_tf.checks import checked_int
from s2sd_tf.data import augmentation, datasets, samplers
from s2sd_tf.losses import S2SDLoss
from s2sd_tf.models import S2SDModel, preset, updates
from s2sd_tf.registry import constructor_arguments
from s2sd_tf.training import optimizers

# Settings of objectives and samplers that the run sets itself.
_GIVEN_BY_THE_RUN = (
    "num_classes",
    "seed",
    "name",
    "trainable",
    "dtype",
    "batch_size",
    "classes_per_batch",
    "samples_per_class",
)
# The sections that accept any key.
_FREE = ("config.optimizer.settings", "config.data.augmentation_settings", "config.model.learning_rate_multipliers")
# The sections with one section per name in a registry.
_REGISTRIES = ("config.data", "config.sampler", "config.objective", "config.miner")


def default_config() -> config_dict.ConfigDict:
    """Returns a locked config with all keys and their defaults. A config file changes some of them and returns it.

    Other keys are an error, except in sections that accept any key, such as `optimizer.settings`. The comments below
    are the reference for the keys.
    """
    config = ml_collections.ConfigDict()
    # Seed of everything random: initial weights, batches, miners.
    config.seed = 0

    config.data = ml_collections.ConfigDict()
    # Name of the data set. The settings of each data set are in the section with its name. They are arguments of its
    # function in `s2sd_tf.data`; see its docstring: `load_folder` for "folder", `load_cub200` for "cub200", ...
    config.data.name = "digits"
    # Folder with the data; not used by "digits".
    config.data.root = ""
    for name in datasets.names():
        config.data[name] = datasets.settings(name)
    # Size of the model's input in pixels; not used by "digits". The next three are not used by "digits" and "omniglot":
    # channels (1 or 3); length to which the shorter side is scaled before the centre crop (0: no crop); whether to
    # invert the image.
    config.data.image_size = 28
    config.data.channels = 3
    config.data.resize_size = 0
    config.data.invert = False
    # Random crops, flips and colours of training images: "" for none, or "base", "adv", "big" (its image_size is 256),
    # "red", "rand", "flip"; see `s2sd_tf.data.augmentation.preset`.
    config.data.augmentation = ""
    # Settings of `Augmentation` that override the preset (`rand_augment`, `magnitude`, `scale`, ...).
    config.data.augmentation_settings = ml_collections.ConfigDict()
    # Number of training classes held out to choose the best checkpoint; 0: train on all, and the last one is the best.
    config.data.validation_classes = 0
    # Instead of classes: the fraction of the images of every training class to hold out.
    config.data.validation_fraction = 0.0
    # A batch has P classes with M images each: P and M.
    config.data.classes_per_batch = 4
    config.data.samples_per_class = 16

    # `sampler.name` chooses how batches are drawn. The settings of each sampler are in the section with its name.
    config.sampler = ml_collections.ConfigDict({"name": "class_balanced"})
    for name in samplers.names():
        config.sampler[name] = _settings(samplers, name)

    config.model = ml_collections.ConfigDict()
    # One of `models.backbones.names()`.
    config.model.backbone = "conv_blocks"
    # Initial weights: "" random; "imagenet" from Keras; or a file with Keras weights or a PyTorch state dict.
    config.model.weights = ""
    # Frozen part of BatchNorm in the backbone: "" nothing; "statistics" as published; "all" also its weights.
    config.model.frozen_bn = ""
    # Only for "conv_blocks": channels of each block, and the number of blocks that halve the resolution.
    config.model.filters = (64, 64, 64, 64)
    config.model.pools = 4
    config.model.embedding_dim = 128
    # The other arguments of `S2SDModel`; see its docstring.
    config.model.update(
        _arguments(S2SDModel, without=("backbone", "embedding_dim", "loss", "learning_rate_multipliers"))
    )
    # Factors on the updates of groups of weights. More keys: "backbone/<shell pattern>" for layers of the backbone.
    # `'--config.model.learning_rate_multipliers["backbone/conv1*"]=0.0'` freezes the weights of the stem.
    config.model.learning_rate_multipliers = dict.fromkeys(updates.GROUPS, 1.0)

    # `objective.name` chooses the objective. The settings of each objective are in the section with its name.
    config.objective = ml_collections.ConfigDict({"name": "multi_similarity"})
    for name in objectives.names():
        config.objective[name] = _settings(objectives, name)

    # The setting `miner` of an objective names a miner. The settings of each miner are in the section with its name.
    config.miner = {name: _settings(mining, name) for name in mining.names()}

    # The arguments of `S2SDLoss`; see its docstring. `preset_config` sets a variant of the paper. The plain objective
    # has no `target_dims` and no `feature_distill`.
    config.s2sd = _arguments(S2SDLoss, without=("objective", "target_objective"))
    # Objective of the targets; empty: the same as for the base embedding.
    config.s2sd.target_objective = ""
    # Log a warning if embeddings collapse.
    config.s2sd.diagnostics = True

    config.optimizer = ml_collections.ConfigDict()
    # Class name of a Keras optimizer; on the classic stack also "addons/lamb" (LAMB of tensorflow-addons) and so on.
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 1e-3
    # Learning rate after a linear warm-up: "constant"; "multi_step" multiplies it by `gamma` after each epoch in
    # `milestones`; "cosine" decreases it to `final_fraction` of its value at the end.
    config.optimizer.schedule = ml_collections.ConfigDict({
        "name": "constant", "warmup_epochs": 0.0, "milestones": (), "gamma": 0.3, "final_fraction": 0.0
    })  # fmt: skip
    # More arguments of the optimizer (weight_decay, beta_1, momentum, clipnorm, use_ema, ...). Any key is accepted here
    # and checked when the optimizer is created. With use_ema, the averaged weights are evaluated and exported, and the
    # best checkpoint is chosen by them.
    config.optimizer.settings = ml_collections.ConfigDict()

    config.train = ml_collections.ConfigDict()
    config.train.epochs = 20
    # 0: one pass over the training images.
    config.train.steps_per_epoch = 0
    # Epochs between checkpoints.
    config.train.checkpoint_every = 1
    # The same seed and number of threads give bit-identical weights.
    config.train.deterministic = True
    # Threads for TensorFlow; 0: one per core.
    config.train.threads = 0
    # Number of latest checkpoints to keep, besides the best one.
    config.train.checkpoints_kept = 2
    # (first, last): the steps to profile for TensorBoard, counted from 1 since the program started; (): none.
    config.train.profile = ()
    # "float32", or "mixed_float16" or "mixed_bfloat16": layers compute in 16 bits, weights and losses stay in 32 bits.
    config.train.precision = "float32"
    # Compile the training step with XLA.
    config.train.jit_compile = False

    config.eval = ml_collections.ConfigDict()
    # Epochs between evaluations on the held-out part and the test classes; 0: only after the last epoch.
    config.eval.every = 1
    config.eval.ks = (1, 2, 4, 8)
    # The metric on held-out classes by which the best checkpoint is chosen.
    config.eval.select_by = "map@r"
    config.lock()
    config.optimizer.settings.unlock()
    config.data.augmentation_settings.unlock()
    config.model.learning_rate_multipliers.unlock()
    return preset_config(config, "msdfa")


def preset_config(config: config_dict.ConfigDict, name: str) -> config_dict.ConfigDict:
    """Sets `config` to a variant of the paper (see `s2sd_tf.preset`) and returns it. Other keys stay as they are."""
    settings = preset(name)
    config.s2sd.feature_distill = settings["feature_distill"]
    config.model.target_pooling = settings["target_pooling"]
    # Keep the largest dimensions of the config, as many as the variant has.
    dims = tuple(sorted(config.s2sd.target_dims))
    config.s2sd.target_dims = dims[max(0, len(dims) - len(settings["target_dims"])) :]
    return config


def resolve(config: config_dict.ConfigDict) -> config_dict.FrozenConfigDict:
    """Checks what no later step of a run checks, and returns a frozen copy of `config`.

    Raises:
        ValueError: an unknown key, a missing key, or a value out of range; the message names it.
    """
    known = default_config()
    _check_keys(config, known, "config")
    config = config_dict.FrozenConfigDict(json.loads(config.to_json()))
    for key, least in [
        ("data.classes_per_batch", 1),
        ("data.samples_per_class", 1),
        ("train.epochs", 1),
        ("train.steps_per_epoch", 0),
        ("train.checkpoint_every", 1),
        ("train.threads", 0),
        ("train.checkpoints_kept", 1),
        ("eval.every", 0),
    ]:
        section, name = key.split(".")
        checked_int(f"config.{key}", config[section][name], least)
    if checked_int("config.seed", config.seed, 0) >= 2**31:
        raise ValueError(f"config.seed: expected an int below 2^31. Received: {config.seed!r}")
    if not isinstance(config.train.jit_compile, bool):
        raise ValueError(f"config.train.jit_compile: expected True or False. Received: {config.train.jit_compile!r}")
    profile = config.train.profile
    if profile and not (
        len(profile) == 2 and all(type(step) is int for step in profile) and 1 <= profile[0] <= profile[1]
    ):
        raise ValueError(
            f"config.train.profile: expected (first, last) with 1 <= first <= last, or (). Received: {tuple(profile)!r}"
        )
    for key, known_names in [
        ("objective.name", [name for name in config.objective if name != "name"]),
        ("s2sd.target_objective", ["", *(name for name in config.objective if name != "name")]),
        ("sampler.name", samplers.names()),
        ("optimizer.schedule.name", optimizers.SCHEDULES),
        ("data.name", datasets.names()),
        ("data.augmentation", ["", *sorted(augmentation.PRESETS)]),
        ("model.frozen_bn", ["", "statistics", "all"]),
        ("train.precision", ["float32", "mixed_float16", "mixed_bfloat16"]),
    ]:
        value = functools.reduce(getattr, key.split("."), config)
        if value not in known_names:
            raise ValueError(f"config.{key}: expected one of {list(known_names)}. Received: {value!r}")
    if config.data.validation_classes and config.data.validation_fraction:
        raise ValueError(
            "config.data.validation_fraction: expected 0 together with validation_classes. "
            f"Received: {config.data.validation_fraction!r} and {config.data.validation_classes!r} classes"
        )
    if config.data.augmentation_settings and not config.data.augmentation:
        raise ValueError(
            "config.data.augmentation_settings: expected none without config.data.augmentation. "
            f"Received: {sorted(config.data.augmentation_settings)}"
        )
    names = ("precision@1", "r_precision", "map@r", *(f"recall@{k}" for k in config.eval.ks))
    if config.eval.select_by not in names:
        raise ValueError(f"config.eval.select_by: expected one of {names}. Received: {config.eval.select_by!r}")
    return config


def unknown_keys(config: Mapping[str, Any]) -> list[str]:
    """The keys of a config that `default_config` does not have, such as "model.depth".

    Sections of unknown data sets, samplers, objectives and miners do not count: if a run uses one, its name causes an
    error.
    """

    def find(section, known, path):
        for key, value in section.items():
            here = f"{path}.{key}"
            if key not in known:
                if not (path in _REGISTRIES and isinstance(value, dict)):
                    yield here.removeprefix("config.")
            elif isinstance(value, dict) and here not in _FREE:
                yield from find(value, known[key], here)

    return sorted(find(config, default_config().to_dict(), "config"))


def _arguments(cls, without):
    """A config section with the arguments of a constructor and their defaults."""
    arguments = constructor_arguments([cls])
    return ml_collections.ConfigDict(
        {key: value for key, value in arguments.items() if key not in (*without, *_GIVEN_BY_THE_RUN)}
    )


def _settings(registry, name):
    return {key: value for key, value in registry.settings(name).items() if key not in _GIVEN_BY_THE_RUN}


def _check_keys(config, known, path):
    if path in _FREE:
        return
    for key in config:
        if key not in known:
            raise ValueError(f"{path}: expected keys out of {sorted(known)}. Received: {key!r}")
    for key in known:
        if key not in config:
            raise ValueError(f"{path}: expected a key {key!r}. Received: {sorted(config)}")
        if isinstance(known[key], ml_collections.ConfigDict):
            if not hasattr(config[key], "keys"):
                raise ValueError(
                    f"{path}.{key}: expected a section with keys {sorted(known[key])}. Received: {config[key]!r}"
                )
            _check_keys(config[key], known[key], f"{path}.{key}")
