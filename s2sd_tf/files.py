"""Atomic file writes that survive a power cut, JSON and digests, and the error raised when a disk is full."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from s2sd_tf.checks import check_folder_to_write

# Name prefix of the temporary folders of writes in progress. One that remains was left by a killed process.
LEFTOVER = ".writing-"

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class OutOfSpace(OSError):
    """A file or folder could not be written: the disk is full, or a quota or file size limit is reached.

    Attributes:
        path: what was to be written. Nothing is there, or what was there before.
        reason: why there is no room.
    """

    def __init__(self, path: str | os.PathLike, reason: str, advice: str = "") -> None:
        super().__init__(f"{path}: expected room to write it. Received: {reason}{advice}")
        self.path = path
        self.reason = reason


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[str]:
    """Writes a file or folder atomically: `with replacing(path) as temporary`.

    Yields a temporary path in a folder beside `path`, with the same name. When the block ends, what was written there
    replaces `path` and is flushed to the disk, so that it survives a power cut. If the block raises, it is removed. A
    folder replaces only a folder, by two renames.

    Raises:
        OutOfSpace: the block, or the flush to the disk, ran out of room.
        IsADirectoryError: `path` is a folder, but a file was written.
    """
    path = os.path.abspath(path)
    with reporting_out_of_space(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        folder = tempfile.mkdtemp(prefix=LEFTOVER, dir=os.path.dirname(path))
        temporary = os.path.join(folder, os.path.basename(path))
        try:
            yield temporary
            if os.path.isdir(path) and not os.path.isdir(temporary):
                raise IsADirectoryError(f"{path}: expected a file, or no file, to be replaced. Received: a folder")
            # Flush before the rename, or a power cut could leave the name without the content.
            _sync_all(temporary)
            _move(temporary, path, aside=os.path.join(folder, "old"))
            _sync(os.path.dirname(path))
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def reporting_out_of_space(path: str | os.PathLike) -> Iterator[None]:
    """Turns any error in the block that means "no room to write" into `OutOfSpace` for `path`."""
    try:
        yield
    except Exception as error:
        reason = _out_of_space(error)
        if reason is None:
            raise
        raise OutOfSpace(path, reason) from error


def check_replaceable(argument: str, path: str | os.PathLike, marker: str) -> None:
    """Raises ValueError if a folder cannot be written to `path`, or would replace something of another kind: a file, or
    a folder that is not empty and has no file named `marker`.
    """
    # An empty path is the current folder.
    full = os.path.abspath(path)
    taken = os.path.exists(full) and (not os.path.isdir(full) or bool(os.listdir(full)))
    if taken and not os.path.exists(os.path.join(full, marker)):
        raise ValueError(f"{argument}: expected a new folder, or one of its kind, with {marker}. Received: {path!r}")
    check_folder_to_write(argument, path)


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Removes what killed writers left in `folder`. Nothing else may be writing there at the time."""
    for name in os.listdir(folder):
        if name.startswith(LEFTOVER):
            shutil.rmtree(os.path.join(folder, name))


def write_json(path: str | os.PathLike, value: Any, indent: int | None = 2) -> None:
    """Writes `value` as JSON, atomically. `indent=None` writes one line."""
    with replacing(path) as temporary, open(temporary, "w") as file:
        json.dump(value, file, indent=indent)
        file.write("\n")


def read_json(path: str | os.PathLike) -> Any:
    """Reads what `write_json` wrote.

    Raises:
        ValueError: not JSON; the message names the file.
    """
    with open(path) as file:
        try:
            return json.load(file)
        except ValueError as error:
            raise ValueError(f"{path}: expected JSON. Received: {error}") from error


def sha256(*paths: str | os.PathLike) -> str:
    """SHA-256 of the concatenated contents of files, as hexadecimal digits."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def _move(temporary, path, aside):
    """Moves `temporary` to `path`, in one step unless `path` is a folder. `aside` is where the old folder goes."""
    if not os.path.isdir(path):
        os.replace(temporary, path)
        return
    # A folder cannot be replaced in one step.
    os.rename(path, aside)
    try:
        os.replace(temporary, path)
    finally:
        if not os.path.exists(path):
            os.rename(aside, path)


def _sync_all(path):
    """Flushes a file, or a folder with everything in it, to the disk."""
    for folder, _, names in os.walk(path):
        for name in names:
            _sync(os.path.join(folder, name))
        _sync(folder)
    if not os.path.isdir(path):
        _sync(path)


def _sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and FUSE file systems cannot flush a folder.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _out_of_space(error):
    """Why there is no room, from an error or one of its causes; None if the error means something else."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OutOfSpace):
            return error.reason
        if getattr(error, "errno", None) in _FULL:
            return os.strerror(error.errno)
        # h5py, C++ libraries and TensorFlow keep the system's message but drop its errno.
        for number in _FULL:
            if os.strerror(number).lower() in str(error).lower():
                return os.strerror(number)
        error = error.__cause__ or error.__context__
    return None
