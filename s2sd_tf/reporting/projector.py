"""Embeddings for TensorBoard's embedding projector."""

import os

import numpy as np
from PIL import Image

from s2sd_tf.evaluation.rows import checked_rows
from s2sd_tf.files import check_replaceable, replacing
from s2sd_tf.reporting.pictures import as_picture

# The largest side of a sprite that the projector shows, and of one of its images.
_SPRITE, _CELL = 8192, 64


def save_projector(folder, embeddings, labels=None, ids=None, image=None, name="embeddings"):
    """Writes a folder that `tensorboard --logdir=<folder>` shows in its projector.

    Args:
        folder: folder to write, whole or not at all.
        embeddings: float rows `(n, dim)`.
        labels, ids: n values each, shown beside the points, or None.
        image: function from a position to an array `(h, w)` or `(h, w, c)`, uint8 or float up to 1, shown as the point,
            or to None; or None. More than 16,384 images do not fit into the picture that the projector reads, which is
            left out then.
        name: str, of the tensor.

    Raises:
        ValueError: a folder that is there and is something else.
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
            # A single column has no head.
            head = [list(columns)] if len(columns) > 1 else []
            # File names may hold what is not UTF-8.
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
