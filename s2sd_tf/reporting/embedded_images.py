"""Embeddings with what a report shows of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from s2sd_tf.evaluation.embeddings import Rows
from s2sd_tf.evaluation.rows import checked_labels, checked_rows


class EmbeddedImages(NamedTuple):
    """Embeddings of images, with the names, ids and pictures to show for them.

    Attributes:
        rows: float rows `(n, dim)`: an array, a memory-mapped file or `EmbeddingShards`.
        labels: int64 `(n,)`.
        names: class names by label, or None to show the labels themselves.
        ids: n ids, or None.
        image: function from a position to an array `(h, w)` or `(h, w, c)`, uint8 or float in [0, 1], or to None if it
            has no picture; or None for no pictures.
        super_classes: names of the super-classes by label, or None if there are none.
    """

    rows: Rows
    labels: np.ndarray
    names: Mapping[int, str] | Sequence[str] | None = None
    ids: Sequence[str] | None = None
    image: Callable[[int], Any] | None = None
    super_classes: Mapping[int, str] | None = None

    def name(self, label: int | np.integer) -> str:
        """The name of a class."""
        return str(int(label) if self.names is None else self.names[int(label)])

    def id(self, position: int) -> str:
        """The id of an image, or its position if there are no ids."""
        return f"position {position}" if self.ids is None else str(self.ids[position])


def checked_images(name: str, images: EmbeddedImages) -> EmbeddedImages:
    """Returns `EmbeddedImages` with checked rows, labels, names and ids.

    Args:
        name: argument name for the error messages.
        images: the images.

    Raises:
        ValueError: rows that `checked_rows` refuses, or labels, names or ids that do not fit them.
    """
    rows = checked_rows(f"{name}.rows", images.rows)
    labels = checked_labels(f"{name}.labels", images.labels, rows)
    if images.ids is not None and len(images.ids) != len(labels):
        raise ValueError(f"{name}.ids: expected one for each of {len(labels)} rows. Received: {len(images.ids)}")
    if images.names is not None:
        known = images.names if isinstance(images.names, Mapping) else range(len(images.names))
        missing = [label for label in np.unique(labels).tolist() if label not in known]
        if missing:
            raise ValueError(f"{name}.names: expected a name for every label. Received: none for {missing[:5]}")
    return images._replace(rows=rows, labels=labels)
