"""Writes an encoder as one file for runtimes other than TensorFlow: ONNX and LiteRT."""

import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from s2sd_tf.checks import check_file_to_write
from s2sd_tf.files import local_path, replacing

# Of ONNX's operations. The newest that tf2onnx writes.
_OPSET = 18


def export_file(
    embed: Callable[[tf.Tensor], tf.Tensor],
    variables: Sequence[tf.Variable],
    preprocessing: Any,
    nested_dims: Sequence[int],
    path: str | os.PathLike,
    format: str,
) -> None:
    """Writes an encoder of float images as a file; see `export_encoder`.

    Args:
        embed: function from preprocessed images to embeddings.
        variables: the variables that it captures.
        preprocessing: the `data.Preprocessing` of the images.
        nested_dims: the dimensions of prefixes that become outputs.
        path: the file.
        format: "onnx" or "litert".

    Raises:
        ImportError: tf2onnx is missing.
        ValueError: `path` is a folder or cannot be written.
    """
    path = local_path("path", path)
    check_file_to_write("path", path)
    shape = [None, None, None, preprocessing.channels]

    @tf.function(input_signature=[tf.TensorSpec(shape, tf.float32, "images")], autograph=False)
    def encode(images):
        whole = embed(preprocessing.portable(images))
        # Not by `truncate`, which computes in float64, which LiteRT lacks.
        prefixes = {f"embedding_{dim}": tf.math.l2_normalize(whole[:, :dim], axis=-1) for dim in nested_dims}
        return {"embedding": whole, **prefixes}

    content = _onnx(encode) if format == "onnx" else _litert(encode, variables)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(content)


def import_tf2onnx() -> Any:
    """Imports tf2onnx.

    Raises:
        ImportError: it is missing; the message says what to install.
    """
    try:
        import tf2onnx
    except ImportError as error:
        raise ImportError("format='onnx' needs tf2onnx: pip install 's2sd_tf[onnx]'") from error
    return tf2onnx


def _onnx(encode):
    model, _ = import_tf2onnx().convert.from_function(encode, input_signature=encode.input_signature, opset=_OPSET)
    names = {"images": ("batch", "height", "width")}
    for value in (*model.graph.input, *model.graph.output):
        for size, name in zip(value.type.tensor_type.shape.dim, names.get(value.name, ("batch",))):
            size.dim_param = name
    return model.SerializeToString()


def _litert(encode, variables):
    module = tf.Module()
    module.encode, module.captured = encode, variables
    with tempfile.TemporaryDirectory() as folder:
        # From a SavedModel, because only then the file has the names of the input and outputs.
        tf.saved_model.save(module, folder, signatures=encode)
        return tf.lite.TFLiteConverter.from_saved_model(folder, signature_keys=["serving_default"]).convert()
