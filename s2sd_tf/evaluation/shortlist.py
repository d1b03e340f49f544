"""Shortlists: the items whose prefixes are nearest to that of a query, by products with all or with some of them."""

import functools
from typing import Any

import numpy as np

from s2sd_tf.evaluation.scann_index import ScannIndex
from s2sd_tf.process_settings import threads, workers
from s2sd_tf.truncation import truncate

CODES = ("float32", "int8", "bits", "scann")
# The product of so many queries with so many items stays in the cache.
_QUERIES, _ITEMS = 1024, 512
# Number of tiles that serve as a sample.
_SAMPLED = 16
# About the largest number of candidates to look at together.
_CANDIDATES = 2**24


def make_shortlist(rows: np.ndarray, dim: int, codes: str, recall: float, k: int, seed: int) -> Any:
    """Returns a shortlist of items.

    Args:
        rows: unit rows, float32 `(n, embedding_dim)`.
        dim: dimension of the prefixes.
        codes: one of `CODES`, how the prefixes are stored.
        recall, k, seed: for "scann", of the prefixes; see `ScannIndex.build`.
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
        # Shuffled, so that the first tiles are a sample of the gallery.
        self._order = np.random.default_rng(0).permutation(self.size)
        codes = np.pad(self._encoded(prefixes)[self._order], ((0, -self.size % _ITEMS), (0, 0)))
        tiles = codes.reshape(-1, _ITEMS, self.dim).transpose(0, 2, 1)
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
        # Every thread multiplies on its own; products of this size are too small to share.
        with workers(len(self._tiles)) as pool:
            for start in range(0, len(queries), _QUERIES):
                factors = self._factors(truncate(queries[start : start + _QUERIES], self.dim))
                found[start : start + _QUERIES] = self._order[self._nearest(factors, count, pool)]
        return found

    def _nearest(self, factors, count, pool):
        """Positions in the tiles of the nearest items, nearest first, `(queries, count)`."""
        # Items above a threshold are candidates. A sample gives the threshold: a similarity that a little more than
        # `count` items exceed. The queries for which fewer do get a lower one.
        parts = np.array_split(np.arange(len(self._tiles)), min(threads(), len(self._tiles)))
        sampled = min(_SAMPLED, len(self._tiles))
        sample = np.concatenate([factors @ self._decoded(tile) for tile in self._tiles[:sampled]], axis=1)
        sample = sample[:, : self.size]
        expected = count * sample.shape[1] / self.size
        place = int(expected + 3 * np.sqrt(expected) + 3)
        nearest, left = np.empty((len(factors), count), np.int64), np.arange(len(factors))
        while len(left):
            thresholds = np.full(len(left), -np.inf, np.float32)
            if place < sample.shape[1]:
                thresholds = -np.partition(-sample[left], place - 1, axis=1)[:, place - 1]
            # Few queries at a time if there are many candidates, because many items are equal.
            candidates = np.count_nonzero(sample[left] >= thresholds[:, None]) / sample[left].size * self.size
            step, missing = max(1, int(_CANDIDATES / candidates)), []
            for start in range(0, len(left), step):
                chosen = left[start : start + step]
                some = functools.partial(self._above, factors[chosen], thresholds[start : start + step])
                full, nearest[chosen] = _best(pool.map(some, parts), len(chosen), count)
                missing.append(chosen[~full])
            left, place = np.concatenate(missing), 4 * place
        return nearest

    def _above(self, factors, thresholds, tiles):
        """`(rows, items, scores)` of the items in some tiles that are not below the thresholds of the queries."""
        scores = np.empty((len(factors), _ITEMS), np.float32)
        above = np.empty(scores.shape, bool)
        found = []
        for tile in tiles:
            np.matmul(factors, self._decoded(self._tiles[tile]), out=scores)
            np.greater_equal(scores, thresholds[:, None], out=above)
            if (tile + 1) * _ITEMS > self.size:
                above[:, self.size - tile * _ITEMS :] = False
            hits = np.flatnonzero(above)
            found.append((hits // _ITEMS, tile * _ITEMS + hits % _ITEMS, scores.reshape(-1)[hits]))
        return [np.concatenate(values) for values in zip(*found)]

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
    """A shortlist of the signs of rotated prefixes, 1 bit per dimension. The queries keep their float32 values.

    The rotation is random, so that every dimension has as much of the variance as another.
    """

    def _encoded(self, prefixes):
        normal = np.random.default_rng(0).standard_normal((self.dim, self.dim))
        self._rotation = np.linalg.qr(normal)[0].astype(np.float32)
        return prefixes @ self._rotation > 0

    def _stored(self, tiles):
        return np.packbits(tiles, axis=2)

    def _decoded(self, tile):
        # 0 and 1 in place of -1 and 1 rank the items of a query in the same way.
        return np.unpackbits(tile, axis=1).astype(np.float32)

    def _factors(self, queries):
        return queries @ self._rotation


def _best(found, queries, count):
    """Chooses the best candidates of every query.

    Args:
        found: parts of the candidates, each `(rows, items, scores)`.
        queries: number of queries.
        count: number of items to choose.

    Returns:
        `(full, items)`: whether a query has enough candidates, bool `(queries,)`, and its best ones, best first, int64
        `(queries, count)`.
    """
    rows, items, scores = (np.concatenate(values) for values in zip(*found))
    counts = np.bincount(rows, minlength=queries)
    # Small integers are sorted fast.
    order = np.argsort(rows.astype(np.int16), kind="stable")
    rows, items, scores = rows[order], items[order], scores[order]
    places = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    nearest = np.zeros((queries, count), np.int64)
    # Queries with similar numbers of candidates together, as all are padded to the most.
    levels = np.frexp(np.maximum(counts, count) / count)[1] // 2
    for level in np.unique(levels):
        chosen = np.flatnonzero(levels == level)
        width = max(count, int(counts[chosen].max()))
        lines = np.full(queries, -1)
        lines[chosen] = np.arange(len(chosen))
        here = lines[rows] >= 0
        place = lines[rows[here]], places[here]
        wide, where = np.full((len(chosen), width), -np.inf, np.float32), np.zeros((len(chosen), width), np.int64)
        wide[place], where[place] = scores[here], items[here]
        if count < width:
            kept = np.argpartition(-wide, count - 1, axis=1)[:, :count]
            wide, where = np.take_along_axis(wide, kept, axis=1), np.take_along_axis(where, kept, axis=1)
        nearest[chosen] = np.take_along_axis(where, np.argsort(-wide, axis=1), axis=1)
    return counts >= count, nearest
