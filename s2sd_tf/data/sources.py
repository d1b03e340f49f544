"""What is in the root of a data set: files as published, shards, or what TensorFlow Datasets prepared."""

import os

from s2sd_tf.data import datasets
from s2sd_tf.data.retrieval_split import tell_unpublished_counts
from s2sd_tf.data.shards import DESCRIPTION, read_shards
from s2sd_tf.data.tensorflow_datasets import builder_of, load_tfds

SOURCES = ("auto", "files", "shards", "tfds")


def load_source(name, root, source, read_files):
    """The `RetrievalSplit` of a registered data set, from what is in `root`.

    Args:
        name: the name that the data set is registered by.
        root: folder.
        source: one of `SOURCES`. "auto" takes shards where there is a `s2sd_shards.json`, else files.
        read_files: function without arguments to the `RetrievalSplit` of the files in `root`.

    Raises:
        ValueError: another source, or one that the data set lacks.
        FileNotFoundError, ValueError, ImportError: what the readers raise.
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
    if datasets.counts(name):
        tell_unpublished_counts(name, datasets.counts(name), split)
    return split
