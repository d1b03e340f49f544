"""s2sd-train: trains from a config file, and resumes when called again.

s2sd-train --config=configs/digits.py --config.model.embedding_dim=8 --workdir=runs/digits8
"""

from absl import flags

from s2sd_tf.cli import app, configs
from s2sd_tf.cli.tables import metrics_table
from s2sd_tf.training import train

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; it is made, or resumed from.", required=True)
_CONFIG = configs.define()


def main():
    app.run(_main)


def _main(_):
    results = train(configs.value(_CONFIG), _WORKDIR.value)
    print(metrics_table({f"test, {method}": metrics for method, metrics in results["test"].items()}))
    print(f"Epoch {results['best_epoch']} of {results['epochs']} ({results['selected_by']}). All in {_WORKDIR.value}")


if __name__ == "__main__":
    main()
