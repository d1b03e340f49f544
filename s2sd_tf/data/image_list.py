"""Images listed in a text file, the format of iNaturalist's retrieval split."""

import os

import numpy as np

from s2sd_tf.data import datasets
from s2sd_tf.data.annotations import Row, image_set, path_under, read_columns
from s2sd_tf.data.image_files import check_options, select_readable
from s2sd_tf.data.image_folder import EXTENSIONS
from s2sd_tf.data.image_set import ImageSet
from s2sd_tf.data.retrieval_split import RetrievalSplit, readable_split, report_unpublished_counts
from s2sd_tf.files import local_path

# Brown et al., ECCV 2020, "Smooth-AP".
_INATURALIST = {"train": (325_846, 5_690), "test": (136_093, 2_452)}
_INATURALIST_FOLDER = "train_val2018"


def load_image_list(
    root: str | os.PathLike, image_list: str | os.PathLike, on_corrupt: str = "raise", check: str = "files"
) -> ImageSet:
    """Loads the image files that a text file lists, one path per line.

    A line may name the class after the path, separated by white space; there are no super-classes then. Without it the
    class is the file's folder, named with the folder above it (`Aves/2997`), which is the super-class. Classes are
    sorted, as numbers if all of them are numbers. Images keep the order of the list.

    Args:
        root: folder that the paths are relative to.
        image_list: text file, UTF-8. Paths end in one of `image_folder.EXTENSIONS` and may contain blanks.
        on_corrupt, check: see `load_cub200`.

    Raises:
        FileNotFoundError: the list does not exist.
        ValueError: see `load_cub200`.
    """
    root, image_list = local_path("root", root), local_path("image_list", image_list)
    check_options(on_corrupt, check)
    (images,) = select_readable([_read(root, image_list, "image_list")], root, on_corrupt, check)
    if not len(images):
        raise ValueError(f"image_list: expected images that can be read. Received: none in {image_list!r}")
    return images.select_classes(np.flatnonzero(images.class_counts()))


@datasets.register("lists", _INATURALIST)
def load_lists(
    root: str | os.PathLike,
    train_list: str | os.PathLike,
    test_list: str | os.PathLike,
    on_corrupt: str = "raise",
    check: str = "files",
) -> RetrievalSplit:
    """Loads a train and a test set from two lists of files, the format of iNaturalist's retrieval split.

    For iNaturalist 2018 (Van Horn et al., CVPR 2018) with the lists of Brown et al., ECCV 2020 ("Smooth-AP"), 325,846
    images of 5,690 species train and 136,093 of 2,452 other species test. Other counts are logged, if the folder is
    that of iNaturalist 2018.

    Args:
        root: folder that the listed paths (`train_val2018/<super-class>/<class>/<file>.jpg`) are relative to.
        train_list, test_list: text files, see `load_image_list`.
        on_corrupt, check: see `load_cub200`.

    Returns:
        `RetrievalSplit` of paths without a gallery.

    Raises:
        FileNotFoundError: a list does not exist.
        ValueError: see `load_cub200`; a class that is in both lists.
    """
    root = local_path("root", root)
    train_list, test_list = local_path("train_list", train_list), local_path("test_list", test_list)
    check_options(on_corrupt, check)
    split = RetrievalSplit(_read(root, train_list, "train_list"), _read(root, test_list, "test_list"))
    split = readable_split(split, root, on_corrupt, check)
    # Other lists are of other data sets.
    if any(_INATURALIST_FOLDER in path for path in split.train.images[:1]):
        report_unpublished_counts("inaturalist", _INATURALIST, split)
    return split


def _read(root, image_list, argument):
    if not os.path.isfile(image_list):
        raise FileNotFoundError(f"{argument}: expected a text file of paths. Received: {image_list!r}")
    rows = []
    super_class_of: dict[str, str | None] = {}
    labelled = None
    for where, (line,) in read_columns(image_list, 1):
        relative, label = line, None
        if not line.lower().endswith(EXTENSIONS) and len(line.split()) > 1:
            relative, label = line.rsplit(None, 1)
        if labelled is None:
            labelled = label is not None
        folders = relative.split("/")[:-1]
        if (
            not relative.lower().endswith(EXTENSIONS)
            or labelled != (label is not None)
            or (not labelled and not folders)
        ):
            wanted = "<path> <class>" if labelled else "<folder of a class>/<file>"
            raise ValueError(
                f"{where}: expected {wanted}, a path ending in {', '.join(EXTENSIONS)}. Received: {line!r}"
            )
        class_name = "/".join(folders[-2:]) if label is None else label
        super_class_of.setdefault(class_name, folders[-2] if len(folders) > 1 else None)
        rows.append(Row(path_under(root, relative, where), class_name, where))
    if not rows:
        raise ValueError(f"{argument}: expected one path per line. Received: {image_list!r}, which is empty")
    numbered = all(name.isdecimal() for name in super_class_of)
    # By length first, because Python refuses to parse integers of thousands of digits.
    class_names = sorted(
        super_class_of, key=(lambda name: (len(name.lstrip("0")), name.lstrip("0"), name)) if numbered else None
    )
    super_classes = [name for name in map(super_class_of.get, class_names) if name is not None]
    has_super_classes = not labelled and len(super_classes) == len(class_names)
    return image_set(rows, class_names, super_classes if has_super_classes else ())
