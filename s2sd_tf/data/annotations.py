"""Readers of annotation files, text and MATLAB. Errors name the file and line."""

import json
import ntpath
import os
import posixpath
import subprocess
import sys
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from s2sd_tf.data import matlab_reader
from s2sd_tf.data.image_set import ImageSet
from s2sd_tf.untrusted import reading

# The most that a MATLAB file may inflate to. The CARS196 file has 2 MB.
_INFLATED_BYTES = 2**26
# The type number of a compressed element.
_COMPRESSED = 15


class Row(NamedTuple):
    """An image that an annotation file lists.

    Attributes:
        path: path of the image file.
        class_name: name of its class.
        where: the annotation file and line, for messages.
    """

    path: str
    class_name: str
    where: str


def read_columns(
    path: str | os.PathLike, columns: int, header: int = 0, path_first: bool = False
) -> Iterator[tuple[str, list[str]]]:
    """Yields `(where, values)` for each non-empty line of a text file with columns separated by white space.

    Args:
        path: file, UTF-8.
        columns: the number of columns.
        header: the number of lines to skip.
        path_first: the first column may contain blanks. By default the last one may.

    Raises:
        FileNotFoundError: the file does not exist.
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


def path_under(root: str | os.PathLike, relative: str, where: str | os.PathLike) -> str:
    """Joins the folder `root` and the path `relative`; `where` is for the message.

    Raises:
        ValueError: `relative` is absolute, leads out of `root`, or is not a valid path.
    """
    outside = posixpath.isabs(relative) or ntpath.isabs(relative) or ntpath.splitdrive(relative)[0]
    if outside or "\0" in relative or ".." in relative.replace("\\", "/").split("/"):
        raise ValueError(f"{where}: expected a path under {root!r}. Received: {relative!r}")
    return os.path.join(root, posixpath.normpath(relative))


def as_int(text: str, column: str, where: str) -> int:
    """Parses the int in a column; `column` and `where` are for the message.

    Raises:
        ValueError: `text` is not an int.
    """
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{where}: expected an int as {column}. Received: {text!r}") from None


def image_set(rows: Sequence[Row], class_names: Sequence[str], super_classes: Sequence[str] = ()) -> ImageSet:
    """Makes an `ImageSet` of paths.

    Args:
        rows: the images, in order.
        class_names: names of the classes, in the order of the labels.
        super_classes: the super-class of each class, or empty.

    Raises:
        ValueError: an image that is listed twice, or two classes with the same name.
    """
    labels = {name: label for label, name in enumerate(class_names)}
    if len(labels) < len(class_names):
        twice = sorted({name for at, name in enumerate(class_names) if labels[name] != at})
        raise ValueError(f"class_names: expected different names. Received: {twice[:5]} more than once")
    seen: dict[str, str] = {}
    for row in rows:
        if row.path in seen:
            raise ValueError(
                f"{row.where}: expected every image once. Received: {row.path!r} again, after {seen[row.path]}"
            )
        seen[row.path] = row.where
    return ImageSet(
        np.array([row.path for row in rows], np.str_),
        np.array([labels[row.class_name] for row in rows], np.int32),
        tuple(class_names),
        tuple(super_classes),
    )


def read_matlab(path: str | os.PathLike, *names: str) -> list[list[Any]]:
    """Reads variables of a MATLAB file, each as a list. Structures become dicts.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a MATLAB file, inflates to more than 64 MiB, or lacks one of the variables.
    """
    _check_there(path)
    with reading(path, "a MATLAB file up to version 7"):
        _check_inflated(path)
        content = _variables(path)
    missing = [name for name in names if name not in content]
    if missing:
        raise ValueError(f"{path}: expected the variables {list(names)}. Received: none named {missing}")
    # scipy does not wrap a single element in an array.
    return [content[name] if isinstance(content[name], list) else [content[name]] for name in names]


def find_root(
    root: str | os.PathLike, folders: Sequence[str], files: Sequence[str]
) -> tuple[str | os.PathLike, str] | None:
    """Finds the first of `folders` under `root` that has one of `files`.

    Args:
        root: folder.
        folders: relative paths that the data may be unpacked to; "" is `root`.
        files: relative paths of files or folders.

    Returns:
        `(folder, file)`, or None if no folder has any of the files.
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
    """The variables of a MATLAB file by name. Another process reads them, because some broken files crash scipy."""
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
    """Raises ValueError if the compressed elements of a version 5 MATLAB file inflate too far for scipy to read."""
    with open(path, "rb") as file:
        content = file.read(_INFLATED_BYTES + 1)
    left = _INFLATED_BYTES - len(content)
    order: Literal["little", "big"] = "little" if content[126:128] == b"IM" else "big"
    start = 128
    while left >= 0 and start + 8 <= len(content):
        kind, length = (int.from_bytes(content[at : at + 4], order) for at in (start, start + 4))
        if kind == _COMPRESSED:
            left -= len(zlib.decompressobj().decompress(content[start + 8 : start + 8 + length], left + 1))
        start += 8 + length
    if left < 0:
        raise ValueError(f"more than {_INFLATED_BYTES:,} bytes")
