"""What the studies on Omniglot share: the runs' flags, the rows' cells, and the files of results."""

import os
import platform

from s2sd_tf.files import replacing, write_json

METRICS = ("recall@1", "recall@2", "recall@4", "recall@8", "map@r")
KINDS = {"plain": "plain objective", "s2sd": "with S2SD"}
COLORS = {"plain": "#7f8c8d", "s2sd": "#1f5fa8"}

_HERE = os.path.dirname(os.path.abspath(__file__))
RESULTS = os.path.join(_HERE, "results")


def arguments(data_dir, dim, kind, seed):
    """Flags of `s2sd-train` for one run of configs/omniglot.py, plain or with S2SD."""
    return [
        f"--config={os.path.join(_HERE, '..', 'configs', 'omniglot.py')}:{'plain' if kind == 'plain' else 'msdfa'}",
        f"--config.data.root={data_dir}",
        f"--config.model.embedding_dim={dim}",
        f"--config.seed={seed}",
        "--config.train.threads=1",
    ]


def table(heads, rows, names_of, gain_of):
    """Lines of a markdown table: the columns `heads`, every metric, and what S2SD gains in recall@1.

    Args:
        heads: list of str.
        rows: list of dicts from metric to `(mean, deviation)`, with the key "kind".
        names_of: function of a row to the cells under `heads`.
        gain_of: function of a row with S2SD to its gain in percent.
    """
    head = [*heads, *METRICS, "gain in recall@1"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [f"{100 * row[metric][0]:.1f} ± {100 * row[metric][1]:.1f}" for metric in METRICS]
        gain = f"{gain_of(row):+.1f}" if row["kind"] == "s2sd" else ""
        lines.append(f"| {' | '.join([*names_of(row), *cells, gain])} |")
    return lines


def write(folder, name, lines, rows, results, workdir, **settings):
    """Writes `name`.json and `name`.md into `folder`.

    Args:
        folder, name: str.
        lines: lines of the table.
        rows: list of dicts, means over runs.
        results: dict from a run's folder to its results.
        workdir: folder of all runs.
        **settings: what else the JSON should tell.
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
