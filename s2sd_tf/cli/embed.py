"""s2sd-embed: embeds a folder of images into shards, or resumes after an interruption.

The output is a folder of shards with the embeddings, ids (paths under the folder) and labels (names of the class
folders) of the images. Images that cannot be read are listed in its summary.json. s2sd-index and s2sd-evaluate read it.

Examples:
  s2sd-embed --encoder=runs/omniglot/saved_model --images=photos --output=embeddings
  s2sd-embed --encoder=encoder --images=photos --output=embeddings --dim=16
"""

from absl import flags

from s2sd_tf.cli import app
from s2sd_tf.cli.tables import embedding_summary

_ENCODER = app.define_path("encoder", None, "SavedModel of s2sd-export.", required=True)
_IMAGES = app.define_path("images", None, "Folder of images, with or without class folders.", required=True)
_OUTPUT = app.define_path("output", None, "Folder to write, or to resume.", required=True)
_DIM = flags.DEFINE_integer(
    "dim", None, "Dimension of the embeddings: one of the model's nested_dims. By default the whole.", lower_bound=1
)
_SHARD_SIZE = flags.DEFINE_integer("shard_size", 4096, "Images per shard.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images embedded at a time.", lower_bound=1)


def main() -> None:
    """The program `s2sd-embed`."""
    app.run(_main)


def _main(_):
    from s2sd_tf.checks import check_folder_to_write
    from s2sd_tf.serving import Encoder, embed_images, list_images

    check_folder_to_write("--output", _OUTPUT.value)
    items = list_images(_IMAGES.value)
    encoder = Encoder(_ENCODER.value, _DIM.value)
    summary = embed_images(items, encoder, _OUTPUT.value, _SHARD_SIZE.value, _BATCH_SIZE.value)
    print(embedding_summary(summary, _OUTPUT.value))


if __name__ == "__main__":
    main()
