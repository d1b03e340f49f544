"""Checks of numbers that users hand over: the error names the argument, what was expected and what was received."""

import numbers


def check_at_least(argument, value, least):
    """Raises ValueError where a number is below `least`."""
    if isinstance(value, bool) or not value >= least:
        raise ValueError(f"{argument}: expected a number >= {least}. Received: {value!r}")


def check_above(argument, value, limit):
    """Raises ValueError where a number is not above `limit`."""
    if isinstance(value, bool) or not value > limit:
        raise ValueError(f"{argument}: expected a number > {limit}. Received: {value!r}")


def checked_int(argument, value, least):
    """`value` as an int.

    Raises:
        ValueError: no int, or below `least`.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"{argument}: expected an int >= {least}. Received: {value!r}")
    return int(value)
