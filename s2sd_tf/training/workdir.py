"""Checks the work directory of a run, and loads a finished run."""

import json
import os
from typing import Any

from ml_collections import config_dict

from s2sd_tf.data import Preprocessing
from s2sd_tf.export import load_model
from s2sd_tf.files import has_content, local_path
from s2sd_tf.models import S2SDModel
from s2sd_tf.training.config import default_config, unknown_keys
from s2sd_tf.untrusted import read_json_object, reading


def check_workdir(config: config_dict.ConfigDict, workdir: str | os.PathLike) -> None:
    """Raises ValueError if `workdir` was written by a different config, or is not a work directory.

    More `train.epochs` than there are the same config, unless the learning rate depends on them.
    """
    path = os.path.join(workdir, "config.json")
    if os.path.exists(path):
        there = config_dict.FrozenConfigDict(stored_config(path)).to_dict()
        here = config.to_dict()
        grows, by_epochs = here["train"]["epochs"] > there["train"]["epochs"], there["optimizer"]["schedule"]["name"]
        if grows and by_epochs != "cosine":
            there["train"]["epochs"] = here["train"]["epochs"]
        differing = sorted(_differences(_used(there), _used(here)))
        if differing and grows and by_epochs == "cosine":
            differing.append("and the cosine schedule depends on the number of epochs")
        if differing:
            raise ValueError(
                f"workdir: expected a new folder or one written by this config. Received: {workdir!r}, whose config "
                f"differs in {', '.join(differing)}"
            )
    elif os.path.exists(workdir) and (not os.path.isdir(workdir) or has_content(workdir)):
        raise ValueError(f"workdir: expected a new or empty folder, or the folder of a run. Received: {workdir!r}")


def load_run(workdir: str | os.PathLike) -> tuple[S2SDModel, config_dict.FrozenConfigDict, Preprocessing]:
    """Loads a finished run.

    Returns:
        `(model, config, preprocessing)`; the model is the chosen one, `best.keras`.

    Raises:
        FileNotFoundError: `workdir` holds no finished run.
    """
    workdir = local_path("workdir", workdir)
    paths = {name: os.path.join(workdir, name) for name in ("config.json", "preprocessing.json", "best.keras")}
    for name, path in paths.items():
        if not os.path.exists(path):
            raise FileNotFoundError(f"workdir: expected a finished run, with {name}. Received: {workdir!r}")
    config = config_dict.FrozenConfigDict(stored_config(paths["config.json"]))
    preprocessing = Preprocessing.load(paths["preprocessing.json"])
    return load_model(paths["best.keras"]), config, preprocessing


def stored_config(path: str | os.PathLike) -> dict[str, Any]:
    """Reads the config of a run, as a dict; keys that were added since the run started get their defaults.

    Raises:
        ValueError: the file is not a config, or has keys that no longer exist.
    """

    def fill(defaults, stored):
        for key, value in defaults.items():
            if not isinstance(value, dict):
                stored.setdefault(key, value)
            elif isinstance(stored.setdefault(key, value), dict):
                fill(value, stored[key])
            else:
                raise ValueError(f"{key} is {stored[key]!r}, not a section")
        return stored

    stored = read_json_object(path)
    with reading(path, "the config of a run"):
        config = config_dict.ConfigDict(fill(json.loads(default_config().to_json()), stored)).to_dict()
    unknown = unknown_keys(config)
    if unknown:
        raise ValueError(
            f"{path}: expected the keys of this version's configs. Received: {', '.join(unknown)}, from a run of an "
            "older version. Start in a new folder"
        )
    return config


def _used(config):
    """The config without the settings of data sets, objectives, miners and samplers that the run does not use.

    So a run can still be resumed after new ones were added.
    """
    config = dict(config)
    objective, sampler = config["objective"], config.get("sampler", {})
    names = {objective["name"], config["s2sd"]["target_objective"] or objective["name"]}
    config["objective"] = {"name": objective["name"], **{name: objective.get(name) for name in names}}
    config["sampler"] = {key: sampler.get(key) for key in ("name", sampler.get("name"))}
    sections = [settings for settings in config["objective"].values() if isinstance(settings, dict)]
    miners = {settings["miner"] for settings in sections if "miner" in settings}
    config["miner"] = {name: config.get("miner", {}).get(name) for name in miners}
    kept = (config["data"]["name"], "augmentation_settings")
    config["data"] = {key: value for key, value in config["data"].items() if key in kept or not isinstance(value, dict)}
    return config


def _differences(one, other, prefix=""):
    for key in one.keys() | other.keys():
        a, b = one.get(key), other.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key} ({a!r} there, {b!r} here)"
