"""s2sd-shards: writes a data set as TFRecord shards, which are read faster than many small files.

s2sd-shards --name=cub200 --root=CUB_200_2011 --output=cub200_shards
"""

from absl import flags

from s2sd_tf.cli import app
from s2sd_tf.data import RetrievalSplit, benchmarks, load_image_folder, split_classes, write_shards
from s2sd_tf.data.image_files import CHECKS, ON_CORRUPT

_NAME = flags.DEFINE_enum(
    "name",
    None,
    [*benchmarks.names(), "folder"],
    "Benchmark; or folder: class folders, of which the first half in sorted order trains.",
    required=True,
)
_ROOT = flags.DEFINE_string("root", None, "Folder of the data set.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write.", required=True)
_SHARD_MIB = flags.DEFINE_float("shard_mib", 128.0, "MiB from which on the next shard is begun.", lower_bound=0.001)
_SOURCE = flags.DEFINE_enum("source", "auto", benchmarks.SOURCES, "What is in --root.")
_ON_CORRUPT = flags.DEFINE_enum("on_corrupt", "raise", ON_CORRUPT, "What becomes of files that are no images.")
_CHECK = flags.DEFINE_enum(
    "check", "files", CHECKS, "How files are checked: by their first and last bytes, or decoded."
)


def main():
    app.run(_main)


def _main(_):
    split = _load()
    shards = write_shards(split, _OUTPUT.value, _SHARD_MIB.value, _NAME.value)
    lines = [("part", "images", "classes", "shards")]
    lines += [
        (part, f"{images:,}", f"{classes:,}", f"{shards[part]:,}") for part, (images, classes) in split.counts().items()
    ]
    print("\n".join(f"{part:<8}{images:>10}{classes:>10}{files:>8}" for part, images, classes, files in lines))
    print(f"TFRecord shards: {_OUTPUT.value}")


def _load():
    if _NAME.value != "folder":
        return benchmarks.load(_NAME.value, _ROOT.value, _SOURCE.value, _ON_CORRUPT.value, _CHECK.value)
    if _SOURCE.value not in ("auto", "files"):
        raise ValueError(f"--source: expected auto or files, with --name=folder. Received: {_SOURCE.value}")
    images = load_image_folder(_ROOT.value, _ON_CORRUPT.value, _CHECK.value)
    return RetrievalSplit(*split_classes(images, test_fraction=0.5))


if __name__ == "__main__":
    main()
