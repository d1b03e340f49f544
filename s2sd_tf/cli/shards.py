"""s2sd-shards: writes a data set as TFRecord shards, which are read faster than many small files.

s2sd-shards --name=cub200 --root=CUB_200_2011 --output=cub200_shards
"""

from absl import flags

from s2sd_tf.cli import app
from s2sd_tf.data import datasets, write_shards
from s2sd_tf.data.image_files import CHECKS, ON_CORRUPT
from s2sd_tf.data.sources import SOURCES

_NAME = flags.DEFINE_enum(
    "name",
    None,
    [name for name in datasets.names() if "source" in datasets.settings(name)],
    "Data set; of class folders, folder, the first half in sorted order trains.",
    required=True,
)
_ROOT = flags.DEFINE_string("root", None, "Folder of the data set.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write.", required=True)
_SHARD_MIB = flags.DEFINE_float("shard_mib", 128.0, "MiB from which on the next shard is begun.", lower_bound=0.001)
_SOURCE = flags.DEFINE_enum("source", "auto", SOURCES, "What is in --root.")
_ON_CORRUPT = flags.DEFINE_enum("on_corrupt", "raise", ON_CORRUPT, "What becomes of files that are no images.")
_CHECK = flags.DEFINE_enum(
    "check", "files", CHECKS, "How files are checked: by their first and last bytes, or decoded."
)


def main():
    app.run(_main)


def _main(_):
    chosen = {"on_corrupt": _ON_CORRUPT.value, "check": _CHECK.value, "source": _SOURCE.value}
    split = datasets.load(_NAME.value, _ROOT.value, **chosen)
    shards = write_shards(split, _OUTPUT.value, _SHARD_MIB.value, _NAME.value)
    lines = [("part", "images", "classes", "shards")]
    lines += [
        (part, f"{images:,}", f"{classes:,}", f"{shards[part]:,}") for part, (images, classes) in split.counts().items()
    ]
    print("\n".join(f"{part:<8}{images:>10}{classes:>10}{files:>8}" for part, images, classes, files in lines))
    print(f"TFRecord shards: {_OUTPUT.value}")


if __name__ == "__main__":
    main()
