"""Checks of what users hand over: the error names the argument, what was expected and what was received."""

import math
import numbers
import os


def check_number(argument, value, wanted="a finite number"):
    """Raises ValueError where `value` is no finite number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"{argument}: expected {wanted}. Received: {value!r}")


def check_at_least(argument, value, least):
    """Raises ValueError where `value` is no finite number, or below `least`."""
    wanted = f"a number >= {least}"
    check_number(argument, value, wanted)
    if value < least:
        raise ValueError(f"{argument}: expected {wanted}. Received: {value!r}")


def check_above(argument, value, limit):
    """Raises ValueError where `value` is no finite number, or not above `limit`."""
    wanted = f"a number > {limit}"
    check_number(argument, value, wanted)
    if value <= limit:
        raise ValueError(f"{argument}: expected {wanted}. Received: {value!r}")


def check_within(argument, value, low, high):
    """Raises ValueError where `value` is no number in [low, high]."""
    wanted = f"a number in [{low}, {high}]"
    check_number(argument, value, wanted)
    if not low <= value <= high:
        raise ValueError(f"{argument}: expected {wanted}. Received: {value!r}")


def check_bool(argument, value):
    """Raises ValueError where `value` is no bool."""
    if not isinstance(value, bool):
        raise ValueError(f"{argument}: expected a bool. Received: {value!r}")


def check_choice(argument, value, choices):
    """Raises ValueError where `value` is none of `choices`."""
    if value not in choices:
        raise ValueError(f"{argument}: expected one of {choices}. Received: {value!r}")


def checked_int(argument, value, least):
    """`value` as an int.

    Raises:
        ValueError: no int, or below `least`.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"{argument}: expected an int >= {least}. Received: {value!r}")
    return int(value)


def check_file_to_write(argument, path):
    """Raises ValueError where a folder is at `path`, which a file is not to take the place of."""
    if os.path.isdir(path):
        raise ValueError(f"{argument}: expected a file to write. Received: {os.fspath(path)!r}, which is a folder")
