"""A labelled set of images, wherever the pixels are, and its division by class or by image."""

import dataclasses
import fnmatch
import math
import os

import numpy as np

from s2sd_tf.checks import check_number, checked_int


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSet:
    """Images with integer labels.

    Attributes:
        images: uint8 `(n, height, width, channels)` pixels; or `(n,)` object array of `bytes`, encoded images; or
            `(n,)` array of `str`, paths of image files; or `(n,)` structured array as `image_slices` makes it, encoded
            images that are byte ranges of files.
        labels: int32 `(n,)`, positions in `class_names`.
        class_names: names of the classes.
        super_classes: the name of each class's super-class; empty where there are none.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple
    super_classes: tuple = ()

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
        if len(self.super_classes) not in (0, len(self.class_names)):
            raise ValueError(
                f"super_classes: expected none, or one for each of {len(self.class_names)} classes. "
                f"Received: {len(self.super_classes)}"
            )

    def __len__(self):
        return len(self.labels)

    @property
    def num_classes(self):
        """Number of classes."""
        return len(self.class_names)

    @property
    def kind(self):
        """Where the pixels are: "pixels", "bytes", "paths" or "slices"."""
        if self.images.dtype == np.uint8:
            return "pixels"
        if self.images.dtype.names:
            return "slices"
        return "bytes" if self.images.dtype == object else "paths"

    def encoded(self, position):
        """The encoded image at a position, as bytes; of any kind but "pixels".

        Raises:
            OSError: it cannot be read.
        """
        image = self.images[position]
        if self.kind == "paths":
            with open(image, "rb") as file:
                return file.read()
        return read_slice(*image.item()) if self.kind == "slices" else image

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
            self.images[chosen],
            new_labels[self.labels[chosen]],
            tuple(self.class_names[c] for c in classes),
            tuple(self.super_classes[c] for c in classes) if self.super_classes else (),
        )

    def select_images(self, positions):
        """The images at some positions, in the order given; the classes stay, also those left without images."""
        positions = np.asarray(positions, np.int64)
        return dataclasses.replace(self, images=self.images[positions], labels=self.labels[positions])

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


def image_slices(paths, offsets, lengths):
    """`images` of an `ImageSet` that are byte ranges of files, as a structured array `(n,)`.

    Args:
        paths: n str, files; the same one may hold many images.
        offsets: n int >= 0, the position of each encoded image's first byte in its file.
        lengths: n int >= 1, bytes of each.

    Returns:
        Array of the fields "path" (str), "offset" and "length" (int64).
    """
    paths = np.asarray(paths, np.str_)
    slices = np.empty(len(paths), [("path", paths.dtype), ("offset", "<i8"), ("length", "<i8")])
    slices["path"], slices["offset"], slices["length"] = paths, offsets, lengths
    return slices


def read_slice(path, offset, length):
    """The bytes of a file from `offset` on.

    Raises:
        OSError: it cannot be read, or ends before.
    """
    # Neither a file object nor its buffer: it is called for every image of a batch.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        content = os.pread(descriptor, length, offset)
    finally:
        os.close(descriptor)
    if len(content) < length:
        raise OSError(f"{os.fsdecode(path)}: expected {length} bytes from {offset} on. Received: {len(content)}")
    return content


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
        check_number("test_fraction", test_fraction, "a number in (0, 1)")
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
    if checked_int("hold_out_classes", count, 0) < 2 or images.num_classes - count < 2:
        raise ValueError(
            "hold_out_classes: expected at least 2 classes held out and 2 left. "
            f"Received: count={count} of {images.num_classes} classes"
        )
    held_out = np.sort(np.random.default_rng(seed).choice(images.num_classes, count, replace=False))
    rest = np.setdiff1d(np.arange(images.num_classes), held_out)
    return images.select_classes(rest), images.select_classes(held_out)


def split_samples(images, fraction, seed=0):
    """`(train, rest)`: divides the images of every class by chance, for data with too few classes, or too few images in
    them, to hold out classes. Both parts have all classes of `images`, under the same labels.

    Args:
        images: `ImageSet`.
        fraction: float in (0, 1), the share of each class's images that goes to `rest`, rounded. A class of at least 2
            images has at least 1 in both parts; a single image goes to `train`.
        seed: int >= 0.

    Raises:
        ValueError: a bad argument, or no class with 2 images.
    """
    check_number("fraction", fraction, "a number in (0, 1)")
    if not 0 < fraction < 1:
        raise ValueError(f"fraction: expected a number in (0, 1). Received: {fraction}")
    rng = np.random.default_rng(checked_int("seed", seed, 0))
    counts = images.class_counts()
    if not (counts >= 2).any():
        raise ValueError("images: expected a class of at least 2 images. Received: none")
    # By class, and within a class in an order by chance.
    shuffled = np.lexsort((rng.random(len(images)), images.labels))
    rank = np.arange(len(images)) - np.repeat(np.cumsum(counts) - counts, counts)
    held_out = np.where(counts < 2, 0, np.clip(np.floor(counts * fraction + 0.5), 1, counts - 1))
    trains = rank >= np.repeat(held_out, counts)
    return images.select_images(np.sort(shuffled[trains])), images.select_images(np.sort(shuffled[~trains]))
