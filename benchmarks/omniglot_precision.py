r"""How much low precision costs in retrieval: Omniglot with S2SD in float32 and with mixed precision.

    python benchmarks/omniglot_precision.py --workdir=runs/omniglot_precision

Trains `configs/omniglot.py` at dimension 16 with 3 seeds in float32 and mixed_bfloat16 (mixed_float16 is for GPUs: on a
CPU it takes ten times as long). Writes `omniglot_precision.json` and `.md` into `--results`. Runs that are already
finished in `--workdir` are not trained again.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import app, flags
from omniglot_runs import METRICS, RESULTS, arguments, write

from s2sd_tf.training.compare import run_all, summarize

_DATA_DIR = flags.DEFINE_string("data_dir", "", "Folder with Omniglot's archives; empty: those in the package.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/omniglot_precision", "Folder for the runs.")
_RESULTS = flags.DEFINE_string("results", RESULTS, "Folder for the table.")
_PRECISIONS = flags.DEFINE_list("precisions", ["float32", "mixed_bfloat16"], "Keras dtype policies.")
_DIM = flags.DEFINE_integer("dim", 16, "Embedding dimension.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds per policy.", lower_bound=1)
_JOBS = flags.DEFINE_integer("jobs", 0, "Parallel runs, one thread each; 0: one per core.", lower_bound=0)
_FLAGS = flags.DEFINE_multi_string("config_flags", [], "A flag for every run: --config_flags=--config.train.epochs=7")


def main(_):
    groups = {}
    for precision in _PRECISIONS.value:
        groups[precision] = {
            os.path.join(_WORKDIR.value, f"{precision}_seed{seed}"): [
                *arguments(_DATA_DIR.value, _DIM.value, "s2sd", seed),
                f"--config.train.precision={precision}",
                *_FLAGS.value,
            ]
            for seed in range(_SEEDS.value)
        }
    results = run_all({workdir: flags for runs in groups.values() for workdir, flags in runs.items()}, _JOBS.value)
    rows = [
        {"precision": precision, "seeds": len(runs), **summarize([results[workdir] for workdir in runs])}
        for precision, runs in groups.items()
    ]
    lines = [f"| precision | seeds | {' | '.join(METRICS)} |", "|---" * (2 + len(METRICS)) + "|"]
    for row in rows:
        cells = [f"{100 * row[metric][0]:.1f} ± {100 * row[metric][1]:.1f}" for metric in METRICS]
        lines.append(f"| {' | '.join([row['precision'], str(row['seeds']), *cells])} |")
    print("\n".join(lines))
    write(_RESULTS.value, "omniglot_precision", lines, rows, results, _WORKDIR.value, config_flags=_FLAGS.value)


if __name__ == "__main__":
    app.run(main)
