"""Reads the parameters of a PyTorch checkpoint as NumPy arrays, without PyTorch and without running code from it."""

import collections
import json
import math
import os
import pickle
import zipfile
from typing import IO, Any, NamedTuple

import numpy as np

from s2sd_tf.files import local_path
from s2sd_tf.untrusted import open_archive

EXTENSIONS = (".pth", ".pt", ".safetensors", ".npz")

# The first pickle in a file written by PyTorch before 1.6.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
# The keys that a checkpoint with other content keeps its parameters under.
_NESTED = ("state_dict", "model")
# NumPy has no bfloat16: "bf16" is read as the upper half of a float32.
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


def read_state_dict(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads the tensors of a PyTorch checkpoint.

    Pickles are read by an unpickler that knows only tensors and dictionaries and refuses every other name, so a file
    cannot run code. If the checkpoint has the state dict under "state_dict" or "model", that part is returned. If all
    names start with "module." (`torch.nn.DataParallel`), the prefix is removed.

    Args:
        path: `.pth` or `.pt` written by `torch.save`, in the format since PyTorch 1.6 (a zip archive) or before;
            `.safetensors`; or `.npz`.

    Returns:
        Name to array: bfloat16 as float32, everything else in its own dtype.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the extension is another one, the file is damaged, or it holds something other than tensors. The
            message names the file and says what is wrong.
    """
    path = local_path("path", path)
    extension = os.path.splitext(path)[1].lower()
    if extension not in EXTENSIONS:
        raise ValueError(f"state dict: expected a file {', '.join(EXTENSIONS)}. Received: {path!r}")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"state dict: expected an existing file. Received: {path!r}")
    read = {".safetensors": _read_safetensors, ".npz": _read_npz}.get(extension, _read_torch)
    try:
        state = _unwrapped(read(path))
    # zipfile, json, numpy and pickle raise these for damaged files.
    except (
        ValueError, OSError, EOFError, KeyError, IndexError, TypeError, AttributeError, OverflowError, MemoryError,
        RecursionError, pickle.UnpicklingError, zipfile.BadZipFile, NotImplementedError,
    ) as error:  # fmt: skip
        raise ValueError(f"state dict: expected an undamaged file of tensors. Received: {path!r}: {error}") from error
    return state


class _Storage(NamedTuple):
    """A flat array in a file: its key, dtype, number of elements, and first element."""

    key: str
    dtype: str
    size: int
    start: int


class _Tensor(NamedTuple):
    """A view of a `_Storage`: first element, shape, and strides in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self, data: np.ndarray) -> np.ndarray:
        """Copies the tensor out of `data`, the numbers under the storage's key.

        Raises:
            ValueError: the tensor reaches outside `data`.
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
    """Unpickles only dictionaries and tensors; a tensor becomes a `_Tensor`, as its numbers are elsewhere in the file.

    Attributes:
        storages: the dtype of each storage found so far, by key.
    """

    def __init__(self, file: IO[bytes]) -> None:
        # Files that PyTorch wrote with Python 2 have names as bytes.
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, str] = {}

    def find_class(self, module: str, name: str) -> Any:
        # A pickle can set attributes of what it gets: so only new functions and immutable types.
        known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch", "Size"): tuple,
            ("torch._utils", "_rebuild_tensor"): lambda *arguments: _Tensor(*arguments),
            ("torch._utils", "_rebuild_tensor_v2"): lambda *arguments: _Tensor(*arguments[:4]),
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
            **{("torch", storage): dtype for storage, dtype in _STORAGES.items()},
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(
                f"{module}.{name}, which is not a tensor; save the model with torch.save(model.state_dict(), ...)"
            )
        return known[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise pickle.UnpicklingError(f"{pid!r} instead of a storage")
        _, dtype, key, _, size, *view = pid
        if dtype not in _STORAGES.values() or not isinstance(size, int):
            raise pickle.UnpicklingError(f"a storage of {size!r} numbers of dtype {dtype!r}")
        self.storages[str(key)] = dtype
        # Before PyTorch 0.4, a storage could be a part of another storage.
        return _Storage(str(key), dtype, size, view[0][1] if view and view[0] else 0)


def _read_torch(path):
    if zipfile.is_zipfile(path):
        return _read_torch_zip(path)
    return _read_torch_legacy(path)


def _read_torch_zip(path):
    with open_archive(path) as archive:
        pickles = [name for name in archive.namelist() if name.split("/")[1:] == ["data.pkl"]]
        if len(pickles) != 1:
            raise ValueError("a zip archive without the data.pkl that torch.save writes")
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
    """Replaces every `_Tensor` in `found` by its array; `numbers` maps the key of a storage to its numbers."""
    # A pickle can refer to one dictionary many times, at every level: without `done`, this would take exponential time.
    done = {} if done is None else done
    if isinstance(found, dict):
        if id(found) not in done:
            copied: dict[str, Any] = {}
            done[id(found)] = copied
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
                raise ValueError(f"{name} has the unknown dtype {entry['dtype']}")
            if not 0 <= first <= end <= size - begin:
                raise ValueError(f"{name} is in the bytes {first} to {end} of {size - begin:,}")
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
    """Converts little-endian bytes to an array of `count` numbers."""
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
        raise ValueError(f"{type(found).__name__} instead of a dictionary of tensors")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, np.ndarray):
            raise ValueError(f"{name!r} is a {type(value).__name__}, not a tensor")
    prefix = "module."
    if all(name.startswith(prefix) for name in found):
        found = {name[len(prefix) :]: value for name, value in found.items()}
    return found
