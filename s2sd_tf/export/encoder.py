"""The encoder as a SavedModel: images in, embeddings out."""

import tensorflow as tf

from s2sd_tf.files import check_replaceable, replacing
from s2sd_tf.keras_compat import raw_variable


def export_encoder(model, preprocessing, path):
    """Writes a SavedModel from images to l2-normalised embeddings, preprocessing included.

    It has two signatures, both giving `{"embedding": (batch, embedding_dim) float32}`:

    - "serving_default": `images`, float32 `(batch, h, w, channels)` of any size, white being 1;
    - "encoded_images": `encoded_images`, strings `(batch,)`, each an encoded PNG, JPEG, BMP or GIF image of any size.

    Loading it takes TensorFlow alone: `tf.saved_model.load(path).signatures["encoded_images"]`.

    Args:
        model: `S2SDModel`, built.
        preprocessing: `data.Preprocessing`, as in training.
        path: folder to write; a new one, or a SavedModel, which it takes the place of.

    Raises:
        ValueError: a folder that is there and is something else.
    """
    check_replaceable("path", path, "saved_model.pb")
    module = _Encoder(model, preprocessing)
    signatures = {"serving_default": module.from_images, "encoded_images": module.from_encoded_images}
    with replacing(path) as temporary:
        tf.saved_model.save(module, temporary, signatures=signatures)


class _Encoder(tf.Module):
    """The base embedding path of a model only: target heads and objectives stay behind."""

    def __init__(self, model, preprocessing):
        super().__init__()
        # What the graphs below capture has to be tracked, and nothing else.
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
