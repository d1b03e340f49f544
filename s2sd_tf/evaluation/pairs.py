"""Counts of all pairs of a query and a gallery item, by similarity, block by block in bounded memory.

Arguments are not checked here; the callers have done that.
"""

import collections
import concurrent.futures
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from s2sd_tf.evaluation.rows import LabeledSets, mean_row, parts, scale_of, scaled, unit
from s2sd_tf.process_settings import threads, workers

# Up to this number of pairs all similarities are kept and sorted.
_SORTED = 2**22
# Otherwise they are rounded down to this number of levels, that is for "cosine" to multiples of 2^-20.
_STEPS = 2**21
# Similarities that differ by less, as a share of the largest, are equal: float64 rounds the same one differently in
# products of other shapes.
_NOISE = 2.0**-40
# Largest height and width of a block, and the bytes that it takes for each pair.
_SIDE, _BYTES = 1024, 48
# Blocks are computed by up to so many threads, while one counts them.
_THREADS = 8
# Pairs of nearly equal rows whose distances are computed at a time.
_NEAR = 4096


class PairCounts(NamedTuple):
    """The numbers of pairs of each similarity.

    Attributes:
        thresholds: the similarities that occur, descending, float64 `(t,)`.
        positives, negatives: the numbers of pairs of one class and of different classes that have that similarity, or
            one between it and the next higher threshold, int64 `(t,)`.
        resolution: the least difference of two thresholds; 0 if they are the similarities themselves.
    """

    thresholds: np.ndarray
    positives: np.ndarray
    negatives: np.ndarray
    resolution: float


class Pairs:
    """All pairs of a query and a gallery item with different keys; of queries among themselves each pair once.

    Args:
        sets: the sets.
        metric: "cosine" or "euclidean".
        memory_mib: MiB that blocks may take, in addition to counts of up to 2^21 similarities.
        progress: whether to show a progress bar.
    """

    def __init__(self, sets: LabeledSets, metric: str, memory_mib: int, progress: bool) -> None:
        positives, candidates = sets.counts()
        times = 2 if sets.alone else 1
        self.sets = sets
        self.metric = metric
        self.positives = int(positives.sum()) // times
        self.negatives = int((candidates - positives).sum()) // times
        self.classes, codes = np.unique(np.concatenate([sets.query_labels, sets.gallery_labels]), return_inverse=True)
        # int32, as comparing them is most of the work of finding the positives.
        codes = codes.astype(np.int32)
        self.query_classes, self.gallery_classes = codes[: len(sets.query_labels)], codes[len(sets.query_labels) :]
        self._threads = min(threads(), _THREADS)
        self._side = int(np.clip(np.sqrt(memory_mib * 2**20 / (_BYTES * (self._threads + 1))), 64, _SIDE))
        self._progress = progress
        self._sorted = self.positives + self.negatives <= _SORTED
        self._scale, self._low = 1.0, -1.0
        self._center: Any = None
        if metric == "euclidean":
            self._scale = scale_of(sets.queries, *(() if sets.alone else (sets.gallery,)))
            self._center = self._scale * mean_row(sets.gallery)
            # At least the longest distance, by the rows farthest from the mean; a power of two makes levels exact.
            radius = self._radius(sets.gallery)
            radii = [radius, radius if sets.alone else self._radius(sets.queries)]
            self._low = -float(np.exp2(np.ceil(np.log2(max(1e-30, sum(radii))))))
        self._step = (2.0 if metric == "cosine" else 1.0) * abs(self._low) / _STEPS

    def counts(self) -> PairCounts:
        """Counts the pairs of every similarity."""
        thresholds: np.ndarray
        if self._sorted:
            similarities, same = [], []
            for _, _, scores, kinds in self._blocks():
                kept = kinds >= 0
                similarities.append(scores[kept])
                same.append(kinds[kept] == 1)
            values, inverse = np.unique(np.concatenate(similarities), return_inverse=True)
            positives = np.bincount(inverse[np.concatenate(same)], minlength=len(values))
            every = np.bincount(inverse, minlength=len(values))
            thresholds, resolution = values / self._scale, 0.0
        else:
            every, positives, left_out = (np.zeros(_STEPS + 1, np.int64) for _ in range(3))
            for _, _, levels, kinds in self._blocks(self._levels):
                # Not by bincount, which makes an array of all levels each time.
                np.add.at(every, levels.reshape(-1), 1)
                for kind, counts in ((1, positives), (-1, left_out)):
                    np.add.at(counts, levels[kinds == kind], 1)
            every -= left_out
            thresholds = (self._low + self._step * np.arange(len(every))) / self._scale
            resolution = self._step / self._scale
        there = np.flatnonzero(every)[::-1]
        negatives = every - positives
        return PairCounts(thresholds[there], positives[there], negatives[there], resolution)

    def counts_of_classes(self, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Counts the pairs of every class whose similarity reaches thresholds.

        Args:
            thresholds: some of those of `counts`, descending, float64 `(t,)`.

        Returns:
            `(positives, negatives)`, int64 `(classes, t)`. A negative pair counts for both of its classes.
        """
        ascending = thresholds[::-1] * self._scale
        size = len(ascending) + 2
        if self._sorted:

            def places(scores):
                return np.searchsorted(ascending, scores, "right")
        else:
            table = np.searchsorted(ascending, self._low + self._step * np.arange(_STEPS + 1), "right").astype(np.int16)

            def places(scores):
                return table[self._levels(scores)]

        positives, negatives = (np.zeros((len(self.classes), size), np.int64) for _ in range(2))
        for start, first, place, kinds in self._blocks(places):
            height, width = place.shape
            rows = self.query_classes[start : start + height]
            columns = self.gallery_classes[first : first + width]
            same = kinds == 1
            if same.any():
                of_pairs = np.broadcast_to(rows[:, None], same.shape)[same].astype(np.int64) * size + place[same]
                there, counts = np.unique(of_pairs, return_counts=True)
                positives.reshape(-1)[there] += counts
            # What is no negative goes into a last column that is not returned.
            place[kinds != 0] = size - 1
            for classes, lines in ((rows, np.arange(height)[:, None]), (columns, np.arange(width))):
                keys = place + size * lines
                found = np.bincount(keys.reshape(-1), minlength=size * len(classes)).reshape(-1, size)
                np.add.at(negatives, classes, found)
        return np.cumsum(positives[:, -2:0:-1], axis=1), np.cumsum(negatives[:, -2:0:-1], axis=1)

    def _levels(self, scores):
        """Rounds similarities, which are overwritten, down to levels, int64 of their shape."""
        # They are rounded down, so that a similarity reaches a threshold if its level does.
        scores -= self._low * (1.0 + _NOISE)
        scores *= 1.0 / self._step
        return scores.astype(np.int64)

    def _blocks(
        self, convert: Callable[[np.ndarray], np.ndarray] = lambda scores: scores
    ) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
        """Yields `(start, first, converted, kinds)`: the positions of the first query and gallery item; `convert` of
        the similarities, float64 `(rows, columns)`; and int8, 1 for a pair of one class, 0 of different ones, -1 to
        leave out.
        """
        sets, side = self.sets, self._side
        waiting: collections.deque[concurrent.futures.Future] = collections.deque()
        bar = tqdm(total=self.positives + self.negatives, desc="Comparing", unit="pair", unit_scale=True,
                   disable=not self._progress)  # fmt: skip
        # Threads of the matrix product itself would wait for each other at every block.
        with bar, workers(self._threads) as pool:
            for start in range(0, sets.queries.shape[0], side):
                for first in range(start if sets.alone else 0, sets.gallery.shape[0], side):
                    waiting.append(pool.submit(self._block, start, first, convert))
                    if len(waiting) > self._threads:
                        yield self._counted(bar, waiting.popleft().result())
            while waiting:
                yield self._counted(bar, waiting.popleft().result())

    def _block(self, start, first, convert):
        sets, side = self.sets, self._side
        here, there = slice(start, start + side), slice(first, first + side)
        rows, columns = self._prepared(sets.queries[here]), self._prepared(sets.gallery[there])
        kinds = (self.query_classes[here, None] == self.gallery_classes[there]).view(np.int8)
        if sets.keys is not None:
            kinds[sets.keys[0][here, None] == sets.keys[1][there]] = -1
        if sets.alone and first == start:
            kinds[np.tril_indices(len(rows))] = -1
        return start, first, convert(self._similarities(rows, columns)), kinds

    def _counted(self, bar, block):
        if self._progress:
            bar.update(int(np.count_nonzero(block[3] >= 0)))
        return block

    def _radius(self, rows):
        """The largest distance of a scaled row from the mean, and a little more."""
        distances = (np.linalg.norm(scaled(part, self._scale) - self._center, axis=1) for _, part in parts(rows))
        return 1.001 * max((float(found.max()) for found in distances), default=0.0)

    def _prepared(self, rows):
        if self.metric == "cosine":
            return unit(rows)
        return scaled(rows, self._scale) - (0.0 if self._sorted else self._center)

    def _similarities(self, rows, columns):
        if self.metric == "cosine":
            scores = rows @ columns.T
            return np.round(scores / _NOISE) * _NOISE if self._sorted else scores
        if self._sorted:
            from scipy.spatial.distance import cdist

            return -cdist(rows, columns)
        sums = np.sum(rows * rows, axis=1)[:, None] + np.sum(columns * columns, axis=1)
        squares = sums - 2.0 * (rows @ columns.T)
        # Small differences of large numbers; equal rows would not be at distance 0.
        near = np.nonzero(squares <= 1e-9 * sums)
        for start in range(0, len(near[0]), _NEAR):
            one, other = (positions[start : start + _NEAR] for positions in near)
            squares[one, other] = np.sum(np.square(rows[one] - columns[other]), axis=1)
        return -np.sqrt(np.maximum(squares, 0.0))
