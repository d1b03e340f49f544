"""Runs an exported encoder: encoded images in, embeddings out."""

import glob
import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import tensorflow as tf

from s2sd_tf.data.annotations import path_under
from s2sd_tf.data.decoding import why_not_decoded
from s2sd_tf.data.preprocessing import decode_rgb
from s2sd_tf.export.encoder import load_encoder
from s2sd_tf.files import local_path, sha256
from s2sd_tf.untrusted import image_excess


class Encoder:
    """Embeds batches of images, some of which may be damaged, with a SavedModel that `export_encoder` wrote.

    Args:
        path: folder of the SavedModel.
        dim: dimension of the embeddings, one of `dims`; None: the whole one.

    Attributes:
        dim: dimension of the embeddings.
        dims: the dimensions that the model was trained for (`nested_dims`), ascending; the last is the whole one.

    Raises:
        FileNotFoundError: `path` is not a SavedModel.
        ValueError: the SavedModel is no encoder, is damaged, or `load_saved_model` refuses it; `dim` is not in `dims`.
    """

    def __init__(self, path: str | os.PathLike, dim: int | None = None) -> None:
        self.path = local_path("path", path)
        loaded = load_encoder(self.path, dim)
        self.dim, self.dims = loaded.dim, loaded.dims
        # Kept, because its functions stop working when the model is deleted.
        self._model = loaded.model
        self._encode = loaded.signatures["encoded_images"]

    def __call__(self, encoded: Sequence[bytes]) -> np.ndarray:
        """Embeds n encoded images; returns float32 `(n, dim)`, also for n = 0.

        Raises:
            ValueError: `encoded` is something else.
            tf.errors.OpError: an image cannot be decoded.
        """
        return self._encode(encoded_images=tf.constant(_checked(encoded), tf.string))["embedding"].numpy()

    def embed(self, encoded: Sequence[bytes]) -> tuple[np.ndarray, dict[int, str]]:
        """Embeds n encoded images, some of which may be damaged.

        Images of more than 64 MiB or 89 million pixels are not decoded.

        Returns:
            `(embeddings, errors)`: float32 `(n, dim)`, and the reason of each failure by position. The embedding of an
            image that cannot be decoded is NaN.

        Raises:
            ValueError: `encoded` is something else.
            tf.errors.OpError: something other than an image fails, such as a device.
        """
        encoded = _checked(encoded)
        rows = np.full((len(encoded), self.dim), np.nan, np.float32)
        errors = {position: reason for position, image in enumerate(encoded) if (reason := why_refused(image))}
        there = [position for position in range(len(encoded)) if position not in errors]
        if not there:
            return rows, errors
        found = run_each(lambda images: {"embedding": self(images)}, [encoded[position] for position in there])
        for position, result in zip(there, found):
            if isinstance(result, ValueError):
                errors[position] = str(result)
            else:
                rows[position] = result["embedding"]
        for row in np.flatnonzero(~np.isfinite(rows).all(axis=1)):
            errors.setdefault(int(row), "its embedding is not finite")
        return rows, errors

    def fingerprint(self) -> str:
        """Returns the SHA-256 of the SavedModel's graph and weights."""
        variables = sorted(glob.glob(os.path.join(glob.escape(self.path), "variables", "*")))
        return sha256(os.path.join(self.path, "saved_model.pb"), *variables)


def why_refused(image: bytes) -> str | None:
    """Why an encoded image is not decoded at all: it is empty, or too large by its header; None if it is."""
    return image_excess(image) if image else "empty"


def run_each(
    run: Callable[[list[bytes]], dict[str, np.ndarray]], images: list[bytes]
) -> list[dict[str, np.ndarray] | ValueError]:
    """Runs a function of a batch of encoded images, so that one that cannot be decoded fails alone.

    Args:
        run: maps n images to arrays `(n, ...)` by name.
        images: the images.

    Returns:
        For each image its rows of the arrays by name, or a ValueError with the reason why it cannot be decoded.
    """
    try:
        outputs = run(images)
        return [{name: rows[position] for name, rows in outputs.items()} for position in range(len(images))]
    except tf.errors.InvalidArgumentError as error:
        if len(images) == 1:
            return [ValueError(why_not_decoded(images[0], error))]
    except tf.errors.CancelledError:
        # Where an image of a batch fails, the others are cancelled, and the error of one of them may come first.
        if len(images) == 1:
            raise
    # The error does not say which image failed.
    return [run_each(run, [image])[0] for image in images]


def _checked(encoded):
    """Returns the encoded images as a list of bytes."""
    wanted = "encoded: expected a list of bytes, each an encoded image"
    if isinstance(encoded, (bytes, str)) or not hasattr(encoded, "__len__") or isinstance(encoded, Mapping):
        raise ValueError(f"{wanted}. Received: {type(encoded).__name__}")
    if hasattr(encoded, "numpy"):
        encoded = encoded.numpy()
    for position, image in enumerate(encoded):
        if not isinstance(image, bytes):
            raise ValueError(f"{wanted}. Received: {type(image).__name__} at position {position}")
    return list(encoded)


def read_image(path: str | os.PathLike) -> np.ndarray | None:
    """Reads an image file as float RGB `(h, w, 3)` in [0, 1]; returns None if it cannot be read."""
    try:
        return None if image_excess(path) else decode_image(tf.io.read_file(path))
    except (OSError, tf.errors.OpError):
        return None


def read_image_under(root: str | os.PathLike, name: str) -> np.ndarray | None:
    """Reads the image file `name` under the folder `root` like `read_image`; returns None if the name leads out of it.

    Links in `root` are followed.
    """
    try:
        return read_image(path_under(root, name, "name"))
    except ValueError:
        return None


def decode_image(encoded: bytes | tf.Tensor) -> np.ndarray:
    """Decodes an image to upright float RGB `(h, w, 3)` in [0, 1]."""
    return decode_rgb(tf.convert_to_tensor(encoded)).numpy()
