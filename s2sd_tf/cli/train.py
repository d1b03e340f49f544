"""s2sd-train: trains a model from a config file, or resumes a run that was interrupted.

Everything of a run goes into its work directory: config, checkpoints, history, the test results, pictures and a
SavedModel of the encoder. On SIGTERM or Ctrl-C the program saves its state and ends with exit status 75 (EX_TEMPFAIL);
the same command resumes from there. --strategy=mirrored shares each batch among the devices of this machine.
--strategy=multiworker shares it among processes: run the same command in each, with TensorFlow's environment variable
TF_CONFIG and a work directory that all of them can see.

Examples:
  s2sd-train --config=configs/omniglot.py --workdir=runs/omniglot
  s2sd-train --config=configs/folder.py --config.data.root=photos --config.model.embedding_dim=64 --workdir=runs/photos
"""

from absl import flags

from s2sd_tf.cli import app, configs
from s2sd_tf.cli.tables import metrics_table, registry_table, sections_table

# What has names to choose from.
REGISTRIES = ("objectives", "miners", "samplers", "backbones", "datasets")

_WORKDIR = app.define_path("workdir", None, "Folder of the run. A new one is created; an interrupted run resumes.")
_DRY_RUN = flags.DEFINE_bool(
    "dry_run",
    False,
    "Build everything, take two steps on one device, evaluate a sample, report what was found, and write nothing.",
)
_STRATEGY = flags.DEFINE_enum(
    "strategy",
    "none",
    ["none", "mirrored", "multiworker"],
    "What shares each batch: nothing, the devices of this machine, or the processes in TF_CONFIG.",
)
_DEVICES = flags.DEFINE_list(
    "devices", [], "Devices of the strategy, such as GPU:0,GPU:1. CPU:0,CPU:1 are virtual CPUs."
)
_LIST = flags.DEFINE_enum("list", None, REGISTRIES, "List the names that a config can choose from, and end.")
_PRINT_CONFIG = flags.DEFINE_bool(
    "print_config", False, "Print the config, with a comment on every key that it uses, and end."
)
_CONFIG = configs.define()


def main() -> None:
    """The program `s2sd-train`."""
    app.run(_main)


def _main(_):
    from s2sd_tf.training import resolve, strategies, train
    from s2sd_tf.training.build import set_threads
    from s2sd_tf.training.dry_run import dry_run

    if _LIST.value:
        print(registry_table(_LIST.value))
        return
    if _PRINT_CONFIG.value:
        from s2sd_tf.training.config_help import explain

        print(explain(resolve(configs.value(_CONFIG))), end="")
        return
    if _DRY_RUN.value:
        replicas = strategies.replicas(_STRATEGY.value, _DEVICES.value)
        print(sections_table(dry_run(configs.value(_CONFIG), replicas)))
        return
    if not _WORKDIR.value:
        raise ValueError("--workdir: expected a folder for the run, without --dry_run. Received: none")
    config = configs.value(_CONFIG)
    set_threads(resolve(config))
    strategy = strategies.get(_STRATEGY.value, _DEVICES.value)
    results = train(config, _WORKDIR.value, strategy)
    print(metrics_table({f"test, {method}": metrics for method, metrics in results["test"].items()}))
    print(f"Epoch {results['best_epoch']} of {results['epochs']} ({results['selected_by']}). All in {_WORKDIR.value}")


if __name__ == "__main__":
    main()
