r"""How much S2SD gains on real images: Omniglot, plain objective against S2SD, at several embedding dimensions.

    python benchmarks/omniglot_s2sd.py --workdir=runs/omniglot_study

Trains `configs/omniglot.py` (136 characters to train on, 106 unseen ones to retrieve; 50 epochs of 24 batches of
28 x 4), plain and with S2SD: at dimension 16 with 5 seeds, at 4, 8, 32 and 64 with 3 seeds. Also trains the plain
objective at 512 dimensions with 3 seeds. Writes `omniglot_s2sd.json`, `.md` and `.png` into `--results`. Runs that are
already finished in `--workdir` are not trained again.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import app, flags
from matplotlib.figure import Figure
from omniglot_runs import COLORS, KINDS, RESULTS, arguments, table, write

from s2sd_tf.reporting import save_figure
from s2sd_tf.training.compare import run_all, summarize

_DATA_DIR = flags.DEFINE_string("data_dir", "", "Folder with Omniglot's archives; empty: those in the package.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/omniglot_study", "Folder for the runs.")
_RESULTS = flags.DEFINE_string("results", RESULTS, "Folder for the table and the plot.")
_DIMS = flags.DEFINE_list("dims", ["4", "8", "16", "32", "64"], "Embedding dimensions.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds per dimension.", lower_bound=1)
_MAIN_DIM = flags.DEFINE_integer("main_dim", 16, "The dimension that gets more seeds.")
_MAIN_SEEDS = flags.DEFINE_integer("main_seeds", 5, "Seeds at that dimension.", lower_bound=1)
_REFERENCE_DIM = flags.DEFINE_integer("reference_dim", 512, "Dimension of a plain model for comparison; 0: none.")
_JOBS = flags.DEFINE_integer("jobs", 0, "Parallel runs, one thread each; 0: one per core.", lower_bound=0)
_FLAGS = flags.DEFINE_multi_string("config_flags", [], "A flag for every run: --config_flags=--config.seed=7")


def main(_):
    groups = {}
    for dim in [int(dim) for dim in _DIMS.value]:
        seeds = range(_MAIN_SEEDS.value if dim == _MAIN_DIM.value else _SEEDS.value)
        groups[dim, "plain"] = [_run(dim, "plain", seed) for seed in seeds]
        groups[dim, "s2sd"] = [_run(dim, "s2sd", seed) for seed in seeds]
    if _REFERENCE_DIM.value:
        groups[_REFERENCE_DIM.value, "plain"] = [
            _run(_REFERENCE_DIM.value, "plain", seed) for seed in range(_SEEDS.value)
        ]
    # The main dimension first.
    ordered = sorted(groups, key=lambda group: group[0] != _MAIN_DIM.value)
    results = run_all(dict(run for group in ordered for run in groups[group]), _JOBS.value)

    rows = []
    for (dim, kind), runs in groups.items():
        found = [results[workdir] for workdir, _ in runs]
        rows.append({"dim": dim, "kind": kind, "seeds": len(found), **summarize(found)})
    lines = _table(rows)
    print("\n".join(lines))
    write(_RESULTS.value, "omniglot_s2sd", lines, rows, results, _WORKDIR.value, config_flags=_FLAGS.value)
    _draw(rows, os.path.join(_RESULTS.value, "omniglot_s2sd.png"))


def _run(dim, kind, seed):
    workdir = os.path.join(_WORKDIR.value, f"{kind}_dim{dim}_seed{seed}")
    return workdir, [*arguments(_DATA_DIR.value, dim, kind, seed), *_FLAGS.value]


def _table(rows):
    plain = {row["dim"]: row["recall@1"][0] for row in rows if row["kind"] == "plain"}
    return table(
        ["dimension", "training", "seeds"],
        rows,
        lambda row: [str(row["dim"]), KINDS[row["kind"]], str(row["seeds"])],
        lambda row: 100 * (row["recall@1"][0] - plain[row["dim"]]),
    )


def _draw(rows, path):
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    dims = sorted({row["dim"] for row in rows if row["kind"] == "s2sd"})
    for kind, label in KINDS.items():
        chosen = sorted((row for row in rows if row["kind"] == kind and row["dim"] in dims), key=lambda row: row["dim"])
        axes.errorbar(
            [row["dim"] for row in chosen],
            [100 * row["recall@1"][0] for row in chosen],
            [100 * row["recall@1"][1] for row in chosen],
            label=label,
            color=COLORS[kind],
            marker="o",
            capsize=3,
        )
    for row in rows:
        if row["dim"] not in dims:
            label = f"plain objective, {row['dim']} dimensions"
            axes.axhline(100 * row["recall@1"][0], color="#d1701f", linestyle="--", linewidth=1.2, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(dims, [str(dim) for dim in dims])
    axes.set_xlabel("embedding dimension")
    axes.set_ylabel("recall@1 on 106 unseen characters, %")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    save_figure(path, figure)


if __name__ == "__main__":
    app.run(main)
