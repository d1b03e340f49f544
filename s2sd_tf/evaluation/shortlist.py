"""Shortlists: the items whose prefixes are nearest to that of a query, by float32, int8, single bits or ScaNN."""

import concurrent.futures
import os
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from s2sd_tf.evaluation.scann_index import ScannIndex
from s2sd_tf.truncation import truncate

CODES = ("float32", "int8", "bits", "scann")
# The product of so many queries with so many items stays in the cache.
_QUERIES, _ITEMS = 1024, 512


def make_shortlist(rows: np.ndarray, dim: int, codes: str, recall: float, k: int, seed: int) -> Any:
    """Returns a shortlist of items.

    Args:
        rows: unit rows, float32 `(n, embedding_dim)`.
        dim: dimension of the prefixes.
        codes: one of `CODES`, how the prefixes are stored.
        recall, k, seed: for "scann"; see `ScannIndex.build`.
    """
    prefixes = truncate(rows, dim)
    if codes == "scann":
        return ScannShortlist(ScannIndex.build(prefixes, recall=recall, k=k, seed=seed))
    return {"float32": Shortlist, "int8": Int8Shortlist, "bits": BitsShortlist}[codes](prefixes)


class ScannShortlist:
    """A shortlist by ScaNN.

    Args:
        index: index of the prefixes.
    """

    def __init__(self, index: ScannIndex) -> None:
        self.index = index
        self.dim = index.dim

    def find(self, queries: np.ndarray, count: int) -> np.ndarray:
        """See `Shortlist.find`."""
        return self.index.nearest(truncate(queries, self.dim), count).indices


class Shortlist:
    """A shortlist by products with all prefixes, in tiles that stay in the cache.

    Args:
        prefixes: unit rows, float32 `(n, dim)`.

    Attributes:
        dim: dimension of the prefixes.
        bytes_per_item: what an item takes.
    """

    def __init__(self, prefixes: np.ndarray) -> None:
        self.size, self.dim = prefixes.shape
        codes = self._encoded(prefixes)
        missing = -self.size % _ITEMS
        tiles = np.pad(codes, ((0, missing), (0, 0))).reshape(-1, _ITEMS, self.dim).transpose(0, 2, 1)
        self._tiles = self._stored(np.ascontiguousarray(tiles))
        self.bytes_per_item = self._tiles[0].nbytes / _ITEMS

    def find(self, queries: np.ndarray, count: int) -> np.ndarray:
        """Finds the items with the nearest prefixes.

        Args:
            queries: unit rows, float32 `(queries, embedding_dim)`.
            count: number of items to find.

        Returns:
            Positions, nearest first, int64 `(queries, min(count, n))`.
        """
        count = min(count, self.size)
        found = np.empty((len(queries), count), np.int64)
        workers = min(os.cpu_count() or 1, len(self._tiles))
        parts = np.array_split(np.arange(len(self._tiles)), workers)
        # Every thread multiplies on its own; products of this size are too small to share.
        with threadpool_limits(1, user_api="blas"), concurrent.futures.ThreadPoolExecutor(workers) as pool:
            for start in range(0, len(queries), _QUERIES):
                factors = self._factors(truncate(queries[start : start + _QUERIES], self.dim))
                bests = list(pool.map(lambda part, factors=factors: self._search(factors, part, count), parts))
                scores, indices = (np.concatenate(values, axis=1) for values in zip(*bests))
                order = np.argsort(-scores, axis=1, kind="stable")[:, :count]
                found[start : start + _QUERIES] = np.take_along_axis(indices, order, axis=1)
        return found

    def _search(self, factors, tiles, count):
        """`(scores, indices)` of the best items in some tiles, `(queries, count)`."""
        best = _Best(len(factors), count)
        scores = np.empty((len(factors), _ITEMS), np.float32)
        above = np.empty(scores.shape, bool)
        # Thresholds are raised whenever twice as many items have been seen.
        seen = raised = 0
        for tile in tiles:
            np.matmul(factors, self._decoded(self._tiles[tile]), out=scores)
            if (tile + 1) * _ITEMS > self.size:
                scores[:, self.size - tile * _ITEMS :] = -np.inf
            np.greater(scores, best.thresholds[:, None], out=above)
            hits = np.flatnonzero(above)
            best.add(hits // _ITEMS, tile * _ITEMS + hits % _ITEMS, scores.reshape(-1)[hits])
            seen += _ITEMS
            if seen >= max(2 * raised, 2 * count):
                best.raise_thresholds()
                raised = seen
        best.raise_thresholds()
        return best.scores, best.indices

    def _encoded(self, prefixes):
        return prefixes

    def _stored(self, tiles):
        """The tiles `(tiles, dim, _ITEMS)` as they are kept."""
        return tiles

    def _decoded(self, tile):
        """A tile as float32 `(dim, _ITEMS)`."""
        return tile

    def _factors(self, queries):
        """What the products of queries with decoded items are taken of; they need only rank the items rightly."""
        return queries


class Int8Shortlist(Shortlist):
    """A shortlist of prefixes in int8, each dimension divided by its largest absolute value."""

    def _encoded(self, prefixes):
        self._scales = np.abs(prefixes).max(axis=0) / 127 + np.float32(1e-30)
        return np.round(prefixes / self._scales).astype(np.int8)

    def _decoded(self, tile):
        return tile.astype(np.float32)

    def _factors(self, queries):
        return queries * self._scales


class BitsShortlist(Shortlist):
    """A shortlist of the signs of prefixes, 1 bit per dimension. The queries keep their float32 values."""

    def _encoded(self, prefixes):
        return prefixes > 0

    def _stored(self, tiles):
        return np.packbits(tiles, axis=2)

    def _decoded(self, tile):
        # 0 and 1 in place of -1 and 1 rank the items of a query in the same way.
        return np.unpackbits(tile, axis=1).astype(np.float32)


class _Best:
    """The best items seen so far, for each of some queries."""

    def __init__(self, queries: int, count: int) -> None:
        self.scores = np.full((queries, count), -np.inf, np.float32)
        self.indices = np.full((queries, count), -1, np.int64)
        self.thresholds = np.full(queries, -np.inf, np.float32)
        self._waiting: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, rows: np.ndarray, indices: np.ndarray, scores: np.ndarray) -> None:
        """Adds items with the query, position and score of each."""
        if len(rows):
            self._waiting.append((rows, indices, scores))

    def raise_thresholds(self) -> None:
        """Keeps the best items only, and sets the thresholds to the worst of these."""
        if not self._waiting:
            return
        rows, indices, scores = (np.concatenate(values) for values in zip(*self._waiting))
        self._waiting = []
        order = np.argsort(rows, kind="stable")
        rows, indices, scores = rows[order], indices[order], scores[order]
        counts = np.bincount(rows, minlength=len(self.scores))
        place = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        count = self.scores.shape[1]
        wide = np.full((len(self.scores), count + int(counts.max())), -np.inf, np.float32)
        where = np.full(wide.shape, -1, np.int64)
        wide[:, :count], where[:, :count] = self.scores, self.indices
        wide[rows, count + place], where[rows, count + place] = scores, indices
        best = np.argpartition(-wide, count - 1, axis=1)[:, :count]
        self.scores, self.indices = np.take_along_axis(wide, best, axis=1), np.take_along_axis(where, best, axis=1)
        self.thresholds = self.scores.min(axis=1)
