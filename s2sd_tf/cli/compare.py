"""s2sd-compare: trains the plain objective and S2SD with the same budget and seeds, and compares them.

Prints a table of means and deviations over the seeds. Writes curves, a gallery, the results as JSON and the SavedModel
of the first S2SD run. Finished runs are reused, interrupted ones resume.

Examples:
  s2sd-compare --config=configs/omniglot.py --workdir=runs/omniglot
  s2sd-compare --config=configs/digits.py --workdir=runs/digits --seeds=0,1,2,3,4
"""

import os
import shutil

from absl import flags

from s2sd_tf.cli import app, configs
from s2sd_tf.cli.tables import metrics_table

_WORKDIR = app.define_path(
    "workdir", None, "Folder of the comparison. Each run gets a folder in its runs/.", required=True
)
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds, separated by commas.")
_JOBS = flags.DEFINE_integer("jobs", 0, "Runs at a time, of one thread each; 0: one per core.", lower_bound=0)
_CONFIG = configs.define()

PLAIN, S2SD = "plain objective", "with S2SD"


def main() -> None:
    """The program `s2sd-compare`."""
    app.run(_main)


def _main(_):
    from s2sd_tf.files import only_writer

    with only_writer("--workdir", _WORKDIR.value, inside=True):
        _compare()


def _compare():
    from s2sd_tf.files import check_replaceable, replacing, write_json
    from s2sd_tf.training import resolve
    from s2sd_tf.training.build import check_data_of_runs
    from s2sd_tf.training.compare import run_all, summarize
    from s2sd_tf.training.datasets import load_split
    from s2sd_tf.training.plan import plan

    if not all(seed.isdecimal() for seed in _SEEDS.value):
        raise ValueError(f"--seeds: expected integers >= 0 separated by commas. Received: {','.join(_SEEDS.value)}")
    check_replaceable("--workdir", os.path.join(_WORKDIR.value, "saved_model"), "saved_model.pb")
    config = resolve(configs.value(_CONFIG))
    if len(set(_SEEDS.value)) < len(_SEEDS.value):
        raise ValueError(f"--seeds: expected different seeds. Received: {','.join(_SEEDS.value)}")
    if not (config.s2sd.target_dims or config.s2sd.feature_distill or config.data.teachers):
        raise ValueError("--config: expected one with S2SD, to compare with. Received: the plain objective")
    passed_on = configs.as_arguments(_CONFIG)
    if not config.train.threads:
        passed_on.append("--config.train.threads=1")
    runs: dict[str, list[str]] = {}
    groups: dict[str, list[str]] = {PLAIN: [], S2SD: []}
    for seed in _SEEDS.value:
        for name, folder, given in ((PLAIN, "plain", _without_teachers(passed_on)), (S2SD, "s2sd", passed_on)):
            workdir = os.path.join(_WORKDIR.value, "runs", f"{folder}_seed{seed}")
            runs[workdir] = [*given, f"--config.seed={seed}"]
            groups[name].append(workdir)
    if not all(os.path.exists(os.path.join(workdir, "results.json")) for workdir in runs):
        split = load_split(config)
        check_data_of_runs(plan(config, split), split, map(int, _SEEDS.value))
    results = run_all(runs, _JOBS.value)
    rows = {name: summarize([results[workdir] for workdir in workdirs]) for name, workdirs in groups.items()}
    write_json(
        os.path.join(_WORKDIR.value, "results.json"),
        {
            name: {
                "mean": {metric: value[0] for metric, value in row.items()},
                "standard_deviation": {metric: value[1] for metric, value in row.items()},
                "runs": {os.path.relpath(w, _WORKDIR.value): results[w]["test"]["exact"] for w in groups[name]},
            }
            for name, row in rows.items()
        },
    )
    _draw(groups)
    shown = groups[S2SD][0]
    shutil.copyfile(os.path.join(shown, "gallery.png"), os.path.join(_WORKDIR.value, "gallery.png"))
    with replacing(os.path.join(_WORKDIR.value, "saved_model")) as temporary:
        shutil.copytree(os.path.join(shown, "saved_model"), temporary)

    count = len(_SEEDS.value)
    shown_values = f"mean +- deviation over {count} seeds" if count > 1 else f"seed {_SEEDS.value[0]}"
    print(f"\nRetrieval on classes never trained on, in percent: {shown_values},")
    print(f"{config.model.embedding_dim} dimensions, the same steps and batches for both.\n")
    columns = [*(f"recall@{k}" for k in config.eval.ks), "map@r"]
    table = {**rows, "gained": _gain(columns, *([results[w] for w in groups[n]] for n in (PLAIN, S2SD)))}
    cells = {name: {c: row[c] if count > 1 else row[c][0] for c in columns} for name, row in table.items()}
    print(metrics_table(cells))
    print(f"\nresults.json, curves.png, gallery.png and saved_model/ are in {_WORKDIR.value}")


def _gain(columns, plain, s2sd):
    """`(mean, deviation)` of each metric's difference over the seeds."""
    from s2sd_tf.training.compare import mean_and_deviation

    pairs = [(with_s2sd["test"]["exact"], without["test"]["exact"]) for with_s2sd, without in zip(s2sd, plain)]
    differences = mean_and_deviation([[one[column] - other[column] for column in columns] for one, other in pairs])
    return dict(zip(columns, zip(*(values.tolist() for values in differences))))


def _draw(groups):
    from s2sd_tf.reporting import save_curves
    from s2sd_tf.training.compare import mean_and_deviation
    from s2sd_tf.training.history import read_history

    panels = {}
    for metric in ("recall@1", "map@r"):
        curves = {}
        for name, workdirs in groups.items():
            histories = [read_history(workdir) for workdir in workdirs]
            rows = [[row for row in history if f"test_{metric}" in row] for history in histories]
            if not all(rows):
                continue
            values = [[100 * row[f"test_{metric}"] for row in history] for history in rows]
            curves[name] = ([row["epoch"] for row in rows[0]], *mean_and_deviation(values))
        if curves:
            panels[f"{metric} on unseen classes, %"] = curves
    if panels:
        save_curves(os.path.join(_WORKDIR.value, "curves.png"), panels)


def _without_teachers(given):
    """Returns the flags of a run with the plain objective, given those of a run with S2SD."""
    # A tuple flag that is given twice has the values of both.
    tuples = ("config.s2sd.target_dims=", "config.data.teachers=")
    kept = [flag for flag in given if not flag.lstrip("-").startswith(tuples)]
    return [*kept, *(f"--{flag}()" for flag in tuples), "--config.s2sd.feature_distill=False"]


if __name__ == "__main__":
    main()
