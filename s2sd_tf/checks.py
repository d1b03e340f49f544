"""Argument checks. Each error names the argument, what was expected and what was received."""

import difflib
import math
import numbers
import os
from collections.abc import Collection, Iterable
from typing import Any


def check_number(argument: str, value: Any, wanted: str = "a finite number") -> None:
    """Raises ValueError unless `value` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"{argument}: expected {wanted}. Received: {value!r}")


def check_at_least(argument: str, value: Any, least: float) -> None:
    """Raises ValueError unless `value` is a finite number >= `least`."""
    wanted = f"a number >= {least}"
    check_number(argument, value, wanted)
    if value < least:
        raise ValueError(f"{argument}: expected {wanted}. Received: {value!r}")


def check_above(argument: str, value: Any, limit: float) -> None:
    """Raises ValueError unless `value` is a finite number > `limit`."""
    wanted = f"a number > {limit}"
    check_number(argument, value, wanted)
    if value <= limit:
        raise ValueError(f"{argument}: expected {wanted}. Received: {value!r}")


def check_within(argument: str, value: Any, low: float, high: float) -> None:
    """Raises ValueError unless `value` is a number in [low, high]."""
    wanted = f"a number in [{low}, {high}]"
    check_number(argument, value, wanted)
    if not low <= value <= high:
        raise ValueError(f"{argument}: expected {wanted}. Received: {value!r}")


def check_bool(argument: str, value: Any) -> None:
    """Raises ValueError unless `value` is a bool."""
    if not isinstance(value, bool):
        raise ValueError(f"{argument}: expected a bool. Received: {value!r}")


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Returns "; did you mean ...?" with the names closest to `name`, or "" if none is close."""
    close = difflib.get_close_matches(name, names, 2)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def check_choice(argument: str, value: Any, choices: Collection) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(
            f"{argument}: expected one of {choices}. Received: {value!r}{did_you_mean(str(value), choices)}"
        )


def checked_int(argument: str, value: Any, least: int) -> int:
    """Returns `value` as an int.

    Raises:
        ValueError: not an int, or below `least`.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"{argument}: expected an int >= {least}. Received: {value!r}")
    return int(value)


def check_file_to_write(argument: str, path: str | os.PathLike) -> None:
    """Raises ValueError if a file cannot be written to `path`: it is a folder, or the folder cannot be written to."""
    if os.path.isdir(path):
        raise ValueError(f"{argument}: expected a file to write. Received: {os.fspath(path)!r}, which is a folder")
    _check_parent(argument, path)


def check_folder_to_write(argument: str, path: str | os.PathLike) -> None:
    """Raises ValueError if a folder cannot be made or written at `path`."""
    if os.path.lexists(path) and not os.path.isdir(path):
        raise ValueError(f"{argument}: expected a folder to write. Received: {os.fspath(path)!r}, which is a file")
    _check_parent(argument, path)


def _check_parent(argument, path):
    folder = os.path.dirname(os.path.abspath(path))
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        reason = "not writable" if os.path.isdir(folder) else "not a folder"
        raise ValueError(
            f"{argument}: expected a path to write. Received: {os.fspath(path)!r}, where {folder!r} is {reason}"
        )
