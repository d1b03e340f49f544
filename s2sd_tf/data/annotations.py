"""Reading of annotation files, text and MATLAB; what is malformed is refused by file and line."""

import json
import ntpath
import os
import posixpath
import subprocess
import sys
import zlib
from typing import NamedTuple

import numpy as np

from s2sd_tf.data import matlab_reader
from s2sd_tf.data.image_set import ImageSet
from s2sd_tf.untrusted import reading

# What a MATLAB file may inflate to: that of CARS196 has 2 MB.
_INFLATED_BYTES = 2**26
# The type of compressed elements in it.
_COMPRESSED = 15


class Row(NamedTuple):
    """An image as an annotation file has it.

    Attributes:
        path: path of the image file.
        class_name: name of its class.
        where: file and line that say so, for messages.
    """

    path: str
    class_name: str
    where: str


def read_columns(path, columns, header=0, path_first=False):
    """Yields `(where, values)` for each line of a text file of columns between white space, empty lines apart.

    Args:
        path: file, UTF-8.
        columns: int, number of columns.
        header: int, lines to pass over.
        path_first: bool; the column that may hold blanks is the first one, not the last one.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: a line with fewer columns, or not in UTF-8.
    """
    _check_there(path)
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: expected UTF-8. Received: {line!r}") from error
            if number <= header or not text:
                continue
            values = text.rsplit(None, columns - 1) if path_first else text.split(None, columns - 1)
            if len(values) < columns:
                raise ValueError(f"{where}: expected {columns} columns. Received: {text!r}")
            yield where, values


def path_under(root, relative, where):
    """The file `relative` under the folder `root`.

    Raises:
        ValueError: it is absolute, leads out of `root`, or can be none.
    """
    outside = posixpath.isabs(relative) or ntpath.isabs(relative) or ntpath.splitdrive(relative)[0]
    if outside or "\0" in relative or ".." in relative.replace("\\", "/").split("/"):
        raise ValueError(f"{where}: expected a path under {root!r}. Received: {relative!r}")
    return os.path.join(root, posixpath.normpath(relative))


def as_int(text, column, where):
    """The int that a column has.

    Raises:
        ValueError: it has none.
    """
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{where}: expected an int as {column}. Received: {text!r}") from None


def image_set(rows, class_names, super_classes=()):
    """An `ImageSet` of paths.

    Args:
        rows: list of `Row`, in the order of the images.
        class_names: names of the classes, in the order of the labels.
        super_classes: the super-class of each, or empty.

    Raises:
        ValueError: an image that is there twice, or two classes of one name.
    """
    labels = {name: label for label, name in enumerate(class_names)}
    if len(labels) < len(class_names):
        twice = sorted({name for at, name in enumerate(class_names) if labels[name] != at})
        raise ValueError(f"class_names: expected classes of different names. Received: {twice[:5]} more than once")
    seen = {}
    for row in rows:
        if row.path in seen:
            raise ValueError(f"{row.where}: expected every image once. Received: {row.path!r} as in {seen[row.path]}")
        seen[row.path] = row.where
    return ImageSet(
        np.array([row.path for row in rows], np.str_),
        np.array([labels[row.class_name] for row in rows], np.int32),
        tuple(class_names),
        tuple(super_classes),
    )


def read_matlab(path, *names):
    """The variables of a MATLAB file: structures as dicts, arrays of them and of str as lists.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: another kind of file, one that inflates to more than 64 MiB, or without a variable of those names.
    """
    _check_there(path)
    with reading(path, "a MATLAB file up to version 7"):
        _check_inflated(path)
        content = _variables(path)
    missing = [name for name in names if name not in content]
    if missing:
        raise ValueError(f"{path}: expected the variables {list(names)}. Received: none named {missing}")
    # One that is alone is no array.
    return [content[name] if isinstance(content[name], list) else [content[name]] for name in names]


def find_root(root, folders, files):
    """`(folder, file)`: the first of `folders` under `root` that has one of `files`, and which; None without any.

    Args:
        root: folder.
        folders: relative paths that the data may be unpacked to; "" is `root`.
        files: relative paths of files or folders.
    """
    for folder in folders:
        for file in files:
            if os.path.exists(os.path.join(root, folder, file)):
                return os.path.join(root, folder) if folder else root, file
    return None


def _check_there(path):
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: expected an annotation file. Received: none")


def _variables(path):
    """The variables of a MATLAB file by name, read in another process, as some broken files crash scipy."""
    done = subprocess.run(
        [sys.executable, "-I", matlab_reader.__file__, os.path.abspath(path)],
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode:
        raise ValueError(done.stderr.strip() or "a file that crashes its reader")
    return json.loads(done.stdout)


def _check_inflated(path):
    """Raises ValueError where the compressed elements of a MATLAB file of version 5 are too large, before scipy makes
    an array of them.
    """
    with open(path, "rb") as file:
        content = file.read(_INFLATED_BYTES + 1)
    left = _INFLATED_BYTES - len(content)
    order = "little" if content[126:128] == b"IM" else "big"
    start = 128
    while left >= 0 and start + 8 <= len(content):
        kind, length = (int.from_bytes(content[at : at + 4], order) for at in (start, start + 4))
        if kind == _COMPRESSED:
            left -= len(zlib.decompressobj().decompress(content[start + 8 : start + 8 + length], left + 1))
        start += 8 + length
    if left < 0:
        raise ValueError(f"more than {_INFLATED_BYTES:,} bytes")
