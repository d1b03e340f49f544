"""CUB200-2011: 200 species of birds, of which 100 train."""

import os
import re

import numpy as np

from s2sd_tf.data.annotations import Row, as_int, find_root, image_set, path_under, read_columns
from s2sd_tf.data.datasets import register
from s2sd_tf.data.image_files import check_options
from s2sd_tf.data.image_folder import scan_image_folder
from s2sd_tf.data.image_set import split_classes
from s2sd_tf.data.retrieval_split import RetrievalSplit, readable_split
from s2sd_tf.data.sources import load_source

_FOLDERS = ("", "CUB_200_2011", "cub200")
# Song et al., CVPR 2016, "Deep Metric Learning via Lifted Structured Feature Embedding".
_COUNTS = {"train": (5_864, 100), "test": (5_924, 100)}


@register("cub200", _COUNTS)
def load_cub200(root, on_corrupt="raise", check="files", source="auto"):
    """`RetrievalSplit` of CUB200-2011 (Wah et al., Caltech 2011): the first 100 classes train, the last 100 test.

    That is 5,864 and 5,924 images; other counts are told. Of a copy with fewer classes the first half trains. Two
    layouts are known, in `root` or in its folder `CUB_200_2011` or `cub200`:

    - the archive's: `images.txt`, `image_class_labels.txt`, `classes.txt` and `images/<class>/*`;
    - the published code's: `images/<class>/*` alone, where the number that a folder's name begins with is the order.

    Args:
        root: folder.
        on_corrupt: what becomes of files that are missing or no images: "raise" refuses them, "skip" leaves them out;
            either way their paths are told.
        check: which files those are. "files": missing, empty, of an unknown format, or truncated JPEG or PNG files, by
            their first and last bytes. "decode": all that cannot be decoded; takes as long as a pass over the data.
            "none": no file is looked at.
        source: what is in `root`. "files": one of the layouts. "shards": what `write_shards` wrote. "tfds": data that
            TensorFlow Datasets prepared, see `load_tfds`. "auto": shards where there is a `s2sd_shards.json`, else
            files. Images of shards and of TensorFlow Datasets are not checked.

    Returns:
        `RetrievalSplit` without a gallery; its images are paths, but slices of shards, and bytes of TensorFlow
        Datasets. Classes are named as in `classes.txt`.

    Raises:
        FileNotFoundError: what `source` says is not in `root`, or one of its annotation files is missing.
        ValueError: a bad argument; an annotation file that is malformed, by file and line, or that names a file outside
            of `root`; with "raise", files that are not images.
    """
    check_options(on_corrupt, check)
    return load_source("cub200", root, source, lambda: _read_files(root, on_corrupt, check))


def _read_files(root, on_corrupt, check):
    found = find_root(root, _FOLDERS, ["images.txt"]) or find_root(root, _FOLDERS, ["images"])
    if not found:
        raise FileNotFoundError(
            f"root: expected CUB200-2011, images.txt or images/<class>/* in one of {list(_FOLDERS)} under it. "
            f"Received: {root!r}"
        )
    folder, file = found
    images, bad = (_annotated(folder), []) if file == "images.txt" else _folders(os.path.join(folder, file))
    split = RetrievalSplit(*split_classes(images, test_fraction=0.5))
    return readable_split(split, folder, on_corrupt, check, bad)


def _annotated(folder):
    classes, class_of = {}, {}
    for where, (number, name) in read_columns(os.path.join(folder, "classes.txt"), 2):
        classes[as_int(number, "class_id", where)] = name
    for where, (image, number) in read_columns(os.path.join(folder, "image_class_labels.txt"), 2):
        name = classes.get(as_int(number, "class_id", where))
        if name is None:
            raise ValueError(f"{where}: expected a class of classes.txt. Received: {number}")
        class_of[image] = name
    rows = []
    for where, (image, relative) in read_columns(os.path.join(folder, "images.txt"), 2):
        if image not in class_of:
            raise ValueError(f"{where}: expected an image of image_class_labels.txt. Received: {image}")
        rows.append(Row(path_under(os.path.join(folder, "images"), relative, where), class_of[image], where))
    return image_set(rows, [classes[number] for number in sorted(classes)])


def _folders(folder):
    images, bad = scan_image_folder(folder)
    numbers = [re.match(r"\d+", name) for name in images.class_names]
    if all(numbers):
        images = images.select_classes(np.argsort([int(number[0]) for number in numbers], kind="stable"))
    return images, bad
