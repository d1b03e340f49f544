"""An exported encoder, from encoded images to embeddings."""

import glob
import os

import numpy as np
import tensorflow as tf

from s2sd_tf.data.annotations import path_under
from s2sd_tf.data.preprocessing import decode_rgb
from s2sd_tf.export.saved_model import load_saved_model
from s2sd_tf.files import sha256
from s2sd_tf.untrusted import image_excess

_SIGNATURE = "encoded_images"


class Encoder:
    """The SavedModel of `export.export_encoder`, for images in batches that may hold broken ones.

    Args:
        path: folder of the SavedModel.

    Attributes:
        dim: int, dimension of the embeddings.

    Raises:
        FileNotFoundError: no SavedModel there.
        ValueError: one without the signature "encoded_images", broken, or refused by `load_saved_model`.
    """

    def __init__(self, path):
        self.path = os.fspath(path)
        # The functions need the model to stay.
        self._model = load_saved_model("encoder", self.path)
        if _SIGNATURE not in self._model.signatures:
            raise ValueError(
                f"encoder: expected a SavedModel of export_encoder, with the signature {_SIGNATURE!r}. Received: "
                f"{sorted(self._model.signatures)} in {self.path!r}"
            )
        self._encode = self._model.signatures[_SIGNATURE]
        self.dim = int(self._encode.structured_outputs["embedding"].shape[-1])

    def __call__(self, encoded):
        """float32 `(n, dim)` of n encoded images (bytes).

        Raises:
            tf.errors.OpError: one cannot be decoded.
        """
        return self._encode(encoded_images=tf.constant(encoded, tf.string))["embedding"].numpy()

    def embed(self, encoded):
        """`(embeddings, errors)` of n encoded images: float32 `(n, dim)`, NaN where one cannot be decoded, and a dict
        from its position to a str that says why. One of more than 64 MiB or 89 million pixels is not decoded.

        Raises:
            tf.errors.OpError: something fails that is not the image's fault, as a device.
        """
        rows = np.full((len(encoded), self.dim), np.nan, np.float32)
        errors = {
            position: reason
            for position, image in enumerate(encoded)
            if (reason := image_excess(image) if image else "empty")
        }
        there = [position for position in range(len(encoded)) if position not in errors]
        if not there:
            return rows, errors
        try:
            rows[there] = self([encoded[position] for position in there])
        except tf.errors.InvalidArgumentError:
            # Which one it is the error does not tell.
            for position in there:
                try:
                    rows[position] = self([encoded[position]])[0]
                except tf.errors.InvalidArgumentError as error:
                    errors[position] = first_line(error)
        for position in np.flatnonzero(~np.isfinite(rows).all(axis=1)):
            errors.setdefault(int(position), "its embedding is not finite")
        return rows, errors

    def fingerprint(self):
        """SHA-256 of the SavedModel's graph and weights, str."""
        variables = sorted(glob.glob(os.path.join(glob.escape(self.path), "variables", "*")))
        return sha256(os.path.join(self.path, "saved_model.pb"), *variables)


def read_image(path):
    """An image file as float RGB `(h, w, 3)` up to 1, or None where it cannot be read."""
    try:
        return None if image_excess(path) else decode_image(tf.io.read_file(path))
    except (OSError, tf.errors.OpError):
        return None


def read_image_under(root, name):
    """The image file `name` under the folder `root`, as `read_image`; None where the name leads out of it. Links in
    `root` are followed.
    """
    try:
        return read_image(path_under(root, name, "name"))
    except ValueError:
        return None


def decode_image(encoded):
    """An encoded image as float RGB `(h, w, 3)` up to 1."""
    return decode_rgb(encoded).numpy()


def first_line(error):
    """The first line of an error's text that says what is wrong, at most 200 characters."""
    lines = str(getattr(error, "message", error)).splitlines()
    # What graphs say of where in them it was.
    where = ("Graph execution error", "Detected at node", "<stack traces", "[[")
    told = [line.strip() for line in lines if line.strip() and not line.strip().startswith(where)]
    return (told or [type(error).__name__])[0][:200]
