"""Files that are either whole or not there, also after a power cut, and what is said where a disk is full."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile

# How the names of folders begin in which something is being written; one that stays is the rest of a killed process.
LEFTOVER = ".writing-"

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class OutOfSpace(OSError):
    """Something could not be written: the disk is full, or a quota or a limit of file sizes is reached.

    Attributes:
        path: what was to be written. There is nothing of it, or what was there before.
    """

    def __init__(self, path, reason, advice=""):
        super().__init__(f"{path}: expected room on its disk. Received: {reason}{advice}")
        self.path = path
        self.reason = reason


@contextlib.contextmanager
def replacing(path):
    """Yields a temporary path beside `path`, with its extension; what is written there takes the place of `path` at
    the end, and is removed if the block raises. A folder takes the place of a folder. What stands under `path` is on
    the disk, whatever happens to the machine afterwards.

    Raises:
        OutOfSpace: the block, or writing to the disk, ran out of room.
    """
    path = os.path.abspath(path)
    with telling_out_of_space(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        folder = tempfile.mkdtemp(prefix=LEFTOVER, dir=os.path.dirname(path))
        temporary = os.path.join(folder, os.path.basename(path))
        try:
            yield temporary
            if os.path.isdir(path) and not os.path.isdir(temporary):
                raise IsADirectoryError(f"{path}: expected a file, or no file, to be replaced. Received: a folder")
            # Before the name changes: or else a power cut could leave the name without the content.
            _sync_all(temporary)
            _move(temporary, path, aside=os.path.join(folder, "old"))
            _sync(os.path.dirname(path))
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def telling_out_of_space(path):
    """Within the block, whatever a library raises where there is no room to write becomes `OutOfSpace` for `path`."""
    try:
        yield
    except Exception as error:
        reason = _out_of_space(error)
        if reason is None:
            raise
        raise OutOfSpace(path, reason) from error


def check_replaceable(argument, path, marker):
    """Raises ValueError where a folder to be written is there and is something else: not empty, and without the file
    `marker` that its kind has.
    """
    taken = os.path.exists(path) and (not os.path.isdir(path) or bool(os.listdir(path)))
    if taken and not os.path.exists(os.path.join(path, marker)):
        raise ValueError(f"{argument}: expected a new folder, or one of its kind, with {marker}. Received: {path!r}")


def remove_leftovers(folder):
    """Removes what killed writers left in `folder`; nobody else may be writing there."""
    for name in os.listdir(folder):
        if name.startswith(LEFTOVER):
            shutil.rmtree(os.path.join(folder, name))


def write_json(path, value, indent=2):
    """Writes `value` as JSON, indented where it is for people too; whole or not at all."""
    with replacing(path) as temporary, open(temporary, "w") as file:
        json.dump(value, file, indent=indent)
        file.write("\n")


def read_json(path):
    """What `write_json` wrote.

    Raises:
        ValueError: something else; the message names the file.
    """
    with open(path) as file:
        try:
            return json.load(file)
        except ValueError as error:
            raise ValueError(f"{path}: expected JSON. Received: {error}") from error


def sha256(*paths):
    """SHA-256 of the content of files, one after another, as hexadecimal digits."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def _move(temporary, path, aside):
    """Gives `path` what is at `temporary`, in one step where it is a file."""
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
    """Writes a file, or a folder with all that is in it, through to the disk."""
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
        # Some network and FUSE file systems cannot do it for a folder.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _out_of_space(error):
    """What an error, or one that it came of, says of a lack of room; None where it is of something else."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OutOfSpace):
            return error.reason
        if getattr(error, "errno", None) in _FULL:
            return os.strerror(error.errno)
        # h5py, libraries in C++ and TensorFlow hand over the system's words, without its number.
        for number in _FULL:
            if os.strerror(number).lower() in str(error).lower():
                return os.strerror(number)
        error = error.__cause__ or error.__context__
    return None
