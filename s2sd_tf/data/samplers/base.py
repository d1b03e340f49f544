"""Base classes and registry of the samplers, argument checks, and draws without repeats."""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from s2sd_tf.checks import checked_int
from s2sd_tf.registry import Registry

SHORT_CLASSES = ("raise", "repeat", "skip")


def checked_labels(labels: np.ndarray) -> np.ndarray:
    """Returns the labels as int64 `(n,)`.

    Raises:
        ValueError: the labels are not a one-dimensional array of integers >= 0.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or not (np.issubdtype(labels.dtype, np.integer) or not len(labels)):
        raise ValueError(f"labels: expected integers (n,). Received: {labels.dtype} {labels.shape}")
    if len(labels) and labels.min() < 0:
        raise ValueError(f"labels: expected integers >= 0. Received: {labels.min()}")
    return labels.astype(np.int64, copy=False)


class Sampler:
    """Chooses the images of every batch of an epoch.

    A subclass implements `draw`, and `check` if it cannot draw from all labels. The batches depend only on the
    arguments of `epoch` and on the stored embeddings, if there are any. So the same seed, epoch and model give the same
    batches.

    Attributes:
        batch_size: the number of images in a batch.
        storage: `EmbeddingStorage` to keep up to date (see `s2sd_tf.data.RefreshStorage`), or None.
    """

    batch_size: int
    storage: Any = None

    def epoch(self, labels: np.ndarray, steps: int, seed: int, epoch: int) -> np.ndarray:
        """Draws the batches of one epoch.

        Args:
            labels: integer array `(n,)`, each >= 0: the classes of the images.
            steps: int >= 1, the number of batches.
            seed, epoch: int >= 0.

        Returns:
            int64 `(steps, batch_size)`, positions in `labels`.

        Raises:
            ValueError: a bad argument, or labels that no batch can be drawn from; the message names the setting.
            RuntimeError: the storage is empty.
        """
        steps = checked_int("steps", steps, 1)
        seed, epoch = checked_int("seed", seed, 0), checked_int("epoch", epoch, 0)
        labels = checked_labels(labels)
        self.check(labels)
        return self.draw(labels, steps, np.random.default_rng([seed, epoch])).astype(np.int64, copy=False)

    def check(self, labels: np.ndarray) -> None:
        """Raises `ValueError` if no batch can be drawn from `labels`, int64 `(n,)`, each >= 0."""

    def draw(self, labels: np.ndarray, steps: int, generator: np.random.Generator) -> np.ndarray:
        """Draws what `epoch` returns. The arguments are already checked."""
        raise NotImplementedError


class ClassSampler(Sampler):
    """A sampler of batches of P classes x M images. The images of a class are next to each other.

    Args:
        classes_per_batch, samples_per_class: P and M, int >= 1.
        short_classes: what to do with classes of fewer than M images: "raise" refuses them, "repeat" repeats images
            once all images of the class are in the batch, "skip" leaves the class out.
    """

    def __init__(self, classes_per_batch: int, samples_per_class: int, short_classes: str = "raise") -> None:
        self.classes_per_batch = checked_int("classes_per_batch", classes_per_batch, 1)
        self.samples_per_class = checked_int("samples_per_class", samples_per_class, 1)
        if short_classes not in SHORT_CLASSES:
            raise ValueError(f"short_classes: expected one of {list(SHORT_CLASSES)}. Received: {short_classes!r}")
        self.short_classes = short_classes

    @property
    def batch_size(self) -> int:  # type: ignore[override]
        """The number of images in a batch, P * M."""
        return self.classes_per_batch * self.samples_per_class

    def check(self, labels: np.ndarray) -> None:
        present = np.unique(labels)
        usable = self.usable_classes(labels)
        if self.short_classes == "raise" and len(usable) < len(present):
            short = np.setdiff1d(present, usable)
            counts = np.bincount(labels)
            raise ValueError(
                f"samples_per_class: expected at least {self.samples_per_class} images in every class, or "
                "short_classes='repeat' or 'skip'. Received: "
                + ", ".join(f"class {c} with {counts[c]}" for c in short[:10])
                + (f" and {len(short) - 10} more classes" if len(short) > 10 else "")
            )
        if len(usable) < self.classes_per_batch:
            raise ValueError(
                f"classes_per_batch: expected at most {len(usable)} classes. Received: {self.classes_per_batch}"
            )

    def usable_classes(self, labels: np.ndarray) -> np.ndarray:
        """The classes that a batch may contain, ascending."""
        counts = np.bincount(labels)
        return np.flatnonzero(counts >= (1 if self.short_classes == "repeat" else self.samples_per_class))


class Queue:
    """Endless random draws from `items`, pass after pass: no item comes again before all items of the pass have come.

    Within one `take`, too, no item repeats before all are in it. So if a pass ends within a `take`, the items that it
    already has go to the end of the next pass.
    """

    def __init__(self, items: np.ndarray, generator: np.random.Generator) -> None:
        self._items = np.asarray(items)
        self._generator = generator
        self._waiting = generator.permutation(self._items)

    def take(self, count: int) -> np.ndarray:
        """Draws the next `count` items."""
        whole, count = divmod(count, len(self._items))
        if not whole:
            return self._take(count)
        return np.concatenate([self._take(len(self._items)) for _ in range(whole)] + [self._take(count)])

    def _take(self, count):
        if len(self._waiting) < count:
            # The rest of the pass comes first. The next pass begins with other items, so that none is taken twice.
            rest = self._waiting
            new = self._generator.permutation(self._items)
            again = np.isin(new, rest)
            self._waiting = np.concatenate([rest, new[~again], new[again]])
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        return taken


def images_by_class(labels: np.ndarray) -> list[np.ndarray]:
    """The positions of the images of class 0, 1, ..., each int64 and ascending."""
    return np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels))[:-1])


_SamplerClass = TypeVar("_SamplerClass", bound=type[Sampler])
_registry = Registry("sampler", Sampler)
names = _registry.names
lookup = _registry.lookup
settings = _registry.settings


def register(name: str) -> Callable[[_SamplerClass], _SamplerClass]:
    """Class decorator that registers a sampler under `name`."""

    def add(cls: _SamplerClass) -> _SamplerClass:
        _registry.add(name, cls)
        return cls

    return add


def get(identifier: str | Sampler, **settings: Any) -> Sampler:
    """Makes a sampler from its registered name and settings; an instance is returned as it is.

    Example:
        >>> s2sd_tf.data.samplers.get("class_balanced", classes_per_batch=56, samples_per_class=2, class_power=0.5)

    Raises:
        ValueError: an unknown name or setting, or settings with an instance.
    """
    return _registry.get(identifier, **settings)
