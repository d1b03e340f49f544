"""A data set divided into parts to train on and parts to test retrieval on."""

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from absl import logging

from s2sd_tf.data.image_files import select_readable
from s2sd_tf.data.image_set import ImageSet


class RetrievalSplit(NamedTuple):
    """The parts of a data set: classes to train on, and other classes to test retrieval on.

    Attributes:
        train: images to train on.
        test: images of other classes. Each one is a query, searched in the gallery or, without a gallery, among the
            other test images.
        gallery: images that are searched, with the classes and labels of `test`; or None.
    """

    train: ImageSet
    test: ImageSet
    gallery: ImageSet | None = None

    def parts(self) -> dict[str, ImageSet]:
        """The existing parts by name."""
        return {name: images for name, images in self._asdict().items() if images is not None}

    def counts(self) -> dict[str, tuple[int, int]]:
        """The number of images, and of classes that have images, by the name of the part."""
        return {
            name: (len(images), int(np.count_nonzero(images.class_counts()))) for name, images in self.parts().items()
        }


def readable_split(
    split: RetrievalSplit,
    root: str | os.PathLike,
    on_corrupt: str,
    check: str,
    bad: Sequence[tuple[str, str]] = (),
) -> RetrievalSplit:
    """Leaves out the files that cannot be read, and the classes without readable files.

    Args:
        split: `RetrievalSplit` of paths.
        root, on_corrupt, check, bad: see `select_readable`.

    Raises:
        ValueError: with "raise", files that cannot be read; a part without images; a class that both trains and tests.
    """
    parts = split.parts()
    parts = dict(zip(parts, select_readable(list(parts.values()), root, on_corrupt, check, bad)))
    for name, images in parts.items():
        if not len(images):
            raise ValueError(f"root: expected images for the part {name!r}. Received: none in {root!r}")
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


def report_unpublished_counts(name: str, expected: Mapping[str, tuple[int, int]], split: RetrievalSplit) -> None:
    """Logs a warning if the counts of a split differ from the published ones.

    With less than half of the published images, the data is assumed to be a subset, and the level is info.

    Args:
        name: name of the data set, for the message.
        expected: dict from a part's name to the published `(images, classes)`.
        split: the split to compare.
    """
    found = split.counts()
    if found == expected:
        return
    total, published = (sum(images for images, _ in counts.values()) for counts in (found, expected))
    log = logging.warning if 2 * total >= published else logging.info
    log("%s: expected the published split, %s. Received: %s", name, _as_text(expected), _as_text(found))


def _as_text(counts):
    return "; ".join(f"{part} {images:,} images of {classes:,} classes" for part, (images, classes) in counts.items())
