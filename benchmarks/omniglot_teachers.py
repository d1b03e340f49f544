r"""What a frozen, larger teacher adds to S2SD: Omniglot, 16 dimensions.

    python benchmarks/omniglot_teachers.py --workdir=runs/omniglot_teachers

The teacher is `configs/omniglot.py` with the plain objective and 512 dimensions; its embeddings of the training images
are `config.data.teachers` of the others. Trains the plain objective and S2SD, without and with the teacher. Writes
`omniglot_teachers.json` and `.md` into `--results`. Runs that are finished in `--workdir` are not trained again.

`--search` shows how the teacher's weight was chosen: it holds out 28 of the 136 training characters, from the teacher
too, and writes `omniglot_teachers_search.md`, from the held-out characters only.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
from absl import app, flags
from omniglot_runs import RESULTS, arguments, table, write

from s2sd_tf.files import replacing
from s2sd_tf.training import load_run, load_split
from s2sd_tf.training.compare import run_all, summarize
from s2sd_tf.training.embedding import embed

_DATA_DIR = flags.DEFINE_string("data_dir", "", "Folder with Omniglot's archives; empty: those in the package.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/omniglot_teachers", "Folder for the runs.")
_RESULTS = flags.DEFINE_string("results", RESULTS, "Folder for the tables.")
_SEARCH = flags.DEFINE_bool("search", False, "Search for the teacher's weight on held-out training characters.")
_DIM = flags.DEFINE_integer("dim", 16, "Embedding dimension.")
_TEACHER_DIM = flags.DEFINE_integer("teacher_dim", 512, "The teacher's embedding dimension.")
_WEIGHT = flags.DEFINE_float("weight", 5.0, "The weight of the teacher's divergence.")
_EPOCHS = flags.DEFINE_integer("epochs", 30, "Epochs per run.", lower_bound=1)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds per kind.", lower_bound=1)
_JOBS = flags.DEFINE_integer("jobs", 0, "Parallel runs, one thread each; 0: one per core.", lower_bound=0)

_HELD_OUT = "--config.data.validation_classes=28"
_WEIGHTS = (1.0, 5.0, 20.0, 50.0, 100.0, 200.0)
_NAMES = {
    "plain": "plain objective",
    "plain_taught": "plain objective and the teacher",
    "s2sd": "S2SD",
    "s2sd_taught": "S2SD and the teacher",
}


def main(_):
    held_out = [_HELD_OUT] if _SEARCH.value else []
    teacher = _teacher(held_out)
    if _SEARCH.value:
        _search(teacher, held_out)
        return
    groups = {
        name: [
            _run(f"{name}_seed{seed}", name.split("_")[0], seed, _taught(teacher) if "_" in name else [])
            for seed in range(_SEEDS.value)
        ]
        for name in _NAMES
    }
    results = run_all({workdir: given for runs in groups.values() for workdir, given in runs}, _JOBS.value)
    rows = [{"kind": name, **summarize([results[workdir] for workdir, _ in runs])} for name, runs in groups.items()]
    plain = rows[0]["recall@1"][0]
    lines = table(
        ["training"],
        rows,
        lambda row: [_NAMES[row["kind"]]],
        lambda row: 100 * (row["recall@1"][0] - plain),
    )
    print("\n".join(lines))
    settings = {"dim": _DIM.value, "teacher_dim": _TEACHER_DIM.value, "weight": _WEIGHT.value, "epochs": _EPOCHS.value}
    write(_RESULTS.value, "omniglot_teachers", lines, rows, results, _WORKDIR.value, seeds=_SEEDS.value, **settings)


def _search(teacher, held_out):
    runs = {"S2SD": _run("search_s2sd", "s2sd", 0, held_out)}
    for weight in _WEIGHTS:
        given = [*held_out, *_taught(teacher, weight)]
        runs[f"S2SD and the teacher, weight {weight:g}"] = _run(f"search_{weight:g}", "s2sd", 0, given)
    results = run_all(dict(runs.values()), _JOBS.value)
    lines = [
        "MAP@R in percent on 28 held-out training characters at the best epoch, seed 0.",
        "",
        "| training | MAP@R |",
        "|---|---|",
        *(f"| {name} | {100 * results[workdir]['best_value']:.1f} |" for name, (workdir, _) in runs.items()),
    ]
    print("\n".join(lines))
    with replacing(os.path.join(_RESULTS.value, "omniglot_teachers_search.md")) as path, open(path, "w") as file:
        file.write("\n".join(lines) + "\n")


def _run(name, kind, seed, more, dim=None):
    workdir = os.path.join(_WORKDIR.value, name)
    given = arguments(_DATA_DIR.value, dim or _DIM.value, kind, seed)
    return workdir, [*given, f"--config.train.epochs={_EPOCHS.value}", *more]


def _teacher(held_out):
    """Trains the teacher and returns the file with its embeddings of the training images."""
    name = "search_teacher" if held_out else "teacher"
    workdir, given = _run(name, "plain", 0, held_out, _TEACHER_DIM.value)
    run_all({workdir: given}, 1)
    path = os.path.join(_WORKDIR.value, f"{name}.npy")
    if not os.path.exists(path):
        model, config, preprocessing = load_run(workdir)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.save(file, embed(model, load_split(config).train, preprocessing))
    return path


def _taught(teacher, weight=None):
    weight = _WEIGHT.value if weight is None else weight
    return [f"--config.data.teachers=({teacher!r},)", f"--config.s2sd.external_distill_weight={weight}"]


if __name__ == "__main__":
    app.run(main)
