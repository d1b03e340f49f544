r"""How much S2SD improves different objectives: Omniglot, 16 dimensions, plain objective against S2SD.

    python benchmarks/omniglot_objectives.py --workdir=runs/omniglot_objectives

Trains `configs/omniglot.py` (136 characters to train on, 106 unseen ones to retrieve) with every objective, plain and
with S2SD, with the settings of the config and the defaults of the objective, except for the learning rates of proxies
and boundaries: their default multipliers suit a network with a learning rate of 1e-5, and this one has 1e-3. Writes
`omniglot_objectives.json`, `.md` and `.png` into `--results`; with `--target_objective=` (targets with the base's
objective) `omniglot_objectives_own_targets`. Runs that are already finished in `--workdir` are not
trained again.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import app, flags
from matplotlib.figure import Figure
from omniglot_runs import COLORS, KINDS, RESULTS, arguments, table, write

from s2sd_tf.reporting import save_figure
from s2sd_tf.training.compare import run_all, summarize

_DATA_DIR = flags.DEFINE_string("data_dir", "", "Folder with Omniglot's archives; empty: those in the package.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/omniglot_objectives", "Folder for the runs.")
_RESULTS = flags.DEFINE_string("results", RESULTS, "Folder for the table and the plot.")
_OBJECTIVES = flags.DEFINE_list(
    "objectives",
    [
        "contrastive",
        "triplet",
        "margin",
        "multi_similarity",
        "lifted_structure",
        "circle",
        "supcon",
        "fast_ap",
        "normalized_softmax",
        "proxy_anchor",
    ],
    "Objectives to train with.",
)
_TARGET_OBJECTIVE = flags.DEFINE_string(
    "target_objective", "multi_similarity", "Objective of the targets; empty: the same as for the base embedding."
)
_DIM = flags.DEFINE_integer("dim", 16, "Embedding dimension.")
_EPOCHS = flags.DEFINE_integer("epochs", 30, "Epochs per run.", lower_bound=1)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds per objective and kind.", lower_bound=1)
_JOBS = flags.DEFINE_integer("jobs", 0, "Parallel runs, one thread each; 0: one per core.", lower_bound=0)

# Multipliers that give proxies and boundaries about their authors' learning rates.
MULTIPLIERS = {"margin": 1.0, "proxy_anchor": 10.0}


def main(_):
    groups = {
        (name, kind): [_run(name, kind, seed) for seed in range(_SEEDS.value)]
        for name in _OBJECTIVES.value
        for kind in KINDS
    }
    # One seed of everything before the next seed.
    ordered = [runs[seed] for seed in range(_SEEDS.value) for runs in groups.values()]
    results = run_all(dict(ordered), _JOBS.value)
    rows = [
        {"objective": name, "kind": kind, **summarize([results[workdir] for workdir, _ in runs])}
        for (name, kind), runs in groups.items()
    ]
    lines = _table(rows)
    print("\n".join(lines))
    settings = {"dim": _DIM.value, "epochs": _EPOCHS.value, "seeds": _SEEDS.value}
    settings["target_objective"] = _TARGET_OBJECTIVE.value
    name = "omniglot_objectives" if _TARGET_OBJECTIVE.value else "omniglot_objectives_own_targets"
    write(_RESULTS.value, name, lines, rows, results, _WORKDIR.value, **settings)
    _draw(rows, os.path.join(_RESULTS.value, f"{name}.png"))


def _run(name, kind, seed):
    workdir = os.path.join(_WORKDIR.value, f"{name}_{kind}_seed{seed}")
    given = [
        *arguments(_DATA_DIR.value, _DIM.value, kind, seed),
        f"--config.train.epochs={_EPOCHS.value}",
        f"--config.objective.name={name}",
        f"--config.s2sd.target_objective={_TARGET_OBJECTIVE.value}",
    ]
    if name in MULTIPLIERS:
        given.append(f"--config.objective.{name}.learning_rate_multiplier={MULTIPLIERS[name]}")
    return workdir, given


def _table(rows):
    return table(
        ["objective", "training"],
        rows,
        lambda row: [row["objective"], KINDS[row["kind"]]],
        lambda row: _gain(rows, row["objective"]),
    )


def _gain(rows, name):
    found = {row["kind"]: row["recall@1"][0] for row in rows if row["objective"] == name}
    return 100 * (found["s2sd"] - found["plain"])


def _draw(rows, path):
    names = [row["objective"] for row in rows if row["kind"] == "plain"]
    names.sort(key=lambda name: _gain(rows, name))
    figure = Figure(figsize=(7.2, 0.42 * len(names) + 1.0), layout="constrained")
    axes = figure.add_subplot()
    for kind, shift in (("plain", -0.12), ("s2sd", 0.12)):
        chosen = {row["objective"]: row["recall@1"] for row in rows if row["kind"] == kind}
        axes.errorbar(
            [100 * chosen[name][0] for name in names],
            [position + shift for position in range(len(names))],
            xerr=[100 * chosen[name][1] for name in names],
            fmt="o",
            capsize=3,
            color=COLORS[kind],
            label=KINDS[kind],
        )
    axes.set_yticks(range(len(names)), [f"{name}  ({_gain(rows, name):+.1f})" for name in names])
    axes.set_xlabel(f"recall@1 on unseen characters, %, {_DIM.value} dimensions (in brackets: gain)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    save_figure(path, figure)


if __name__ == "__main__":
    app.run(main)
