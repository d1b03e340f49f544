"""A data set divided for retrieval."""

from typing import NamedTuple

import numpy as np
from absl import logging

from s2sd_tf.data.image_files import select_readable
from s2sd_tf.data.image_set import ImageSet


class RetrievalSplit(NamedTuple):
    """The parts of a data set: classes to train on, and others to retrieve.

    Attributes:
        train: `ImageSet` to train on.
        test: `ImageSet` of other classes; each image is searched among the others, or, where there is a gallery, is a
            query in it.
        gallery: `ImageSet` that is searched, with the classes and labels of `test`; or None.
    """

    train: ImageSet
    test: ImageSet
    gallery: ImageSet | None = None

    def parts(self):
        """The parts that there are, as a dict from their name."""
        return {name: images for name, images in self._asdict().items() if images is not None}

    def counts(self):
        """Dict from a part's name to `(images, classes that have images)`."""
        return {
            name: (len(images), int(np.count_nonzero(images.class_counts()))) for name, images in self.parts().items()
        }


def readable_split(split, root, on_corrupt, check, bad=()):
    """`split` without the files that cannot be read and without the classes that are left with none.

    Args:
        split: `RetrievalSplit` of paths.
        root, on_corrupt, check, bad: see `select_readable`.

    Raises:
        ValueError: with "raise", files that cannot be read; no image left for a part; a class that trains and tests.
    """
    parts = split.parts()
    parts = dict(zip(parts, select_readable(list(parts.values()), root, on_corrupt, check, bad)))
    for name, images in parts.items():
        if not len(images):
            raise ValueError(f"root: expected images to be the part {name!r} under it. Received: none in {root!r}")
    tested = parts["test"].class_counts() + (parts["gallery"].class_counts() if "gallery" in parts else 0)
    parts = {
        name: images.select_classes(np.flatnonzero(images.class_counts() if name == "train" else tested))
        for name, images in parts.items()
    }
    both = sorted(set(parts["train"].class_names) & set(parts["test"].class_names))
    if both:
        raise ValueError(
            f"root: expected classes that either train or test. Received: {len(both)} that do both in {root!r}, "
            f"{both[:5]}"
        )
    return RetrievalSplit(**parts)


def tell_unpublished_counts(name, expected, split):
    """Logs where a split has other counts than the published one: as a warning, or as an information where it has less
    than half of the images, and so is but a part.

    Args:
        name: the data set's, for the message.
        expected: dict from a part's name to the published `(images, classes)`.
        split: `RetrievalSplit`.
    """
    found = split.counts()
    if found == expected:
        return
    total, published = (sum(images for images, _ in counts.values()) for counts in (found, expected))
    tell = logging.warning if 2 * total >= published else logging.info
    tell("%s: expected the published split, %s. Received: %s", name, _as_text(expected), _as_text(found))


def _as_text(counts):
    return "; ".join(f"{part} {images:,} images of {classes:,} classes" for part, (images, classes) in counts.items())
