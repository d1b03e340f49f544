"""Embeddings of training images in bounded memory, for the samplers that use them."""

import threading
from collections.abc import Iterable
from typing import Any

import numpy as np

from s2sd_tf.checks import check_above, checked_int
from s2sd_tf.data.samplers.base import ClassSampler, checked_labels


class EmbeddingStorage:
    """l2-normalised float32 embeddings of some of the training images.

    Args:
        max_mib: number > 0, limit of the memory for embeddings in MiB.

    Attributes:
        lock: reentrant lock that `refill` holds. Hold it while reading, so that all values are from the same refill.
    """

    def __init__(self, max_mib: float = 256.0) -> None:
        check_above("max_mib", max_mib, 0)
        self.max_mib = max_mib
        self.lock = threading.RLock()
        self._buffer = np.empty((0, 0), np.float32)
        self._positions: Any = None
        self._epoch: Any = None

    @property
    def is_filled(self) -> bool:
        """Whether embeddings are stored."""
        return self._positions is not None

    @property
    def positions(self) -> np.ndarray:
        """Positions of the embedded images, int64 `(n,)`, ascending."""
        self._check_filled()
        return self._positions

    @property
    def embeddings(self) -> np.ndarray:
        """Embeddings in the order of `positions`, float32 `(n, dim)`; rows have norm 1, except rows of zeros."""
        self._check_filled()
        return self._buffer

    @property
    def epoch(self) -> int:
        """The epoch that the embeddings are for."""
        self._check_filled()
        return self._epoch

    def capacity(self, dim: int) -> int:
        """The number of embeddings of dimension `dim` that fit."""
        return int(self.max_mib * 2**20 // (4 * dim))

    def refill(self, positions: np.ndarray, dim: int, batches: Iterable[np.ndarray], epoch: int = 0) -> None:
        """Replaces all stored embeddings, with only one batch in memory besides them.

        Args:
            positions: int `(n,)`, ascending, n >= 1.
            dim: int >= 1.
            batches: float arrays `(batch, dim)`, n rows in total, in the order of `positions`. They are normalised
                here; rows of zeros stay zero.
            epoch: int >= 0, the epoch that the embeddings are for, which `training_batches` then draws.

        Raises:
            ValueError: bad arguments, more embeddings than fit, not n rows, or values that are not finite in float32.
                The storage is empty after this and any error of `batches`.
        """
        with self.lock:
            self._positions = None
            dim, epoch = checked_int("dim", dim, 1), checked_int("epoch", epoch, 0)
            positions = _checked_positions(positions, self.capacity(dim))
            self._fill((len(positions), dim), batches)
            self._positions, self._epoch = positions, epoch

    def _fill(self, shape, batches):
        if self._buffer.shape != shape:
            # Freed before the new one is made, because both may not fit into memory.
            self._buffer = np.empty((0, 0), np.float32)
            self._buffer = np.empty(shape, np.float32)
        filled = 0
        for batch in batches:
            batch = np.asarray(batch, np.float32)
            if batch.shape[1:] != shape[1:] or filled + len(batch) > shape[0]:
                raise ValueError(f"batches: expected {shape} in all. Received: {batch.shape} after {filled} rows")
            if not np.isfinite(batch).all():
                raise ValueError("embeddings: expected finite numbers. Received: NaN or infinity from the model")
            rows = self._buffer[filled : filled + len(batch)]
            # Divided by the largest number first, because the squares of huge or tiny numbers are infinite or 0.
            largest = np.abs(batch).max(axis=1, keepdims=True)
            np.divide(batch, np.where(largest > 0, largest, 1.0), out=rows)
            # The norms are at least 1 now, except for rows of zeros.
            rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1.0)
            filled += len(batch)
        if filled != shape[0]:
            raise ValueError(f"batches: expected {shape} in all. Received: {filled} rows")

    def _check_filled(self):
        if not self.is_filled:
            raise RuntimeError(
                "storage: expected embeddings of the training images. Received: none yet. Add "
                "s2sd_tf.data.RefreshStorage(sampler, images, preprocessing) to the callbacks of `fit`. Without `fit`, "
                "or under a distribution strategy, call its `refresh(model)` before drawing batches"
            )


def _checked_positions(positions, capacity):
    positions = np.asarray(positions)
    if positions.ndim != 1 or not len(positions):
        raise ValueError(f"positions: expected (n,), at least one. Received: {positions.shape}")
    whole = np.issubdtype(positions.dtype, np.integer)
    if not whole or positions[0] < 0 or (positions[1:] <= positions[:-1]).any():
        raise ValueError(f"positions: expected integers >= 0, ascending. Received: {positions.dtype} {positions}")
    if len(positions) > capacity:
        raise ValueError(f"positions: expected at most {capacity} (max_mib). Received: {len(positions)}")
    return positions.astype(np.int64)


class StorageSampler(ClassSampler):
    """A sampler of P x M batches that uses stored embeddings.

    Args:
        classes_per_batch, samples_per_class, short_classes: see `ClassSampler`.
        max_mib: number > 0, limit of the memory for stored embeddings in MiB.
    """

    storage: EmbeddingStorage

    def __init__(
        self,
        classes_per_batch: int,
        samples_per_class: int,
        short_classes: str = "raise",
        max_mib: float = 256.0,
    ) -> None:
        super().__init__(classes_per_batch, samples_per_class, short_classes)
        self.storage = EmbeddingStorage(max_mib)

    def epoch(self, labels: np.ndarray, steps: int, seed: int, epoch: int) -> np.ndarray:
        # Locked, so that nothing is drawn from a half refilled storage.
        with self.storage.lock:
            return super().epoch(labels, steps, seed, epoch)

    def images_to_store(self, labels: np.ndarray, dim: int, seed: int, epoch: int) -> np.ndarray:
        """Chooses the images whose embeddings the storage should have in an epoch.

        These are all images that a batch may contain. If they do not fit, they are a random sample: M images of every
        class, or of as many classes as fit, and then any others.

        Args:
            labels: integer array `(n,)`.
            dim: int >= 1, dimension of the embeddings.
            seed, epoch: int >= 0.

        Returns:
            int64, positions in `labels`, ascending.

        Raises:
            ValueError: a bad argument, labels that no batch can be drawn from, or a `max_mib` too small for one batch.
        """
        dim = checked_int("dim", dim, 1)
        seed, epoch = checked_int("seed", seed, 0), checked_int("epoch", epoch, 0)
        labels = checked_labels(labels)
        self.check(labels)
        usable = np.flatnonzero(np.isin(labels, self.usable_classes(labels)))
        capacity = self.storage.capacity(dim)
        if len(usable) <= capacity:
            return usable
        if capacity < self.batch_size:
            raise ValueError(
                f"max_mib: expected at least {4 * dim * self.batch_size / 2**20:.3g} MiB, for one batch of "
                f"{self.batch_size} embeddings of dimension {dim}. Received: {self.storage.max_mib}"
            )
        # The third number makes these draws independent of those of the batches.
        generator = np.random.default_rng([seed, epoch, 1])
        shuffled = generator.permutation(usable)
        is_first = _rank_in_class(labels[shuffled]) < self.samples_per_class
        first, others = shuffled[is_first], shuffled[~is_first]
        classes, counts = np.unique(labels[first], return_counts=True)
        order = generator.permutation(len(classes))
        kept = classes[order][np.cumsum(counts[order]) <= capacity]
        if len(kept) == len(classes):
            return np.sort(np.concatenate([first, others[: capacity - len(first)]]))
        return np.sort(first[np.isin(labels[first], kept)])

    def stored(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns `(positions, embeddings)` of the storage, after checking that they are enough for batches."""
        positions = self.storage.positions
        if positions[-1] >= len(labels):
            raise ValueError(
                f"labels: expected the labels of the images that are stored, more than {positions[-1]}. "
                f"Received: {len(labels)}"
            )
        self.check(labels[positions])
        return positions, self.storage.embeddings


def _rank_in_class(labels):
    """For each label, the number of equal labels before it, `(n,)`."""
    order = np.argsort(labels, kind="stable")
    in_order = labels[order]
    ranks = np.empty(len(labels), np.int64)
    ranks[order] = np.arange(len(labels)) - np.searchsorted(in_order, in_order)
    return ranks
