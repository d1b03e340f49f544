"""s2sd-index: builds a search index of embeddings, and with an encoder one SavedModel that contains both.

The index is searched by ScaNN, tuned to a recall against exact search, or exactly; or, for nested embeddings, by a
funnel: a shortlist by --funnel_dim dimensions, tuned to the recall too, is ranked by all of them. The SavedModel takes
images and returns the ids, labels and scores of the nearest items.

Examples:
  s2sd-index --embeddings=embeddings --output=index
  s2sd-index --embeddings=embeddings --output=index --encoder=runs/omniglot/saved_model --saved_model=retrieval
  s2sd-index --embeddings=embeddings --output=index --method=funnel --funnel_dim=16
"""

import contextlib

from absl import flags

from s2sd_tf.cli import app

_EMBEDDINGS = app.define_path(
    "embeddings", None, "Folder of s2sd-embed, or a .npy, .npz or .tfrecord file.", required=True
)
_OUTPUT = app.define_path("output", None, "Folder to write the index to.", required=True)
_METHOD = flags.DEFINE_enum(
    "method", None, ["scann", "exact", "funnel"], "Search method; by default scann where it is installed, else exact."
)
_FUNNEL_DIM = flags.DEFINE_integer(
    "funnel_dim",
    None,
    "With --method=funnel: dimension of the shortlist, one of the model's nested_dims.",
    lower_bound=1,
)
_CODES = flags.DEFINE_enum(
    "codes",
    "float32",
    ["float32", "int8", "bits", "scann"],
    "With --method=funnel: how the shortlist stores prefixes.",
)
_METRIC = flags.DEFINE_enum(
    "metric", "cosine", ["cosine", "euclidean"], "Similarity: cosine, or negative euclidean distance."
)
_RECALL = flags.DEFINE_float("recall", 0.99, "Recall against exact search that ScaNN or funnel is tuned to.")
_K = flags.DEFINE_integer(
    "k", 10, "Number of neighbours for --recall, and of those that the SavedModel finds.", lower_bound=1
)
_MIN_SCORE = flags.DEFINE_float(
    "min_score",
    None,
    "Least similarity of a match, stored for s2sd-search and the SavedModel; with --metric=euclidean a negative "
    "distance. s2sd-evaluate prints thresholds.",
)
_ENCODER = app.define_path("encoder", None, "SavedModel of s2sd-export; needed for --saved_model.")
_SAVED_MODEL = app.define_path("saved_model", None, "Folder to write a SavedModel that maps images to ids and scores.")


def main() -> None:
    """The program `s2sd-index`."""
    app.run(_main)


def _main(_):
    from s2sd_tf.files import only_writer

    with contextlib.ExitStack() as stack:
        for flag in (_OUTPUT, _SAVED_MODEL):
            if flag.value:
                stack.enter_context(only_writer(f"--{flag.name}", flag.value))
        _build()


def _build():
    from s2sd_tf.evaluation import FunnelIndex, ScannIndex, build_index, read_embeddings
    from s2sd_tf.evaluation.index import check_min_score
    from s2sd_tf.evaluation.scann_searcher import SCANN_OPS, import_scann
    from s2sd_tf.export import export_retrieval
    from s2sd_tf.files import check_replaceable
    from s2sd_tf.serving import Encoder

    if (_ENCODER.value is None) != (_SAVED_MODEL.value is None):
        raise ValueError("--encoder and --saved_model: expected both or neither")
    check_min_score(_MIN_SCORE.value, _METRIC.value)
    check_replaceable("--output", _OUTPUT.value, "index.json")
    if _SAVED_MODEL.value:
        check_replaceable("--saved_model", _SAVED_MODEL.value, "saved_model.pb")
        import_scann(SCANN_OPS)
    rows, ids, labels = read_embeddings(_EMBEDDINGS.value)
    if _ENCODER.value:
        # Fails before an hour of tuning if it is not an encoder, or one of another dimension.
        Encoder(_ENCODER.value, rows.shape[1])
    index = build_index(
        rows, ids, labels, _METHOD.value, _METRIC.value, _RECALL.value, _K.value, dim=_FUNNEL_DIM.value,
        codes=_CODES.value,
    )  # fmt: skip
    index.min_score = _MIN_SCORE.value
    index.save(_OUTPUT.value)
    tuning = ""
    if isinstance(index, (ScannIndex, FunnelIndex)):
        tuning = f", {index.settings}, recall@{index.tuned['k']} {index.tuned['measured']:.4f} against exact search"
    print(f"{len(index):,} items, {index.dim} dimensions, {index.method}{tuning}: {_OUTPUT.value}")
    if _SAVED_MODEL.value:
        export_retrieval(_ENCODER.value, index, _SAVED_MODEL.value, _K.value)
        print(f"SavedModel with signatures serving_default, pixels, encoded_images, embeddings: {_SAVED_MODEL.value}")


if __name__ == "__main__":
    main()
