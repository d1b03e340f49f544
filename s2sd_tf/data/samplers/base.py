"""The base classes of the samplers, the registry, checks of arguments, and draws without repeats."""

import numpy as np

from s2sd_tf.checks import checked_int
from s2sd_tf.registry import Registry

SHORT_CLASSES = ("raise", "repeat", "skip")


def checked_labels(labels):
    """Labels as int64 `(n,)`.

    Raises:
        ValueError: something else than integers >= 0.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or not (np.issubdtype(labels.dtype, np.integer) or not len(labels)):
        raise ValueError(f"labels: expected integers (n,). Received: {labels.dtype} {labels.shape}")
    if len(labels) and labels.min() < 0:
        raise ValueError(f"labels: expected integers >= 0. Received: {labels.min()}")
    return labels.astype(np.int64, copy=False)


class Sampler:
    """Chooses the images of every batch of an epoch.

    A subclass implements `draw(labels, steps, generator)`, and `check(labels)` where labels may not suit it. What is
    drawn is a function of the arguments of `epoch` alone, and of the stored embeddings where there are any: the same
    seed, epoch and model give the same batches.

    Attributes:
        batch_size: int, images of a batch.
        storage: `EmbeddingStorage` that has to be kept up to date (see `s2sd_tf.data.RefreshStorage`), or None.
    """

    storage = None

    def epoch(self, labels, steps, seed, epoch):
        """The batches of one epoch.

        Args:
            labels: integer array `(n,)`, each >= 0: the classes of the images.
            steps: int >= 1, batches of the epoch.
            seed, epoch: int >= 0.

        Returns:
            int64 `(steps, batch_size)`, positions in `labels`.

        Raises:
            ValueError: a bad argument, or labels that no batch can be drawn from; the message names the setting.
            RuntimeError: a storage that holds nothing.
        """
        steps = checked_int("steps", steps, 1)
        seed, epoch = checked_int("seed", seed, 0), checked_int("epoch", epoch, 0)
        labels = checked_labels(labels)
        self.check(labels)
        return self.draw(labels, steps, np.random.default_rng([seed, epoch])).astype(np.int64, copy=False)

    def check(self, labels):
        """Raises `ValueError` where no batch can be drawn from `labels`, int64 `(n,)`, each >= 0."""

    def draw(self, labels, steps, generator):
        """What `epoch` returns, from checked arguments and a `numpy.random.Generator`."""
        raise NotImplementedError


class ClassSampler(Sampler):
    """A sampler of batches of P classes x M images; the images of a class stand together.

    Args:
        classes_per_batch, samples_per_class: P and M, int >= 1.
        short_classes: what becomes of classes with fewer than M images: "raise" refuses them; "repeat" takes an image
            again once all of its class are in the batch; "skip" leaves the class out.
    """

    def __init__(self, classes_per_batch, samples_per_class, short_classes="raise"):
        self.classes_per_batch = checked_int("classes_per_batch", classes_per_batch, 1)
        self.samples_per_class = checked_int("samples_per_class", samples_per_class, 1)
        if short_classes not in SHORT_CLASSES:
            raise ValueError(f"short_classes: expected one of {list(SHORT_CLASSES)}. Received: {short_classes!r}")
        self.short_classes = short_classes

    @property
    def batch_size(self):
        """P * M."""
        return self.classes_per_batch * self.samples_per_class

    def check(self, labels):
        present = np.unique(labels)
        usable = self.usable_classes(labels)
        if self.short_classes == "raise" and len(usable) < len(present):
            short = np.setdiff1d(present, usable)
            counts = np.bincount(labels)
            raise ValueError(
                f"samples_per_class: expected at least {self.samples_per_class} images in every class, or "
                "short_classes='repeat' or 'skip'. Received: "
                + ", ".join(f"class {c} with {counts[c]}" for c in short[:10])
                + (f" and {len(short) - 10} classes more" if len(short) > 10 else "")
            )
        if len(usable) < self.classes_per_batch:
            raise ValueError(
                f"classes_per_batch: expected at most {len(usable)} classes. Received: {self.classes_per_batch}"
            )

    def usable_classes(self, labels):
        """Classes that a batch may hold, ascending."""
        counts = np.bincount(labels)
        return np.flatnonzero(counts >= (1 if self.short_classes == "repeat" else self.samples_per_class))


class Queue:
    """Endless draws from `items`: nothing a second time before all have come once, pass after pass.

    Within one `take` no item repeats before all are in it. So where a pass ends within a `take`, what the take already
    holds goes to the end of the next pass.
    """

    def __init__(self, items, generator):
        self._items = np.asarray(items)
        self._generator = generator
        self._waiting = generator.permutation(self._items)

    def take(self, count):
        """The next `count` items."""
        whole, count = divmod(count, len(self._items))
        if not whole:
            return self._take(count)
        return np.concatenate([self._take(len(self._items)) for _ in range(whole)] + [self._take(count)])

    def _take(self, count):
        if len(self._waiting) < count:
            # What is left over goes out first; the next pass begins with others, so that none is taken twice.
            rest = self._waiting
            new = self._generator.permutation(self._items)
            again = np.isin(new, rest)
            self._waiting = np.concatenate([rest, new[~again], new[again]])
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        return taken


def images_by_class(labels):
    """List of int64 arrays: the positions of the images of class 0, 1, ..., ascending."""
    return np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels))[:-1])


_registry = Registry("sampler", Sampler)
names = _registry.names
lookup = _registry.lookup
settings = _registry.settings


def register(name):
    """Class decorator: makes a sampler known by `name`."""
    return lambda cls: _registry.add(name, cls)


def get(identifier, **settings):
    """A sampler from its registered name and settings, or the sampler given.

    Example:
        >>> s2sd_tf.data.samplers.get("class_balanced", classes_per_batch=56, samples_per_class=2, class_power=0.5)

    Raises:
        ValueError: an unknown name or setting, or settings beside an instance.
    """
    return _registry.get(identifier, **settings)
