"""Reads and writes embeddings on disk: our own shards, and the files of other programs."""

import glob
import numbers
import os
import types
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from s2sd_tf.files import local_path, replacing, write_json
from s2sd_tf.untrusted import read_array, read_arrays, read_json_object, reading

# Names of the features in the examples of a TFRecord file.
FEATURES = ("embedding", "id", "label")


class EmbeddingShards:
    """Concatenates memory-mapped arrays without loading them: `rows[start:stop]` reads only these rows.

    Args:
        arrays: arrays `(n, dim)` of the same dimension and dtype.

    Attributes:
        shape: `(total number of rows, dim)`.
        dtype: dtype of the arrays.
    """

    def __init__(self, arrays: Iterable[np.ndarray]) -> None:
        arrays = list(arrays)
        if not arrays:
            raise ValueError("arrays: expected at least one. Received: none")
        kinds = {(array.shape[1:], array.dtype.str) for array in arrays}
        if len(kinds) > 1:
            raise ValueError(f"arrays: expected the same dimension and dtype. Received: {sorted(kinds)}")
        self._arrays = arrays
        self._ends = np.cumsum([len(array) for array in arrays])
        self.shape = (int(self._ends[-1]), *arrays[0].shape[1:])
        self.dtype = arrays[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    def __getitem__(self, chosen: Any) -> np.ndarray:
        if isinstance(chosen, (int, np.integer)):
            return self.take_rows([int(chosen)])[0]
        if not isinstance(chosen, slice):
            return self.take_rows(chosen)
        start, stop, step = chosen.indices(len(self))
        if step != 1:
            raise ValueError(f"step: expected 1. Received: {step}")
        parts = []
        for array, end in zip(self._arrays, self._ends):
            begin = end - len(array)
            if start < end and stop > begin:
                parts.append(array[max(start - begin, 0) : stop - begin])
        return np.concatenate(parts) if parts else np.empty((0, *self.shape[1:]), self.dtype)

    def take_rows(self, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """The rows at `positions`, ints or a mask, as an array `(number of positions, dim)`.

        Raises:
            IndexError: a position out of range, or a mask of another length.
        """
        positions = np.asarray(positions)
        if positions.dtype == bool:
            if len(positions) != len(self):
                raise IndexError(f"positions: expected a mask of length {len(self)}. Received: {len(positions)}")
            positions = np.flatnonzero(positions)
        positions = np.where(positions < 0, positions + len(self), positions).astype(np.int64)
        if len(positions) and not 0 <= positions.min() <= positions.max() < len(self):
            raise IndexError(f"positions: expected values in [0, {len(self)}). Received: {positions.max()}")
        rows = np.empty((len(positions), *self.shape[1:]), self.dtype)
        owner = np.searchsorted(self._ends, positions, "right")
        for shard in np.unique(owner):
            of_shard = owner == shard
            begin = self._ends[shard] - len(self._arrays[shard])
            rows[of_shard] = self._arrays[shard][positions[of_shard] - begin]
        return rows


# Float rows `(n, dim)` that can be sliced; a memory-mapped file is an `np.ndarray` too.
Rows = np.ndarray | EmbeddingShards


class Embeddings(NamedTuple):
    """Embeddings with the ids and labels of their items.

    Attributes:
        rows: float rows `(n, dim)`: an array, a memory-mapped file or `EmbeddingShards`.
        ids: n ids, or None.
        labels: n labels, or None.
    """

    rows: Rows
    ids: list[str] | None
    labels: list[str] | list[int] | None


def shard_name(number: int) -> str:
    """Folder name of the shard of that number."""
    return f"shard-{number:05d}"


def write_shard(
    folder: str | os.PathLike,
    rows: np.ndarray,
    ids: Sequence[str],
    labels: Sequence[str] | None = None,
    index: Any = None,
) -> None:
    """Writes a shard atomically: `embeddings.npy` (float32), `items.json`, and the index if one is given.

    Args:
        folder: folder to write.
        rows: float array `(n, dim)`.
        ids: n ids.
        labels: n labels, or None.
        index: an `Index` of the rows, or None.
    """
    with replacing(folder) as temporary:
        os.makedirs(temporary)
        write_rows(temporary, np.asarray(rows, np.float32))
        write_items(temporary, ids, labels)
        if index is not None:
            index.save(os.path.join(temporary, "index"))


def write_items(folder: str | os.PathLike, ids: Iterable[str], labels: Sequence[str] | None) -> None:
    """Writes the ids and labels of all rows to `items.json` in `folder`."""
    write_json(os.path.join(folder, "items.json"), {"ids": list(ids), "labels": labels and list(labels)}, indent=None)


def read_items(folder: str | os.PathLike) -> tuple[list[str], list[str] | None]:
    """Reads `(ids, labels)` that `write_items` wrote.

    Raises:
        FileNotFoundError: no `items.json` in `folder`.
        ValueError: a broken `items.json`.
    """
    path = os.path.join(folder, "items.json")
    items = read_json_object(path)
    ids: Any = items.get("ids")
    labels: Any = items.get("labels")
    for name, values in (("ids", ids), ("labels", [] if labels is None else labels)):
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise ValueError(f"{path}: expected {name}, a list of strings. Received: {type(values).__name__}")
    if labels is not None and len(labels) != len(ids):
        raise ValueError(f"{path}: expected {len(ids)} labels. Received: {len(labels)}")
    return ids, labels


def write_rows(folder: str | os.PathLike, rows: np.ndarray) -> None:
    """Writes rows to `embeddings.npy` in `folder`."""
    write_array(os.path.join(folder, "embeddings.npy"), rows)


def write_array(path: str | os.PathLike, array: np.ndarray) -> None:
    """Writes a `.npy` file."""
    with open(path, "wb") as file:
        # Not `file` itself, which NumPy writes by C functions: it does not notice if the last bytes find no room.
        np.save(types.SimpleNamespace(write=file.write), array, allow_pickle=False)


def read_rows(folder: str | os.PathLike, ids: Sequence[str]) -> np.ndarray:
    """Opens the rows of `embeddings.npy` in `folder`, memory-mapped.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not float rows `(len(ids), dim)`.
    """
    path = os.path.join(folder, "embeddings.npy")
    rows = read_array(path, mmap_mode="r")
    if rows.ndim != 2 or rows.dtype.kind != "f" or len(rows) != len(ids):
        raise ValueError(f"{path}: expected float rows ({len(ids)}, dim). Received: {rows.dtype} {rows.shape}")
    return rows


def shard_folders(folder: str | os.PathLike) -> list[str]:
    """Paths of the shards in `folder`, in order."""
    found = sorted(glob.glob(os.path.join(glob.escape(os.fspath(folder)), "shard-*")))
    return [path for path in found if os.path.exists(os.path.join(path, "items.json"))]


def check_finished(folder: str | os.PathLike) -> None:
    """Raises ValueError if the run that wrote the shards in `folder` did not finish."""
    if os.path.exists(os.path.join(folder, "plan.json")) and not os.path.exists(os.path.join(folder, "summary.json")):
        raise ValueError(
            f"embeddings: expected a finished run. Received: {folder!r}, which was interrupted; embed again"
        )


def read_shards(folder: str | os.PathLike) -> Embeddings:
    """Opens all shards in `folder`, memory-mapped.

    Raises:
        FileNotFoundError: no shards in `folder`.
        ValueError: an interrupted run, or a broken file; the message names it.
    """
    check_finished(folder)
    folders = shard_folders(folder)
    if not folders:
        raise FileNotFoundError(f"embeddings: expected a folder with shards. Received: {folder!r}")
    rows, ids = [], []
    labels: list[str] | None = []
    for path in folders:
        its_ids, its_labels = read_items(path)
        array = read_rows(path, its_ids)
        if len(array):
            rows.append(array)
            ids += its_ids
            labels = None if its_labels is None or labels is None else labels + its_labels
    with reading(folder, "shards of the same dimension"):
        return Embeddings(EmbeddingShards(rows or [array]), ids, labels)


def read_embeddings(path: str | os.PathLike) -> Embeddings:
    """Reads embeddings from a file or folder.

    - a folder: the shards that `s2sd-embed` and the Beam pipeline write;
    - `.npy`: float rows, memory-mapped; no ids and labels;
    - `.npz`: the array `embeddings` and optionally `labels` and `ids`, integers or texts;
    - `.tfrecord` or `.tfrecords`: examples with the features `embedding` (floats), `id` (bytes or an int) and `label`
      (bytes or an int).

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: another format, or content that does not fit.
    """
    path = local_path("path", path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"embeddings: expected a file or a folder. Received: {path!r}")
    if os.path.isdir(path):
        return read_shards(path)
    extension = os.path.splitext(path)[1].lower()
    readers = {".npy": _read_npy, ".npz": _read_npz, ".tfrecord": _read_tfrecord, ".tfrecords": _read_tfrecord}
    if extension not in readers:
        raise ValueError(f"embeddings: expected one of {sorted(readers)} or a folder. Received: {path!r}")
    with reading(f"embeddings: {path}", f"rows in a whole {extension} file"):
        found = readers[extension](path)
    if len(found.rows.shape) != 2:
        raise ValueError(f"embeddings: expected rows (n, dim) in {path!r}. Received: shape {tuple(found.rows.shape)}")
    for name, values in (("ids", found.ids), ("labels", found.labels)):
        if values is not None and len(values) != found.rows.shape[0]:
            raise ValueError(
                f"embeddings: expected {name} for {found.rows.shape[0]} rows in {path!r}. Received: {len(values)}"
            )
    return found


def _read_npy(path):
    return Embeddings(read_array(path, mmap_mode="r"), None, None)


def _read_npz(path):
    content = read_arrays(path)
    if "embeddings" not in content:
        raise ValueError(f"no array named embeddings, only {sorted(content)}")
    labels = ints_or_texts("labels", content["labels"]) if "labels" in content else None
    ids = [str(item) for item in ints_or_texts("ids", content["ids"])] if "ids" in content else None
    return Embeddings(content["embeddings"], ids, labels)


def read_labels(name: str, path: str | os.PathLike, count: int) -> list[str]:
    """Reads a label file: a `.npy` file, or a text file in UTF-8 with one label per line.

    Args:
        name: argument name for the error messages.
        path: the file.
        count: number of labels that it must have.

    Blanks at the end of a line, a byte order mark and blank lines after the last label are left out. Whole numbers give
    the same labels in every type: 1, 1.0 and "1".

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, or another number of labels; the message names the file.
    """
    path = local_path(name, path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{name}: expected a file. Received: {path!r}")
    with reading(f"{name}: {path}", "integers or texts, one for each row"):
        if path.lower().endswith(".npy"):
            labels = [str(label) for label in ints_or_texts(name, read_array(path))]
        else:
            with open(path, encoding="utf-8-sig") as file:
                labels = [line.rstrip() for line in file.read().split("\n")]
            while labels and not labels[-1]:
                labels.pop()
    if len(labels) != count:
        raise ValueError(f"{name}: expected {count} labels, one for each row, in {path!r}. Received: {len(labels)}")
    return labels


def ints_or_texts(name: str, values: Any) -> list[Any]:
    """Returns labels or ids as a list of ints or texts. Bytes become texts, whole floats become ints.

    Raises:
        ValueError: values of another kind or shape.
    """
    if hasattr(values, "numpy"):
        values = values.numpy()
    if isinstance(values, np.ndarray):
        if values.ndim == 2 and values.shape[1] == 1:
            values = values[:, 0]
        if values.ndim != 1:
            raise ValueError(f"{name}: expected one for each row, of shape (n,). Received: shape {values.shape}")
        values = values.tolist()
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise ValueError(f"{name}: expected integers or texts, one for each row. Received: {values!r}")
    return [value if type(value) in (str, int) else _int_or_text(name, value) for value in values]


def _int_or_text(name, value):
    try:
        value = value.numpy() if hasattr(value, "numpy") else value
        if isinstance(value, bytes):
            return value.decode()
        if isinstance(value, str):
            return str(value)
        if isinstance(value, numbers.Integral):
            return int(value)
        if isinstance(value, numbers.Real) and float(value).is_integer():
            return int(float(value))
    except (ValueError, OverflowError):
        pass
    raise ValueError(f"{name}: expected integers or texts, one for each row. Received: {value!r}")


def _read_tfrecord(path):
    rows: list[np.ndarray] = []
    ids: list[Any] = []
    labels: list[Any] = []
    for record in tf.data.TFRecordDataset(path).as_numpy_iterator():
        features = tf.train.Example.FromString(record).features.feature
        rows.append(np.array(features["embedding"].float_list.value, np.float32))
        for name, values in (("id", ids), ("label", labels)):
            if features[name].bytes_list.value:
                values.append(features[name].bytes_list.value[0].decode())
            elif features[name].int64_list.value or features[name].float_list.value:
                value = (features[name].int64_list.value or features[name].float_list.value)[0]
                values.append(_int_or_text(name, value))
    if not rows:
        raise ValueError("no examples")
    return Embeddings(np.stack(rows), [str(item) for item in ids] or None, labels or None)
