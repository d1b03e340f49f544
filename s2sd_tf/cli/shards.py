"""s2sd-shards: writes a data set as TFRecord shards, which load faster than many small files.

Examples:
  s2sd-shards --name=cub200 --root=CUB_200_2011 --output=cub200_shards
  s2sd-shards --name=folder --root=photos --output=photo_shards --on_corrupt=skip
"""

from absl import flags

from s2sd_tf.cli import app

_NAME = flags.DEFINE_string(
    "name",
    None,
    "Data set of image files: folder, of which the first half of the classes trains, cub200, cars196, ...",
    required=True,
)
_ROOT = app.define_path("root", None, "Folder of the data set.", required=True)
_OUTPUT = app.define_path("output", None, "Folder to write.", required=True)
_SHARD_MIB = flags.DEFINE_float("shard_mib", 128.0, "Size in MiB at which a new shard starts.", lower_bound=0.001)
_SOURCE = flags.DEFINE_enum("source", "auto", ["auto", "files", "shards", "tfds"], "What --root contains.")
_ON_CORRUPT = flags.DEFINE_enum("on_corrupt", "raise", ["raise", "skip"], "What to do with files that are not images.")
_CHECK = flags.DEFINE_enum(
    "check", "files", ["none", "files", "decode"], "Check of files: none, by first and last bytes, or decoding."
)


def main() -> None:
    """The program `s2sd-shards`."""
    app.run(_main)


def _main(_):
    from s2sd_tf.data import datasets, write_shards
    from s2sd_tf.files import only_writer

    for flag in (_CHECK, _ON_CORRUPT):
        if flag.present and _SOURCE.value in ("shards", "tfds"):
            raise ValueError(f"--{flag.name}: expected image files. Received: --source={_SOURCE.value}")
    chosen = {"on_corrupt": _ON_CORRUPT.value, "check": _CHECK.value, "source": _SOURCE.value}
    with only_writer("--output", _OUTPUT.value):
        names = [name for name in datasets.names() if "source" in datasets.settings(name)]
        if _NAME.value not in names:
            raise ValueError(f"--name: expected one of {names}. Received: {_NAME.value!r}")
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
