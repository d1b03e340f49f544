"""The flags of config files."""

import runpy
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from s2sd_tf.cli import app

# Each flag belongs to the program that defines it by a function of this file.
flags.disclaim_key_flags()


def define() -> Any:
    """Defines `--config`; pass the result to `value`."""
    return config_flags.DEFINE_config_file(
        "config",
        None,
        "Config file, with options after a colon (published.py:cub200,512). --config.key=value changes a key.",
        # For the sections that accept any key. `default_config` locks the rest, and `resolve` checks it.
        lock_config=False,
        accept_new_attributes=True,
    )


def as_arguments(flag: Any) -> list[str]:
    """Returns command-line arguments for another process that give the config of the flag, with all changed keys."""
    parsed = flags.FLAGS[flag.name]
    changed = config_flags.get_override_values(parsed)
    file = config_flags.get_config_filename(parsed)
    return [f"--config={file}", *(f"--config.{key}={value}" for key, value in changed.items())]


def define_register() -> Any:
    """Defines `--register`; pass the result to `register`."""
    return app.define_path(
        "register", None, "Python file to run first, which registers your own objectives: the run's config file."
    )


def register(flag: Any) -> None:
    """Runs the file of the flag, if it is given.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if flag.value:
        runpy.run_path(flag.value)


def value(flag: Any) -> ConfigDict:
    """Returns the config of the flag.

    Raises:
        ValueError: there is none, or it cannot be loaded.
    """
    if flag.value is None and not flag.present:
        raise ValueError("--config: expected a config file. Received: none")
    try:
        # ml_collections raises an error of loading only when the config is first used.
        flag.value.to_json()
    except OSError as error:
        raise ValueError(f"config: {error}") from error
    except AttributeError as error:
        raise ValueError(
            "--config: expected a file whose get_config returns a config, made by s2sd_tf.training.default_config. "
            f"Received: one that returns {type(flag.value).__name__}"
        ) from error
    return flag.value
