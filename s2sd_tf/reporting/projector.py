"""Exports embeddings for TensorBoard's embedding projector."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from PIL import Image

from s2sd_tf.evaluation.embeddings import Rows
from s2sd_tf.evaluation.rows import checked_rows
from s2sd_tf.files import check_replaceable, replacing
from s2sd_tf.reporting.pictures import as_picture

# The projector shows sprites with sides of up to _SPRITE pixels. Each image in one is _CELL pixels wide and high.
_SPRITE, _CELL = 8192, 64


def save_projector(
    folder: str | os.PathLike,
    embeddings: Rows | tf.Tensor,
    labels: Sequence | np.ndarray | None = None,
    ids: Sequence | np.ndarray | None = None,
    image: Callable[[int], Any] | None = None,
    name: str = "embeddings",
) -> None:
    """Writes a folder that `tensorboard --logdir=<folder>` shows in its projector.

    Args:
        folder: folder to write, atomically.
        embeddings: float rows `(n, dim)`.
        labels, ids: n values each to show beside the points, or None.
        image: None, or a function from a position to the image to show as the point: an array `(h, w)` or `(h, w, c)`,
            uint8 or float in [0, 1], or None. More than 16,384 images do not fit into the projector's sprite, so none
            are shown then.
        name: name of the tensor.

    Raises:
        ValueError: `folder` exists and is neither empty nor a projector folder.
    """
    from google.protobuf import text_format
    from tensorboard.plugins.projector import ProjectorConfig

    check_replaceable("folder", folder, "projector_config.pbtxt")
    rows = np.asarray(checked_rows("embeddings", embeddings)[:], np.float32)
    columns = {key: values for key, values in (("label", labels), ("id", ids)) if values is not None}
    config = ProjectorConfig()
    tensor = config.embeddings.add(tensor_name=name, tensor_path="vectors.tsv")
    tensor.tensor_shape.extend(rows.shape)
    with replacing(folder) as temporary:
        os.makedirs(temporary)
        np.savetxt(os.path.join(temporary, "vectors.tsv"), rows, fmt="%.6g", delimiter="\t")
        if columns:
            tensor.metadata_path = "metadata.tsv"
            lines = [[_cell(value) for value in values] for values in zip(*columns.values())]
            # The projector expects no header for a single column.
            head = [list(columns)] if len(columns) > 1 else []
            # File names may contain bytes that are not UTF-8.
            with open(
                os.path.join(temporary, "metadata.tsv"), "w", encoding="utf-8", errors="backslashreplace"
            ) as file:
                file.writelines("\t".join(line) + "\n" for line in head + lines)
        side = int(np.ceil(np.sqrt(len(rows))))
        if image is not None and side * _CELL <= _SPRITE:
            tensor.sprite.image_path = "sprite.png"
            tensor.sprite.single_image_dim.extend([_CELL, _CELL])
            sprite = Image.new("RGB", (side * _CELL, side * _CELL), "white")
            for position in range(len(rows)):
                pixels = image(position)
                if pixels is None:
                    continue
                picture = as_picture(pixels).convert("RGB").resize((_CELL, _CELL))
                sprite.paste(picture, (position % side * _CELL, position // side * _CELL))
            sprite.save(os.path.join(temporary, "sprite.png"))
        with open(os.path.join(temporary, "projector_config.pbtxt"), "w") as file:
            file.write(text_format.MessageToString(config))


def _cell(value):
    return " ".join(str(value).split()) or "-"
