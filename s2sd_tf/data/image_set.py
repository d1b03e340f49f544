"""A labelled set of images, wherever the pixels are, and its division by class."""

import dataclasses
import fnmatch
import math

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSet:
    """Images with integer labels.

    Attributes:
        images: uint8 `(n, height, width, channels)` pixels; or `(n,)` object array of `bytes`, encoded images; or
            `(n,)` array of `str`, paths of image files.
        labels: int32 `(n,)`, positions in `class_names`.
        class_names: names of the classes.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple

    def __post_init__(self):
        if len(self.images) != len(self.labels):
            raise ValueError(
                f"labels: expected one for each of {len(self.images)} images. Received: {len(self.labels)} labels"
            )
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < len(self.class_names):
            raise ValueError(
                f"labels: expected integers in [0, {len(self.class_names)}). "
                f"Received: {self.labels.min()} to {self.labels.max()}"
            )

    def __len__(self):
        return len(self.labels)

    @property
    def num_classes(self):
        """Number of classes."""
        return len(self.class_names)

    @property
    def kind(self):
        """Where the pixels are: "pixels", "bytes" or "paths"."""
        if self.images.dtype == np.uint8:
            return "pixels"
        return "bytes" if self.images.dtype == object else "paths"

    def class_counts(self):
        """Images of each class, int `(num_classes,)`."""
        return np.bincount(self.labels, minlength=self.num_classes)

    def select_classes(self, classes):
        """The images of some classes (positions in `class_names`), relabelled from 0 in the order given."""
        classes = np.asarray(classes, np.int64)
        new_labels = np.full(self.num_classes, -1, np.int32)
        new_labels[classes] = np.arange(len(classes))
        chosen = np.flatnonzero(new_labels[self.labels] >= 0)
        return ImageSet(
            self.images[chosen], new_labels[self.labels[chosen]], tuple(self.class_names[c] for c in classes)
        )

    def select_by_name(self, patterns):
        """The classes whose name equals one of `patterns` or matches it as a shell pattern (`Sanskrit/*`).

        Raises:
            ValueError: a pattern without a match; the message lists some of the names there are.
        """
        chosen = []
        for pattern in patterns:
            # An exact name goes first, as names may hold brackets.
            found = [c for c, name in enumerate(self.class_names) if name == pattern] or [
                c for c, name in enumerate(self.class_names) if fnmatch.fnmatchcase(name, pattern)
            ]
            if not found:
                some = ", ".join(self.class_names[:10])
                raise ValueError(f"classes: expected names or patterns of classes ({some}, ...). Received: {pattern!r}")
            chosen += [c for c in found if c not in chosen]
        return self.select_classes(sorted(chosen))


def split_classes(images, test_classes=None, test_fraction=None):
    """`(train, test)`: class-disjoint parts of an `ImageSet`.

    Args:
        images: `ImageSet`.
        test_classes: names or shell patterns of the classes to test on; the others train.
        test_fraction: float in (0, 1), the share of the classes to test on: the last ones, as the class order of the
            published retrieval protocols has it. Exactly one of the two is given.

    Raises:
        ValueError: both or none given, no class left for one part, or a name that no class has.
    """
    if (test_classes is None) == (test_fraction is None):
        raise ValueError(
            "split_classes: expected exactly one of test_classes and test_fraction. "
            f"Received: test_classes={test_classes!r}, test_fraction={test_fraction!r}"
        )
    if test_classes is not None:
        test = images.select_by_name(test_classes)
        names = set(test.class_names)
        train = images.select_classes([c for c, name in enumerate(images.class_names) if name not in names])
    else:
        if not 0 < test_fraction < 1:
            raise ValueError(f"test_fraction: expected a number in (0, 1). Received: {test_fraction}")
        first = images.num_classes - max(1, math.floor(images.num_classes * test_fraction + 0.5))
        train = images.select_classes(range(first))
        test = images.select_classes(range(first, images.num_classes))
    if not train.num_classes or not test.num_classes:
        raise ValueError(
            "split_classes: expected at least one class to train and one to test on. "
            f"Received: {train.num_classes} and {test.num_classes} of {images.num_classes}"
        )
    return train, test


def hold_out_classes(images, count, seed=0):
    """`(rest, held_out)`: holds out `count` classes drawn by `seed`, to choose a model on.

    Raises:
        ValueError: fewer than 2 held out (retrieval among one class is always right), or fewer than 2 left.
    """
    if count < 2 or images.num_classes - count < 2:
        raise ValueError(
            "hold_out_classes: expected at least 2 classes held out and 2 left. "
            f"Received: count={count} of {images.num_classes} classes"
        )
    held_out = np.sort(np.random.default_rng(seed).choice(images.num_classes, count, replace=False))
    rest = np.setdiff1d(np.arange(images.num_classes), held_out)
    return images.select_classes(rest), images.select_classes(held_out)
