"""The parameters in a PyTorch checkpoint as numpy arrays, without PyTorch and without running what a file says."""

import collections
import json
import math
import os
import pickle
import zipfile
from typing import NamedTuple

import numpy as np

from s2sd_tf.untrusted import open_archive

EXTENSIONS = (".pth", ".pt", ".safetensors", ".npz")

# First of the pickles of a file that PyTorch wrote before 1.6.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
# What a checkpoint keeps its parameters under, where it has more in it.
_NESTED = ("state_dict", "model")
# "bf16" is none of numpy's: it is read as the upper half of a float32.
_STORAGES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "BFloat16Storage": "bf16",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}
_SAFETENSORS = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "bf16",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}


def read_state_dict(path):
    """The tensors of a PyTorch checkpoint.

    A pickle in it is read by an unpickler that knows tensors and dictionaries and refuses every other name, so that a
    file can do no harm. A state dict under "state_dict" or "model" is taken out, and a "module." that begins all names
    (`torch.nn.DataParallel`) is left out.

    Args:
        path: `.pth` or `.pt` as `torch.save` writes it, since PyTorch 1.6 (a zip archive) or before; `.safetensors`;
            or `.npz`.

    Returns:
        dict from name to array, bfloat16 as float32 and everything else in its own dtype.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another extension, a broken file, or one with something else in it than tensors; the message names
            the file and what is wrong.
    """
    path = os.fspath(path)
    extension = os.path.splitext(path)[1].lower()
    if extension not in EXTENSIONS:
        raise ValueError(f"state dict: expected a file {', '.join(EXTENSIONS)}. Received: {path!r}")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"state dict: expected a file. Received: {path!r}")
    read = {".safetensors": _read_safetensors, ".npz": _read_npz}.get(extension, _read_torch)
    try:
        state = _unwrapped(read(path))
    # What a broken file makes zipfile, json, numpy and pickle raise.
    except (
        ValueError, OSError, EOFError, KeyError, IndexError, TypeError, AttributeError, OverflowError, MemoryError,
        RecursionError, pickle.UnpicklingError, zipfile.BadZipFile, NotImplementedError,
    ) as error:  # fmt: skip
        raise ValueError(f"state dict: expected tensors in a whole file. Received: {path!r}: {error}") from error
    return state


class _Storage(NamedTuple):
    """A flat array in a file: its key there, dtype, number of elements, and first element."""

    key: str
    dtype: str
    size: int
    start: int


class _Tensor(NamedTuple):
    """A view of a `_Storage`: first element, shape, and strides in elements."""

    storage: _Storage
    offset: int
    shape: tuple
    strides: tuple

    def array(self, data):
        """The tensor as an array; `data` are the numbers under the storage's key.

        Raises:
            ValueError: it is not within them.
        """
        measures = (self.storage.start, self.offset, *self.shape, *self.strides)
        if len(self.shape) != len(self.strides) or not all(isinstance(n, int) and n >= 0 for n in measures):
            raise ValueError(f"a tensor of shape {self.shape}, strides {self.strides} and offset {self.offset}")
        values = data[self.storage.start :]
        last = self.offset + sum((length - 1) * stride for length, stride in zip(self.shape, self.strides))
        count = math.prod(self.shape)
        if count and (last >= len(values) or count > len(values)):
            raise ValueError(f"a tensor of shape {self.shape} out of {len(values)} numbers")
        if not count:
            return np.empty(self.shape, values.dtype)
        strides = [stride * values.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(values[self.offset :], self.shape, strides, writeable=False).copy()


class _Unpickler(pickle.Unpickler):
    """Knows dictionaries and tensors; a tensor becomes a `_Tensor`, whose numbers are elsewhere in the file.

    Attributes:
        storages: dict from the key of each storage met so far to its dtype.
    """

    def __init__(self, file):
        # PyTorch's files of Python 2 have their names as bytes.
        super().__init__(file, encoding="utf-8")
        self.storages = {}

    def find_class(self, module, name):
        # Functions made anew and types that are immutable: a pickle can set attributes of what it is given.
        known = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch", "Size"): tuple,
            ("torch._utils", "_rebuild_tensor"): lambda *arguments: _Tensor(*arguments),
            ("torch._utils", "_rebuild_tensor_v2"): lambda *arguments: _Tensor(*arguments[:4]),
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
            **{("torch", storage): dtype for storage, dtype in _STORAGES.items()},
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(
                f"{module}.{name} in it, which is no tensor; save with torch.save(model.state_dict(), ...)"
            )
        return known[module, name]

    def persistent_load(self, pid):
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise pickle.UnpicklingError(f"{pid!r} in place of a storage")
        _, dtype, key, _, size, *view = pid
        if dtype not in _STORAGES.values() or not isinstance(size, int):
            raise pickle.UnpicklingError(f"a storage of {size!r} numbers of dtype {dtype!r}")
        self.storages[str(key)] = dtype
        # Before 0.4 a storage could be a part of another one.
        return _Storage(str(key), dtype, size, view[0][1] if view and view[0] else 0)


def _read_torch(path):
    if zipfile.is_zipfile(path):
        return _read_torch_zip(path)
    return _read_torch_legacy(path)


def _read_torch_zip(path):
    with open_archive(path) as archive:
        pickles = [name for name in archive.namelist() if name.split("/")[1:] == ["data.pkl"]]
        if len(pickles) != 1:
            raise ValueError("a zip archive without the data.pkl of torch.save")
        root = pickles[0].split("/")[0]
        if f"{root}/byteorder" in archive.namelist() and archive.read(f"{root}/byteorder").strip() != b"little":
            raise ValueError("numbers of a big-endian machine")
        with archive.open(pickles[0]) as file:
            unpickler = _Unpickler(file)
            found = unpickler.load()
        numbers = {}
        for key, dtype in unpickler.storages.items():
            raw = archive.read(f"{root}/data/{key}")
            numbers[key] = _numbers(raw, dtype, len(raw) // _itemsize(dtype))
    return _with_arrays(found, numbers)


def _read_torch_legacy(path):
    with open(path, "rb") as file:
        if file.read(1) != b"\x80":
            raise ValueError("not a file of torch.save")
        file.seek(0)
        if _Unpickler(file).load() != _LEGACY_MAGIC:
            raise ValueError("not a file of torch.save")
        _version = _Unpickler(file).load()
        if not _Unpickler(file).load().get("little_endian", True):
            raise ValueError("numbers of a big-endian machine")
        unpickler = _Unpickler(file)
        found = unpickler.load()
        numbers = {}
        for key in _Unpickler(file).load():
            dtype = unpickler.storages[str(key)]
            count = int(_numbers(file.read(8), "<i8", 1)[0])
            numbers[str(key)] = _numbers(file.read(count * _itemsize(dtype)), dtype, count)
    return _with_arrays(found, numbers)


def _with_arrays(found, numbers, done=None):
    """`found` with an array for every `_Tensor` in its dictionaries; `numbers` are the storages' by key."""
    # A pickle may name one dictionary many times, and in it another one as often: each is walked once.
    done = {} if done is None else done
    if isinstance(found, dict):
        if id(found) not in done:
            done[id(found)] = copied = {}
            copied.update((name, _with_arrays(value, numbers, done)) for name, value in found.items())
        return done[id(found)]
    return found.array(numbers[found.storage.key]) if isinstance(found, _Tensor) else found


def _read_safetensors(path):
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
        header = json.loads(file.read(length))
        begin, state = 8 + length, {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            first, end = entry["data_offsets"]
            if entry["dtype"] not in _SAFETENSORS:
                raise ValueError(f"{name} of dtype {entry['dtype']}")
            if not 0 <= first <= end <= size - begin:
                raise ValueError(f"{name} in the bytes {first} to {end} of {size - begin:,}")
            file.seek(begin + first)
            dtype, shape = _SAFETENSORS[entry["dtype"]], tuple(entry["shape"])
            state[name] = _numbers(file.read(end - first), dtype, math.prod(shape)).reshape(shape)
    return state


def _read_npz(path):
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _itemsize(dtype):
    return 2 if dtype == "bf16" else np.dtype(dtype).itemsize


def _numbers(raw, dtype, count):
    """`count` numbers of little-endian bytes."""
    if len(raw) != count * _itemsize(dtype):
        raise ValueError(f"{len(raw):,} bytes for {count:,} numbers of {_itemsize(dtype)} bytes")
    if dtype == "bf16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, dtype)


def _unwrapped(found):
    for key in _NESTED:
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{type(found).__name__} in place of a dictionary of tensors")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, np.ndarray):
            raise ValueError(f"{name!r} is {type(value).__name__}, no tensor")
    prefix = "module."
    if all(name.startswith(prefix) for name in found):
        found = {name[len(prefix) :]: value for name, value in found.items()}
    return found
