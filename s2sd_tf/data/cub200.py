"""CUB200-2011: 200 species of birds, of which 100 train."""

import os
import re

import numpy as np

from s2sd_tf.data.annotations import Row, as_int, find_root, image_set, path_under, read_columns
from s2sd_tf.data.image_files import check_options
from s2sd_tf.data.image_folder import scan_image_folder
from s2sd_tf.data.image_set import split_classes
from s2sd_tf.data.retrieval_split import RetrievalSplit, readable_split, tell_unpublished_counts

_FOLDERS = ("", "CUB_200_2011", "cub200")


def load_cub200(root, on_corrupt="raise", check="files"):
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

    Returns:
        `RetrievalSplit` of paths without a gallery; classes are named as in `classes.txt`.

    Raises:
        FileNotFoundError: neither layout is under `root`, or one of its annotation files is missing.
        ValueError: a bad argument; an annotation file that is malformed, by file and line, or that names a file outside
            of `root`; with "raise", files that are not images.
    """
    check_options(on_corrupt, check)
    found = find_root(root, _FOLDERS, ["images.txt"]) or find_root(root, _FOLDERS, ["images"])
    if not found:
        raise FileNotFoundError(
            f"root: expected CUB200-2011, images.txt or images/<class>/* in one of {list(_FOLDERS)} under it. "
            f"Received: {root!r}"
        )
    folder, file = found
    images, bad = (_annotated(folder), []) if file == "images.txt" else _folders(os.path.join(folder, file))
    split = RetrievalSplit(*split_classes(images, test_fraction=0.5))
    split = readable_split(split, folder, on_corrupt, check, bad)
    tell_unpublished_counts("cub200", split)
    return split


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
