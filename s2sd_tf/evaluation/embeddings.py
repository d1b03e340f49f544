"""Embeddings on disk: shards that were written whole, and what other programs wrote."""

import glob
import os
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from s2sd_tf.files import replacing, write_json
from s2sd_tf.untrusted import read_array, read_arrays, read_json_object, reading

# Names of the features of a TFRecord's examples.
FEATURES = ("embedding", "id", "label")


class Embeddings(NamedTuple):
    """Embeddings with what they are of.

    Attributes:
        rows: what gives float rows `(n, dim)` when sliced: an array, a memory-mapped file, `EmbeddingShards`.
        ids: list of n str, or None.
        labels: list of n str or int, or None.
    """

    rows: np.ndarray
    ids: list
    labels: list


class EmbeddingShards:
    """Rows of many memory-mapped files, one after another: `rows[start:stop]` reads what it gives and no more.

    Args:
        arrays: arrays `(n, dim)` of one dimension and dtype.
    """

    def __init__(self, arrays):
        arrays = list(arrays)
        if not arrays:
            raise ValueError("arrays: expected at least one. Received: none")
        kinds = {(array.shape[1:], array.dtype.str) for array in arrays}
        if len(kinds) > 1:
            raise ValueError(f"arrays: expected one dimension and dtype. Received: {sorted(kinds)}")
        self._arrays = arrays
        self._ends = np.cumsum([len(array) for array in arrays])
        self.shape = (int(self._ends[-1]), *arrays[0].shape[1:])
        self.dtype = arrays[0].dtype

    def __len__(self):
        return self.shape[0]

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self[:], dtype)

    def __getitem__(self, chosen):
        if isinstance(chosen, (int, np.integer)):
            return self.take_rows([chosen])[0]
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

    def take_rows(self, positions):
        """The rows at some positions, ints or a mask, `(number of positions, dim)`.

        Raises:
            IndexError: a position that is not there.
        """
        positions = np.asarray(positions)
        if positions.dtype == bool:
            if len(positions) != len(self):
                raise IndexError(f"positions: expected a mask of {len(self)}. Received: one of {len(positions)}")
            positions = np.flatnonzero(positions)
        positions = np.where(positions < 0, positions + len(self), positions).astype(np.int64)
        if len(positions) and not 0 <= positions.min() <= positions.max() < len(self):
            raise IndexError(f"positions: expected them in [0, {len(self)}). Received: {positions.max()}")
        rows = np.empty((len(positions), *self.shape[1:]), self.dtype)
        owner = np.searchsorted(self._ends, positions, "right")
        for shard in np.unique(owner):
            of_shard = owner == shard
            begin = self._ends[shard] - len(self._arrays[shard])
            rows[of_shard] = self._arrays[shard][positions[of_shard] - begin]
        return rows


def shard_name(number):
    """Name of the folder of a shard."""
    return f"shard-{number:05d}"


def write_shard(folder, rows, ids, labels=None, index=None):
    """Writes a shard, whole or not at all: `embeddings.npy` (float32), `items.json`, and an index where one is given.

    Args:
        folder: folder to write.
        rows: float array `(n, dim)`.
        ids: n str.
        labels: n str, or None.
        index: an `Index` of the rows, or None.
    """
    with replacing(folder) as temporary:
        os.makedirs(temporary)
        np.save(os.path.join(temporary, "embeddings.npy"), np.asarray(rows, np.float32), allow_pickle=False)
        write_items(temporary, ids, labels)
        if index is not None:
            index.save(os.path.join(temporary, "index"))


def write_items(folder, ids, labels):
    """Writes `items.json`: what each row is."""
    write_json(os.path.join(folder, "items.json"), {"ids": list(ids), "labels": labels and list(labels)}, indent=None)


def read_items(folder):
    """`(ids, labels)` of `write_items`.

    Raises:
        FileNotFoundError: no `items.json` there.
        ValueError: one that is broken.
    """
    path = os.path.join(folder, "items.json")
    items = read_json_object(path)
    ids, labels = items.get("ids"), items.get("labels")
    for name, values in (("ids", ids), ("labels", [] if labels is None else labels)):
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise ValueError(f"{path}: expected {name}, a list of texts. Received: {type(values).__name__}")
    if labels is not None and len(labels) != len(ids):
        raise ValueError(f"{path}: expected {len(ids)} labels. Received: {len(labels)}")
    return ids, labels


def read_rows(folder, ids):
    """The rows of `embeddings.npy` in a folder, memory-mapped.

    Raises:
        FileNotFoundError: no such file there.
        ValueError: no float rows `(len(ids), dim)`.
    """
    path = os.path.join(folder, "embeddings.npy")
    rows = read_array(path, mmap_mode="r")
    if rows.ndim != 2 or rows.dtype.kind != "f" or len(rows) != len(ids):
        raise ValueError(f"{path}: expected float rows ({len(ids)}, dim). Received: {rows.dtype} {rows.shape}")
    return rows


def shard_folders(folder):
    """The folders of the shards in `folder`, in their order."""
    found = sorted(glob.glob(os.path.join(glob.escape(folder), "shard-*")))
    return [path for path in found if os.path.exists(os.path.join(path, "items.json"))]


def check_finished(folder):
    """Raises ValueError where the shards in `folder` are those of an unfinished run."""
    if os.path.exists(os.path.join(folder, "plan.json")) and not os.path.exists(os.path.join(folder, "summary.json")):
        raise ValueError(
            f"embeddings: expected a finished run. Received: {folder!r}, which was interrupted; embed again"
        )


def read_shards(folder):
    """`Embeddings` of all shards in `folder`, memory-mapped.

    Raises:
        FileNotFoundError: no shards there.
        ValueError: an interrupted run, or a file that is broken; the message names it.
    """
    check_finished(folder)
    folders = shard_folders(folder)
    if not folders:
        raise FileNotFoundError(f"embeddings: expected a folder with shards. Received: {folder!r}")
    rows, ids, labels = [], [], []
    for path in folders:
        its_ids, its_labels = read_items(path)
        array = read_rows(path, its_ids)
        if len(array):
            rows.append(array)
            ids += its_ids
            labels = None if its_labels is None or labels is None else labels + its_labels
    with reading(folder, "shards of one dimension"):
        return Embeddings(EmbeddingShards(rows or [array]), ids, labels)


def read_embeddings(path):
    """`Embeddings` of a file or a folder.

    - a folder: the shards that `s2sd-embed` and the Beam pipeline write;
    - `.npy`: float rows, memory-mapped; without ids and labels;
    - `.npz`: arrays `embeddings` and, where there are any, `labels` and `ids`;
    - `.tfrecord` or `.tfrecords`: examples with the features `embedding` (floats), `id` (bytes) and `label` (bytes or
      an int).

    Raises:
        FileNotFoundError: nothing there.
        ValueError: another format, or content that does not fit.
    """
    path = os.fspath(path)
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
                f"embeddings: expected {name} of {found.rows.shape[0]} rows in {path!r}. Received: {len(values)}"
            )
    return found


def _read_npy(path):
    return Embeddings(read_array(path, mmap_mode="r"), None, None)


def _read_npz(path):
    content = read_arrays(path)
    if "embeddings" not in content:
        raise ValueError(f"no array named embeddings, but {sorted(content)}")
    labels = content["labels"].reshape(-1).tolist() if "labels" in content else None
    ids = None
    if "ids" in content:
        ids = [i.decode() if isinstance(i, bytes) else str(i) for i in content["ids"].reshape(-1)]
    return Embeddings(content["embeddings"], ids, labels)


def _read_tfrecord(path):
    rows, ids, labels = [], [], []
    for record in tf.data.TFRecordDataset(path).as_numpy_iterator():
        features = tf.train.Example.FromString(record).features.feature
        rows.append(np.array(features["embedding"].float_list.value, np.float32))
        for name, values in (("id", ids), ("label", labels)):
            if features[name].bytes_list.value:
                values.append(features[name].bytes_list.value[0].decode())
            elif features[name].int64_list.value:
                value = features[name].int64_list.value[0]
                values.append(str(value) if name == "id" else value)
    if not rows:
        raise ValueError("no examples")
    return Embeddings(np.stack(rows), ids or None, labels or None)
