"""Images in a tree of class folders."""

import os

import numpy as np

from s2sd_tf.data.image_files import check_options, select_readable
from s2sd_tf.data.image_set import ImageSet

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".gif")


def load_image_folder(root, on_corrupt="raise", check="decode"):
    """An `ImageSet` of the image files under `root`, one class for every folder that holds images itself.

    A class is named by its path under `root`, so class folders may be nested (`Greek/character01`). Where all of them
    are, the first folder (`Greek`) is the super-class. Classes and files are in sorted order. Files and folders whose
    name begins with a dot are passed over. Links are followed, but for one to a folder that it is in.

    Args:
        root: folder; `root/<class>/*.{png,jpg,jpeg,bmp,gif}`, whatever the case of the extension.
        on_corrupt: what becomes of files that are no image or cannot be decoded: "raise" refuses them, "skip" leaves
            them out; either way their paths are told.
        check: "decode" decodes every file once, with a progress bar for more than 1,000. "files" looks at their first
            and last bytes, see `load_cub200`. "none" looks at the extension only, and a file that cannot be decoded
            ends the training that meets it.

    Raises:
        FileNotFoundError: `root` is not a folder.
        ValueError: no image under `root`; or, with "raise", files that are not images.
    """
    check_options(on_corrupt, check)
    images, bad = scan_image_folder(root)
    (images,) = select_readable([images], root, on_corrupt, check, bad)
    if not len(images):
        raise ValueError(f"root: expected images as <class>/*{{{','.join(EXTENSIONS)}}} under it. Received: {root!r}")
    return images.select_classes(np.flatnonzero(images.class_counts()))


def scan_image_folder(root):
    """`(images, bad)`: an `ImageSet` of what `load_image_folder` finds by names alone, and `(path, reason)` of files
    that are out of place.

    Raises:
        FileNotFoundError: `root` is not a folder.
    """
    if not os.path.isdir(root):
        raise FileNotFoundError(f"root: expected a folder of class folders. Received: {root!r}")
    files, bad = _scan(root)
    class_names, labels = np.unique([name for _, name in files], return_inverse=True)
    class_names = tuple(class_names.tolist())
    nested = all("/" in name for name in class_names)
    super_classes = tuple(name.split("/")[0] for name in class_names) if nested else ()
    paths = np.array([path for path, _ in files], dtype=np.str_)
    return ImageSet(paths, labels.astype(np.int32), class_names, super_classes), bad


def walk_folders(root):
    """Yields `(folder, names of its files)` of `root` and of all folders under it, sorted.

    Names that begin with a dot are passed over. Links are followed, but for one to a folder that it is in.
    """
    root = os.fspath(root)
    # What every folder that is to be visited is itself in, links resolved.
    inside = {root: {_identity(root)}}
    for folder, subfolders, names in os.walk(root, followlinks=True):
        around = inside.pop(folder)
        found = {name: _identity(os.path.join(folder, name)) for name in subfolders if not name.startswith(".")}
        subfolders[:] = sorted(name for name, identity in found.items() if identity not in around)
        inside.update((os.path.join(folder, name), around | {found[name]}) for name in subfolders)
        yield folder, sorted(name for name in names if not name.startswith("."))


def _identity(folder):
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _scan(root):
    """`(files, bad)`: `(path, class name)` of the image files, `(path, reason)` of the others."""
    files, bad = [], []
    for folder, names in walk_folders(root):
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
