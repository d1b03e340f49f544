"""Files that are either whole or not there."""

import contextlib
import json
import os
import shutil
import tempfile

# How the names of folders begin in which something is being written; one that stays is the rest of a killed process.
LEFTOVER = ".writing-"


@contextlib.contextmanager
def replacing(path):
    """Yields a temporary path beside `path`, with its extension; what is written there takes the place of `path` at
    the end, and is removed if the block raises. A folder takes the place of a folder.
    """
    path = os.path.abspath(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    folder = tempfile.mkdtemp(prefix=LEFTOVER, dir=os.path.dirname(path))
    temporary = os.path.join(folder, os.path.basename(path))
    try:
        yield temporary
        if os.path.isdir(path):
            # A folder cannot be replaced in one step; the old one moves aside into what is removed below.
            os.rename(path, os.path.join(folder, "old"))
        os.replace(temporary, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
    """What `write_json` wrote."""
    with open(path) as file:
        return json.load(file)
