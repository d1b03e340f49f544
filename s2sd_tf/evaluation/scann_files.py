"""A searcher of ScaNN as a folder that can be moved, and whose files are checked before ScaNN reads them."""

import os
import re
import tempfile

from s2sd_tf.evaluation.scann_searcher import import_scann
from s2sd_tf.files import sha256
from s2sd_tf.untrusted import reading

_LIST, _CONFIG = "scann_assets.pbtxt", "scann_config.pb"


def save_searcher(searcher, folder):
    """Writes a new folder."""
    os.makedirs(folder)
    searcher.serialize(folder)
    # ScaNN writes where the files are; names alone let the folder be moved.
    path = os.path.join(folder, _LIST)
    with open(path) as file:
        text = file.read()
    with open(path, "w") as file:
        file.write(re.sub(r'asset_path: ".*/([^/"]+)"', r'asset_path: "\1"', text))


def digests(folder, names=None):
    """SHA-256 of the files of some names in a folder, or of all, by name."""
    return {name: sha256(os.path.join(folder, name)) for name in sorted(names or os.listdir(folder))}


def load_searcher(folder, written=None):
    """The searcher that `save_searcher` wrote.

    Args:
        folder: the folder.
        written: `digests` of it when it was written, or None.

    Raises:
        ValueError: files that are missing, changed or broken, or names that lead elsewhere.
        ImportError: ScaNN is missing or does not fit TensorFlow.
    """
    scann = import_scann()
    folder = os.path.abspath(folder)
    with reading(folder, "what ScaNN writes"), open(os.path.join(folder, _LIST)) as file:
        found = re.findall(r'assets \{\s*asset_type: (\w+)\s*asset_path: "([^"]*)"\s*\}', file.read())
    for _, name in found:
        if os.path.basename(name) != name or name.endswith(".pkl"):
            raise ValueError(f"index: expected names of files in {folder!r}. Received: {name!r}")
    names = {_CONFIG, *(name for _, name in found)}
    # ScaNN's own code reads them, which ends the process where they are broken.
    with reading(folder, "the files as they were written"):
        there = digests(folder, {*names, _LIST})
        changed = written and [name for name, digest in there.items() if written.get(name) != digest]
        if changed:
            raise ValueError(f"another SHA-256 of {changed}")
    # ScaNN takes names as they were when it wrote them: it gets a folder with where the files are now. Nothing else
    # is in it, as it would unpickle a file of ids.
    with tempfile.TemporaryDirectory() as links, reading(folder, "what ScaNN writes"):
        for name in names:
            os.symlink(os.path.join(folder, name), os.path.join(links, name))
        with open(os.path.join(links, _LIST), "w") as file:
            file.writelines(f'assets {{\n  asset_type: {a}\n  asset_path: "{links}/{b}"\n}}\n' for a, b in found)
        return scann.scann_ops_pybind.load_searcher(links)
