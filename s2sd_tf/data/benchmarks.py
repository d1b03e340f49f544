"""The benchmarks of image retrieval by name, wherever they are: as published, as shards, or in TensorFlow Datasets."""

import os
from typing import NamedTuple

from s2sd_tf.data.cars196 import load_cars196
from s2sd_tf.data.cub200 import load_cub200
from s2sd_tf.data.image_files import check_options
from s2sd_tf.data.inshop import load_inshop
from s2sd_tf.data.retrieval_split import tell_unpublished_counts
from s2sd_tf.data.shards import DESCRIPTION, read_shards
from s2sd_tf.data.sop import load_sop
from s2sd_tf.data.tensorflow_datasets import load_tfds

SOURCES = ("auto", "files", "shards", "tfds")


class _Benchmark(NamedTuple):
    load: callable
    tfds: str | None


_BENCHMARKS = {
    "cars196": _Benchmark(load_cars196, "cars196"),
    "cub200": _Benchmark(load_cub200, "caltech_birds2011"),
    "inshop": _Benchmark(load_inshop, None),
    "sop": _Benchmark(load_sop, "stanford_online_products"),
}


def names():
    """Names of the benchmarks, sorted."""
    return sorted(_BENCHMARKS)


def load(name, root, source="auto", on_corrupt="raise", check="files"):
    """`RetrievalSplit` of a benchmark.

    Args:
        name: "cub200", "cars196", "sop" or "inshop".
        root: folder of the data.
        source: what is in `root`. "files": a published layout, see `load_cub200` and its like. "shards": what
            `write_shards` wrote. "tfds": data prepared by TensorFlow Datasets, see `load_tfds`. "auto": shards where
            there is a `s2sd_shards.json`, else files.
        on_corrupt, check: for files, see `load_cub200`; other sources are not looked at image by image.

    Raises:
        FileNotFoundError, ValueError, ImportError: a bad argument, or what the loaders raise.
    """
    if name not in _BENCHMARKS:
        raise ValueError(f"name: expected one of {names()}. Received: {name!r}")
    if source not in SOURCES:
        raise ValueError(f"source: expected one of {list(SOURCES)}. Received: {source!r}")
    check_options(on_corrupt, check)
    benchmark = _BENCHMARKS[name]
    if source == "tfds":
        if benchmark.tfds is None:
            raise ValueError(
                f"source: expected 'auto', 'files' or 'shards' for {name}. Received: 'tfds', which lacks it"
            )
        return load_tfds(benchmark.tfds, root)
    if source == "shards" or (source == "auto" and os.path.isfile(os.path.join(root, DESCRIPTION))):
        split = read_shards(root, name)
        tell_unpublished_counts(name, split)
        return split
    return benchmark.load(root, on_corrupt, check)
