"""Shared by the Omniglot studies: the flags of runs, the tables, and the files with results."""

import os
import platform

from s2sd_tf.files import replacing, write_json

METRICS = ("recall@1", "recall@2", "recall@4", "recall@8", "map@r")
KINDS = {"plain": "plain objective", "s2sd": "with S2SD"}
COLORS = {"plain": "#7f8c8d", "s2sd": "#1f5fa8"}

_HERE = os.path.dirname(os.path.abspath(__file__))
RESULTS = os.path.join(_HERE, "results")


def arguments(data_dir, dim, kind, seed):
    """Returns the flags of `s2sd-train` for one run of configs/omniglot.py, plain or with S2SD."""
    return [
        f"--config={os.path.join(_HERE, '..', 'configs', 'omniglot.py')}:{'plain' if kind == 'plain' else 'msdfa'}",
        f"--config.data.root={data_dir}",
        f"--config.model.embedding_dim={dim}",
        f"--config.seed={seed}",
        "--config.train.threads=1",
    ]


def table(heads, rows, names_of, gain_of):
    """Returns the lines of a Markdown table: the columns `heads`, every metric, and the gain in recall@1.

    Args:
        heads: names of the first columns.
        rows: list of dicts from metric to `(mean, deviation)`, which also have the key "kind", "plain" for the
            rows without a gain.
        names_of: function from a row to its cells under `heads`.
        gain_of: function from another row to its gain in percentage points.
    """
    head = [*heads, *METRICS, "gain in recall@1"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [f"{100 * row[metric][0]:.1f} ± {100 * row[metric][1]:.1f}" for metric in METRICS]
        gain = f"{gain_of(row):+.1f}" if row["kind"] != "plain" else ""
        lines.append(f"| {' | '.join([*names_of(row), *cells, gain])} |")
    return lines


def write(folder, name, lines, rows, results, workdir, **settings):
    """Writes `name`.json and `name`.md into `folder`.

    Args:
        folder: folder to write to.
        name: file name without extension.
        lines: lines of the table.
        rows: list of dicts with means over runs.
        results: dict from each run's folder to its results.
        workdir: folder of all runs.
        **settings: further entries of the JSON.
    """
    versions = next(iter(results.values()))["versions"]
    content = {
        "rows": rows,
        **settings,
        "versions": {**versions, "python": platform.python_version()},
        "runs": {os.path.relpath(run, workdir): result["test"]["exact"] for run, result in results.items()},
    }
    write_json(os.path.join(folder, f"{name}.json"), content)
    with replacing(os.path.join(folder, f"{name}.md")) as path, open(path, "w") as file:
        file.write("\n".join(lines) + "\n")
