"""s2sd-evaluate: retrieval metrics of a finished run's model on its test classes.

s2sd-evaluate --workdir=runs/digits8
"""

import os

from absl import flags

from s2sd_tf.cli import app
from s2sd_tf.cli.tables import metrics_table
from s2sd_tf.evaluation import retrieval_metrics
from s2sd_tf.files import write_json
from s2sd_tf.training import load_run
from s2sd_tf.training.datasets import load_data
from s2sd_tf.training.run import embed

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a finished run.", required=True)
_KS = flags.DEFINE_list("ks", ["1", "2", "4", "8"], "The k of recall@k, separated by commas.")
_METHODS = flags.DEFINE_list("methods", ["exact", "scann"], "Search methods, out of exact and scann.")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write; default: evaluation.json in the work directory.")


def main():
    app.run(_main)


def _main(_):
    if not all(k.isdigit() for k in _KS.value):
        raise ValueError(f"--ks: expected integers separated by commas. Received: {','.join(_KS.value)}")
    model, config, preprocessing = load_run(_WORKDIR.value)
    test = load_data(config).test
    embeddings = embed(model, test, preprocessing)
    ks = [int(k) for k in _KS.value]
    results = {method: retrieval_metrics(embeddings, test.labels, ks=ks, method=method) for method in _METHODS.value}
    write_json(_OUTPUT.value or os.path.join(_WORKDIR.value, "evaluation.json"), results)
    print(metrics_table(results))


if __name__ == "__main__":
    main()
