"""Loads a data set from what its root holds: published files, shards, or data that TensorFlow Datasets prepared."""

import os
from collections.abc import Callable

from s2sd_tf.data import datasets
from s2sd_tf.data.retrieval_split import RetrievalSplit, report_unpublished_counts
from s2sd_tf.data.shards import DESCRIPTION, read_shards
from s2sd_tf.data.tensorflow_datasets import builder_of, load_tfds

SOURCES = ("auto", "files", "shards", "tfds")


def load_source(
    name: str, root: str | os.PathLike, source: str, read_files: Callable[[], RetrievalSplit]
) -> RetrievalSplit:
    """Loads a registered data set from `root`.

    Args:
        name: the registered name of the data set.
        root: folder.
        source: one of `SOURCES`. "auto" reads shards if `root` has a `s2sd_shards.json`, else files.
        read_files: reads the published files in `root`.

    Raises:
        ValueError: an unknown source, or "tfds" for a data set that TensorFlow Datasets does not have.
        FileNotFoundError, ValueError, ImportError: see `read_shards`, `load_tfds` and `read_files`.
    """
    if source not in SOURCES:
        raise ValueError(f"source: expected one of {list(SOURCES)}. Received: {source!r}")
    if source == "tfds":
        builder = builder_of(name)
        if builder is None:
            raise ValueError(f"source: expected 'auto', 'files' or 'shards' for {name!r}. Received: 'tfds'")
        return load_tfds(builder, root)
    is_shards = source == "shards" or (source == "auto" and os.path.isfile(os.path.join(root, DESCRIPTION)))
    split = read_shards(root, name) if is_shards else read_files()
    if counts := datasets.counts(name):
        report_unpublished_counts(name, counts, split)
    return split
