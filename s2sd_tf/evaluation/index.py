"""Indexes: a gallery with ids and labels that is built once, saved, searched and changed; and the exact one."""

import os

import numpy as np

from s2sd_tf.checks import check_choice, checked_int
from s2sd_tf.evaluation.embeddings import read_rows, write_items
from s2sd_tf.evaluation.exact import exact_neighbors
from s2sd_tf.evaluation.neighbors import METRICS, no_neighbors, padded
from s2sd_tf.evaluation.rows import checked_rows
from s2sd_tf.files import check_replaceable, replacing, write_json

# Of `index.json` and of what stands beside it.
FORMAT = 1


class Index:
    """A gallery that can be searched, with the id and, where given, the label of every item.

    Attributes:
        metric: "cosine" or "euclidean".
        dim: int, dimension of the embeddings.
        ids: list of str, by position.
        labels: list of str by position, or None.
    """

    method = None

    def __init__(self, metric, dim, ids, labels):
        self.metric = metric
        self.dim = dim
        self.ids = ids
        self.labels = labels

    def __len__(self):
        return len(self.ids)

    def search(self, queries, k):
        """`Neighbors` of float rows `(queries, dim)`: positions, of which `ids` and `labels` tell more.

        Raises:
            ValueError: queries of another dimension or with values that are not finite, or k < 1.
        """
        queries = np.asarray(checked_rows("queries", queries))
        if queries.shape[1] != self.dim:
            raise ValueError(f"queries: expected dimension {self.dim}. Received: {queries.shape[1]}")
        return self.nearest(queries, checked_int("k", k, 1))

    def nearest(self, queries, k):
        """`search` of an array and a k that were checked."""
        if not len(queries) or not len(self):
            return no_neighbors(len(queries), k)
        return padded(*self._search(queries, min(k, len(self))), k)

    def add(self, embeddings, ids, labels=None):
        """Adds items; one whose id is there already takes its place.

        Args:
            embeddings: float array `(n, dim)`.
            ids: n different str.
            labels: n str, where the index has labels.

        Raises:
            ValueError: what does not fit.
        """
        rows, ids, labels = checked_items(embeddings, ids, labels)
        if rows.shape[1] != self.dim:
            raise ValueError(f"embeddings: expected dimension {self.dim}. Received: {rows.shape[1]}")
        if (labels is None) != (self.labels is None):
            has, got = ("none" if value is None else "labels" for value in (self.labels, labels))
            raise ValueError(f"labels: expected them as the index has them: {has}. Received: {got}")
        before = dict(zip(self.ids, self.labels)) if labels is not None else None
        self.ids = self._add(rows, ids)
        if before is not None:
            before.update(zip(ids, labels))
            self.labels = [before[item] for item in self.ids]

    def remove(self, ids):
        """Removes the items of some ids; the positions of others may change.

        Raises:
            ValueError: an id that is not there, or no item would be left.
        """
        ids = [str(item) for item in ids]
        unknown = sorted(set(ids) - set(self.ids))
        if unknown or len(set(ids)) < len(ids):
            raise ValueError(f"ids: expected different ids of items of the index. Received: {unknown[:5] or ids[:5]}")
        if len(ids) == len(self):
            raise ValueError("ids: expected at least one item to be left. Received: all")
        before = dict(zip(self.ids, self.labels)) if self.labels is not None else None
        self.ids = self._remove(ids)
        if before is not None:
            self.labels = [before[item] for item in self.ids]

    def rows(self):
        """The embeddings of all items, float32 `(n, dim)`, by position; for the cosine metric they may be unit rows."""
        raise NotImplementedError

    def save(self, folder):
        """Writes the index as a folder, whole or not at all; `load_index` reads it.

        Raises:
            ValueError: a folder that is there and is something else.
        """
        check_replaceable("folder", folder, "index.json")
        with replacing(folder) as temporary:
            os.makedirs(temporary)
            self._save(temporary)
            write_items(temporary, self.ids, self.labels)
            about = {"format": FORMAT, "method": self.method, "metric": self.metric, "dim": self.dim}
            write_json(os.path.join(temporary, "index.json"), {**about, "size": len(self), **self._about(temporary)})

    @classmethod
    def load(cls, folder, about, ids, labels):
        """The index that `save` wrote.

        Args:
            folder: the folder.
            about: dict, the content of its `index.json`, of which what all indexes have was checked.
            ids, labels: of the items.

        Raises:
            ValueError: files that are broken.
        """
        raise NotImplementedError

    def _about(self, folder):
        """What `index.json` says beside what it says of every index."""
        return {}


class ExactIndex(Index):
    """Exact search over embeddings in memory or in a memory-mapped file."""

    method = "exact"

    def __init__(self, rows, metric, ids, labels):
        super().__init__(metric, rows.shape[1], ids, labels)
        self._rows = rows

    @classmethod
    def build(cls, embeddings, ids=None, labels=None, metric="cosine"):
        """An index of float rows `(n, dim)`, n >= 1, which are kept as they are; see `ScannIndex.build`."""
        check_choice("metric", metric, METRICS)
        rows, ids, labels = checked_items(embeddings, ids, labels)
        return cls(rows, metric, ids, labels)

    @classmethod
    def load(cls, folder, about, ids, labels):
        rows = checked_rows(folder, read_rows(folder, ids))
        if rows.shape[1] != about["dim"]:
            raise ValueError(f"{folder}: expected rows of dimension {about['dim']}. Received: {rows.shape[1]}")
        return cls(rows, about["metric"], ids, labels)

    def rows(self):
        return np.asarray(self._rows[:], np.float32)

    def _search(self, queries, k):
        return exact_neighbors(queries, self._rows, k, self.metric)

    def _add(self, rows, ids):
        position = {item: i for i, item in enumerate(self.ids)}
        kept = np.array(self._rows[:], np.float32)
        new = [i for i, item in enumerate(ids) if item not in position]
        for i, item in enumerate(ids):
            if item in position:
                kept[position[item]] = rows[i]
        self._rows = np.concatenate([kept, np.asarray(rows, np.float32)[new]])
        return [*self.ids, *(ids[i] for i in new)]

    def _remove(self, ids):
        gone = set(ids)
        kept = [i for i, item in enumerate(self.ids) if item not in gone]
        self._rows = np.asarray(self._rows[:])[kept]
        return [self.ids[i] for i in kept]

    def _save(self, folder):
        np.save(os.path.join(folder, "embeddings.npy"), self.rows(), allow_pickle=False)


def checked_items(embeddings, ids, labels):
    """`(rows, ids, labels)` of the items of an index: rows that can be sliced, lists of str, labels or None.

    Raises:
        ValueError: no row, not one id and label for each, or ids that are not different.
    """
    rows = checked_rows("embeddings", embeddings)
    if not rows.shape[0]:
        raise ValueError("embeddings: expected at least one row. Received: none")
    ids = [str(i) for i in range(rows.shape[0])] if ids is None else [str(item) for item in ids]
    labels = None if labels is None else [str(label) for label in labels]
    for name, values in (("ids", ids), ("labels", labels)):
        if values is not None and len(values) != rows.shape[0]:
            raise ValueError(f"{name}: expected one for each of {rows.shape[0]} rows. Received: {len(values)}")
    if len(set(ids)) < len(ids):
        raise ValueError("ids: expected different ones. Received: duplicates")
    return rows, ids, labels
