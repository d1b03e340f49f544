"""What the keys of a config mean."""

import inspect
import textwrap
from collections.abc import Mapping
from typing import Any

import docstring_parser
from ml_collections import ConfigDict

from s2sd_tf import mining, objectives
from s2sd_tf.data import datasets, samplers
from s2sd_tf.losses import S2SDLoss
from s2sd_tf.models import S2SDModel
from s2sd_tf.training.config import KEYS, REGISTRIES, SECTIONS, leaves

_INTRODUCTION = (
    "Sections of data sets, samplers, objectives and miners that this config does not choose are left out; "
    's2sd-train --list shows their names. Values of -1 and "auto" are chosen when a run starts, to suit its images.'
)


def explain(config: ConfigDict) -> str:
    """Returns a config as Python assignments, each below a comment on what the key does.

    Args:
        config: has the keys of `default_config`.
    """
    values = dict(leaves(config.to_dict()))
    meanings = {tuple(path.split(".")): meaning for path, (_, meaning) in KEYS.items()}
    chosen = _chosen(config.to_dict())
    for section, source in chosen.items():
        for name, meaning in _arguments(source).items():
            meanings.setdefault((*section, name), meaning)
    order = list(meanings)
    lines = _comment(_INTRODUCTION)
    for section in ("", *SECTIONS):
        # In the order in which they are documented.
        paths = [path for path in values if section == (path[0] if len(path) > 1 else "")]
        lines.append("")
        for path in sorted(paths, key=lambda path: order.index(path) if path in order else len(order)):
            if path[0] in REGISTRIES and len(path) == 3 and path[:2] not in chosen and path not in meanings:
                continue
            lines += _comment(meanings.get(path, ""))
            lines += _assignments(path, values[path])
    return "\n".join(lines) + "\n"


def _chosen(config):
    """Returns the sections whose keys are arguments, each with the class or function that has these arguments."""
    names = dict.fromkeys(filter(None, (config["objective"]["name"], config["s2sd"]["target_objective"])))
    miners = dict.fromkeys(filter(None, (config["objective"][name].get("miner") for name in names)))
    return {
        ("s2sd",): S2SDLoss,
        ("model",): S2SDModel,
        ("data", config["data"]["name"]): datasets.loader(config["data"]["name"]),
        ("sampler", config["sampler"]["name"]): samplers.lookup(config["sampler"]["name"]),
        **{("objective", name): objectives.lookup(name) for name in names},
        **{("miner", name): mining.lookup(name) for name in miners},
    }


def _arguments(source: Any) -> dict[str, str]:
    """Returns the descriptions of the arguments of a function, or of a class and its bases."""
    found: dict[str, str] = {}
    for item in inspect.getmro(source) if inspect.isclass(source) else [source]:
        for parameter in docstring_parser.parse(inspect.getdoc(item) or "", docstring_parser.Style.GOOGLE).params:
            for name in parameter.arg_name.split(", "):
                # A base class has the text that "see `Base`" refers to.
                if found.get(name, "see `").startswith("see `"):
                    found[name] = " ".join((parameter.description or "").split())
    return found


def _assignments(path, value):
    if not isinstance(value, Mapping) or not value:
        return [f"config{''.join(f'.{k}' if k.isidentifier() else f'[{k!r}]' for k in path)} = {value!r}"]
    return [line for key in value for line in _assignments((*path, key), value[key])]


def _comment(text):
    text = text[:1].upper() + text[1:]
    return textwrap.wrap(text, 120, initial_indent="# ", subsequent_indent="# ")
