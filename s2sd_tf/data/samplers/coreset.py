"""Batches that cover the embedding space: coresets of random pools of images."""

import numpy as np

from s2sd_tf.checks import checked_int
from s2sd_tf.data.samplers.base import Queue, images_by_class, register
from s2sd_tf.data.samplers.storage import StorageSampler


class CoresetSampler(StorageSampler):
    """P anchors that cover a random pool of stored images, each with M - 1 other random images of its class.

    For every batch a pool of `pool_factor * P` images is drawn, evenly over the classes (one per class if there are
    enough classes). Then P anchors of different classes are taken from the pool, the first at random, the others by
    `pick`. With M = 1 classes are ignored: the pool has any images, and the batch is P of them. If the storage has
    only a sample of the images, the pool is drawn from it, and the other M - 1 images from all.

    Args:
        classes_per_batch, samples_per_class, short_classes, max_mib: see `StorageSampler`.
        pool_factor: int >= 1. With 1 the whole pool becomes anchors, and the embeddings do not matter.
    """

    def __init__(
        self,
        classes_per_batch: int,
        samples_per_class: int,
        short_classes: str = "raise",
        pool_factor: int = 8,
        max_mib: float = 256.0,
    ) -> None:
        super().__init__(classes_per_batch, samples_per_class, short_classes, max_mib)
        self.pool_factor = checked_int("pool_factor", pool_factor, 1)

    def pick(self, distances: np.ndarray, generator: np.random.Generator) -> int | np.integer:
        """Chooses the position of the next anchor.

        Args:
            distances: float `(pool,)`, squared distance of each image to the nearest anchor so far; -1 for images that
                cannot be taken. At least one can.
            generator: for random choices.
        """
        raise NotImplementedError

    def check(self, labels: np.ndarray) -> None:
        if self.samples_per_class > 1:
            super().check(labels)
        elif len(labels) < self.classes_per_batch:
            raise ValueError(
                f"classes_per_batch: expected at most {len(labels)}, the number of images, if samples_per_class is 1. "
                f"Received: {self.classes_per_batch}"
            )

    def draw(self, labels: np.ndarray, steps: int, generator: np.random.Generator) -> np.ndarray:
        positions, embeddings = self.stored(labels)
        stored_labels = labels[positions]
        if self.samples_per_class == 1:
            size = min(self.pool_factor * self.classes_per_batch, len(positions))
            groups = np.arange(len(positions))
            pools = (generator.choice(len(positions), size, replace=False) for _ in range(steps))
        else:
            groups = stored_labels
            pools = self._pools(stored_labels, steps, generator)
        anchors = np.stack([pool[self._anchors(embeddings[pool], groups[pool], generator)] for pool in pools])
        if self.samples_per_class == 1:
            return positions[anchors]
        members = images_by_class(labels)
        fill = [
            _with_others(positions[anchor], members[stored_labels[anchor]], self.samples_per_class, generator)
            for anchor in anchors.ravel()
        ]
        return np.reshape(fill, (steps, self.batch_size))

    def _pools(self, stored_labels, steps, generator):
        """Yields pools of positions in the storage, evenly over the classes as far as their sizes allow."""
        members = images_by_class(stored_labels)
        classes = self.usable_classes(stored_labels)
        every, some = divmod(self.pool_factor * self.classes_per_batch, len(classes))
        class_queue = Queue(classes, generator)
        queues = {c: Queue(members[c], generator) for c in classes}
        for _ in range(steps):
            counts = dict.fromkeys(classes, every) if every else {}
            for c in class_queue.take(some):
                counts[c] = every + 1
            yield np.concatenate([queues[c].take(min(count, len(members[c]))) for c, count in counts.items()])

    def _anchors(self, embeddings, groups, generator):
        """Chooses P positions in `embeddings` `(pool, dim)`, of different `groups` `(pool,)`."""
        chosen = np.empty(self.classes_per_batch, np.int64)
        chosen[0] = generator.integers(len(embeddings))
        distances = np.full(len(embeddings), np.inf, np.float32)
        for k in range(1, len(chosen)):
            last = chosen[k - 1]
            # For rows of norm 1. A row of zeros counts as orthogonal to all.
            np.minimum(distances, np.maximum(2.0 - 2.0 * (embeddings @ embeddings[last]), 0.0), out=distances)
            distances[groups == groups[last]] = -1.0
            chosen[k] = self.pick(distances, generator)
        return chosen


@register("greedy_coreset")
class GreedyCoreset(CoresetSampler):
    """Coreset batches by the greedy k-centre algorithm: the next anchor is the image farthest from all anchors so far.

    Sinha et al., "Small-GAN: Speeding up GAN training using core-sets", ICML 2020. For the rest and the arguments see
    `CoresetSampler`.
    """

    def pick(self, distances: np.ndarray, generator: np.random.Generator) -> int | np.integer:
        return np.argmax(distances)


@register("d2_coreset")
class D2Coreset(CoresetSampler):
    """Coreset batches by D^2 sampling: the next anchor is drawn in proportion to its squared distance to the nearest.

    Arthur & Vassilvitskii, "k-means++: The advantages of careful seeding", SODA 2007. Softer than `GreedyCoreset`,
    which prefers outliers. For the rest and the arguments see `CoresetSampler`.
    """

    def pick(self, distances: np.ndarray, generator: np.random.Generator) -> int | np.integer:
        weights = np.cumsum(np.maximum(distances, 0.0), dtype=np.float64)
        if not weights[-1] > 0:
            return generator.choice(np.flatnonzero(distances >= 0))
        # In (0, total], so that images without weight are never drawn.
        return np.searchsorted(weights, weights[-1] * (1.0 - generator.random()))


def _with_others(anchor, members, count, generator):
    """The anchor and random other members of its class, repeated if there are too few, `(count,)`.

    Args:
        anchor: one of `members`.
        members: int `(n,)`, ascending.
        count: int >= 1.
        generator: `numpy.random.Generator`.
    """
    # Positions among the members without the anchor. From the anchor's place on they are shifted by one.
    others = generator.choice(len(members) - 1, min(count, len(members)) - 1, replace=False)
    others += others >= np.searchsorted(members, anchor)
    return np.resize(np.concatenate([[anchor], members[others]]), count)
