"""The configuration of a training run: all keys, with their defaults."""

import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

from s2sd_tf import mining, objectives
from s2sd_tf.checks import check_choice, check_number, checked_int, did_you_mean
from s2sd_tf.data import augmentation, datasets, samplers
from s2sd_tf.files import local_path
from s2sd_tf.losses import S2SDLoss
from s2sd_tf.models import S2SDModel, preset, updates
from s2sd_tf.models.backbones.hub import TOKENS
from s2sd_tf.registry import constructor_arguments
from s2sd_tf.training import optimizers

# Settings of objectives, samplers and the loss that the run sets itself.
_GIVEN_BY_THE_RUN = (
    "num_classes",
    "seed",
    "name",
    "trainable",
    "dtype",
    "batch_size",
    "classes_per_batch",
    "samples_per_class",
    "external_teachers",
)
# The sections that accept any key.
FREE = ("optimizer.settings", "data.augmentation_settings", "model.learning_rate_multipliers")
# The sections with one section per name in a registry.
REGISTRIES = {"data": datasets, "sampler": samplers, "objective": objectives, "miner": mining}
# The sections, in the order of a run.
SECTIONS = ("data", "sampler", "model", "objective", "miner", "s2sd", "optimizer", "train", "eval")
# The values that leave a key open: `plan` then chooses one that suits the images found.
AUTO: dict[str, Any] = {
    "data.image_size": -1,
    "data.resize_size": -1,
    "data.augmentation": "auto",
    "data.validation_classes": -1,
    "data.validation_fraction": -1.0,
    "data.classes_per_batch": -1,
    "data.samples_per_class": -1,
    "model.backbone": "auto",
    "model.weights": "auto",
    "model.frozen_bn": "auto",
    "model.learning_rate_multipliers.heads": -1.0,
    "s2sd.distill_weight": -1.0,
    "s2sd.feature_distill_weight": -1.0,
    "s2sd.distill_warmup_steps": -1,
    "s2sd.feature_distill_delay": -1,
    "s2sd.feature_distill_warmup_steps": -1,
    "optimizer.learning_rate": -1.0,
    "train.epochs": -1,
    "train.steps_per_epoch": -1,
    "eval.every": -1,
}
# The keys that are not arguments of a class or of a data set: default and meaning.
KEYS: dict[str, tuple[Any, str]] = {
    "seed": (0, "Seed of everything random: initial weights, batches, miners."),
    "data.name": ("digits", "Name of the data set; `s2sd-train --list=datasets` lists them."),
    "data.root": ("", 'Folder with the data; not used by "digits". "omniglot" comes with the package, and "" is that.'),
    "data.exclude": (
        "",
        "Text file of images to leave out, one path or end of a path per line, such as the exclude.txt of s2sd-audit; "
        '"": none. Only for data sets of image files.',
    ),
    "data.teachers": (
        (),
        "Teachers from outside: .npy files, each a float matrix with a row for each training image, in the data set's "
        "order, or for each training class, in the order of the names. See config.s2sd.external_distill_weight.",
    ),
    "data.image_size": (28, 'Size of the model\'s input in pixels; not used by "digits".'),
    "data.channels": (3, '1 or 3, the channels of an image; not used by "digits" and "omniglot".'),
    "data.resize_size": (
        0,
        "Length to which the shorter side is scaled before the crop to image_size; 0: no crop. Not used by "
        '"digits" and "omniglot".',
    ),
    "data.invert": (False, 'Whether to invert the images; not used by "digits" and "omniglot".'),
    "data.augmentation": (
        "",
        'Random crops, flips and colours of training images: "" for none, or "base", "adv", "big" (its image_size is '
        '256), "red", "mild", "rand", "flip"; see `s2sd_tf.data.augmentation.preset`.',
    ),
    "data.augmentation_settings": (
        {},
        "Settings of `s2sd_tf.data.Augmentation` that override the preset: rand_augment, magnitude, scale, ...",
    ),
    "data.validation_classes": (
        0,
        "Number of training classes held out to choose the best checkpoint; 0: train on all, and the last one is the "
        "best.",
    ),
    "data.validation_fraction": (
        0.0,
        "Instead of classes: the fraction of the images of every training class to hold out.",
    ),
    "data.classes_per_batch": (4, "A batch has P classes with M images each: P."),
    "data.samples_per_class": (16, "A batch has P classes with M images each: M."),
    "sampler.name": ("class_balanced", "How batches are drawn; `s2sd-train --list=samplers` lists the names."),
    "model.backbone": ("conv_blocks", "Name of the backbone; `s2sd-train --list=backbones` lists them."),
    "model.weights": (
        "",
        'Initial weights of the backbone: "" random; "imagenet" from Keras; "preset" for "hub:<preset>"; or a file '
        "with Keras weights or a PyTorch state dict.",
    ),
    "model.frozen_bn": (
        "",
        'Frozen part of BatchNorm in the backbone: "" nothing; "statistics" as published; "all" also its weights.',
    ),
    "model.filters": ((64, 64, 64, 64), 'Only for "conv_blocks": channels of each block.'),
    "model.pools": (4, 'Only for "conv_blocks": number of blocks that halve the resolution.'),
    "model.tokens": (
        "grid",
        'Only for "hub:<preset>": what a transformer outputs. "grid": the tokens of its patches, which are pooled; '
        '"class": its class token, or what it pools itself.',
    ),
    "model.embedding_dim": (128, ">= 1, dimension of the base embedding."),
    "objective.name": ("multi_similarity", "Name of the objective; `s2sd-train --list=objectives` lists them."),
    "s2sd.target_objective": ("multi_similarity", 'Objective of the targets; "": the same as for the base embedding.'),
    "s2sd.diagnostics": (
        True,
        "Log how spread out the embeddings are and the norm of the gradients, and warn if embeddings collapse.",
    ),
    "optimizer.name": (
        "adam",
        'Class name of a Keras optimizer; "TorchAdam", Adam with epsilon where PyTorch has it; on the classic stack '
        'also "addons/lamb" (LAMB of tensorflow-addons) and so on.',
    ),
    "optimizer.learning_rate": (1e-3, "The learning rate."),
    "optimizer.schedule.name": (
        "constant",
        'Learning rate after the warm-up: "constant"; "multi_step" multiplies it by gamma after each epoch in '
        'milestones; "cosine" decreases it to final_fraction of its value at the end.',
    ),
    "optimizer.schedule.warmup_epochs": (0.0, "Epochs in which the learning rate grows linearly from 0."),
    "optimizer.schedule.milestones": ((), 'Only for "multi_step": the epochs.'),
    "optimizer.schedule.gamma": (0.3, 'Only for "multi_step": the factor.'),
    "optimizer.schedule.final_fraction": (0.0, 'Only for "cosine": the fraction.'),
    "optimizer.settings": (
        {},
        "More arguments of the optimizer (weight_decay, beta_1, momentum, clipnorm, use_ema, ...). They are checked "
        "when the optimizer is created. With use_ema, the averaged weights are evaluated and exported, and the best "
        "checkpoint is chosen by them.",
    ),
    "train.epochs": (20, "Number of epochs."),
    "train.steps_per_epoch": (0, "Steps in an epoch; 0: one pass over the training images."),
    "train.checkpoint_every": (1, "Epochs between checkpoints."),
    "train.deterministic": (True, "Whether the same seed and number of threads give bit-identical weights."),
    "train.threads": (0, "Threads for TensorFlow; 0: one per core."),
    "train.checkpoints_kept": (2, "Number of latest checkpoints to keep, besides the best one."),
    "train.profile": (
        (),
        "(first, last): the steps to profile for TensorBoard, counted from 1 since the program started; (): none.",
    ),
    "train.precision": (
        "float32",
        '"float32", or "mixed_float16" or "mixed_bfloat16": layers compute in 16 bits, weights and losses stay in 32 '
        "bits.",
    ),
    "train.jit_compile": (False, "Whether to compile the training step with XLA."),
    "eval.every": (
        1,
        "Epochs between evaluations on the held-out part and the test classes; 0: only after the last epoch.",
    ),
    "eval.ks": ((1, 2, 4, 8), "The k of recall@k."),
    "eval.select_by": ("map@r", "The metric on held-out classes by which the best checkpoint is chosen."),
}


def default_config() -> config_dict.ConfigDict:
    """Returns a locked config with all keys and their defaults. A config file changes some of them and returns it.

    Other keys are an error, except in sections that accept any key, such as `optimizer.settings`.
    `s2sd-train --config=<file> --print_config` explains the keys in use.
    """
    config = ml_collections.ConfigDict()
    for name in SECTIONS:
        config[name] = ml_collections.ConfigDict()
    config.optimizer.schedule = ml_collections.ConfigDict()
    # The settings of each data set, sampler, objective and miner are in the section with its name.
    for section, registry in REGISTRIES.items():
        for name in registry.names():
            config[section][name] = _own(registry.settings(name))
    # `preset_config` sets a variant of the paper. The plain objective has no `target_dims` and no `feature_distill`.
    config.s2sd.update(_own(constructor_arguments([S2SDLoss]), without=("objective", "target_objective")))
    config.model.update(_own(constructor_arguments([S2SDModel]), without=("backbone", "embedding_dim", "loss")))
    config.model.learning_rate_multipliers = dict.fromkeys(updates.GROUPS, 1.0)
    for path, (value, _) in KEYS.items():
        *sections, key = path.split(".")
        functools.reduce(getattr, sections, config)[key] = value
    config.lock()
    for path in FREE:
        functools.reduce(getattr, path.split("."), config).unlock()
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


def automatic(config: config_dict.ConfigDict) -> config_dict.ConfigDict:
    """Leaves the keys of `config` open that a run can choose to suit its images, and returns it. See `AUTO`."""
    config.update_from_flattened_dict(AUTO)
    return config


def resolve(config: config_dict.ConfigDict) -> config_dict.FrozenConfigDict:
    """Checks what no later step of a run checks, and returns a frozen copy of `config`.

    Raises:
        ValueError: an unknown key, a missing key, or a value out of range; the message names it.
    """
    known = default_config()
    _check_keys(config, known, "config")
    config = config_dict.FrozenConfigDict(_with_local_paths(json.loads(config.to_json())))
    for key, least in [
        ("data.validation_classes", 0),
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
        if not is_auto(config, key):
            checked_int(f"config.{key}", config[section][name], least)
    if checked_int("config.seed", config.seed, 0) >= 2**31:
        raise ValueError(f"config.seed: expected an int below 2^31. Received: {config.seed!r}")
    if not isinstance(config.train.jit_compile, bool):
        raise ValueError(f"config.train.jit_compile: expected True or False. Received: {config.train.jit_compile!r}")
    fraction = config.data.validation_fraction
    check_number("config.data.validation_fraction", fraction, "a number in [0, 1)")
    if not 0 <= fraction < 1 and not is_auto(config, "data.validation_fraction"):
        raise ValueError(f"config.data.validation_fraction: expected a number in [0, 1). Received: {fraction!r}")
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
        ("model.tokens", TOKENS),
        ("model.frozen_bn", ["", "statistics", "all"]),
        ("train.precision", ["float32", "mixed_float16", "mixed_bfloat16"]),
    ]:
        if not is_auto(config, key):
            check_choice(f"config.{key}", functools.reduce(getattr, key.split("."), config), list(known_names))
    if config.data.validation_classes > 0 and config.data.validation_fraction > 0:
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
    check_choice("config.eval.select_by", config.eval.select_by, names)
    return config


def is_auto(config: Mapping[str, Any], key: str) -> bool:
    """Whether a config leaves `key` open, see `AUTO`."""
    *sections, name = key.split(".")
    section = functools.reduce(lambda found, part: found[part], sections, config)
    return key in AUTO and section.get(name) == AUTO[key]


def _with_local_paths(config):
    """Expands `~` in the paths of a config, and refuses URLs, see `local_path`."""
    sections = {"config.data": (config["data"], ["root", "exclude"]), "config.model": (config["model"], ["weights"])}
    for name in datasets.names():
        sections[f"config.data.{name}"] = (config["data"][name], datasets.path_settings(name))
    for path, (section, keys) in sections.items():
        texts = [key for key in keys if isinstance(section[key], str)]
        section.update({key: local_path(f"{path}.{key}", section[key], empty=True) for key in texts})
    # A list, like all sequences of a config from JSON.
    config["data"]["teachers"] = [local_path("config.data.teachers", path) for path in config["data"]["teachers"]]
    return config


def similar_keys(name: str) -> str:
    """Returns "; did you mean ...?" with the keys of a config that are like `name`, such as "embeding_dim", or ""."""
    paths = [path for path, _ in leaves(default_config().to_dict())]
    last = name.split(".")[-1]
    same = [".".join(("config", *path)) for path in paths if path[-1] == last]
    if 0 < len(same) <= 3:
        return f"; did you mean {' or '.join(same)}?"
    return did_you_mean(last, {path[-1] for path in paths})


def leaves(section: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields `(path, value)` for every key of a config as a dict. A section that accepts any key is one value."""
    for key, value in section.items():
        here = (*path, key)
        if isinstance(value, Mapping) and ".".join(here) not in FREE:
            yield from leaves(value, here)
        else:
            yield here, value


def unknown_keys(config: Mapping[str, Any]) -> list[str]:
    """The keys of a config that `default_config` does not have, such as "model.depth".

    Sections of unknown data sets, samplers, objectives and miners do not count: if a run uses one, its name causes an
    error.
    """

    def find(section, known, path):
        for key, value in section.items():
            here = f"{path}.{key}" if path else key
            if key not in known:
                if not (path in REGISTRIES and isinstance(value, dict)):
                    yield here
            elif isinstance(value, dict) and here not in FREE:
                yield from find(value, known[key], here)

    return sorted(find(config, default_config().to_dict(), ""))


def _own(arguments, without=()):
    """Returns the arguments that the run does not set itself."""
    return {key: value for key, value in arguments.items() if key not in (*without, *_GIVEN_BY_THE_RUN)}


def _check_keys(config, known, path):
    if path.removeprefix("config.") in FREE:
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
