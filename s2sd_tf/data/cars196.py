"""CARS196: 196 models of cars, of which 98 train."""

import os

from s2sd_tf.data.annotations import Row, find_root, image_set, path_under, read_matlab
from s2sd_tf.data.datasets import register
from s2sd_tf.data.image_files import check_options
from s2sd_tf.data.image_folder import scan_image_folder
from s2sd_tf.data.image_set import split_classes
from s2sd_tf.data.retrieval_split import RetrievalSplit, readable_split
from s2sd_tf.data.sources import load_source

_FOLDERS = ("", "cars196", "stanford_cars")
_ANNOTATIONS = "cars_annos.mat"
_META = "devkit/cars_meta.mat"
_TRAIN_LABELS = "devkit/cars_train_annos.mat"
_TEST_LABELS = ("devkit/cars_test_annos_withlabels.mat", "cars_test_annos_withlabels.mat")
# Song et al., CVPR 2016, "Deep Metric Learning via Lifted Structured Feature Embedding".
_COUNTS = {"train": (8_054, 98), "test": (8_131, 98)}


@register("cars196", _COUNTS)
def load_cars196(root, on_corrupt="raise", check="files", source="auto"):
    """`RetrievalSplit` of CARS196 (Krause et al., 3dRR 2013): the first 98 classes train, the last 98 test.

    That is 8,054 and 8,131 images; other counts are told. Of a copy with fewer classes the first half trains. The
    archive's own parts for classification do not matter. Three layouts are known, in `root` or in its folder `cars196`
    or `stanford_cars`:

    - one archive: `cars_annos.mat` and `car_ims/*`;
    - the development kit: `devkit/cars_train_annos.mat`, `devkit/cars_meta.mat`, `cars_train/*`, `cars_test/*` and, in
      `devkit` or beside it, `cars_test_annos_withlabels.mat`, as the kit's own file of the test images has no labels;
    - the published code's: `images/<class>/*` alone, in sorted order.

    With folders named as the classes are, the last differs in the order of the classes, not in which of them train.

    Args:
        root, on_corrupt, check, source: see `load_cub200`.

    Returns:
        `RetrievalSplit` without a gallery; classes are named as in the annotations ("Acura RL Sedan 2012").

    Raises:
        FileNotFoundError: no layout is under `root`, or one of its annotation files is missing, as that of the test
            images' labels.
        ValueError: see `load_cub200`; a MATLAB file that is malformed, by file and annotation.
    """
    check_options(on_corrupt, check)
    return load_source("cars196", root, source, lambda: _read_files(root, on_corrupt, check))


def _read_files(root, on_corrupt, check):
    found = find_root(root, _FOLDERS, [_ANNOTATIONS, _TRAIN_LABELS]) or find_root(root, _FOLDERS, ["images"])
    if not found:
        raise FileNotFoundError(
            f"root: expected CARS196, one of {_ANNOTATIONS}, {_TRAIN_LABELS} and images/<class>/* in one of "
            f"{list(_FOLDERS)} under it. Received: {root!r}"
        )
    folder, file = found
    bad = []
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
            f"root: expected the labels of the test images, {_TEST_LABELS[0]}, which are published apart from the "
            f"development kit. Received: {folder!r} without them"
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
