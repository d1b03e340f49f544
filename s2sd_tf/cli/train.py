"""s2sd-train: trains from a config file, and resumes when called again.

s2sd-train --config=configs/digits.py --config.model.embedding_dim=8 --workdir=runs/digits8

On SIGTERM or Ctrl-C it saves where it is and ends with exit status 75 (EX_TEMPFAIL): the same command goes on from
there. Before it has begun, SIGTERM ends it as it ends any program, and nothing is lost.

--strategy=mirrored trains on several devices of the machine, --strategy=multiworker on those of several processes: the
same command in each, with the environment variable TF_CONFIG of TensorFlow and a work directory that all of them see.

With --dry_run it builds everything, takes two steps, evaluates a sample, says what it found, and writes nothing.
"""

from absl import flags

from s2sd_tf.cli import app, configs
from s2sd_tf.cli.tables import metrics_table, sections_table
from s2sd_tf.training import strategies, train
from s2sd_tf.training.dry_run import dry_run

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; it is made, or resumed from.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Build everything, take two steps, evaluate a sample; write nothing.")
_STRATEGY = flags.DEFINE_enum(
    "strategy",
    "none",
    strategies.STRATEGIES,
    "mirrored: the devices of this machine share out each batch; multiworker: those of the processes in TF_CONFIG.",
)
_DEVICES = flags.DEFINE_list("devices", [], "GPU:0,GPU:1 or so, of the strategy; CPU:0,CPU:1 are virtual CPUs.")
_CONFIG = configs.define()


def main():
    app.run(_main)


def _main(_):
    if _DRY_RUN.value:
        print(sections_table(dry_run(configs.value(_CONFIG))))
        return
    if not _WORKDIR.value:
        raise ValueError("--workdir: expected a folder for the run, without --dry_run. Received: none")
    strategy = strategies.get(_STRATEGY.value, _DEVICES.value)
    results = train(configs.value(_CONFIG), _WORKDIR.value, strategy)
    print(metrics_table({f"test, {method}": metrics for method, metrics in results["test"].items()}))
    print(f"Epoch {results['best_epoch']} of {results['epochs']} ({results['selected_by']}). All in {_WORKDIR.value}")


if __name__ == "__main__":
    main()
