"""Images in a tree of class folders."""

import concurrent.futures
import os

import numpy as np
import tensorflow as tf
from absl import logging
from tqdm import tqdm

from s2sd_tf.data.image_set import ImageSet
from s2sd_tf.data.preprocessing import decode_rgb

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".gif")


def load_image_folder(root, on_corrupt="raise", check=True):
    """An `ImageSet` of the image files under `root`, one class for every folder that holds images itself.

    A class is named by its path under `root`, so class folders may be nested (`Greek/character01`). Classes and files
    are in sorted order. Files and folders whose name begins with a dot are passed over.

    Args:
        root: folder; `root/<class>/*.{png,jpg,jpeg,bmp,gif}`, whatever the case of the extension.
        on_corrupt: what becomes of files that are no image or cannot be decoded: "raise" refuses them, "skip" leaves
            them out; either way their paths are told.
        check: bool; decodes every file once, with a progress bar for more than 1,000. Without it only the extension
            is looked at, and a file that cannot be decoded ends the training that meets it.

    Raises:
        FileNotFoundError: `root` is not a folder.
        ValueError: no image under `root`; or, with "raise", files that are not images.
    """
    if on_corrupt not in ("raise", "skip"):
        raise ValueError(f"on_corrupt: expected 'raise' or 'skip'. Received: {on_corrupt!r}")
    if not os.path.isdir(root):
        raise FileNotFoundError(f"root: expected a folder of class folders. Received: {root!r}")
    files, bad = _scan(root)
    if check:
        bad += _undecodable([path for path, _ in files])
    if bad:
        lines = [f"  {path}: {why}" for path, why in bad]
        message = f"{len(bad)} files under {root!r} are not readable images"
        if on_corrupt == "raise":
            shown = "\n".join(lines[:20] + ["  ..."] * (len(lines) > 20))
            raise ValueError(f"{message}:\n{shown}\nPass on_corrupt='skip' to train without them.")
        logging.warning("%s and are skipped:\n%s", message, "\n".join(lines))
    left_out = {path for path, _ in bad}
    files = [(path, name) for path, name in files if path not in left_out]
    if not files:
        raise ValueError(f"root: expected images as <class>/*{{{','.join(EXTENSIONS)}}} under it. Received: {root!r}")
    class_names, labels = np.unique([name for _, name in files], return_inverse=True)
    paths = np.array([path for path, _ in files], dtype=np.str_)
    return ImageSet(paths, labels.astype(np.int32), tuple(class_names.tolist()))


def _scan(root):
    """`(files, bad)`: `(path, class name)` of the image files, `(path, reason)` of the others."""
    files, bad = [], []
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        class_name = os.path.relpath(folder, root).replace(os.sep, "/")
        for name in sorted(names):
            path = os.path.join(folder, name)
            if name.startswith("."):
                continue
            if not name.lower().endswith(EXTENSIONS):
                bad.append((path, "not an image file by its extension"))
            elif class_name == ".":
                bad.append((path, "not in a class folder"))
            else:
                files.append((path, class_name))
    return files, bad


def _undecodable(paths):
    """`(path, reason)` of the files that the input pipeline could not decode."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        reasons = tqdm(
            pool.map(_decode_error, paths),
            total=len(paths),
            desc="Checking images",
            unit="file",
            disable=len(paths) <= 1000,
        )
        return [(path, reason) for path, reason in zip(paths, reasons) if reason]


def _decode_error(path):
    try:
        with open(path, "rb") as file:
            content = file.read()
        if not content:
            return "empty file"
        with tf.device("CPU:0"):
            decode_rgb(content)
    except (OSError, tf.errors.OpError) as error:
        return str(error).strip().splitlines()[0][:200]
    return None
