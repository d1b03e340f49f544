"""Images listed in a text file, as iNaturalist's retrieval split is published."""

import os

import numpy as np

from s2sd_tf.data import datasets
from s2sd_tf.data.annotations import Row, image_set, path_under, read_columns
from s2sd_tf.data.image_files import check_options, select_readable
from s2sd_tf.data.image_folder import EXTENSIONS
from s2sd_tf.data.retrieval_split import RetrievalSplit, readable_split, tell_unpublished_counts

# Brown et al., ECCV 2020, "Smooth-AP".
_INATURALIST = {"train": (325_846, 5_690), "test": (136_093, 2_452)}


def load_image_list(root, image_list, on_corrupt="raise", check="files"):
    """An `ImageSet` of the files that a text file lists, a path under `root` a line.

    Without more the class is the folder that a file is in, named with the folder above it (`Aves/2997`), which is the
    super-class. What follows a path after white space is its class instead; then there are no super-classes. Classes
    are sorted, as numbers where all of them are; images keep the order of the list.

    Args:
        root: folder that the paths are under.
        image_list: text file, UTF-8. Paths end in .png, .jpg, .jpeg, .bmp or .gif and may hold blanks.
        on_corrupt, check: see `load_cub200`.

    Raises:
        FileNotFoundError: the list is not there.
        ValueError: see `load_cub200`.
    """
    check_options(on_corrupt, check)
    (images,) = select_readable([_read(root, image_list, "image_list")], root, on_corrupt, check)
    if not len(images):
        raise ValueError(f"image_list: expected images that can be read. Received: none of {image_list!r}")
    return images.select_classes(np.flatnonzero(images.class_counts()))


@datasets.register("lists", _INATURALIST)
def load_lists(root, train_list, test_list, on_corrupt="raise", check="files"):
    """`RetrievalSplit` by two lists of files, as iNaturalist's is published.

    That is iNaturalist 2018 (Van Horn et al., CVPR 2018) by the lists of Brown et al., ECCV 2020 ("Smooth-AP"): 325,846
    images of 5,690 species train, 136,093 of 2,452 others test; other counts are told.

    Args:
        root: folder that the lists' paths (`train_val2018/<super-class>/<class>/<file>.jpg`) are under.
        train_list, test_list: text files, see `load_image_list`.
        on_corrupt, check: see `load_cub200`.

    Returns:
        `RetrievalSplit` of paths without a gallery.

    Raises:
        FileNotFoundError: a list is not there.
        ValueError: see `load_cub200`; a class that is in both lists.
    """
    check_options(on_corrupt, check)
    split = RetrievalSplit(_read(root, train_list, "train_list"), _read(root, test_list, "test_list"))
    split = readable_split(split, root, on_corrupt, check)
    tell_unpublished_counts("inaturalist", datasets.counts("lists"), split)
    return split


def _read(root, image_list, argument):
    if not os.path.isfile(image_list):
        raise FileNotFoundError(f"{argument}: expected a text file of paths. Received: {image_list!r}")
    rows, super_class_of, labelled = [], {}, None
    for where, (line,) in read_columns(image_list, 1):
        has_label = not line.lower().endswith(EXTENSIONS)
        relative, label = line.rsplit(None, 1) if has_label and len(line.split()) > 1 else (line, None)
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
        class_name = label if labelled else "/".join(folders[-2:])
        super_class_of.setdefault(class_name, folders[-2] if len(folders) > 1 else None)
        rows.append(Row(path_under(root, relative, where), class_name, where))
    if not rows:
        raise ValueError(f"image_list: expected a path a line. Received: {image_list!r}, which is empty")
    numbered = all(name.isdecimal() for name in super_class_of)
    # By length first, as Python refuses to read numbers of thousands of digits.
    class_names = sorted(
        super_class_of, key=(lambda name: (len(name.lstrip("0")), name.lstrip("0"), name)) if numbered else None
    )
    super_classes = [super_class_of[name] for name in class_names]
    return image_set(rows, class_names, () if labelled or None in super_classes else super_classes)
