"""Exports the encoder as a SavedModel: images in, embeddings out."""

import os
from typing import Any

import tensorflow as tf

from s2sd_tf.files import check_replaceable, replacing
from s2sd_tf.keras_compat import keras, raw_variable


def export_encoder(model: keras.Model, preprocessing: Any, path: str | os.PathLike) -> None:
    """Writes a SavedModel that turns images into l2-normalised embeddings, preprocessing included.

    It has two signatures. Both return `{"embedding": (batch, embedding_dim) float32}`:

    - "serving_default": `images`, float32 `(batch, h, w, channels)` of any size, where white is 1;
    - "encoded_images": `encoded_images`, strings `(batch,)`, each an encoded PNG, JPEG, BMP or GIF image of any size.

    Only TensorFlow is needed to load it: `tf.saved_model.load(path).signatures["encoded_images"]`.

    Args:
        model: built `S2SDModel`.
        preprocessing: the `data.Preprocessing` used in training.
        path: folder to write; a new folder, or a SavedModel to replace.

    Raises:
        ValueError: `path` exists and is neither an empty folder nor a SavedModel.
    """
    check_replaceable("path", path, "saved_model.pb")
    module = _Encoder(model, preprocessing)
    signatures = {"serving_default": module.from_images, "encoded_images": module.from_encoded_images}
    with replacing(path) as temporary:
        tf.saved_model.save(module, temporary, signatures=signatures)


class _Encoder(tf.Module):
    """Only the base embedding path of a model, without target heads and objectives."""

    def __init__(self, model: keras.Model, preprocessing: Any) -> None:
        super().__init__()
        # Exactly the variables that the graphs below capture must be tracked.
        layers = [model.backbone, model.embedding_head, *([model.gem] if model.pooling == "gem" else [])]
        self._variables = [raw_variable(variable) for layer in layers for variable in layer.variables]

        def encode(images):
            return {"embedding": tf.cast(model(preprocessing(images), training=False), tf.float32)}

        shape = [None, None, None, preprocessing.channels]
        self.from_images = tf.function(encode, input_signature=[tf.TensorSpec(shape, tf.float32, "images")])

        def encode_bytes(encoded_images):
            images = tf.map_fn(
                preprocessing.from_bytes,
                encoded_images,
                fn_output_signature=tf.TensorSpec(preprocessing.output_shape, tf.float32),
            )
            return {"embedding": tf.cast(model(images, training=False), tf.float32)}

        self.from_encoded_images = tf.function(
            encode_bytes, input_signature=[tf.TensorSpec([None], tf.string, "encoded_images")]
        )
