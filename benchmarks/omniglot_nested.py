r"""One nested model against a model for each dimension: Omniglot, plain objective and S2SD.

    python benchmarks/omniglot_nested.py --workdir=runs/omniglot_nested

Trains `configs/omniglot.py` (50 epochs) with a base embedding of 64 dimensions and `nested_dims=(8, 16, 32, 64)`, with
S2SD and with the plain objective, 5 seeds each, with several `nested_weights`; and, with S2SD and without prefixes, one
of 64 dimensions. Evaluates the prefixes of all of them from 4 to 64. The models for each dimension have the settings of
`omniglot_s2sd.py` and are taken from its results as far as they are there; --train_separate trains all of them.

Every finished run is added to `omniglot_nested.json` in `--results`, and not trained again. At the end, the table (.md)
and the plot (.png) are written beside it.

`--search` compares the weights of the prefixes without the test characters: it holds out 28 of the 136 training
characters, and writes `omniglot_nested_search.md`, from these only.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
from absl import app, flags
from matplotlib.figure import Figure
from omniglot_runs import COLORS, METRICS, RESULTS, arguments

from s2sd_tf import evaluation, truncate
from s2sd_tf.files import read_json, replacing, write_json
from s2sd_tf.reporting import save_figure
from s2sd_tf.training import load_run
from s2sd_tf.training.compare import mean_and_deviation, run_all
from s2sd_tf.training.datasets import load_data
from s2sd_tf.training.embedding import embed

_DATA_DIR = flags.DEFINE_string("data_dir", "", "Folder with Omniglot's archives; empty: those in the package.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/omniglot_nested", "Folder for the runs.")
_RESULTS = flags.DEFINE_string("results", RESULTS, "Folder for the results, the table and the plot.")
_SEPARATE = flags.DEFINE_string(
    "separate", os.path.join(RESULTS, "omniglot_s2sd.json"), "Results of the models for each dimension."
)
_TRAIN_SEPARATE = flags.DEFINE_bool("train_separate", False, "Train the models for each dimension, too.")
_SEARCH = flags.DEFINE_bool("search", False, "Search for `nested_weights` on held-out training characters.")
_JOBS = flags.DEFINE_integer("jobs", 2, "Parallel runs, one thread each.", lower_bound=1)
_FLAGS = flags.DEFINE_multi_string("config_flags", [], "A flag for every run: --config_flags=--config.train.epochs=1")

DIMS = (8, 16, 32, 64)
PREFIXES = (4, 6, 8, 12, 16, 24, 32, 48, 64)
SEEDS = 5
# The weights of the prefixes of the nested models, () for equal ones; and one more that was searched.
NESTED = {"nested": (), "nested2": (2, 1, 1, 1), "nested4": (4, 1, 1, 1)}
SEARCHED = (*NESTED.values(), (4, 2, 1, 1))
SEPARATE = "separate"
NAMES = {
    ("nested", "s2sd"): "one nested model with S2SD",
    ("nested2", "s2sd"): "the same, weights 2, 1, 1, 1",
    ("nested4", "s2sd"): "the same, weights 4, 1, 1, 1",
    (SEPARATE, "s2sd"): "a model for each dimension, with S2SD",
    ("nested", "plain"): "one nested model, plain objective",
    ("nested4", "plain"): "the same, weights 4, 1, 1, 1",
    (SEPARATE, "plain"): "a model for each dimension, plain objective",
}


def main(_):
    if _SEARCH.value:
        _search()
        return
    path = os.path.join(_RESULTS.value, "omniglot_nested.json")
    content = read_json(path) if os.path.exists(path) else {"config_flags": _FLAGS.value, "runs": {}}
    if content["config_flags"] != _FLAGS.value:
        raise ValueError(f"--config_flags: expected {content['config_flags']}, those of {path}. Received: others")
    separate = {} if _TRAIN_SEPARATE.value else _separate()
    missing = [name for name in _planned(separate) if name not in content["runs"]]
    for start in range(0, len(missing), _JOBS.value):
        runs = {os.path.join(_WORKDIR.value, name): name for name in missing[start : start + _JOBS.value]}
        for workdir, result in run_all({path: _arguments(name) for path, name in runs.items()}, _JOBS.value).items():
            content["versions"] = result["versions"]
            content["runs"][runs[workdir]] = {"seconds": result["train_seconds"], "dims": _prefixes(workdir)}
            write_json(path, content)
    content["rows"] = _rows({**content["runs"], **separate})
    write_json(path, content)
    _write(_table(content["rows"]), "omniglot_nested.md")
    _draw(content, os.path.join(_RESULTS.value, "omniglot_nested.png"))


def _search(seeds=3):
    """Writes the metrics of every prefix on held-out characters, by the weights of the prefixes."""
    runs = {
        weights: [os.path.join(_WORKDIR.value, f"search_{'_'.join(map(str, weights))}_{seed}") for seed in range(seeds)]
        for weights in SEARCHED
    }
    given = {
        workdir: [
            *_arguments(_name("nested", "s2sd", 64, seed)),
            f"--config.s2sd.nested_weights={weights}",
            "--config.data.validation_classes=28",
        ]
        for weights, workdirs in runs.items()
        for seed, workdir in enumerate(workdirs)
    }
    # All weights with the first seed, then with the next.
    run_all({workdir: given[workdir] for group in zip(*runs.values()) for workdir in group}, _JOBS.value)
    lines = [
        f"Recall@1 / MAP@R of the prefixes in percent on 28 held-out training characters, mean over {seeds} seeds.",
        "",
        f"| weights | {' | '.join(map(str, DIMS))} | mean |",
        "|---" * (len(DIMS) + 2) + "|",
    ]
    for weights, workdirs in runs.items():
        found = [_prefixes(workdir, "validation") for workdir in workdirs]
        means = np.mean([[[one[str(dim)][name] for name in ("recall@1", "map@r")] for dim in DIMS] for one in found], 0)
        cells = [f"{100 * recall:.1f} / {100 * precision:.1f}" for recall, precision in [*means, means.mean(0)]]
        lines.append(f"| {weights or 'equal'} | {' | '.join(cells)} |")
    _write(lines, "omniglot_nested_search.md")


def _write(lines, name):
    """Prints a table and writes it into `--results`."""
    text = "\n".join(lines) + "\n"
    print(text)
    with replacing(os.path.join(_RESULTS.value, name)) as temporary, open(temporary, "w") as file:
        file.write(text)


def _planned(separate):
    """Names of the runs, those that decide first. Of the models for each dimension, those not in `separate`."""
    seeds = range(SEEDS)
    names = [_name(way, kind, 64, seed) for seed in seeds for way, kind in NAMES if way in NESTED]
    # Of these, the prefixes too.
    names += [_name(SEPARATE, "s2sd", 64, seed) for seed in seeds]
    others = [_name(SEPARATE, kind, dim, seed) for dim in DIMS for seed in seeds for kind in ("s2sd", "plain")]
    return list(dict.fromkeys(names + [name for name in others if name not in separate]))


def _name(way, kind, dim, seed):
    return f"{way}_{kind}_dim{dim}_seed{seed}"


def _arguments(name):
    way, kind, dim, seed = name.split("_")
    flags_ = arguments(_DATA_DIR.value, int(dim.removeprefix("dim")), kind, int(seed.removeprefix("seed")))
    if way in NESTED:
        flags_ += [f"--config.s2sd.nested_dims={DIMS}", f"--config.s2sd.nested_weights={NESTED[way]}"]
    return [*flags_, *_FLAGS.value]


def _prefixes(workdir, part="test"):
    """The metrics of a run's images by dimension, of all prefixes that the model has."""
    model, config, preprocessing = load_run(workdir)
    images = getattr(load_data(config), part)
    rows = embed(model, images, preprocessing)
    return {
        str(dim): evaluation.retrieval_metrics(truncate(rows, dim), images.labels, ks=config.eval.ks)
        for dim in PREFIXES
        if dim <= rows.shape[1]
    }


def _separate():
    """The runs of `omniglot_s2sd.py`, named and formed like those of this study."""
    found = {}
    for name, metrics in read_json(_SEPARATE.value)["runs"].items():
        kind, dim, seed = name.split("_")
        found[f"{SEPARATE}_{kind}_{dim}_{seed}"] = {"dims": {dim.removeprefix("dim"): metrics}}
    return found


def _rows(runs):
    """A row for each dimension and way of training: the metrics, and recall@1 less that of the separate models."""
    rows = []
    for dim in DIMS:
        seeds = range(SEEDS)
        found = {}
        for way, kind in NAMES:
            names = [_name(way, kind, 64 if way in NESTED else dim, seed) for seed in seeds]
            found[way, kind] = [runs[name]["dims"][str(dim)] for name in names]
        for (way, kind), metrics in found.items():
            row = {"dim": dim, "way": way, "kind": kind, "seeds": len(seeds)}
            for name in METRICS:
                mean, deviation = mean_and_deviation([[one[name]] for one in metrics])
                row[name] = (float(mean[0]), float(deviation[0]))
            for key, other in (("over_separate", (SEPARATE, kind)), ("over_plain", (SEPARATE, "plain"))):
                row[key] = row["recall@1"][0] - float(np.mean([one["recall@1"] for one in found[other]]))
            rows.append(row)
    return rows


def _table(rows):
    head = ["dimension", "training", "seeds", "recall@1", "recall@2", "map@r", "over a model each", "over plain"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [f"{100 * row[name][0]:.1f} ± {100 * row[name][1]:.1f}" for name in ("recall@1", "recall@2", "map@r")]
        gains = [
            f"{100 * row['over_separate']:+.1f}" if row["way"] in NESTED else "",
            f"{100 * row['over_plain']:+.1f}" if row["kind"] == "s2sd" else "",
        ]
        names = [str(row["dim"]), NAMES[row["way"], row["kind"]], str(row["seeds"])]
        lines.append(f"| {' | '.join([*names, *cells, *gains])} |")
    lines += [
        "",
        "Gains are of recall@1 in percentage points, over the models for each dimension with the same objective, and "
        f"over the plain ones. Nested models with S2SD over {list(DIMS)}, by their weights:",
        "",
    ]
    for way, weights in NESTED.items():
        nested = [row for row in rows if (row["way"], row["kind"]) == (way, "s2sd")]
        over = [100 * row["over_separate"] for row in nested]
        least = 100 * min(row["over_plain"] for row in nested)
        lines.append(
            f"- {weights or 'equal'}: over a model each {np.mean(over):+.1f} on average, {min(over):+.1f} at least; "
            f"over plain {least:+.1f} at least"
        )
    return lines


def _draw(content, path):
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.add_subplot()
    curves = {
        "one nested model with S2SD, its prefixes": (("nested", "s2sd"), COLORS["s2sd"], "-"),
        "the same, weights 2, 1, 1, 1": (("nested2", "s2sd"), COLORS["s2sd"], "--"),
        "the same, weights 4, 1, 1, 1": (("nested4", "s2sd"), COLORS["s2sd"], "-."),
        "one nested model, plain objective, its prefixes": (("nested", "plain"), COLORS["plain"], "-"),
        "S2SD of 64 dimensions, its prefixes": ((SEPARATE, "s2sd"), "#d1701f", ":"),
    }
    for label, ((way, kind), color, style) in curves.items():
        runs = [content["runs"][name] for name in (_name(way, kind, 64, seed) for seed in range(SEEDS))]
        means = [100 * np.mean([run["dims"][str(dim)]["recall@1"] for run in runs]) for dim in PREFIXES]
        axes.plot(PREFIXES, means, style, color=color, label=label)
    for kind in ("s2sd", "plain"):
        chosen = [row for row in content["rows"] if (row["way"], row["kind"]) == (SEPARATE, kind)]
        axes.errorbar(
            [row["dim"] for row in chosen],
            [100 * row["recall@1"][0] for row in chosen],
            [100 * row["recall@1"][1] for row in chosen],
            label=NAMES[SEPARATE, kind],
            color=COLORS[kind],
            marker="o",
            linestyle="",
            capsize=3,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(PREFIXES, [str(dim) for dim in PREFIXES])
    axes.minorticks_off()
    axes.set_xlabel("dimension")
    axes.set_ylabel("recall@1 on 106 unseen characters, %")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    save_figure(path, figure)


if __name__ == "__main__":
    app.run(main)
