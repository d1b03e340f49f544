"""Shortlists: the items whose prefixes are nearest to that of a query, by products with all or with some of them."""

import functools
from typing import Any, NamedTuple

import numpy as np

from s2sd_tf.evaluation.scann_index import ScannIndex
from s2sd_tf.process_settings import threads, workers
from s2sd_tf.truncation import truncate

CODES = ("float32", "int8", "bits", "scann")
# The product of so many queries with so many items stays in the cache.
_QUERIES, _ITEMS = 1024, 512
# Number of items in the sample that thresholds come from.
_SAMPLED = 8192
# Rows whose centres are found at a time.
_BLOCK = 2**14
# About the largest number of candidates to look at together.
_CANDIDATES = 2**24


def make_shortlist(
    rows: np.ndarray,
    dim: int,
    codes: str,
    recall: float,
    k: int,
    seed: int,
    centres: np.ndarray | None = None,
    clusters_to_search: int = 1,
) -> Any:
    """Returns a shortlist of items.

    Args:
        rows: unit rows, float32 `(n, embedding_dim)`.
        dim: dimension of the prefixes.
        codes: one of `CODES`, how the prefixes are stored.
        recall, k, seed: for "scann", of the prefixes; see `ScannIndex.build`.
        centres, clusters_to_search: for the others, see `Shortlist`.
    """
    prefixes = truncate(rows, dim)
    if codes == "scann":
        return ScannShortlist(ScannIndex.build(prefixes, recall=recall, k=k, seed=seed))
    kinds = {"float32": Shortlist, "int8": Int8Shortlist, "bits": BitsShortlist}
    return kinds[codes](prefixes, centres, clusters_to_search)


def nearest_centres(rows: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The cluster of every row, int64 `(n,)`: the position of the centre with the largest product."""
    starts = range(0, len(rows), _BLOCK)
    found = [np.argmax(rows[start : start + _BLOCK] @ centres.T, axis=1) for start in starts]
    return np.concatenate([np.empty(0, np.int64), *found])


class ScannShortlist:
    """A shortlist by ScaNN.

    Args:
        index: index of the prefixes.
    """

    def __init__(self, index: ScannIndex) -> None:
        self.index = index
        self.dim = index.dim

    def find(self, queries: np.ndarray, count: int, widen: float = 1.0) -> np.ndarray:
        """See `Shortlist.find`."""
        return self.index.nearest(truncate(queries, self.dim), count).indices


class _Tile(NamedTuple):
    """Items of one cluster that lie one after the other, from `first` in the order of the tiles."""

    cluster: int
    first: int
    items: int
    codes: np.ndarray


class Shortlist:
    """A shortlist by products with the prefixes, in tiles that stay in the cache.

    Args:
        prefixes: unit rows, float32 `(n, dim)`.
        centres: of clusters, unit rows, float32 `(clusters, dim)`; None: all prefixes are in one.
        clusters_to_search: a query's products are with the items of so many clusters, those whose centres are nearest
            to it; with all items if these are too few, or if these are more than a quarter.

    Attributes:
        dim: dimension of the prefixes.
        bytes_per_item: what an item takes.
    """

    def __init__(self, prefixes: np.ndarray, centres: np.ndarray | None = None, clusters_to_search: int = 1) -> None:
        self.size, self.dim = prefixes.shape
        self._centres = np.zeros((1, self.dim), np.float32) if centres is None else centres
        self._searched = clusters_to_search
        clusters = nearest_centres(prefixes, self._centres)
        self._order = np.argsort(clusters, kind="stable")
        codes = self._encoded(prefixes)
        sampled = np.random.default_rng(0).choice(self.size, min(_SAMPLED, self.size), replace=False)
        self._sample = self._tile(codes[sampled])
        codes = codes[self._order]
        ends = np.cumsum(np.bincount(clusters, minlength=len(self._centres))).tolist()
        self._tiles = [
            self._tile(codes[first : min(first + _ITEMS, end)], cluster, first)
            for cluster, (start, end) in enumerate(zip([0, *ends], ends))
            for first in range(start, end, _ITEMS)
        ]
        self._clusters = np.array([tile.cluster for tile in self._tiles])
        self.bytes_per_item = sum(tile.codes.nbytes for tile in self._tiles) / self.size

    def find(self, queries: np.ndarray, count: int, widen: float = 1.0) -> np.ndarray:
        """Finds the items with the nearest prefixes.

        Args:
            queries: unit rows, float32 `(queries, embedding_dim)`.
            count: number of items to find.
            widen: >= 1, how many times as many clusters to search.

        Returns:
            Positions, nearest first, int64 `(queries, min(count, n))`.
        """
        count = min(count, self.size)
        found = np.empty((len(queries), count), np.int64)
        starts = range(0, len(queries), _QUERIES)

        def search(map_, start):
            prefixes = truncate(queries[start : start + _QUERIES], self.dim)
            clusters = self._clusters_of(prefixes, count, widen)
            nearest = self._nearest(self._factors(prefixes), clusters, count, map_)
            found[start : start + _QUERIES] = self._order[nearest]

        # Every thread multiplies on its own; products of this size are too small to share. It has its own queries, or
        # its own tiles if they are few.
        with workers(max(len(starts), len(self._tiles))) as pool:
            if len(starts) >= threads():
                list(pool.map(functools.partial(search, map), starts))
            else:
                for start in starts:
                    search(pool.map, start)
        return found

    def _clusters_of(self, prefixes, count, widen):
        """The clusters that each query searches, in no order, int64 `(queries, searched)`; None: all."""
        every = len(self._centres)
        # At least those that have twice as many items.
        searched = int(np.ceil(max(self._searched * widen, 2 * count * every / self.size)))
        if searched > every // 4:
            return None
        return np.argpartition(-(prefixes @ self._centres.T), searched - 1, axis=1)[:, :searched]

    def _nearest(self, factors, clusters, count, map_):
        """Places in the order of the tiles of the nearest items, nearest first, `(queries, count)`."""
        # Items above a threshold are candidates. A sample gives the threshold: a similarity that a little more than
        # `count` items exceed. The queries for which fewer do get a lower one, and all clusters if theirs have too few.
        sample = factors @ self._decoded(self._sample)
        expected = count * sample.shape[1] / self.size
        place = at_first = int(expected + 3 * np.sqrt(expected) + 3)
        nearest, left = np.empty((len(factors), count), np.int64), np.arange(len(factors))
        while len(left):
            thresholds = np.full(len(left), -np.inf, np.float32)
            if place < sample.shape[1]:
                thresholds = -np.partition(-sample[left], place - 1, axis=1)[:, place - 1]
            # Few queries at a time if there are many candidates, because many items are equal.
            candidates = np.count_nonzero(sample[left] >= thresholds[:, None]) / sample[left].size * self.size
            step, missing = max(1, int(_CANDIDATES / threads() / candidates)), []
            for start in range(0, len(left), step):
                chosen = left[start : start + step]
                queries = self._by_cluster(clusters, chosen)
                some = functools.partial(self._above, factors[chosen], thresholds[start : start + step], queries)
                tiles = np.flatnonzero(np.isin(self._clusters, list(queries)))
                parts = np.array_split(tiles, max(1, min(threads(), len(tiles))))
                full, nearest[chosen] = _best(map_(some, parts), len(chosen), count)
                missing.append(chosen[~full])
            left = np.concatenate(missing)
            if place < sample.shape[1]:
                place *= 4
            else:
                clusters, place = None, at_first
        return nearest

    def _by_cluster(self, clusters, chosen):
        """A dict from every cluster to those of the chosen queries that search it, positions in `chosen`."""
        if clusters is None:
            return dict.fromkeys(range(len(self._centres)), np.arange(len(chosen)))
        wanted = clusters[chosen]
        order = np.argsort(wanted, axis=None, kind="stable")
        found, starts = np.unique(wanted.reshape(-1)[order], return_index=True)
        return dict(zip(found.tolist(), np.split(order // wanted.shape[1], starts[1:])))

    def _above(self, factors, thresholds, queries, tiles):
        """`(rows, places, scores)` of the items in some tiles that are not below the thresholds of their queries."""
        scores, above = np.empty(len(factors) * _ITEMS, np.float32), np.empty(len(factors) * _ITEMS, bool)
        found = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))]
        cluster = None
        for tile in map(self._tiles.__getitem__, tiles):
            if tile.cluster != cluster:
                cluster, rows = tile.cluster, queries[tile.cluster]
                some, least = factors[rows], thresholds[rows, None]
            size, shape = len(rows) * tile.items, (len(rows), tile.items)
            np.matmul(some, self._decoded(tile), out=scores[:size].reshape(shape))
            np.greater_equal(scores[:size].reshape(shape), least, out=above[:size].reshape(shape))
            hits = np.flatnonzero(above[:size])
            found.append((rows[hits // tile.items], tile.first + hits % tile.items, scores[hits]))
        return [np.concatenate(values) for values in zip(*found)]

    def _tile(self, codes, cluster=0, first=0):
        """A tile of encoded prefixes `(items, dim)`."""
        # A copy: a view would keep all codes.
        return _Tile(cluster, first, len(codes), self._stored(np.array(codes.T, order="C")))

    def _encoded(self, prefixes):
        return prefixes

    def _stored(self, codes):
        """The codes of a tile `(dim, items)` as they are kept."""
        return codes

    def _decoded(self, tile):
        """A tile as float32 `(dim, items)`."""
        return tile.codes

    def _factors(self, queries):
        """What the products of queries with decoded items are taken of; they need only rank the items rightly."""
        return queries


class Int8Shortlist(Shortlist):
    """A shortlist of prefixes in int8, each dimension divided by its largest absolute value."""

    def _encoded(self, prefixes):
        self._scales = np.abs(prefixes).max(axis=0) / 127 + np.float32(1e-30)
        return np.round(prefixes / self._scales).astype(np.int8)

    def _decoded(self, tile):
        return tile.codes.astype(np.float32)

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

    def _stored(self, codes):
        return np.packbits(codes, axis=1)

    def _decoded(self, tile):
        # 0 and 1 in place of -1 and 1 rank the items of a query in the same way.
        return np.unpackbits(tile.codes, axis=1, count=tile.items).astype(np.float32)

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
