"""Exact search by blocked matrix products in float32, in bounded memory, also over galleries on disk.

Arguments are not checked here; the callers have done that.
"""

import concurrent.futures
import contextlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from s2sd_tf.evaluation.embeddings import Rows
from s2sd_tf.evaluation.neighbors import Neighbors, padded
from s2sd_tf.evaluation.rows import mean_row, normalized, take

# Extra candidates beyond the k nearest, whose Euclidean distances are recomputed in float64.
_MARGIN = 8
# Columns in a group. Single columns are examined only if the maximum of their group is among the best so far.
_GROUP = 32
# A block of similarities has at most _WIDTH columns and _FLATTER times fewer rows, so that it stays in the cache.
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

    Among equal similarities the lower position comes first. Euclidean distances are recomputed in float64.
    """
    left, right = _factors(queries, gallery, metric)
    if metric == "cosine":
        return Neighbors(*_search(left, right, k, keys, memory_mib, progress))
    # Take some more, as those near the end may change places.
    indices, _ = _search(left, right, min(k + _MARGIN, gallery.shape[0]), keys, memory_mib, progress)
    indices, similarities = _exact_distances(queries, gallery, indices)
    return padded(indices[:, :k], similarities[:, :k], k)


def positive_ranks(
    queries: Rows,
    gallery: Rows,
    query_labels: np.ndarray,
    gallery_labels: np.ndarray,
    metric: str = "cosine",
    keys: tuple[np.ndarray, np.ndarray] | None = None,
    memory_mib: int = 512,
    progress: bool = False,
) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    """Ranks the whole gallery for every query, and yields the ranks of its positives.

    Args:
        queries, gallery, metric, keys, memory_mib, progress: see `exact_neighbors`.
        query_labels, gallery_labels: int64 arrays `(queries,)` and `(gallery,)`. A positive is an item with the label
            of the query and another key.

    The ranks come from float32 products. Items may change places if their similarities differ by less than the
    rounding error: about 1e-7 for cosine, and 1e-7 times the squared distances from the mean row for Euclidean.

    Yields:
        `(queries, ranks)` for one block of queries at a time: their positions, int64 `(n,)`, and a list of n int64
        arrays, the ranks of their positives, ascending and counted from 1. Queries whose label is not in the gallery
        are skipped. Among equal similarities the lower position ranks first, as in `exact_neighbors`.
    """
    left, right = _factors(queries, gallery, metric)
    order = np.argsort(gallery_labels, kind="stable")
    ordered = gallery_labels[order]
    begin, end = np.searchsorted(ordered, query_labels, "left"), np.searchsorted(ordered, query_labels, "right")
    wanted = np.flatnonzero(end > begin)
    size = len(right)
    # Room for a product as wide as the gallery, twice, as it may be assembled from parts.
    height = max(1, min(1024, memory_mib * 2**20 // (8 * max(size, 1))))
    width = _block_width(memory_mib, right.width)
    whole = None
    if 4 * size * right.width <= memory_mib * 2**18:
        whole = np.empty((right.width, size), np.float32)
        for first in range(0, size, width):
            whole[:, first : first + width] = right.right(slice(first, min(first + width, size)))

    def one(query, row):
        positives = order[begin[query] : end[query]]
        if keys is not None:
            positives = positives[keys[1][positives] != keys[0][query]]
        if not len(positives):
            return np.empty(0, np.int64)
        found = row[positives]
        above = np.flatnonzero(row >= found.min())
        if keys is not None:
            above = above[keys[1][above] != keys[0][query]]
        values = row[above]
        ascending = np.sort(values)
        after = np.searchsorted(ascending, found, "right")
        ranks = len(ascending) - after + 1
        equal = after - np.searchsorted(ascending, found, "left")
        if (equal > 1).any():
            place = np.empty(len(above), np.int64)
            place[np.argsort(-values, kind="stable")] = np.arange(1, len(above) + 1)
            ranks = place[np.searchsorted(above, positives)]
        return np.sort(ranks)

    bar = tqdm(total=len(wanted), desc="Ranking", unit="query", disable=not progress)
    with bar, _workers() as pool, _full_precision(bool(tf.config.get_visible_devices("GPU"))):
        for start in range(0, len(wanted), height):
            chosen = wanted[start : start + height]
            # Read a slice if possible: usually nearly all queries are wanted, in order.
            begin_row, end_row = int(chosen[0]), int(chosen[-1]) + 1
            near = end_row - begin_row <= 2 * height
            rows = left.left(slice(begin_row, end_row))[chosen - begin_row] if near else left.left(chosen)
            if whole is not None:
                scores = np.asarray(tf.matmul(rows, whole))
            else:
                scores = np.empty((len(rows), size), np.float32)
                for first in range(0, size, width):
                    columns = right.right(slice(first, min(first + width, size)))
                    scores[:, first : first + width] = np.asarray(tf.matmul(rows, columns))
            yield chosen, list(pool.map(one, chosen, scores, chunksize=16))
            bar.update(len(chosen))


class _Factor:
    """One side of the product `left @ right.T` that computes the similarities of a metric.

    Cosine: the product of unit rows. Euclidean: minus the squared distance, as (2x, -|x|^2, 1) times (y, 1, -|y|^2).
    The gallery's mean is subtracted from both sides first, so that a distance is not a small difference of large
    numbers.

    Args:
        rows: float rows `(n, dim)`.
        metric: "cosine" or "euclidean".
        center: float64 `(dim,)` for "euclidean".
    """

    def __init__(self, rows: Rows, metric: str, center: np.ndarray | None = None) -> None:
        self.rows = rows
        self.metric = metric
        self.center: Any = center

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

    def _prepared(self, chosen):
        rows = np.asarray(self.rows[chosen])
        if self.metric == "cosine":
            return normalized(rows), None
        moved = rows.astype(np.float64) - self.center
        squares = np.sum(moved * moved, axis=1, keepdims=True)
        return moved.astype(np.float32), squares.astype(np.float32)


def _factors(queries, gallery, metric):
    """`(left, right)` factors of a search; the same object twice if the queries are the gallery."""
    center = mean_row(gallery) if metric == "euclidean" else None
    right = _Factor(gallery, metric, center)
    return (right if queries is gallery else _Factor(queries, metric, center)), right


def _search(left, right, k, keys=None, memory_mib=512, progress=False):
    """Finds the k nearest of every query: `(indices, similarities)`, int64 and float32 `(queries, k)`.

    If fewer than k are left, the rest is -1 and -inf. For the arguments see `exact_neighbors`.
    """
    best = _Best(len(left), k)
    width = _block_width(memory_mib, right.width)
    height = width // _FLATTER
    on_gpu = bool(tf.config.get_visible_devices("GPU"))
    symmetric = left is right and not on_gpu
    bar = tqdm(total=len(left) * len(right), desc="Searching", unit="pair", unit_scale=True, disable=not progress)
    # The gallery is read once, and the queries once for each block of it. If both are the same set, every product is
    # used in both directions. The columns before a block of queries were then merged earlier, from transposed products,
    # so that every query still sees the gallery in ascending order.
    with bar, _workers() as pool, _full_precision(on_gpu):
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
                scores = np.asarray(tf.matmul(rows, columns[:, offset - first :]))
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
        parts = np.array_split(np.arange(scores.shape[0]), min(_threads(), max(1, scores.shape[0] // 64)))
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


def _exact_distances(queries, gallery, indices, block=1024):
    """Recomputes the distances of neighbours one by one in float64, and sorts by them."""
    ordered = np.empty_like(indices)
    similarities = np.empty(indices.shape, np.float32)
    for start in range(0, len(indices), block):
        found = indices[start : start + block]
        rows = np.asarray(queries[start : start + block]).astype(np.float64)
        distances = np.full(found.shape, np.inf)
        for column in range(found.shape[1]):
            there = np.flatnonzero(found[:, column] >= 0)
            others = take(gallery, found[there, column]).astype(np.float64)
            distances[there, column] = np.linalg.norm(rows[there] - others, axis=1)
        # Equal distances: the lower position first. Missing neighbours are last.
        order = np.lexsort((np.where(found < 0, np.iinfo(np.int64).max, found), distances), axis=1)
        ordered[start : start + block] = np.take_along_axis(found, order, axis=1)
        similarities[start : start + block] = -np.take_along_axis(distances, order, axis=1)
    return ordered, similarities


def _block_width(memory_mib, dim):
    # A block of scores and its copies take about three times its bytes. A gallery column takes 28 bytes per dimension:
    # as read, in float64, normalised and transposed. So 12 width^2 / _FLATTER + 28 dim width must fit into the memory.
    columns, square = 28.0 * dim, 12.0 / _FLATTER
    width = int((np.sqrt(columns**2 + 4 * square * memory_mib * 2**20) - columns) / (2 * square))
    return int(np.clip(width - width % _GROUP, 2 * _GROUP, _WIDTH))


def _threads():
    return os.cpu_count() or 1


def _workers():
    return concurrent.futures.ThreadPoolExecutor(_threads())


@contextlib.contextmanager
def _full_precision(on_gpu):
    """Computes products in full float32 on a GPU too, where TensorFlow uses TensorFloat-32 by default."""
    if not on_gpu:
        yield
        return
    before = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    try:
        yield
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(before)
