"""s2sd-train: trains from a config file, and resumes when called again.

    s2sd-train --config=configs/digits.py --config.model.embedding_dim=8 --workdir=runs/digits8
"""

from s2sd_tf.cli import app

# isort: split
from absl import flags
from ml_collections import config_flags

from s2sd_tf.cli.tables import metrics_table
from s2sd_tf.training import train

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; it is made, or resumed from.", required=True)
_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, and --config.key=value to change a key of it.")
flags.mark_flag_as_required("config")


def main():
    app.run(_main)


def _main(_):
    results = train(_CONFIG.value, _WORKDIR.value)
    print(metrics_table({f"test, {method}": metrics for method, metrics in results["test"].items()}))
    print(f"Epoch {results['best_epoch']} of {results['epochs']} ({results['selected_by']}). All in {_WORKDIR.value}")


if __name__ == "__main__":
    main()
