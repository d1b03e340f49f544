"""s2sd-index: builds an index of embeddings, and with an encoder one SavedModel of both.

s2sd-index --embeddings=embeddings --output=index --encoder=runs/digits8/saved_model --saved_model=retrieval
"""

from absl import flags

from s2sd_tf.cli import app
from s2sd_tf.evaluation import build_index, read_embeddings
from s2sd_tf.export import export_retrieval
from s2sd_tf.files import check_replaceable
from s2sd_tf.serving import Encoder

_EMBEDDINGS = flags.DEFINE_string("embeddings", None, "Folder of s2sd-embed, or .npy, .npz, .tfrecord.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Folder of the index to write.", required=True)
_METHOD = flags.DEFINE_enum("method", "scann", ["scann", "exact"], "How it is searched.")
_METRIC = flags.DEFINE_enum("metric", "cosine", ["cosine", "euclidean"], "Metric.")
_RECALL = flags.DEFINE_float("recall", 0.99, "Recall that ScaNN is tuned to.")
_K = flags.DEFINE_integer(
    "k", 10, "Neighbours of which it is the recall, and that the SavedModel finds.", lower_bound=1
)
_ENCODER = flags.DEFINE_string("encoder", None, "SavedModel of s2sd-export, for --saved_model.")
_SAVED_MODEL = flags.DEFINE_string("saved_model", None, "Folder to write a SavedModel from images to ids and scores.")


def main():
    app.run(_main)


def _main(_):
    if (_ENCODER.value is None) != (_SAVED_MODEL.value is None):
        raise ValueError("--encoder and --saved_model: expected both or neither")
    check_replaceable("--output", _OUTPUT.value, "index.json")
    if _SAVED_MODEL.value:
        check_replaceable("--saved_model", _SAVED_MODEL.value, "saved_model.pb")
        # So that another than an encoder is told before an hour of tuning.
        Encoder(_ENCODER.value)
    rows, ids, labels = read_embeddings(_EMBEDDINGS.value)
    index = build_index(rows, ids, labels, _METHOD.value, _METRIC.value, _RECALL.value, _K.value)
    index.save(_OUTPUT.value)
    told = ""
    if index.method == "scann":
        told = f", {index.settings}, recall@{index.tuned['k']} {index.tuned['measured']:.4f} against exact search"
    print(f"{len(index):,} items, {index.dim} dimensions, {index.method}{told}: {_OUTPUT.value}")
    if _SAVED_MODEL.value:
        export_retrieval(_ENCODER.value, index, _SAVED_MODEL.value, _K.value)
        print(f"SavedModel with signatures serving_default, encoded_images, embeddings: {_SAVED_MODEL.value}")


if __name__ == "__main__":
    main()
