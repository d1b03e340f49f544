"""Exports the encoder as a SavedModel, or for ONNX and LiteRT: images in, embeddings out."""

import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from s2sd_tf.checks import check_choice
from s2sd_tf.evaluation import Whitening
from s2sd_tf.export.files import export_file
from s2sd_tf.export.saved_model import load_saved_model
from s2sd_tf.files import check_replaceable, local_path, replacing
from s2sd_tf.graph_checks import checked_shape, for_any_batch
from s2sd_tf.keras_compat import LAYERS_NEED_AUTOGRAPH, keras, raw_variable
from s2sd_tf.truncation import truncate

FORMATS = ("savedmodel", "onnx", "litert")
# The signatures of the whole embedding, and how the names of those of its prefixes begin.
_SIGNATURES = {"serving_default": "images", "pixels": "pixels", "encoded_images": "encoded_images"}


def export_encoder(
    model: keras.Model,
    preprocessing: Any,
    path: str | os.PathLike,
    format: str = "savedmodel",
    whitening: Whitening | None = None,
) -> None:
    """Writes a SavedModel, or a file for ONNX or LiteRT, that turns images into embeddings, preprocessing included.

    All signatures of the SavedModel return `{"embedding": (batch, embedding_dim) float32}`, with no rows for an empty
    batch:

    - "serving_default": `images`, float32 `(batch, h, w, channels)` of any size in [0, 1], where white is 1;
    - "pixels": `pixels`, uint8 `(batch, h, w, channels)` of any size in 0..255;
    - "encoded_images": `encoded_images`, strings `(batch,)`, each an encoded PNG, JPEG, BMP or GIF image, or WebP where
      TensorFlow decodes it. Images are turned upright by their EXIF orientation. An image of more than 89,478,485
      pixels by its header is refused with an InvalidArgumentError before it is decoded.

    A model with `nested_dims` (8, 16, 64) also has "images_8", "pixels_8", "encoded_images_8" and the same with 16.
    They take the same images and return embeddings of these dimensions, `truncate` of the whole ones.

    `channels` is that of `preprocessing`. Images of another shape, and floats that are not finite or not in
    [-0.5, 1.5], are refused with `tf.errors.InvalidArgumentError`. Only TensorFlow is needed to load the SavedModel:
    `tf.saved_model.load(path).signatures["encoded_images"]`.

    The other formats have what "serving_default" has, without its checks: the input `images`, the output `embedding`,
    and for each shorter one of the `nested_dims` an output such as `embedding_16`.

    Args:
        model: built `S2SDModel`, whose embeddings are l2-normalised. Another built Keras model from images to rows
            `(batch, dim)` works too; its rows are returned as they are.
        preprocessing: the `data.Preprocessing` used in training.
        path: folder to write; a new folder, or a SavedModel to replace. For the other formats a file, which may exist.
            It is written completely or not at all.
        format: "savedmodel"; "onnx", for which tf2onnx must be installed; or "litert", a LiteRT (TensorFlow Lite) file.
        whitening: None, or a map that is applied to the embeddings, fitted to those of this model. The prefixes of
            nested embeddings are then left out, as whitening mixes the dimensions.

    Raises:
        ImportError: tf2onnx is missing.
        ValueError: `model` is not built or returns something else, `preprocessing` does not fit it, or `path` exists
            and is neither an empty folder nor a SavedModel.
    """
    check_choice("format", format, FORMATS)
    if whitening is not None and not isinstance(whitening, Whitening):
        raise ValueError(f"whitening: expected a Whitening or None. Received: {type(whitening).__name__}")
    if format != "savedmodel":
        embed = _traced(model, preprocessing, whitening)
        export_file(embed, _captured(model), preprocessing, _nested_dims(model, whitening), path, format)
        return
    check_replaceable("path", path, "saved_model.pb")
    module = _Encoder(model, preprocessing, whitening)
    with replacing(path) as temporary:
        tf.saved_model.save(module, temporary, signatures=module.functions())


class LoadedEncoder(NamedTuple):
    """A SavedModel that `export_encoder` wrote, for one dimension of its embeddings.

    Attributes:
        model: the loaded SavedModel. Its signatures stop working when it is deleted.
        signatures: "serving_default", "pixels" and "encoded_images" of this dimension, functions by name. Encoders of
            earlier versions have no "pixels".
        dim: the dimension.
        dims: the dimensions to choose from, ascending; the last is the whole one.
    """

    model: Any
    signatures: dict[str, Any]
    dim: int
    dims: tuple[int, ...]


def load_encoder(path: str | os.PathLike, dim: int | None = None, argument: str = "dim") -> LoadedEncoder:
    """Loads a SavedModel that `export_encoder` wrote.

    Args:
        path: the folder.
        dim: dimension of the embeddings, one that the model was trained for; None: the whole one.
        argument: name of the argument that `dim` was passed as, for error messages.

    Raises:
        FileNotFoundError: `path` is not a SavedModel.
        ValueError: the SavedModel is no encoder, is damaged, or `load_saved_model` refuses it, or it does not have this
            dimension.
    """
    path = local_path("encoder", path)
    model = load_saved_model("encoder", path)
    signature = model.signatures.get("encoded_images")
    outputs = {} if signature is None else signature.structured_outputs
    shape = outputs["embedding"].shape if "embedding" in outputs else tf.TensorShape(None)
    if shape.rank != 2 or shape[-1] is None:
        raise ValueError(
            "encoder: expected a SavedModel of export_encoder, with the signature 'encoded_images' that returns "
            f"'embedding'. Received: {path!r} with the signatures {sorted(model.signatures)}"
            + (f", which returns {sorted(outputs)}" if outputs else "")
        )
    whole = int(shape[-1])
    found = [re.fullmatch(r"encoded_images_(\d+)", name) for name in model.signatures]
    dims = (*sorted(int(match[1]) for match in found if match), whole)
    dim = whole if dim is None else checked_trained(argument, dim, dims)
    names = {name: name if dim == whole else f"{prefix}_{dim}" for name, prefix in _SIGNATURES.items()}
    there = {name: model.signatures[own] for name, own in names.items() if own in model.signatures}
    return LoadedEncoder(model, there, dim, dims)


def checked_trained(argument: str, dim: int, dims: Sequence[int]) -> int:
    """Returns `dim`.

    Raises:
        ValueError: it is not one of `dims`, the dimensions that a model was trained for.
    """
    if isinstance(dim, bool) or dim not in dims:
        wanted = f"one of {list(dims)}, the dimensions that the model was trained for (nested_dims)"
        raise ValueError(f"{argument}: expected {wanted}. Received: {dim!r}")
    return dim


class _Encoder(tf.Module):
    """Only the base embedding path of a model, without target heads and objectives."""

    def __init__(self, model: keras.Model, preprocessing: Any, whitening: Whitening | None) -> None:
        super().__init__()
        embed = _traced(model, preprocessing, whitening)
        self._variables = _captured(model)
        channels = preprocessing.channels
        shape = [None, None, None, channels]

        def checked_images(argument, images):
            return checked_shape(images, shape, f"{argument}: expected shape (batch, height, width, {channels})")

        def embedded(images, preprocess):
            return {"embedding": for_any_batch(lambda batch: embed(preprocess(batch)), images, [1, 1, channels])}

        @tf.function(input_signature=[tf.TensorSpec(shape, tf.float32, "images")], autograph=False)
        def from_images(images):
            return embedded(checked_images("images", images), preprocessing)

        @tf.function(input_signature=[tf.TensorSpec(shape, tf.uint8, "pixels")], autograph=False)
        def from_pixels(pixels):
            return embedded(checked_images("pixels", pixels), preprocessing.from_pixels)

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "encoded_images")], autograph=False)
        def from_encoded_images(encoded_images):
            images = tf.map_fn(
                preprocessing.from_bytes,
                checked_shape(encoded_images, [None], "encoded_images: expected strings of shape (batch,)"),
                fn_output_signature=tf.TensorSpec(preprocessing.output_shape, tf.float32),
            )
            return {"embedding": for_any_batch(embed, images, preprocessing.output_shape)}

        functions = (from_images, from_pixels, from_encoded_images)
        # An attribute, because a SavedModel has only the functions that its module has.
        self._functions = dict(zip(_SIGNATURES, functions))
        for dim in _nested_dims(model, whitening):
            for prefix, function in zip(_SIGNATURES.values(), functions):
                self._functions[f"{prefix}_{dim}"] = _truncated(function, dim)

    def functions(self) -> dict[str, Any]:
        """Returns the functions to export, by signature name."""
        return dict(self._functions)


def _captured(model):
    """The variables that the graph of a model's embeddings captures: the heads of an `S2SDModel` for training are left
    out. They come from the layers, since a graph has the parts of a distributed variable, which must be saved as one.
    """
    layers = [model]
    if hasattr(model, "embedding_head"):
        layers = [model.backbone, model.embedding_head, *([model.gem] if model.pooling == "gem" else [])]
    return [raw_variable(variable) for layer in layers for variable in layer.variables]


def _nested_dims(model, whitening):
    """The dimensions of the prefixes that a model was trained for, if nothing mixes them."""
    return model.s2sd_loss.nested_dims[:-1] if hasattr(model, "s2sd_loss") and whitening is None else ()


def _truncated(function, dim):
    """`function`, a signature, with embeddings of the dimension `dim`."""

    @tf.function(input_signature=function.input_signature, autograph=False)
    def prefix(images):
        return {"embedding": truncate(function(images)["embedding"], dim)}

    return prefix


def _traced(model, preprocessing, whitening):
    """Returns the model, then the whitening if there is one, as a `tf.function` of preprocessed images. It is traced
    once for all signatures.
    """
    if not isinstance(model, keras.Model) or not model.built:
        raise ValueError(
            "model: expected a built Keras model; call it on a batch of images to build it. Received: "
            f"{type(model).__name__}{', which is not built' if isinstance(model, keras.Model) else ''}"
        )
    size = getattr(preprocessing, "output_shape", None)
    if size is None or not hasattr(preprocessing, "from_pixels"):
        raise ValueError(f"preprocessing: expected a Preprocessing. Received: {preprocessing!r}")

    @tf.function(input_signature=[tf.TensorSpec([None, *size], tf.float32)], autograph=LAYERS_NEED_AUTOGRAPH)
    def embed(images):
        rows = model(images, training=False)
        return tf.cast(rows, tf.float32) if tf.is_tensor(rows) and rows.dtype.is_floating else rows

    try:
        rows = embed.get_concrete_function().structured_outputs
    except (ValueError, TypeError, tf.errors.OpError) as error:
        wanted = getattr(getattr(model, "backbone", model), "input_shape", None)
        if isinstance(wanted, tuple) and tf.TensorShape(wanted[1:]).is_compatible_with(size):
            raise
        raise ValueError(
            f"preprocessing: expected images that the model accepts{f', {wanted[1:]}' if wanted else ''}. "
            f"Received: images {size}"
        ) from error
    if getattr(rows, "dtype", None) != tf.float32 or rows.shape.rank != 2 or rows.shape[-1] is None:
        found = f"{rows.dtype.name} {rows.shape}" if hasattr(rows, "dtype") else type(rows).__name__
        raise ValueError(f"model: expected one output, floats of shape (batch, dim). Received: {found}")
    if whitening is None:
        return embed
    if len(whitening.mean) != rows.shape[-1]:
        raise ValueError(f"whitening: expected one of {rows.shape[-1]} dimensions. Received: {len(whitening.mean)}")

    @tf.function(input_signature=embed.input_signature, autograph=False)
    def whitened(images):
        return whitening.in_graph(embed(images))

    return whitened
