"""s2sd-embed: embeds a folder of images into shards; called again after an interruption, goes on.

s2sd-embed --encoder=runs/digits8/saved_model --images=<folder> --output=embeddings
"""

from absl import flags

from s2sd_tf.cli import app
from s2sd_tf.cli.tables import embedding_summary
from s2sd_tf.serving import Encoder, embed_images, list_images

_ENCODER = flags.DEFINE_string("encoder", None, "SavedModel of s2sd-export.", required=True)
_IMAGES = flags.DEFINE_string("images", None, "Folder of images, in class folders or not.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write, or to go on with.", required=True)
_SHARD_SIZE = flags.DEFINE_integer("shard_size", 4096, "Images of a shard.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images embedded at a time.", lower_bound=1)


def main():
    app.run(_main)


def _main(_):
    items = list_images(_IMAGES.value)
    summary = embed_images(items, Encoder(_ENCODER.value), _OUTPUT.value, _SHARD_SIZE.value, _BATCH_SIZE.value)
    print(embedding_summary(summary, _OUTPUT.value))


if __name__ == "__main__":
    main()
