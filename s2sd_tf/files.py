"""Atomic file writes that survive a power cut, locks, JSON and digests, and the error raised when a disk is full."""

import contextlib
import datetime
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from typing import Any

from absl import logging

from s2sd_tf.checks import check_folder_to_write

# Name prefix of the temporary folders of writes in progress, and of locks. One that remains was left by a killed
# process.
LEFTOVER = ".writing-"

# In a folder that is locked by its only writer.
_LOCK = f"{LEFTOVER}lock"
_TEMPORARY = re.compile(re.escape(LEFTOVER) + "[a-z0-9_]{8}")
# As a `pathlib.Path`, a URL has one slash.
_URL = re.compile("[A-Za-z][A-Za-z0-9+.-]+:/")
_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")
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


def local_path(argument: str, path: str | os.PathLike, empty: bool = False) -> str:
    """Returns a path as a str, with `~` and `~user` expanded. Every function that takes a path calls it first.

    Args:
        argument: name of the argument or flag for the message.
        path: the path.
        empty: whether "" is accepted, for "not given", and returned.

    Raises:
        ValueError: `path` is no path: another type, bytes, empty, with a NUL or other characters that no file name has;
            or it is a URL, such as gs://bucket/folder. The message names `argument`.
    """
    found = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(found, str) or not (_is_file_name(found) or (empty and not found)):
        raise ValueError(f"{argument}: expected a path, a str or pathlib.Path. Received: {path!r}")
    if _URL.match(found):
        raise ValueError(
            f"{argument}: expected a path in the file systems of this machine; mount the storage, or copy the files. "
            f"Received: {found!r}"
        )
    return os.path.expanduser(str(found))


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[str]:
    """Writes a file or folder atomically: `with replacing(path) as temporary`.

    Yields a temporary path in a folder beside `path`, with the same name. When the block ends, what was written there
    replaces `path` and is flushed to the disk, so that it survives a power cut. If the block raises, it is removed. A
    folder replaces only a folder, by two renames. What killed processes left beside `path` is removed first.

    Raises:
        OutOfSpace: the block, or the flush to the disk, ran out of room.
        IsADirectoryError: `path` is a folder, but a file was written.
    """
    path = os.path.abspath(local_path("path", path))
    with reporting_out_of_space(path):
        with _explaining(f"{path}: expected a path that can be written"):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            for name in os.listdir(os.path.dirname(path)):
                if _TEMPORARY.fullmatch(name):
                    _remove_abandoned(os.path.join(os.path.dirname(path), name))
            folder, lock = _temporary_folder(os.path.dirname(path))
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
            os.close(lock)


@contextlib.contextmanager
def only_writer(argument: str, path: str | os.PathLike, inside: bool = False) -> Iterator[None]:
    """Within the block no other process, on any machine, gets past `only_writer` for the same folder.

    The kernel holds the lock and releases it when the process ends in any way, so a killed process blocks nobody. The
    lock is a file that says who holds it, and is removed at the end. On a file system without locks, a warning is
    logged instead.

    Args:
        argument: name of the argument or flag for the message.
        path: folder to write. It need not exist.
        inside: whether the lock is in the folder, which is created for it, and removed at the end if it is still empty.
            Otherwise the lock is beside it, for a folder that is replaced as a whole.

    Raises:
        ValueError: another process has the folder; the message names it.
        OSError: the folder cannot be written.
    """
    path = os.path.abspath(local_path(argument, path))
    lock = os.path.join(path, _LOCK)
    if not inside:
        lock = os.path.join(os.path.dirname(path), f"{_LOCK}-{_short_name(path)}")
    created = _missing_folders(os.path.dirname(lock))
    with reporting_out_of_space(path), _explaining(f"{argument}: expected a folder that can be written", path):
        descriptor = _acquire(argument, path, lock)
    try:
        yield
    finally:
        # Removed before it is released: a process that waits for the removed file notices, see `_acquire`.
        with contextlib.suppress(OSError):
            os.unlink(lock)
        os.close(descriptor)
        with contextlib.suppress(OSError):
            for folder in created:
                os.rmdir(folder)


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


def check_room(path: str | os.PathLike, size: int) -> None:
    """Raises OSError if there is no room for a file of `size` bytes at `path`, where there is none."""
    try:
        with open(path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    finally:
        os.remove(path)


def check_replaceable(argument: str, path: str | os.PathLike, marker: str) -> None:
    """Raises ValueError if a folder cannot be written to `path`, or would replace something of another kind: a file, or
    a folder that is not empty and has no file named `marker`.
    """
    full = os.path.abspath(local_path(argument, path))
    taken = os.path.exists(full) and (not os.path.isdir(full) or bool(os.listdir(full)))
    if taken and not os.path.exists(os.path.join(full, marker)):
        raise ValueError(f"{argument}: expected a new folder, or one of its kind, with {marker}. Received: {path!r}")
    check_folder_to_write(argument, full)


def has_content(folder: str | os.PathLike) -> bool:
    """Whether a folder has anything except what a killed writer left, and locks."""
    return any(not name.startswith(LEFTOVER) for name in os.listdir(folder))


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Removes what killed writers left in `folder`. What a living process is writing stays, except on a file system
    without locks, where nothing else may be writing at the time.
    """
    for name in os.listdir(folder):
        if name.startswith(LEFTOVER) and not name.startswith(_LOCK):
            _remove_abandoned(os.path.join(folder, name), without_locks=True)


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


@contextlib.contextmanager
def _explaining(expected, path=None):
    """Turns an OSError of the block, which would name a temporary file, into one of the same type that explains it."""
    try:
        yield
    except OSError as error:
        if error.errno is None or _out_of_space(error) is not None:
            raise
        received = error.strerror if path is None else f"{path!r}: {error.strerror}"
        raise type(error)(f"{expected}. Received: {received}") from error


def _acquire(argument, path, lock):
    """Returns the descriptor of the locked file `lock`, which says who holds it."""
    while True:
        os.makedirs(os.path.dirname(lock), exist_ok=True)
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue  # The process that created the folder has removed it again.
        try:
            locked = _lock(descriptor)
            if locked is False:
                raise ValueError(
                    f"{argument}: expected a folder that no other process is writing. Received: {path!r}, which "
                    f"{_holder(descriptor)} is writing"
                )
            if locked is None:
                logging.warning(
                    "%s is on a file system without locks: make sure that no other process writes it at the same time",
                    path,
                )
            # The process that held it may have removed it meanwhile.
            if _is_open(descriptor, lock):
                now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
                holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": now}
                # On a full disk the lock holds without it, and the output says that there is no room.
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, json.dumps(holder).encode(), 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_file_name(path):
    try:
        return bool(path) and "\0" not in path and bool(os.fsencode(path))
    except UnicodeEncodeError:
        return False


def _short_name(path):
    """A name of fixed length for the last part of a path, which may itself be as long as names can be."""
    return hashlib.sha256(os.fsencode(os.path.basename(path))).hexdigest()[:16]


def _lock(descriptor):
    """Whether the open file or folder is now locked; False: by somebody else; None: the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError:
        return None


def _holder(descriptor):
    try:
        about = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {about['pid']} on {about['host']}, since {about['since']},"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _is_open(descriptor, path):
    """Whether `path` is the open file or folder."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _missing_folders(folder):
    """The folders that `os.makedirs(folder)` would create, the innermost first."""
    missing = []
    while not os.path.lexists(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
    return missing


def _temporary_folder(parent):
    """A new folder in `parent`, locked as long as the returned descriptor is open."""
    while True:
        folder = tempfile.mkdtemp(prefix=LEFTOVER, dir=parent)
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue  # Another process took it for abandoned before it was locked, here and below.
        if _lock(descriptor) is not False and _is_open(descriptor, folder):
            return folder, descriptor
        os.close(descriptor)


def _remove_abandoned(folder, without_locks=False):
    """Removes a temporary folder unless its writer lives. `without_locks`: also if there are no locks that tell."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except (FileNotFoundError, PermissionError):
        return  # Removed meanwhile, or another user's.
    try:
        locked = _lock(descriptor)
        if locked or (locked is None and without_locks):
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)


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
        # NumPy drops the system's message too.
        if _SHORT_WRITE.fullmatch(str(error)):
            return "only part of it could be written"
        # h5py, C++ libraries and TensorFlow keep the system's message but drop its errno.
        for number in _FULL:
            if os.strerror(number).lower() in str(error).lower():
                return os.strerror(number)
        error = error.__cause__ or error.__context__
    return None
