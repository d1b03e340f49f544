"""The flag of the config file."""

from absl import flags
from ml_collections import config_flags


def define():
    """Defines `--config`; the result goes to `value`."""
    flag = config_flags.DEFINE_config_file(
        "config",
        None,
        "Config file, its options after a colon (published.py:cub200,512); --config.key=value changes a key of it.",
        # For the section that takes any key; the rest is locked by `default_config`, or checked by `resolve`.
        lock_config=False,
        accept_new_attributes=True,
    )
    flags.mark_flag_as_required("config")
    return flag


def value(flag):
    """The `ConfigDict` of the flag.

    Raises:
        ValueError: the file cannot be loaded.
    """
    try:
        # ml_collections puts an error of loading off to the first look into the config.
        flag.value.to_json()
    except OSError as error:
        raise ValueError(f"config: {error}") from error
    return flag.value
