"""Omniglot's two small background archives, which the package contains, as a zero-shot retrieval task."""

import os

import numpy as np

from s2sd_tf.data.annotations import path_under
from s2sd_tf.data.datasets import register
from s2sd_tf.data.image_folder import super_classes_in
from s2sd_tf.data.image_set import ImageSet
from s2sd_tf.data.preprocessing import Preprocessing
from s2sd_tf.data.retrieval_split import RetrievalSplit
from s2sd_tf.files import local_path
from s2sd_tf.untrusted import image_excess, open_archive

ARCHIVES = ("images_background_small1.zip", "images_background_small2.zip")
TEST_ALPHABETS = ("Japanese_(katakana)", "Sanskrit", "Tagalog")
_PACKAGED = os.path.join(os.path.dirname(os.path.abspath(__file__)), "omniglot_archives")


def load_omniglot(data_dir: str | os.PathLike = "", size: int = 28) -> tuple[ImageSet, ImageSet, Preprocessing]:
    """Loads Omniglot's small archives (Lake et al., Science 2015; MIT licence): `(train, test, preprocessing)`.

    The 136 characters of the first archive train. The 106 characters of Japanese (katakana), Sanskrit and Tagalog in
    the second archive test. Each character has 20 drawings; its alphabet is the super-class. Greek and Latin are in
    both archives and only train. This is not the standard few-shot split of Omniglot.

    Args:
        data_dir: folder with the two published zip files, which are not unpacked. "": those in the package.
        size: side of the preprocessed images in pixels (the drawings have 105).

    Raises:
        FileNotFoundError: an archive does not exist.
        ValueError: an archive that is broken, inflates too far, or has images other than
            `<folder>/<alphabet>/<character>/<file>.png`; the message names it.
    """
    data_dir = local_path("data_dir", _PACKAGED if data_dir == "" else data_dir)
    train = _read_archive(os.path.join(data_dir, ARCHIVES[0]))
    test = _read_archive(os.path.join(data_dir, ARCHIVES[1])).select_by_name([f"{name}/*" for name in TEST_ALPHABETS])
    return train, test, _preprocessing(size)


def _preprocessing(size):
    # Inverted: ink is 1, paper is 0.
    return Preprocessing(size, size, channels=1, invert=True)


@register("omniglot", preprocessing=_preprocessing)
def _split(root=""):
    """Handwritten characters of eight alphabets, from Omniglot (Lake et al., Science 2015); comes with the package."""
    return RetrievalSplit(*load_omniglot(root)[:2])


def _read_archive(path):
    if not os.path.isfile(path):
        raise FileNotFoundError(f"data_dir: expected Omniglot's archive {os.path.basename(path)}. Received: {path}")
    with open_archive(path) as archive:
        files = [(name, archive.read(name)) for name in sorted(archive.namelist()) if name.endswith(".png")]
    images, characters = [], []
    for name, image in files:
        path_under(path, name, path)
        folders = name.split("/")[:-1]
        if len(folders) < 3:
            raise ValueError(f"{path}: expected images <folder>/<alphabet>/<character>/<file>.png. Received: {name!r}")
        if reason := image_excess(image):
            raise ValueError(f"{path}: expected drawings. Received: {name!r} of {reason}")
        images.append(image)
        characters.append("/".join(folders[1:3]))
    class_names, labels = np.unique(characters, return_inverse=True)
    array = np.empty(len(images), dtype=object)
    array[:] = images
    names = tuple(class_names.tolist())
    return ImageSet(array, labels.astype(np.int32), names, super_classes_in(names))
