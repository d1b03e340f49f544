"""Saves a ScaNN searcher as a folder that can be moved, and checks its files before ScaNN loads them."""

import os
import re
import tempfile
from collections.abc import Iterable
from typing import Any

from s2sd_tf.evaluation.scann_searcher import import_scann
from s2sd_tf.files import sha256
from s2sd_tf.untrusted import reading

_LIST, _CONFIG = "scann_assets.pbtxt", "scann_config.pb"


def save_searcher(searcher: Any, folder: str) -> None:
    """Writes a ScaNN searcher into a new folder."""
    os.makedirs(folder)
    searcher.serialize(folder)
    # ScaNN writes absolute paths. Keep only the file names, so that the folder can be moved.
    path = os.path.join(folder, _LIST)
    with open(path) as file:
        text = file.read()
    with open(path, "w") as file:
        file.write(re.sub(r'asset_path: ".*/([^/"]+)"', r'asset_path: "\1"', text))


def digests(folder: str | os.PathLike, names: Iterable[str] | None = None) -> dict[str, str]:
    """SHA-256 by name of the files `names` in a folder, by default of all files."""
    return {name: sha256(os.path.join(folder, name)) for name in sorted(names or os.listdir(folder))}


def load_searcher(folder: str | os.PathLike, written: dict[str, str] | None = None) -> Any:
    """Loads a searcher that `save_searcher` wrote.

    Args:
        folder: the folder.
        written: `digests` of the folder when it was written, or None to skip that check.

    Raises:
        ValueError: files that are missing, changed or broken, or file names that point elsewhere.
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
    # Check before ScaNN's native code reads the files: it ends the process if they are broken.
    with reading(folder, "the files as they were written"):
        there = digests(folder, {*names, _LIST})
        changed = written and [name for name, digest in there.items() if written.get(name) != digest]
        if changed:
            raise ValueError(f"a different SHA-256 of {changed}")
    # ScaNN needs absolute paths, so it gets a temporary folder of links and a list of the current paths. The folder has
    # nothing else in it, because ScaNN would unpickle a file of ids.
    with tempfile.TemporaryDirectory() as links, reading(folder, "what ScaNN writes"):
        for name in names:
            os.symlink(os.path.join(folder, name), os.path.join(links, name))
        with open(os.path.join(links, _LIST), "w") as file:
            file.writelines(f'assets {{\n  asset_type: {a}\n  asset_path: "{links}/{b}"\n}}\n' for a, b in found)
        return scann.scann_ops_pybind.load_searcher(links)
