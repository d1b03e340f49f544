"""Loads data sets that TensorFlow Datasets has prepared."""

import os

import numpy as np
from absl import logging
from tqdm import tqdm

from s2sd_tf.data import datasets
from s2sd_tf.data.image_set import ImageSet, split_classes
from s2sd_tf.data.retrieval_split import RetrievalSplit, report_unpublished_counts
from s2sd_tf.files import local_path

# The features to read besides the image, and the name of the data set in this package.
_BUILDERS: dict[str, tuple[dict[str, bool], str]] = {
    "caltech_birds2011": ({"label": True, "image/filename": True}, "cub200"),
    "cars196": ({"label": True}, "cars196"),
    "stanford_online_products": ({"class_id": True, "super_class_id": True}, "sop"),
}


def load_tfds(name: str, data_dir: str | os.PathLike | None = None) -> RetrievalSplit:
    """Loads a data set that TensorFlow Datasets has prepared. Nothing is downloaded.

    The encoded images stay in memory, and their size is logged; `write_shards` writes them to files that are read on
    demand. The split is the one of `load_cub200`, `load_cars196` or `load_sop`. For the first two, the builder's own
    parts are joined and the first half of the classes trains.

    Args:
        name: "caltech_birds2011", "cars196" or "stanford_online_products".
        data_dir: folder of prepared data sets. Default: the default folder of TensorFlow Datasets.

    Returns:
        `RetrievalSplit` of bytes without a gallery, with the same class names as the loaders above.

    Raises:
        ImportError: tensorflow-datasets is not installed.
        FileNotFoundError: the data set is not prepared in `data_dir`; the message says how to prepare it.
        ValueError: an unknown name, or fewer than two classes.
    """
    if name not in _BUILDERS:
        raise ValueError(f"name: expected one of {sorted(_BUILDERS)}. Received: {name!r}")
    if data_dir is not None:
        data_dir = local_path("data_dir", data_dir)
    tfds = _import_tfds()
    builder = tfds.builder(name, data_dir=data_dir)
    if not builder.is_prepared():
        raise FileNotFoundError(
            f"data_dir: expected {name}, prepared. Received: {os.fspath(builder.data_dir)!r} without it. To download "
            f"and prepare it, call tfds.builder({name!r}, data_dir=...).download_and_prepare()"
        )
    features, registered = _BUILDERS[name]
    examples = {part: _read(tfds, builder, part, features) for part in ("train", "test")}
    if name == "stanford_online_products":
        split = RetrievalSplit(*(_products(examples[part], builder.info.features) for part in ("train", "test")))
    else:
        named = _birds if name == "caltech_birds2011" else _cars
        images = named(examples["train"] + examples["test"], builder.info.features)
        split = RetrievalSplit(*split_classes(images, test_fraction=0.5))
    size = sum(len(example["image"]) for part in examples.values() for example in part)
    logging.info("%s: %.0f MiB of encoded images are in memory", name, size / 2**20)
    if published := datasets.counts(registered):
        report_unpublished_counts(registered, published, split)
    return split


def builder_of(registered: str) -> str | None:
    """Name of the TensorFlow Datasets builder for a data set registered here, or None."""
    return next((name for name, (_, known) in _BUILDERS.items() if known == registered), None)


def _import_tfds():
    # Imported late, because it takes seconds.
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise ImportError(
            "load_tfds: expected tensorflow-datasets. Received: none. Run pip install tensorflow-datasets"
        ) from error
    return tensorflow_datasets


def _read(tfds, builder, part, features):
    decoders = tfds.decode.PartialDecoding({"image": True, **features}, decoders={"image": tfds.decode.SkipDecoding()})
    dataset = tfds.as_numpy(builder.as_dataset(split=part, decoders=decoders, shuffle_files=False))
    count = builder.info.splits[part].num_examples
    return list(tqdm(dataset, total=count, desc=f"Reading {part}", unit="image", disable=count <= 1000))


def _cars(examples, features):
    return _image_set(examples, [int(example["label"]) for example in examples], features["label"].int2str)


def _birds(examples, _):
    # The builder's class names lack the number that the folder names begin with.
    labels = [int(example["label"]) for example in examples]
    folders = [os.path.basename(os.path.dirname(example["image/filename"].decode())) for example in examples]
    return _image_set(examples, labels, dict(zip(labels, folders)).__getitem__)


def _products(examples, features):
    numbers = [int(example["class_id"]) for example in examples]
    super_class_of = dict(zip(numbers, (int(example["super_class_id"]) for example in examples)))

    def super_class(number):
        return features["super_class_id"].int2str(super_class_of[number])

    # The lists of the archive count classes from 1.
    return _image_set(examples, numbers, lambda number: str(number + 1), super_class)


def _image_set(examples, numbers, class_name, super_class=None):
    numbers, labels = np.unique(numbers, return_inverse=True)
    images = np.empty(len(examples), object)
    images[:] = [example["image"] for example in examples]
    names = tuple(class_name(number) for number in numbers.tolist())
    super_classes = tuple(super_class(number) for number in numbers.tolist()) if super_class else ()
    return ImageSet(images, labels.astype(np.int32), names, super_classes)
