"""Index base class (a gallery to build once, save, search and change), and the index for exact search."""

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import tensorflow as tf

from s2sd_tf.checks import check_choice, check_number, checked_int
from s2sd_tf.evaluation.embeddings import Rows, ints_or_texts, read_rows, write_items, write_rows
from s2sd_tf.evaluation.exact import exact_neighbors
from s2sd_tf.evaluation.neighbors import METRICS, Neighbors, no_neighbors, padded
from s2sd_tf.evaluation.rows import checked_rows
from s2sd_tf.files import check_replaceable, replacing, write_json

# Version of the saved format: `index.json` and the files beside it.
FORMAT = 1
# An index that has this many times the items that it was tuned for is tuned again.
GROWN = 1.5


class Index:
    """A gallery that can be searched, with an id and optionally a label for every item.

    Attributes:
        method: name of the search method.
        metric: "cosine" or "euclidean".
        dim: dimension of the embeddings.
        ids: ids by position.
        labels: labels by position, or None.
        min_score: the least similarity of an item that counts as found, or None for no limit. May be set.
    """

    method: str | None = None

    def __init__(self, metric: str, dim: int, ids: Any, labels: list[str] | None) -> None:
        self.metric = metric
        self.dim = dim
        self.ids = ids
        self.labels = labels
        self.min_score: float | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def search(self, queries: Rows | tf.Tensor, k: int, min_score: float | None = None) -> Neighbors:
        """Finds the k nearest items of float rows `(queries, dim)`, as positions in `ids` and `labels`.

        Args:
            queries: the rows.
            k: int >= 1.
            min_score: the least similarity, up to rounding in float32 (2^-21 of it), of an item that counts as found.
                Default: the index's own. For no limit pass a number below all similarities, such as -2 for "cosine".

        Raises:
            ValueError: queries of another dimension or with values that are not finite, k < 1, or a `min_score` that is
                not finite or that no similarity reaches.
        """
        queries = np.asarray(checked_rows("queries", queries))
        if queries.shape[1] != self.dim:
            raise ValueError(f"queries: expected dimension {self.dim}. Received: {queries.shape[1]}")
        k, min_score = checked_int("k", k, 1), self.min_score if min_score is None else min_score
        check_min_score(min_score, self.metric)
        found = self.nearest(queries, k)
        if min_score is None:
            return found
        reached = found.similarities >= least_similarity(min_score)
        return Neighbors(np.where(reached, found.indices, -1), np.where(reached, found.similarities, -np.inf))

    def nearest(self, queries: np.ndarray, k: int) -> Neighbors:
        """`search` without checking the arguments."""
        if not len(queries) or not len(self):
            return no_neighbors(len(queries), k)
        return padded(*self._search(queries, min(k, len(self))), k)

    def add(self, embeddings: Rows | tf.Tensor, ids: Iterable[str], labels: Iterable[str] | None = None) -> None:
        """Adds items. An item replaces the one that has the same id.

        Args:
            embeddings: float array `(n, dim)`.
            ids: n different ids.
            labels: n labels if the index has labels, else None.

        Raises:
            ValueError: arguments that do not fit the index.
        """
        rows, ids, labels = checked_items(embeddings, ids, labels)
        if rows.shape[1] != self.dim:
            raise ValueError(f"embeddings: expected dimension {self.dim}. Received: {rows.shape[1]}")
        if (labels is None) != (self.labels is None):
            has, got = ("none" if value is None else "labels" for value in (self.labels, labels))
            raise ValueError(f"labels: expected the same as in the index: {has}. Received: {got}")
        before = dict(zip(self.ids, self.labels)) if self.labels is not None else None
        self.ids = self._add(rows, ids)
        if before is not None and labels is not None:
            before.update(zip(ids, labels))
            self.labels = [before[item] for item in self.ids]

    def remove(self, ids: Iterable[str]) -> None:
        """Removes items by id. The positions of the others may change.

        Raises:
            ValueError: an id that is unknown or given twice, or no item would be left.
        """
        ids = [str(item) for item in ints_or_texts("ids", ids)]
        unknown = sorted(set(ids) - set(self.ids))
        if unknown or len(set(ids)) < len(ids):
            raise ValueError(f"ids: expected different ids of items in the index. Received: {unknown[:5] or ids[:5]}")
        if len(ids) == len(self):
            raise ValueError("ids: expected at least one item to be left. Received: all")
        before = dict(zip(self.ids, self.labels)) if self.labels is not None else None
        self.ids = self._remove(ids)
        if before is not None:
            self.labels = [before[item] for item in self.ids]

    def rows(self) -> np.ndarray:
        """Embeddings of all items by position, float32 `(n, dim)`. With the cosine metric they may be normalised."""
        raise NotImplementedError

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the index as a folder, atomically. `load_index` reads it.

        Raises:
            ValueError: `folder` exists and is neither empty nor an index.
        """
        check_replaceable("folder", folder, "index.json")
        check_min_score(self.min_score, self.metric)
        with replacing(folder) as temporary:
            os.makedirs(temporary)
            self._save(temporary)
            write_items(temporary, self.ids, self.labels)
            about: dict[str, Any] = {"format": FORMAT, "method": self.method, "metric": self.metric, "dim": self.dim}
            about |= {"size": len(self), "min_score": self.min_score}
            write_json(os.path.join(temporary, "index.json"), {**about, **self._about(temporary)})

    @classmethod
    def load(
        cls, folder: str | os.PathLike, about: dict[str, Any], ids: list[str], labels: list[str] | None
    ) -> "Index":
        """Loads an index that `save` wrote. Called by `load_index`.

        Args:
            folder: the folder.
            about: the content of its `index.json`. The fields that every index has were checked.
            ids, labels: those of the items.

        Raises:
            ValueError: broken files.
        """
        raise NotImplementedError

    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """`(indices, similarities)` of the k nearest items, at most `len(self)`."""
        raise NotImplementedError

    def _add(self, rows: Any, ids: list[str]) -> list[str]:
        """Adds rows and returns all ids by position."""
        raise NotImplementedError

    def _remove(self, ids: list[str]) -> list[str]:
        """Removes items and returns the remaining ids by position."""
        raise NotImplementedError

    def _save(self, folder: str) -> None:
        """Writes the files of this kind of index into `folder`."""
        raise NotImplementedError

    def _about(self, folder: str) -> dict[str, Any]:
        """Additional fields of `index.json` for this kind of index."""
        return {}


class RowsIndex(Index):
    """An index that keeps the rows of its items, in memory or in a memory-mapped file."""

    def __init__(self, rows: Any, metric: str, ids: list[str], labels: list[str] | None) -> None:
        super().__init__(metric, rows.shape[1], ids, labels)
        self._rows = rows

    def rows(self) -> np.ndarray:
        return np.asarray(self._rows[:], np.float32)

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
        write_rows(folder, self.rows())


class ExactIndex(RowsIndex):
    """Exact search."""

    method = "exact"

    @classmethod
    def build(
        cls,
        embeddings: Rows | tf.Tensor,
        ids: Iterable[str] | None = None,
        labels: Iterable[str] | None = None,
        metric: str = "cosine",
    ) -> "ExactIndex":
        """Builds an index of float rows `(n, dim)`, n >= 1, without copying them; see `ScannIndex.build`."""
        check_choice("metric", metric, METRICS)
        rows, ids, labels = checked_items(embeddings, ids, labels)
        return cls(rows, metric, ids, labels)

    @classmethod
    def load(
        cls, folder: str | os.PathLike, about: dict[str, Any], ids: list[str], labels: list[str] | None
    ) -> "ExactIndex":
        rows = checked_rows(os.fspath(folder), read_rows(folder, ids))
        if rows.shape[1] != about["dim"]:
            raise ValueError(f"{folder}: expected rows of dimension {about['dim']}. Received: {rows.shape[1]}")
        return cls(rows, about["metric"], ids, labels)

    def _search(self, queries, k):
        return exact_neighbors(queries, self._rows, k, self.metric)


def check_min_score(min_score: float | None, metric: str) -> None:
    """Checks the least similarity of a match; None is no limit.

    Raises:
        ValueError: a number that is not finite, or that no similarity of the metric reaches.
    """
    if min_score is None:
        return
    check_number("min_score", min_score)
    most = 1.0 if metric == "cosine" else 0.0
    if min_score > most:
        raise ValueError(
            f"min_score: expected at most {most:g}, the largest {metric} similarity"
            f"{'' if metric == 'cosine' else ' (a negative distance)'}. Received: {min_score!r}"
        )


def least_similarity(min_score: float) -> np.float32:
    """The similarity from which on an item counts as found: a little lower, as searches round differently."""
    return np.float32(min_score - 2.0**-21 * max(1.0, abs(min_score)))


def checked_items(
    embeddings: Any, ids: Iterable[Any] | None, labels: Iterable[Any] | None
) -> tuple[Any, list[str], list[str] | None]:
    """Checks the items of an index and returns `(rows, ids, labels)`. Ids are the positions by default.

    Raises:
        ValueError: no rows, another number of ids or labels than rows, or duplicate ids.
    """
    rows = checked_rows("embeddings", embeddings)
    if not rows.shape[0]:
        raise ValueError("embeddings: expected at least one row. Received: none")
    ids = [str(item) for item in (range(rows.shape[0]) if ids is None else ints_or_texts("ids", ids))]
    labels = None if labels is None else [str(label) for label in ints_or_texts("labels", labels)]
    for name, values in (("ids", ids), ("labels", labels)):
        if values is not None and len(values) != rows.shape[0]:
            raise ValueError(f"{name}: expected one for each of {rows.shape[0]} rows. Received: {len(values)}")
    if len(set(ids)) < len(ids):
        raise ValueError("ids: expected different ids. Received: duplicates")
    return rows, ids, labels
