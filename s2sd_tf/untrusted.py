"""Safe reading of files from others: broken or oversized ones are refused with an error that names the file."""

import builtins
import contextlib
import importlib.util
import io
import json
import os
import stat
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from s2sd_tf.keras_compat import keras

# 256 MiB as RGB; also Pillow's default limit.
MAX_PIXELS = 2**30 // 12
MAX_IMAGE_BYTES = 2**26
# An archive may inflate to this many bytes, or to this many times its size if that is more.
_INFLATED_BYTES, _INFLATED_RATIO = 2**26, 100
# Layers that hold code, read other files, or wrap whole programs.
_REFUSED = (
    "Lambda", "__lambda__", "__tensor__", "ClassMethod", "InstanceMethod", "InstanceProperty",
    "StringLookup", "IntegerLookup", "TextVectorization",
    "TFSMLayer", "TorchModuleWrapper", "JaxLayer", "FlaxLayer",
)  # fmt: skip
_PACKAGES = ("keras", "s2sd_tf", "keras_cv", "keras_hub", "tensorflow_addons")
# The Keras modules with functions that a layer may refer to.
_FUNCTIONS = ("activations", "losses", "metrics", "initializers", "regularizers", "constraints")
# The TensorFlow functions that a Keras 2 layer may refer to.
_TENSORFLOW = ("math.", "nn.", "__operators__.", "cast", "reshape", "concat", "split", "transpose")


def image_excess(image: str | os.PathLike | bytes) -> str | None:
    """Why an encoded image must not be decoded, judged by its size and header; None if it may be.

    Args:
        image: path of a file, or bytes. For an image that Pillow cannot read the result is None; decoding it fails.

    Raises:
        OSError: the file does not exist or cannot be read.
    """
    if isinstance(image, bytes):
        size = len(image)
    else:
        status = os.stat(image)
        # Pipes and devices may have no end.
        if not stat.S_ISREG(status.st_mode):
            return "not a regular file"
        size = status.st_size
    if size > MAX_IMAGE_BYTES:
        return f"{size:,} bytes, more than {MAX_IMAGE_BYTES:,}"
    with io.BytesIO(image) if isinstance(image, bytes) else open(image, "rb") as file:
        try:
            with Image.open(file, formats=("PNG", "JPEG", "BMP", "GIF", "WEBP")) as header:
                width, height = header.size
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            return f"more than {MAX_PIXELS:,} pixels"
        except Exception:  # each Pillow plugin raises its own
            return None
    return f"{width} x {height}, more than {MAX_PIXELS:,} pixels" if width * height > MAX_PIXELS else None


@contextlib.contextmanager
def open_archive(path: str | os.PathLike) -> Iterator[zipfile.ZipFile]:
    """Opens a zip archive: `with open_archive(path) as archive`. No member can be larger than the archive says.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a zip archive; it would inflate to more than 64 MiB and more than 100 times its size; or, in the
            block, a member cannot be read. The message names the file.
    """
    with reading(path, "a zip archive"), zipfile.ZipFile(path) as archive:
        inflated, size = sum(info.file_size for info in archive.infolist()), os.path.getsize(path)
        if inflated > max(_INFLATED_BYTES, _INFLATED_RATIO * size):
            raise ValueError(f"{inflated:,} bytes out of {size:,}")
        yield archive


def read_array(path: str | os.PathLike, mmap_mode: Any = None) -> np.ndarray:
    """Reads a `.npy` file. For `mmap_mode` see `np.load`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, a truncated one, or one with objects; the message names it.
    """
    with reading(path, "a .npy file of numbers or texts"):
        array = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("a .npz file")
        return array


def read_arrays(path: str | os.PathLike, wanted: str = "a .npz file of numbers or texts") -> dict[str, np.ndarray]:
    """Reads a `.npz` file as a dict of arrays.

    Args:
        path: file.
        wanted: what was expected, for the message.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, a truncated one, one with objects, or one that inflates too far (see
            `open_archive`); the message names it.
    """
    with reading(path, wanted), open_archive(path), np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def read_json_object(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, or not an object; the message names the file.
    """
    with reading(path, "a JSON object"), open(path, encoding="utf-8") as file:
        found = json.load(file)
        if not isinstance(found, dict):
            raise ValueError(type(found).__name__)
        return found


@contextlib.contextmanager
def reading(path: str | os.PathLike, wanted: str) -> Iterator[None]:
    """Turns any error in the block, which reads `path`, into a ValueError that names the file.

    A FileNotFoundError stays one, with a message of the same form.

    Args:
        path: file or folder, or words that end in it; the message starts with it.
        wanted: what was expected.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: expected {wanted}. Received: {_short(error)}") from error
    except Exception as error:  # broken content makes libraries raise anything, even NameError
        raise ValueError(f"{path}: expected {wanted}. Received: {_short(error)}") from error


def check_layers(value: Any) -> None:
    """Raises ValueError if the config of a Keras object, from JSON, refers to a class or function that must not be
    looked up.
    """
    if isinstance(value, list):
        for item in value:
            check_layers(item)
    if not isinstance(value, dict):
        return
    name = value.get("class_name")
    if name is not None:
        _check_name(name, value)
    for item in value.values():
        check_layers(item)


def _check_name(name, value):
    module, config = value.get("module"), value.get("config")
    looked_up = config if name == "function" else name
    # Keras looks up functions by their own name, and classes by their registered name.
    registered = looked_up if name == "function" else value.get("registered_name")
    if name in _REFUSED or looked_up in _REFUSED:
        raise ValueError(f"a {looked_up}, which can run any code")
    if "Tokenizer" in f"{looked_up} {registered}":
        raise ValueError(f"a {looked_up}, which can read other files")
    if name in ("TFOpLambda", "SlicingOpLambda"):
        function = config.get("function")
        if not isinstance(function, str) or not function.startswith(_TENSORFLOW):
            raise ValueError(f"the TensorFlow function {function!r}")
        return
    if module is None or (isinstance(registered, str) and keras.utils.get_registered_object(registered) is not None):
        return
    parts = str(module).split(".")
    if parts[0] == "keras_hub" and importlib.util.find_spec("keras_hub") is None:
        raise ValueError("layers of keras-hub, which is not installed: pip install 's2sd_tf[hub]' on the default stack")
    if name == "function":
        # Functions known by name only, such as "relu", have the module "builtins".
        known = parts == ["builtins"] or (parts[0] == "keras" and parts[-1] in _FUNCTIONS)
        known = known and not hasattr(builtins, str(looked_up))
    else:
        known = parts[0] in _PACKAGES
    # With a dot in the name, Keras would look inside other objects, such as modules that are imported there.
    if not known or "." in str(looked_up):
        raise ValueError(f"{module}.{looked_up}; register your own classes and functions before loading")


def _short(error):
    return " ".join((str(error) or type(error).__name__).split())[:500]
