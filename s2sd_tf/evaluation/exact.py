"""Exact search by blocked matrix products in float32, in bounded memory, also over galleries on disk.

Arguments are not checked here; the callers have done that.
"""

import concurrent.futures
import contextlib
import hashlib
import threading
from collections.abc import Generator
from typing import Any

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from s2sd_tf.evaluation.embeddings import Rows
from s2sd_tf.evaluation.neighbors import Neighbors, lengths, padded
from s2sd_tf.evaluation.rows import mean_row, normalized, parts, row_scales, scale_of, scaled
from s2sd_tf.process_settings import full_float32, threads, workers

# Extra candidates beyond the k nearest, whose similarities are recomputed in float64.
_MARGIN = 8
# Above this number of items of one query, similarities are computed once for equal rows; and in parts of this size.
_FEW, _NUMBERS = 64, 2**18
# Queries whose similarities are computed in float64 at a time.
_ROWS = 1024
# Columns in a group. Single columns are examined only if the maximum of their group is among the best so far.
_GROUP = 32
# A block of similarities has at most _WIDTH columns and _FLATTER times fewer rows. _FLATTER divides _GROUP, so that
# blocks of queries do not cross those of the gallery.
_WIDTH, _FLATTER = 16_384, 8


def exact_neighbors(
    queries: Rows,
    gallery: Rows,
    k: int,
    metric: str = "cosine",
    keys: tuple[np.ndarray, np.ndarray] | None = None,
    memory_mib: int = 512,
    progress: bool = False,
) -> Neighbors:
    """Finds the k nearest gallery items of every query.

    Args:
        queries, gallery: finite float rows `(queries, dim)` and `(gallery, dim)`. Pass the same object twice if the
            queries are the gallery: this saves half of the work.
        k: int >= 1.
        metric: "cosine" or "euclidean".
        keys: `(query_keys, gallery_keys)`, int64 arrays, or None. Items with the key of the query are skipped.
        memory_mib: MiB that blocks may take, in addition to the arguments and results.
        progress: whether to show a progress bar.

    The similarity of two rows is computed in float64 and rounded to float32, so it does not depend on where the rows
    are. Among items whose similarities are then equal, the lower position comes first. Products in float32 only choose
    the items for which this is done: those whose rank rounding could change.
    """
    left, right = _factors(queries, gallery, metric)
    # Take some more, as those near the end may change places.
    wanted = min(k + _MARGIN, len(right))
    indices, rough = _search(left, right, wanted, keys, memory_mib, progress)
    similarities, bands = _similarities_of(left, right, indices, rough, k)
    order = np.lexsort((np.where(indices < 0, np.iinfo(np.int64).max, indices), -similarities), axis=1)[:, :k]
    indices, similarities = (np.take_along_axis(values, order, axis=1) for values in (indices, similarities))
    if k < wanted < len(right):
        # Where the last item found is as near as the k-th up to rounding, those not found may be so too.
        lowest = rough[:, k - 1] - bands
        crowded = np.flatnonzero((rough[:, -1] >= lowest) & np.isfinite(rough[:, -1]))
        with workers() if len(crowded) else contextlib.nullcontext() as pool:
            for chosen, scores in _products(pool, left, right, crowded, memory_mib):
                for query, row in zip(chosen, scores):
                    close = _others(np.flatnonzero(row >= lowest[query]), query, keys)
                    values = _similarities(left, right, query, close)
                    nearest = np.argsort(-values, kind="stable")[:k]
                    indices[query], similarities[query] = close[nearest], values[nearest]
    if metric == "euclidean":
        similarities = lengths(indices, similarities, left.scale)
    return padded(indices, similarities, k)


def positive_ranks(
    queries: Rows,
    gallery: Rows,
    query_labels: np.ndarray,
    gallery_labels: np.ndarray,
    metric: str = "cosine",
    keys: tuple[np.ndarray, np.ndarray] | None = None,
    memory_mib: int = 512,
    progress: bool = False,
) -> Generator[tuple[np.ndarray, list[np.ndarray]], None, None]:
    """Ranks the whole gallery for every query, and yields the ranks of its positives.

    Args:
        queries, gallery, metric, keys, memory_mib, progress: see `exact_neighbors`.
        query_labels, gallery_labels: int64 arrays `(queries,)` and `(gallery,)`. A positive is an item with the label
            of the query and another key.

    Yields:
        `(queries, ranks)` for one block of queries at a time: their positions, int64 `(n,)`, and a list of n int64
        arrays, the ranks of their positives, ascending and counted from 1. Queries whose label is not in the gallery
        are skipped. The ranking is that of `exact_neighbors`.
    """
    left, right = _factors(queries, gallery, metric)
    order = np.argsort(gallery_labels, kind="stable")
    ordered = gallery_labels[order]
    begin, end = np.searchsorted(ordered, query_labels, "left"), np.searchsorted(ordered, query_labels, "right")
    wanted = np.flatnonzero(end > begin)

    def one(query, row, size):
        positives = _others(order[begin[query] : end[query]], query, keys)
        if not len(positives):
            return np.empty(0, np.int64)
        found = row[positives]
        band = left.band(size, found.min())
        above = _others(np.flatnonzero(row >= found.min() - band), query, keys)
        values = row[above]
        ascending = np.sort(values)
        high = np.searchsorted(ascending, found + band, "right")
        ranks = len(ascending) - high + 1
        crowded = high - np.searchsorted(ascending, found - band, "left") > 1
        if crowded.any():
            # Rank the items that are as near as one of these positives up to rounding, by their similarities.
            found = found[crowded]
            levels = np.sort(found)
            at = np.searchsorted(levels, values)
            below, next_ = levels[np.maximum(at - 1, 0)], levels[np.minimum(at, len(levels) - 1)]
            near = np.minimum(np.abs(values - below), np.abs(values - next_)) <= band
            close, values = above[near], np.sort(values[near])
            place = np.empty(len(close), np.int64)
            place[np.argsort(-_similarities(left, right, query, close), kind="stable")] = np.arange(1, len(close) + 1)
            # Before these are the items that are nearer by more than rounding.
            nearer = len(ascending) - np.searchsorted(ascending, found, "right")
            nearer -= len(values) - np.searchsorted(values, found, "right")
            ranks[crowded] = nearer + place[np.searchsorted(close, positives[crowded])]
        return np.sort(ranks)

    bar = tqdm(total=len(wanted), desc="Ranking", unit="query", disable=not progress)
    with bar, workers() as pool:
        for chosen, scores in _products(pool, left, right, wanted, memory_mib):
            sizes = left.sizes(left.wide(chosen))
            yield chosen, list(pool.map(one, chosen, scores, sizes, chunksize=16))
            bar.update(len(chosen))


def _others(positions, query, keys):
    """Leaves out the positions whose items have the key of the query."""
    return positions if keys is None else positions[keys[1][positions] != keys[0][query]]


def _products(pool, left, right, wanted, memory_mib):
    """Yields `(queries, scores)`: the positions of a block of the queries `wanted`, and float32 `(n, gallery)`, which
    the next block overwrites.
    """
    size = len(right)
    # As much room again as the scores take is left to those who look at them.
    height = max(1, min(1024, memory_mib * 2**20 // (8 * max(size, 1))))
    width = _block_width(memory_mib, right.width)
    whole = None
    if len(wanted) and 4 * size * right.width <= memory_mib * 2**18:
        whole = np.empty((right.width, size), np.float32)
        for first in range(0, size, width):
            whole[:, first : first + width] = right.right(slice(first, min(first + width, size)))
    buffer = np.empty((min(height, len(wanted)), size), np.float32)
    on_gpu = bool(tf.config.get_visible_devices("GPU"))
    for start in range(0, len(wanted), height):
        chosen = wanted[start : start + height]
        # Read a slice if possible: usually nearly all queries are wanted, in order.
        begin_row, end_row = int(chosen[0]), int(chosen[-1]) + 1
        near = end_row - begin_row <= 2 * height
        rows = left.left(slice(begin_row, end_row))[chosen - begin_row] if near else left.left(chosen)
        scores = buffer[: len(rows)]
        with _full_precision(on_gpu):
            if whole is not None:
                _multiply(pool, rows, whole, scores, on_gpu)
            else:
                for first in range(0, size, width):
                    columns = right.right(slice(first, min(first + width, size)))
                    _multiply(pool, rows, columns, scores[:, first : first + width], on_gpu)
        yield chosen, scores


def _multiply(pool, rows, columns, out, on_gpu):
    """Writes the product of two float32 matrices into `out`."""
    if on_gpu:
        out[...] = tf.matmul(rows, columns).numpy()
        return
    height = -(-len(rows) // threads())

    def multiply(start):
        part = slice(start, start + height)
        np.matmul(rows[part], columns, out=out[part])

    # A new result for every block would let the memory of the process grow: the C library puts small things into the
    # gap of the last one, so that the next does not fit there.
    list(pool.map(multiply, range(0, len(rows), height)))


def _similarities(left, right, query, items):
    """Similarities of one query, a position, to the gallery's `items`: float32 `(items,)`, of scaled rows."""
    row = left.wide([query])
    chosen, inverse = items, np.arange(len(items))
    if len(items) > _FEW:
        # Many items are as near only if most of them are copies.
        chosen, inverse = np.unique(right.originals[items], return_inverse=True)
    values = np.empty(len(chosen), np.float32)
    step = max(1, _NUMBERS // row.shape[1])
    for start in range(0, len(chosen), step):
        values[start : start + step] = left.similarities(row, right.wide(chosen[start : start + step]))
    return values[inverse]


def _similarities_of(left, right, indices, rough, k):
    """`(similarities, bands)` of neighbours, from their products `rough`, descending along a row: float32, of scaled
    rows, -inf for those missing and for those that cannot be among the k nearest; and how far a product may be from
    that of the k-th to be the same up to rounding, float32 `(queries,)`.
    """
    similarities = np.full(indices.shape, -np.inf, np.float32)
    bands = np.empty(len(indices), np.float32)
    levels = rough[:, min(k, rough.shape[1]) - 1]

    def fill(start):
        part = slice(start, min(start + _ROWS, len(indices)))
        rows = left.wide(part)
        bands[part] = left.band(left.sizes(rows), levels[part])
        wanted = (indices[part] >= 0) & (rough[part] >= (levels[part] - bands[part])[:, None])
        for column in range(indices.shape[1]):
            there = np.flatnonzero(wanted[:, column])
            others = right.wide(indices[start + there, column])
            similarities[start + there, column] = left.similarities(rows[there], others)

    with workers() as pool:
        list(pool.map(fill, range(0, len(indices), _ROWS)))
    return similarities, bands


class _Factor:
    """One side of the product `left @ right.T` that computes the similarities of a metric.

    Cosine: the product of unit rows. Euclidean: minus the squared distance, as (2x, -|x|^2, 1) times (y, 1, -|y|^2).
    For "euclidean" all rows are scaled first, so that squares neither overflow nor vanish. Then the gallery's mean is
    subtracted from both sides, so that a distance is not a small difference of large numbers.

    Args:
        rows: float rows `(n, dim)`.
        metric: "cosine" or "euclidean".
        scale: factor of the rows for "euclidean", a power of two.
        center: mean of the scaled gallery for "euclidean", float64 `(dim,)`.
    """

    def __init__(self, rows: Rows, metric: str, scale: float = 1.0, center: np.ndarray | None = None) -> None:
        self.rows = rows
        self.metric = metric
        self.scale = scale
        self.center: Any = center
        self._originals: np.ndarray | None = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.rows.shape[0]

    @property
    def width(self) -> int:
        """Inner dimension of the product."""
        return self.rows.shape[1] + (2 if self.metric == "euclidean" else 0)

    def left(self, chosen: slice | np.ndarray) -> np.ndarray:
        """The left factor of the rows `chosen`, a slice or positions: float32 `(n, width)`."""
        rows, squares = self._prepared(chosen)
        if self.metric == "cosine":
            return rows
        return np.concatenate([2.0 * rows, -squares, np.ones_like(squares)], axis=1)

    def right(self, chosen: slice | np.ndarray) -> np.ndarray:
        """The right factor of the rows `chosen`, transposed: float32 `(width, n)`."""
        rows, squares = self._prepared(chosen)
        if self.metric == "euclidean":
            rows = np.concatenate([rows, np.ones_like(squares), -squares], axis=1)
        return np.ascontiguousarray(rows.T)

    def wide(self, chosen: Any) -> np.ndarray:
        """The rows `chosen`, scaled by powers of two so that squares fit, which is exact: float64 `(n, dim)`."""
        rows = np.asarray(self.rows[chosen])
        if self.metric == "euclidean":
            return scaled(rows, self.scale)
        # The squares of floats of up to 32 bits fit as they are.
        return rows.astype(np.float64) if rows.dtype.itemsize <= 4 else scaled(rows, row_scales(rows))

    def similarities(self, rows: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Similarities of pairs of `wide` rows, or of one row to all others: float32 `(n,)`."""
        if self.metric == "cosine":
            # Products of the rows as they are: integers give equal similarities, also 0, where unit rows would not.
            norms = np.sqrt(np.sum(rows * rows, axis=1) * np.sum(others * others, axis=1))
            return (np.sum(rows * others, axis=1) / np.where(norms > 0, norms, 1.0)).astype(np.float32)
        return -np.linalg.norm(rows - others, axis=1).astype(np.float32)

    def sizes(self, rows: np.ndarray) -> np.ndarray:
        """Distances of `wide` rows from the mean for "euclidean", else 0: float64 `(n,)`."""
        return np.zeros(len(rows)) if self.metric == "cosine" else np.linalg.norm(rows - self.center, axis=1)

    def band(self, size: Any, score: Any) -> Any:
        """How far apart two products of a query may be though the similarities are equal, in float32.

        Args:
            size: of the query, as `sizes` returns it.
            score: the lower product.
        """
        # A product of n terms errs by about sqrt(n) roundings of the sum of their absolute values; float32 rounds by
        # 2^-24. For "euclidean" that sum is at most (|x| + |y|)^2, where |y| <= |x| + |x - y|.
        terms = 1.0 if self.metric == "cosine" else np.square(2.0 * size + np.sqrt(np.maximum(-score, 0.0)))
        return np.float32(2.0**-23 * (8.0 + 2.0 * np.sqrt(self.width)) * terms + 1e-36)

    @property
    def originals(self) -> np.ndarray:
        """For every row the position of the first row that is equal, int64 `(n,)`."""
        with self._lock:
            if self._originals is None:
                self._originals = self._first_equal()
            return self._originals

    def _first_equal(self):
        digests = np.empty(len(self), np.uint64)
        for start, part in parts(self.rows):
            for position, row in enumerate(part, start):
                digest = hashlib.blake2b(row.tobytes(), digest_size=8).digest()
                digests[position] = int.from_bytes(digest, "little")
        _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
        return first[inverse]

    def _prepared(self, chosen):
        if self.metric == "cosine":
            return normalized(self.rows[chosen]), None
        moved = self.wide(chosen) - self.center
        squares = np.sum(moved * moved, axis=1, keepdims=True)
        return moved.astype(np.float32), squares.astype(np.float32)


def _factors(queries, gallery, metric):
    """`(left, right)` factors of a search; the same object twice if the queries are the gallery."""
    settings: dict[str, Any] = {}
    if metric == "euclidean":
        scale = scale_of(gallery, *(() if queries is gallery else (queries,)))
        settings = {"scale": scale, "center": scale * mean_row(gallery)}
    right = _Factor(gallery, metric, **settings)
    return (right if queries is gallery else _Factor(queries, metric, **settings)), right


def _search(left, right, k, keys=None, memory_mib=512, progress=False):
    """Finds the k nearest of every query: `(indices, similarities)`, int64 and float32 `(queries, k)`.

    If fewer than k are left, the rest is -1 and -inf. For the arguments see `exact_neighbors`.
    """
    best = _Best(len(left), k)
    width = _block_width(memory_mib, right.width)
    height = width // _FLATTER
    on_gpu = bool(tf.config.get_visible_devices("GPU"))
    symmetric = left is right and not on_gpu
    buffer = np.empty(0 if on_gpu else min(height, len(left)) * min(width, len(right)), np.float32)
    bar = tqdm(total=len(left) * len(right), desc="Searching", unit="pair", unit_scale=True, disable=not progress)
    # The gallery is read once, and the queries once for each block of it. If both are the same set, every product is
    # used in both directions. The columns before a block of queries were then merged earlier, from transposed products,
    # so that every query still sees the gallery in ascending order.
    with bar, workers() as pool, _full_precision(on_gpu):
        for first in range(0, len(right), width):
            last = min(first + width, len(right))
            columns = right.right(slice(first, last))
            for begin in range(first if symmetric else 0, len(left), height):
                rows = left.left(slice(begin, min(begin + height, len(left))))
                if on_gpu:
                    best.update_on_device(begin, rows, columns, first, keys)
                    bar.update(rows.shape[0] * columns.shape[1])
                    continue
                inside = symmetric and begin < last
                offset = begin if inside else first
                scores = buffer[: len(rows) * (last - offset)].reshape(len(rows), last - offset)
                _multiply(pool, rows, columns[:, offset - first :], scores, on_gpu)
                best.update(pool, begin, scores, offset, keys)
                bar.update(scores.size)
                if symmetric:
                    after = scores[:, len(rows) :] if inside else scores
                    best.update(pool, begin + len(rows) if inside else first, after.T, begin, keys)
                    bar.update(after.size)
    return best.indices, best.similarities


class _Best:
    """The k best items seen so far, for each of `count` queries."""

    def __init__(self, count: int, k: int) -> None:
        self.k = k
        self.similarities = np.full((count, k), -np.inf, np.float32)
        self.indices = np.full((count, k), -1, np.int64)

    def update(
        self,
        pool: concurrent.futures.Executor,
        first: int,
        scores: np.ndarray,
        offset: int,
        keys: tuple[np.ndarray, np.ndarray] | None,
    ) -> None:
        """Merges scores `(rows, columns)` of the queries from `first` on with the items from `offset` on."""
        if not scores.size:
            return
        parts = np.array_split(np.arange(scores.shape[0]), min(threads(), max(1, scores.shape[0] // 64)))
        list(pool.map(lambda part: self._update(first, scores, offset, keys, part[0], part[-1] + 1), parts))

    def update_on_device(
        self,
        first: int,
        rows: np.ndarray,
        columns: np.ndarray,
        offset: int,
        keys: tuple[np.ndarray, np.ndarray] | None,
    ) -> None:
        """Like `update`, with the scores `rows @ columns`. Uses TensorFlow only, so that it runs on the GPU."""
        stop = first + len(rows)
        scores = tf.matmul(rows, columns)
        if keys is not None:
            own = keys[0][first:stop, None] == keys[1][None, offset : offset + columns.shape[1]]
            scores = tf.where(own, -np.inf, scores)
        values, found = tf.math.top_k(scores, min(self.k, columns.shape[1]))
        # The items seen before come first: they have the lower positions and win ties.
        values = tf.concat([self.similarities[first:stop], values], axis=1)
        indices = tf.concat([self.indices[first:stop], tf.cast(found, tf.int64) + offset], axis=1)
        values, chosen = tf.math.top_k(values, self.k)
        indices = tf.gather(indices, chosen, batch_dims=1).numpy()
        self.similarities[first:stop] = values.numpy()
        self.indices[first:stop] = np.where(np.isneginf(self.similarities[first:stop]), -1, indices)

    def _update(self, first, scores, offset, keys, start, stop):
        height, width = stop - start, scores.shape[1]
        grouped, rest = _grouped(scores[start:stop])
        groups = grouped.shape[2]
        thresholds = self.similarities[first + start : first + stop, -1]
        own = _most_own(keys, first + start, first + stop, offset, width)
        new = np.isneginf(thresholds)
        if 4 * (self.k + own) >= (groups if new.any() else width):
            self._take_best(first + start, scores[start:stop], offset, keys, own)
            return
        maxima = grouped.max(axis=1)
        if new.any():
            # Each of the best groups has an item at least as good as the lowest of their maxima.
            lowest = np.partition(maxima[new], groups - self.k - own, axis=1)[:, groups - self.k - own]
            thresholds = thresholds.copy()
            thresholds[new] = np.nextafter(lowest, np.float32(-np.inf))
        rows, group = np.nonzero(maxima > thresholds[:, None])
        most = 8 * (self.k + own) * height
        values: Any = grouped[rows, :, group] if len(rows) <= most else None
        above: Any = values > thresholds[rows, None] if len(rows) <= most else None
        above_rest = rest > thresholds[:, None]
        if above is None or np.count_nonzero(above) + np.count_nonzero(above_rest) > most:
            self._take_best(first + start, scores[start:stop], offset, keys, own)
            return
        hit, member = np.nonzero(above)
        last_rows, last_columns = np.nonzero(above_rest)
        columns = np.concatenate([member * groups + group[hit], last_columns + groups * _GROUP])
        values = np.concatenate([values[hit, member], rest[last_rows, last_columns]])
        rows = np.concatenate([rows[hit], last_rows])
        if keys is not None:
            others = keys[0][first + start + rows] != keys[1][offset + columns]
            rows, columns, values = rows[others], columns[others], values[others]
        if len(rows):
            order = np.argsort(rows * width + columns)
            self._merge_lists(first + start, rows[order], columns[order] + offset, values[order])

    def _take_best(self, first, scores, offset, keys, own):
        """Merges the best of whole rows, without looking at groups."""
        with tf.device("CPU"):
            values, columns = tf.math.top_k(np.ascontiguousarray(scores), min(self.k + own, scores.shape[1]))
        values, columns = values.numpy(), columns.numpy().astype(np.int64)
        queries = np.arange(first, first + len(scores))
        if own:
            values[keys[0][queries, None] == keys[1][offset + columns]] = -np.inf
        self._merge(queries, values, columns + offset)

    def _merge_lists(self, first, rows, indices, values):
        """Merges single items, sorted by row and then by index."""
        changed, counts = np.unique(rows, return_counts=True)
        place = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        line = np.repeat(np.arange(len(changed)), counts)
        # Merge rows of similar length together, as all are padded to the longest.
        for low, high in ((0, self.k), (self.k, 16 * self.k), (16 * self.k, np.inf)):
            some = (counts > low) & (counts <= high)
            if not some.any():
                continue
            of_items = some[line]
            lines = (np.cumsum(some) - 1)[line[of_items]]
            new_values = np.full((int(some.sum()), int(counts[some].max())), -np.inf, np.float32)
            new_indices = np.full(new_values.shape, -1, np.int64)
            new_values[lines, place[of_items]] = values[of_items]
            new_indices[lines, place[of_items]] = indices[of_items]
            self._merge(first + changed[some], new_values, new_indices)

    def _merge(self, queries, values, indices):
        values = np.concatenate([self.similarities[queries], values], axis=1)
        indices = np.concatenate([self.indices[queries], indices], axis=1)
        order = np.argsort(-values, axis=1, kind="stable")[:, : self.k]
        values = np.take_along_axis(values, order, axis=1)
        self.similarities[queries] = values
        self.indices[queries] = np.where(np.isneginf(values), -1, np.take_along_axis(indices, order, axis=1))


def _grouped(scores):
    """`(grouped, rest)`: views of the scores, `(rows, _GROUP, groups)`, and of the remaining columns, `(rows, fewer)`.

    The columns of a group are `groups` apart, so that the maximum over them is vectorized over the groups.
    """
    height, width = scores.shape
    groups = width // _GROUP
    head, rest = scores[:, : groups * _GROUP], scores[:, groups * _GROUP :]
    if scores.strides[1] == scores.itemsize:
        return head.reshape(height, _GROUP, groups), rest
    return head.T.reshape(_GROUP, groups, height).transpose(2, 0, 1), rest


def _most_own(keys, start, stop, offset, width):
    """The largest number of items in a gallery block that have the key of one query; 0 without keys."""
    if keys is None:
        return 0
    there, counts = np.unique(keys[1][offset : offset + width], return_counts=True)
    wanted = keys[0][start:stop]
    found = np.minimum(np.searchsorted(there, wanted), len(there) - 1)
    return int(np.max(counts[found] * (there[found] == wanted)))


def _block_width(memory_mib, dim):
    # A block of scores and its copies take about three times its bytes. A gallery column takes 28 bytes per dimension:
    # as read, in float64, normalised and transposed. So 12 width^2 / _FLATTER + 28 dim width must fit into the memory.
    columns, square = 28.0 * dim, 12.0 / _FLATTER
    width = int((np.sqrt(columns**2 + 4 * square * memory_mib * 2**20) - columns) / (2 * square))
    return int(np.clip(width - width % _GROUP, 2 * _GROUP, _WIDTH))


def _full_precision(on_gpu):
    return full_float32() if on_gpu else contextlib.nullcontext()
