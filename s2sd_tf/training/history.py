"""The logs of a run's epochs, as a CSV file."""

import csv
import os

from s2sd_tf.files import replacing

NAME = "history.csv"
# Columns that a run does not reproduce: what took how long.
TIMES = (
    "input_seconds",
    "compute_seconds",
    "evaluation_seconds",
    "refresh_seconds",
    "checkpoint_seconds",
    "images_per_second",
)


def read_history(workdir):
    """The epochs' logs of a run: a list of dicts of floats, without what an epoch did not log."""
    with open(os.path.join(workdir, NAME), newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def write_history(workdir, history):
    """Writes the epochs' logs, whole or not at all; what an epoch did not log is empty."""
    columns = list(dict.fromkeys(key for row in history for key in row))
    with replacing(os.path.join(workdir, NAME)) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(history)
