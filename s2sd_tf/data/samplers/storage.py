"""Embeddings of training images for the samplers that look at them, in bounded memory."""

import numpy as np

from s2sd_tf.data.samplers.base import ClassSampler


class EmbeddingStorage:
    """l2-normalised float32 embeddings of some of the training images.

    Args:
        max_mib: number > 0, the most that the embeddings may take, in MiB.
    """

    def __init__(self, max_mib=256.0):
        if not max_mib > 0:
            raise ValueError(f"max_mib: expected a number > 0. Received: {max_mib}")
        self.max_mib = max_mib
        self._buffer = np.empty((0, 0), np.float32)
        self._positions = None

    @property
    def is_filled(self):
        """Whether there are embeddings."""
        return self._positions is not None

    @property
    def positions(self):
        """int64 `(n,)`, ascending: which images the embeddings are of."""
        self._check_filled()
        return self._positions

    @property
    def embeddings(self):
        """float32 `(n, dim)`, rows of norm 1, in the order of `positions`."""
        self._check_filled()
        return self._buffer

    def capacity(self, dim):
        """The number of embeddings of dimension `dim` that fit."""
        return int(self.max_mib * 2**20 // (4 * dim))

    def refill(self, positions, dim, batches):
        """Replaces all that is stored; beside it, only one batch is held.

        Args:
            positions: int `(n,)`, ascending.
            dim: int >= 1.
            batches: iterable of float arrays `(batch, dim)`, n rows in all, in the order of `positions`.

        Raises:
            ValueError: more than fits, not n rows, or values that are not finite. Nothing is stored then.
        """
        self._positions = None
        shape = (len(positions), dim)
        if len(positions) > self.capacity(dim):
            raise ValueError(f"positions: expected at most {self.capacity(dim)} (max_mib). Received: {len(positions)}")
        if self._buffer.shape != shape:
            # Let go of before the new one is made, as both may not fit.
            self._buffer = None
            self._buffer = np.empty(shape, np.float32)
        filled = 0
        for batch in batches:
            batch = np.asarray(batch, np.float32)
            if batch.shape[1:] != (dim,) or filled + len(batch) > len(positions):
                raise ValueError(f"batches: expected {shape} in all. Received: {batch.shape} after {filled} rows")
            if not np.isfinite(batch).all():
                raise ValueError("embeddings: expected finite numbers. Received: NaN or infinity from the model")
            norms = np.linalg.norm(batch, axis=1, keepdims=True)
            np.divide(batch, np.maximum(norms, 1e-12), out=self._buffer[filled : filled + len(batch)])
            filled += len(batch)
        if filled != len(positions):
            raise ValueError(f"batches: expected {shape} in all. Received: {filled} rows")
        self._positions = np.asarray(positions, np.int64)

    def _check_filled(self):
        if not self.is_filled:
            raise RuntimeError(
                "storage: expected embeddings of the training images, and there are none yet. Add "
                "s2sd_tf.data.RefreshStorage(sampler, images, preprocessing) to the callbacks of `fit`; where batches "
                "are drawn without `fit`, or under a distribution strategy, call its `refresh(model)` first"
            )


class StorageSampler(ClassSampler):
    """A sampler of P x M batches that looks at stored embeddings.

    Args:
        classes_per_batch, samples_per_class, short_classes: see `ClassSampler`.
        max_mib: number > 0, the most that the stored embeddings may take, in MiB.
    """

    def __init__(self, classes_per_batch, samples_per_class, short_classes="raise", max_mib=256.0):
        super().__init__(classes_per_batch, samples_per_class, short_classes)
        self.storage = EmbeddingStorage(max_mib)

    def images_to_store(self, labels, dim, seed, epoch):
        """Which images the storage should hold in an epoch.

        All that a batch may hold; or, where not all fit, a random sample of them: first M images of every class, or of
        as many classes as fit, then any.

        Args:
            labels: integer array `(n,)`.
            dim: int >= 1, dimension of the embeddings.
            seed, epoch: int >= 0.

        Returns:
            int64, positions in `labels`, ascending.

        Raises:
            ValueError: labels that no batch can be drawn from, or a `max_mib` that does not hold one batch.
        """
        labels = np.asarray(labels)
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
        # The third number keeps these draws apart from those of the batches.
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

    def stored(self, labels):
        """`(positions, embeddings)` of the storage, after a check that batches of `labels` can be made of it."""
        positions = self.storage.positions
        if positions[-1] >= len(labels):
            raise ValueError(
                f"labels: expected those of the images whose embeddings are stored, more than {positions[-1]}. "
                f"Received: {len(labels)}"
            )
        self.check(labels[positions])
        return positions, self.storage.embeddings


def _rank_in_class(labels):
    """How many of the labels before each one are equal to it, `(n,)`."""
    order = np.argsort(labels, kind="stable")
    in_order = labels[order]
    ranks = np.empty(len(labels), np.int64)
    ranks[order] = np.arange(len(labels)) - np.searchsorted(in_order, in_order)
    return ranks
