"""Images in a tree of class folders."""

import os
import re
from collections.abc import Iterator, Sequence

import numpy as np

from s2sd_tf.data.image_files import check_options, select_readable
from s2sd_tf.data.image_set import ImageSet
from s2sd_tf.files import local_path

EXTENSIONS = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp")
# Folders that divide a data set, not classes.
_PART = re.compile("(train(ing)?|test(ing)?|val(id|idation)?|eval(uation)?|dev)([-_ ]?(images?|set|data|split))?", re.I)


def load_image_folder(root: str | os.PathLike, on_corrupt: str = "raise", check: str = "decode") -> ImageSet:
    """Loads the image files under `root`. Every folder that directly holds images is a class.

    A class is named by its path under `root`, so class folders may be nested (`Greek/character01`). If all classes are
    nested, the first folder (`Greek`) is the super-class. Classes and files are sorted. Files and folders whose name
    begins with a dot are ignored. Links are followed, except a link to a folder that contains it.

    Args:
        root: folder; `root/<class>/*` with one of `EXTENSIONS`, in upper or lower case.
        on_corrupt: what to do with files that are not images or cannot be decoded: "raise" refuses them, "skip" leaves
            them out. Both report their paths.
        check: "decode" decodes every file once, with a progress bar for more than 1,000 files. "files" reads their
            first and last bytes, see `load_cub200`. "none" checks the extension only; a file that cannot be decoded
            then stops the training, and is named.

    Raises:
        FileNotFoundError: `root` is not a folder.
        ValueError: no image under `root`; class folders in parts such as `train` and `test`; or, with "raise", files
            that are not images and folders that cannot be listed.
    """
    root = local_path("root", root)
    check_options(on_corrupt, check)
    images, bad = scan_image_folder(root)
    (images,) = select_readable([images], root, on_corrupt, check, bad)
    if not len(images):
        raise ValueError(f"root: expected images as <class>/*{{{','.join(EXTENSIONS)}}} under it. Received: {root!r}")
    return images.select_classes(np.flatnonzero(images.class_counts()))


def scan_image_folder(root: str | os.PathLike) -> tuple[ImageSet, list[tuple[str, str]]]:
    """Finds the images of `load_image_folder` by their names, without opening them.

    Returns:
        `(images, bad)`, where `bad` has the `(path, reason)` of each file that is not an image in a class folder.

    Raises:
        FileNotFoundError: `root` is not a folder.
        ValueError: class folders in parts such as `train` and `test`.
    """
    if not os.path.isdir(root):
        raise FileNotFoundError(f"root: expected a folder of class folders. Received: {root!r}")
    files, bad = _scan(root)
    _check_no_parts(root, {name for _, name in files})
    names, labels = np.unique([name for _, name in files], return_inverse=True)
    class_names = tuple(names.tolist())
    paths = np.array([path for path, _ in files], dtype=np.str_)
    return ImageSet(paths, labels.astype(np.int32), class_names, super_classes_in(class_names)), bad


def super_classes_in(class_names: Sequence[str]) -> tuple[str, ...]:
    """Returns the first folder of every class, the super-class, if all classes are nested, else ()."""
    return tuple(name.split("/")[0] for name in class_names) if all("/" in name for name in class_names) else ()


def walk_folders(root: str | os.PathLike, bad: list[tuple[str, str]]) -> Iterator[tuple[str, list[str]]]:
    """Yields `(folder, names of its files)` for `root` and all folders under it, sorted.

    Names that begin with a dot are ignored. Links are followed, except a link to a folder that contains it.

    Args:
        root: folder.
        bad: gets the `(path, reason)` of each folder that cannot be listed.
    """

    def identity(folder):
        try:
            status = os.stat(folder)
        except OSError as error:
            failed(error)
            return None
        return status.st_dev, status.st_ino

    def failed(error):
        bad.append((error.filename, f"a folder that cannot be listed: {error.strerror}"))

    root = os.fspath(root)
    # For each folder still to visit: the identities of itself and of the folders that contain it, links resolved.
    inside = {root: {identity(root)}}
    for folder, subfolders, names in os.walk(root, onerror=failed, followlinks=True):
        around = inside.pop(folder)
        found = {name: identity(os.path.join(folder, name)) for name in subfolders if not name.startswith(".")}
        subfolders[:] = sorted(name for name, known in found.items() if known and known not in around)
        inside.update((os.path.join(folder, name), around | {found[name]}) for name in subfolders)
        yield folder, sorted(name for name in names if not name.startswith("."))


def _check_no_parts(root, class_names):
    """Raises ValueError if two folders beside each other divide the classes, as `train/cat` and `test/cat` do."""
    parts: dict[str, set[str]] = {}
    for name in class_names:
        *folders, _ = name.split("/")
        for depth, folder in enumerate(folders):
            if _PART.fullmatch(folder):
                parts.setdefault("/".join(folders[:depth]), set()).add(folder)
    for parent, names in sorted(parts.items()):
        if len(names) > 1:
            train, test = sorted(names, key=lambda name: (not name.lower().startswith("train"), name))[:2]
            train, test = (os.path.join(root, parent, name) for name in (train, test))
            raise ValueError(
                f"root: expected class folders. Received: {os.fspath(root)!r}, which is divided into {sorted(names)}. "
                f"Pass {train!r}; in a config, config.data.root={train} and config.data.folder.test_root={test}"
            )


def _scan(root):
    """`(files, bad)`: `(path, class name)` of each image file, `(path, reason)` of each other file."""
    files: list[tuple[str, str]] = []
    bad: list[tuple[str, str]] = []
    for folder, names in walk_folders(root, bad):
        class_name = os.path.relpath(folder, root).replace(os.sep, "/")
        for name in names:
            path = os.path.join(folder, name)
            if not name.lower().endswith(EXTENSIONS):
                bad.append((path, "not an image file by its extension"))
            elif class_name == ".":
                bad.append((path, "not in a class folder"))
            else:
                files.append((path, class_name))
    return files, bad
