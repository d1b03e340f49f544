"""Your own images, one folder per class, divided into classes to train on and classes to test on."""

import functools
import os

from s2sd_tf.data.datasets import register
from s2sd_tf.data.image_files import check_options
from s2sd_tf.data.image_folder import load_image_folder
from s2sd_tf.data.image_set import split_classes
from s2sd_tf.data.retrieval_split import RetrievalSplit
from s2sd_tf.data.sources import load_source
from s2sd_tf.files import local_path

_TEST_FRACTION = 0.5


@register("folder")
def load_folder(
    root: str | os.PathLike,
    test_root: str | os.PathLike = "",
    test_classes: str = "",
    test_fraction: float = _TEST_FRACTION,
    on_corrupt: str = "raise",
    check: str = "decode",
    source: str = "auto",
) -> RetrievalSplit:
    """Loads a tree of class folders (see `load_image_folder`) and divides its classes into train and test.

    Args:
        root: folder of class folders, or of shards written from them.
        test_root: a second folder of class folders, to test on. "" tests on classes of `root`.
        test_classes: names or shell patterns (`birds/*`) of the classes to test on, separated by commas. "" tests on
            all classes of `test_root`, or without `test_root` on the last classes of `root`.
        test_fraction: float in (0, 1), the share of the classes of `root` to test on if neither `test_root` nor
            `test_classes` is given. The last classes test.
        on_corrupt, check: see `load_cub200`.
        source: "files", "shards" (already divided), or "auto", see `load_cub200`.

    Raises:
        FileNotFoundError: a root is not a folder.
        ValueError: a bad argument; a class or a file that is in both roots; see `load_image_folder` and
            `split_classes`.
    """
    root, test_root = local_path("root", root), local_path("test_root", test_root, empty=True)
    check_options(on_corrupt, check)

    def read(folder):
        return load_image_folder(folder, on_corrupt, check)

    split = load_source("folder", root, source, lambda: _split(read, root, test_root, test_classes, test_fraction))
    if split.train.kind == "slices" and (test_root or test_classes or test_fraction != _TEST_FRACTION):
        raise ValueError(
            "test_root, test_classes, test_fraction: expected none for shards, which are divided already. "
            f"Received: {test_root!r}, {test_classes!r}, {test_fraction!r}"
        )
    return split


def _split(read, root, test_root, test_classes, test_fraction):
    patterns = [pattern.strip() for pattern in test_classes.split(",") if pattern.strip()]
    images = read(root)
    if not test_root and images.num_classes < 2:
        raise ValueError(
            "root: expected at least 2 classes, one to train on and one to test on, or a test_root. "
            f"Received: {os.fspath(root)!r} with 1, {images.class_names[0]!r}"
        )
    if not test_root:
        chosen = {"test_classes": patterns} if patterns else {"test_fraction": test_fraction}
        return RetrievalSplit(*split_classes(images, **chosen))
    test = read(test_root)
    if patterns:
        test = test.select_by_name(patterns)
    both = sorted(set(images.class_names) & set(test.class_names))
    if both:
        raise ValueError(
            "test_root: expected classes that are not in root; choose others with test_classes. "
            f"Received: {len(both)} classes that are in both, {both[:5]}"
        )
    train_files = set(_real_paths(images))
    shared = [path for path in _real_paths(test) if path in train_files]
    if shared:
        raise ValueError(
            "test_root: expected images that are not in root. "
            f"Received: {test_root!r} and {root!r}, with {len(shared)} images that are in both, such as {shared[0]!r}"
        )
    return RetrievalSplit(images, test)


def _real_paths(images):
    """The paths of the images' files, without links to folders and `..`."""
    real_folder = functools.cache(os.path.realpath)
    return [os.path.join(real_folder(os.path.dirname(path)), os.path.basename(path)) for path in images.images.tolist()]
