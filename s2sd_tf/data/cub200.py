"""CUB200-2011: 200 species of birds, 100 to train on and 100 to test on."""

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
from s2sd_tf.files import local_path

_FOLDERS = ("", "CUB_200_2011", "cub200")
# Song et al., CVPR 2016, "Deep Metric Learning via Lifted Structured Feature Embedding".
_COUNTS = {"train": (5_864, 100), "test": (5_924, 100)}


@register("cub200", _COUNTS)
def load_cub200(
    root: str | os.PathLike, on_corrupt: str = "raise", check: str = "files", source: str = "auto"
) -> RetrievalSplit:
    """Loads CUB200-2011 (Wah et al., Caltech 2011): the first 100 classes train, the last 100 test.

    These are 5,864 and 5,924 images; other counts are logged. In a copy with fewer classes the first half trains. Two
    layouts are supported, in `root` or in its folder `CUB_200_2011` or `cub200`:

    - the archive: `images.txt`, `image_class_labels.txt`, `classes.txt` and `images/<class>/*`;
    - the published code: `images/<class>/*` only, in the order of the numbers that the folder names begin with.

    Args:
        root: folder.
        on_corrupt: what to do with files that are missing or not images: "raise" refuses them, "skip" leaves them out.
            Both report their paths.
        check: how to find these files. "files" reads the first and last bytes, which finds missing and empty files,
            unknown formats, and truncated JPEG and PNG files. "decode" decodes every file, which takes as long as a
            pass over the data. "none" opens no file.
        source: what is in `root`. "files": one of the layouts. "shards": the output of `write_shards`. "tfds": data
            that TensorFlow Datasets prepared, see `load_tfds`. "auto": shards if there is a `s2sd_shards.json`, else
            files. Images in shards or from TensorFlow Datasets are not checked.

    Returns:
        `RetrievalSplit` without a gallery. Images are paths, or slices for shards, or bytes for TensorFlow Datasets.
        Classes are named as in `classes.txt`.

    Raises:
        FileNotFoundError: `root` does not have what `source` says, or one of its annotation files is missing.
        ValueError: a bad argument; a malformed annotation file, or one that names a file outside of `root` (the message
            has the file and line); with "raise", files that are not images.
    """
    root = local_path("root", root)
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
        class_name = classes.get(as_int(number, "class_id", where))
        if class_name is None:
            raise ValueError(f"{where}: expected a class of classes.txt. Received: {number}")
        class_of[image] = class_name
    rows = []
    for where, (image, relative) in read_columns(os.path.join(folder, "images.txt"), 2):
        if image not in class_of:
            raise ValueError(f"{where}: expected an image of image_class_labels.txt. Received: {image}")
        rows.append(Row(path_under(os.path.join(folder, "images"), relative, where), class_of[image], where))
    return image_set(rows, [classes[number] for number in sorted(classes)])


def _folders(folder):
    images, bad = scan_image_folder(folder)
    numbers = [number for name in images.class_names if (number := re.match(r"\d+", name))]
    if len(numbers) == images.num_classes:
        images = images.select_classes(np.argsort([int(number[0]) for number in numbers], kind="stable"))
    return images, bad
