"""Reads and writes `history.csv`, the logs of a run by epoch."""

import csv
import os
from collections.abc import Mapping, Sequence
from typing import Any

from s2sd_tf.files import local_path, replacing

NAME = "history.csv"
# Columns with times, which differ between two identical runs.
TIMES = (
    "input_seconds",
    "compute_seconds",
    "evaluation_seconds",
    "refresh_seconds",
    "checkpoint_seconds",
    "images_per_second",
)


def read_history(workdir: str | os.PathLike) -> list[dict[str, float]]:
    """Reads the logs of a run, one dict per epoch. A value that an epoch did not log is missing from its dict."""
    with open(os.path.join(local_path("workdir", workdir), NAME), newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def write_history(workdir: str | os.PathLike, history: Sequence[Mapping[str, Any]]) -> None:
    """Writes the logs of a run, one row per epoch, atomically. A value that an epoch did not log is left empty."""
    columns = list(dict.fromkeys(key for row in history for key in row))
    with replacing(os.path.join(workdir, NAME)) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(history)
