"""A SavedModel of this package that a server runs: an encoder, or a retrieval."""

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from s2sd_tf.export.encoder import load_encoder
from s2sd_tf.export.retrieval import load_retrieval
from s2sd_tf.export.saved_model import signature_defs
from s2sd_tf.serving.encoder import run_each


class Signature(NamedTuple):
    """A function of a SavedModel. All have one input.

    Attributes:
        input: name of the input.
        dtype: its dtype: tf.string for encoded images `(batch,)`, else that of images or embeddings.
        run: computes any number of rows: an array or a list of bytes in, arrays with as many rows by name out.
        run_each: maps a list of encoded images to what each gives: the rows of the outputs by name, or a ValueError
            with the reason if it cannot be decoded. None if the input is no encoded images.
    """

    input: str
    dtype: tf.DType
    run: Callable[[Any], dict[str, np.ndarray]]
    run_each: Callable[[list[bytes]], list[dict[str, np.ndarray] | ValueError]] | None


class Servable:
    """Loads a SavedModel of `export_encoder` or `export_retrieval`.

    Args:
        path: folder of the SavedModel.

    Attributes:
        is_retrieval: whether it is one of `export_retrieval`.
        signatures: `Signature`s by name.
        signature_defs: TensorFlow's descriptions of the signatures by name, SignatureDef messages.

    Raises:
        FileNotFoundError: `path` is not a SavedModel.
        ValueError: the SavedModel is another, is damaged, or `load_saved_model` refuses it.
        ImportError: it is a retrieval and ScaNN's operations are missing.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.signature_defs = signature_defs("model", path)
        self.is_retrieval = "embeddings" in self.signature_defs
        # Kept, because its functions stop working when the model is deleted.
        self._model = load_retrieval(path) if self.is_retrieval else load_encoder(path).model
        self.signatures = {name: _signature(self._model.signatures[name]) for name in self.signature_defs}
        # The first call of a function takes longer.
        for signature in self.signatures.values():
            if signature.run_each:
                signature.run([])


def _signature(function):
    (spec,) = function.structured_input_signature[1].values()

    def run(values):
        # The dtype matters for no rows.
        return {name: rows.numpy() for name, rows in function(**{spec.name: tf.constant(values, spec.dtype)}).items()}

    encoded = spec.dtype == tf.string
    return Signature(spec.name, spec.dtype, run, functools.partial(run_each, run) if encoded else None)
