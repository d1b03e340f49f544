"""CARS196: 196 models of cars, 98 to train on and 98 to test on."""

import os

from s2sd_tf.data.annotations import Row, find_root, image_set, path_under, read_matlab
from s2sd_tf.data.datasets import register
from s2sd_tf.data.image_files import check_options
from s2sd_tf.data.image_folder import scan_image_folder
from s2sd_tf.data.image_set import split_classes
from s2sd_tf.data.retrieval_split import RetrievalSplit, readable_split
from s2sd_tf.data.sources import load_source
from s2sd_tf.files import local_path

_FOLDERS = ("", "cars196", "stanford_cars")
_ANNOTATIONS = "cars_annos.mat"
_META = "devkit/cars_meta.mat"
_TRAIN_LABELS = "devkit/cars_train_annos.mat"
_TEST_LABELS = ("devkit/cars_test_annos_withlabels.mat", "cars_test_annos_withlabels.mat")
# Song et al., CVPR 2016, "Deep Metric Learning via Lifted Structured Feature Embedding".
_COUNTS = {"train": (8_054, 98), "test": (8_131, 98)}


@register("cars196", _COUNTS)
def load_cars196(
    root: str | os.PathLike, on_corrupt: str = "raise", check: str = "files", source: str = "auto"
) -> RetrievalSplit:
    """Loads CARS196 (Krause et al., 3dRR 2013): the first 98 classes train, the last 98 test.

    These are 8,054 and 8,131 images; other counts are logged. In a copy with fewer classes the first half trains. The
    archive's own train and test parts, which are for classification, are ignored. Three layouts are supported, in
    `root` or in its folder `cars196` or `stanford_cars`:

    - one archive: `cars_annos.mat` and `car_ims/*`;
    - the development kit: `devkit/cars_train_annos.mat`, `devkit/cars_meta.mat`, `cars_train/*`, `cars_test/*` and, in
      `devkit` or beside it, `cars_test_annos_withlabels.mat`, because the kit's own file of test images has no labels;
    - the published code: `images/<class>/*` only, in sorted order.

    If the folders have the names of the classes, the last layout changes the order of the classes, but the same ones
    train.

    Args:
        root, on_corrupt, check, source: see `load_cub200`.

    Returns:
        `RetrievalSplit` without a gallery. Classes are named as in the annotations ("Acura RL Sedan 2012").

    Raises:
        FileNotFoundError: `root` has none of the layouts, or an annotation file is missing, such as the test labels.
        ValueError: see `load_cub200`; a malformed MATLAB file (the message has the file and the annotation's number).
    """
    root = local_path("root", root)
    check_options(on_corrupt, check)
    return load_source("cars196", root, source, lambda: _read_files(root, on_corrupt, check))


def _read_files(root, on_corrupt, check):
    found = find_root(root, _FOLDERS, [_ANNOTATIONS, _TRAIN_LABELS]) or find_root(root, _FOLDERS, ["images"])
    if not found:
        raise FileNotFoundError(
            f"root: expected CARS196, with {_ANNOTATIONS}, {_TRAIN_LABELS} or images/<class>/* in one of "
            f"{list(_FOLDERS)} under it. Received: {root!r}"
        )
    folder, file = found
    bad: list[tuple[str, str]] = []
    if file == _ANNOTATIONS:
        images = _one_archive(folder)
    elif file == _TRAIN_LABELS:
        images = _development_kit(folder)
    else:
        images, bad = scan_image_folder(os.path.join(folder, file))
    split = RetrievalSplit(*split_classes(images, test_fraction=0.5))
    return readable_split(split, folder, on_corrupt, check, bad)


def _one_archive(folder):
    path = os.path.join(folder, _ANNOTATIONS)
    annotations, class_names = read_matlab(path, "annotations", "class_names")
    return image_set(_rows(path, annotations, "relative_im_path", folder, class_names), class_names)


def _development_kit(folder):
    labelled = find_root(folder, [""], _TEST_LABELS)
    if not labelled:
        raise FileNotFoundError(
            f"root: expected the labels of the test images, {_TEST_LABELS[0]}, which are published separately from "
            f"the development kit. Received: {folder!r} without them"
        )
    (class_names,) = read_matlab(os.path.join(folder, _META), "class_names")
    rows = []
    for file, images in ((_TRAIN_LABELS, "cars_train"), (labelled[1], "cars_test")):
        path = os.path.join(folder, file)
        (annotations,) = read_matlab(path, "annotations")
        rows += _rows(path, annotations, "fname", os.path.join(folder, images), class_names)
    return image_set(rows, class_names)


def _rows(path, annotations, path_field, folder, class_names):
    rows = []
    for number, annotation in enumerate(annotations, 1):
        where = f"{path}, annotation {number}"
        try:
            relative, label = str(annotation[path_field]), int(annotation["class"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{where}: expected the fields {path_field} and class. Received: {annotation!r}"
            ) from error
        if not 1 <= label <= len(class_names):
            raise ValueError(f"{where}: expected a class from 1 to {len(class_names)}. Received: {label}")
        rows.append(Row(path_under(folder, relative, where), class_names[label - 1], where))
    return rows
