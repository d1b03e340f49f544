"""s2sd-beam: embeds images with Apache Beam into shards, each with a search index.

The work is shared among the machines of the Beam runner. s2sd-search searches the output folder as one index.

Examples:
  s2sd-beam --encoder=runs/omniglot/saved_model --images=photos --output=embeddings
  s2sd-beam --encoder=/nfs/encoder --tfrecords='/nfs/photos-*' --output=/nfs/embeddings --beam=--runner=FlinkRunner
"""

import logging
from typing import Any

from absl import flags

from s2sd_tf.cli import app
from s2sd_tf.cli.tables import embedding_summary

_ENCODER = app.define_path(
    "encoder", None, "SavedModel of s2sd-export, on a file system that the workers can read.", required=True
)
_IMAGES = app.define_path("images", None, "Folder of images, on a file system that the workers can read.")
_TFRECORDS = flags.DEFINE_string("tfrecords", None, "Pattern of TFRecord files with the features image, id and label.")
_OUTPUT = app.define_path("output", None, "New folder, on a file system that the workers share.", required=True)
_DIM = flags.DEFINE_integer(
    "dim", None, "Dimension of the embeddings: one of the model's nested_dims. By default the whole.", lower_bound=1
)
_SHARDS = flags.DEFINE_integer("shards", 16, "Maximum number of shards.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images embedded at a time.", lower_bound=1)
_METHOD = flags.DEFINE_enum(
    "method",
    None,
    ["scann", "exact", "funnel", "none"],
    "Search method of each shard's index; by default scann where it is installed, else exact.",
)
_FUNNEL_DIM = flags.DEFINE_integer(
    "funnel_dim", None, "With --method=funnel: dimension of the shortlist, see s2sd-index.", lower_bound=1
)
_CODES = flags.DEFINE_enum(
    "codes", "float32", ["float32", "int8", "bits", "scann"], "With --method=funnel: how the shortlist stores prefixes."
)
_METRIC = flags.DEFINE_enum("metric", "cosine", ["cosine", "euclidean"], "Metric of the index.")
_RECALL = flags.DEFINE_float("recall", 0.99, "Recall against exact search that ScaNN or funnel is tuned to.")
_OPTIONS = flags.DEFINE_multi_string(
    "beam", [], "Option of the Beam pipeline, such as --runner=FlinkRunner. Repeat the flag for several."
)


def main() -> None:
    """The program `s2sd-beam`."""
    app.run(_main)


def _main(_):
    from s2sd_tf.serving import list_images

    if (_IMAGES.value is None) == (_TFRECORDS.value is None):
        raise ValueError("--images and --tfrecords: expected exactly one")
    try:
        from s2sd_tf.serving import beam
    except ImportError as error:
        raise ImportError("s2sd-beam needs Apache Beam: pip install 's2sd_tf[beam]'") from error
    # Beam logs every batch.
    logging.getLogger("apache_beam").setLevel(logging.WARNING)
    # What fails is raised too, and reported once.
    logging.getLogger("apache_beam.runners.common").setLevel(logging.CRITICAL)
    index: dict[str, Any] | None = None
    if _METHOD.value == "none":
        for flag in (_METRIC, _RECALL, _FUNNEL_DIM, _CODES):
            if flag.present:
                raise ValueError(f"--{flag.name}: expected an index. Received: --method=none")
    else:
        index = {"method": _METHOD.value, "metric": _METRIC.value, "recall": _RECALL.value}
        index |= {"dim": _FUNNEL_DIM.value, "codes": _CODES.value}
    source = _TFRECORDS.value or list_images(_IMAGES.value)
    summary = beam.run(
        source, _ENCODER.value, _OUTPUT.value, _SHARDS.value, _BATCH_SIZE.value, index, _OPTIONS.value, _DIM.value
    )
    print(embedding_summary(summary, _OUTPUT.value))


if __name__ == "__main__":
    main()
