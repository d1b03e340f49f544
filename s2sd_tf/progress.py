"""Progress on a terminal. Nothing is written where standard error is a file or a pipe."""

import contextlib
from collections.abc import Iterator

from tqdm import tqdm


@contextlib.contextmanager
def stage(text: str) -> Iterator[None]:
    """Shows `text` while the block runs, for work without a count."""
    with tqdm(desc=text, bar_format="{desc} ...", leave=False, disable=None):
        yield


def steps(total: int | None, text: str, unit: str) -> tqdm:
    """Returns a progress bar of `total` units, which disappears at the end."""
    return tqdm(total=total, desc=text, unit=unit, leave=False, disable=None)
