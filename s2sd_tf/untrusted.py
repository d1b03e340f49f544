"""Reading of files that others wrote, within limits: what is broken or too large is refused by the file's name."""

import contextlib
import io
import json
import os
import stat
import zipfile

import numpy as np
from PIL import Image

# 1 GiB as float RGB; Pillow's own limit.
MAX_PIXELS = 2**30 // 12
MAX_IMAGE_BYTES = 2**26
# Bytes that an archive may inflate to whatever its size, and how many times its size beyond that.
_INFLATED_BYTES, _INFLATED_RATIO = 2**26, 100


def image_excess(image):
    """Why an encoded image is not to be decoded, by its size and its header; None for no reason.

    Args:
        image: path of a file, or bytes. What Pillow cannot read has no reason here; its decoder will give one.

    Raises:
        OSError: the file is not there, or cannot be read.
    """
    if isinstance(image, bytes):
        size = len(image)
    else:
        status = os.stat(image)
        # Others, as pipes and devices, may have no end.
        if not stat.S_ISREG(status.st_mode):
            return "not a regular file"
        size = status.st_size
    if size > MAX_IMAGE_BYTES:
        return f"{size:,} bytes, more than {MAX_IMAGE_BYTES:,}"
    with io.BytesIO(image) if isinstance(image, bytes) else open(image, "rb") as file:
        try:
            with Image.open(file, formats=("PNG", "JPEG", "BMP", "GIF")) as header:
                width, height = header.size
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            return f"more than {MAX_PIXELS:,} pixels"
        except Exception:  # of every plugin its own
            return None
    return f"{width} x {height}, more than {MAX_PIXELS:,} pixels" if width * height > MAX_PIXELS else None


@contextlib.contextmanager
def open_archive(path):
    """Yields the `zipfile.ZipFile` at `path`, none of whose members can be larger than it says.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: no zip archive; one that would inflate to more than 64 MiB and 100 times its size; or, in the block,
            a member that cannot be read. The message names the file.
    """
    with reading(path, "a zip archive"), zipfile.ZipFile(path) as archive:
        inflated, size = sum(info.file_size for info in archive.infolist()), os.path.getsize(path)
        if inflated > max(_INFLATED_BYTES, _INFLATED_RATIO * size):
            raise ValueError(f"{inflated:,} bytes out of {size:,}")
        yield archive


def read_array(path, mmap_mode=None):
    """The array of a `.npy` file; see `np.load`.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: another kind of file, a truncated one, or one of objects; the message names it.
    """
    with reading(path, "a .npy file of numbers or texts"):
        array = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("a .npz file")
        return array


def read_arrays(path, wanted="a .npz file of numbers or texts"):
    """The arrays of a `.npz` file, as a dict.

    Args:
        path: file.
        wanted: str, what was expected, for the message.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: another kind of file, a truncated one, one with objects, or one that inflates too far (see
            `open_archive`); the message names it.
    """
    with reading(path, wanted), open_archive(path), np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def read_json_object(path):
    """The dict in a JSON file.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: no JSON, or something else than an object; the message names the file.
    """
    with reading(path, "a JSON object"), open(path, encoding="utf-8") as file:
        found = json.load(file)
        if not isinstance(found, dict):
            raise ValueError(type(found).__name__)
        return found


@contextlib.contextmanager
def reading(path, wanted):
    """Around what reads `path`: whatever broken content makes it raise is a ValueError that names the file, or a
    FileNotFoundError where something is not there.

    Args:
        path: file or folder.
        wanted: str, what was expected.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: expected {wanted}. Received: {_short(error)}") from error
    except Exception as error:  # libraries raise whatever comes of broken content, NameError included
        raise ValueError(f"{path}: expected {wanted}. Received: {_short(error)}") from error


def _short(error):
    return " ".join((str(error) or type(error).__name__).split())[:500]
