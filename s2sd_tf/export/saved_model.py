"""Loads SavedModels, and refuses those that do more than compute."""

import os
import re
from typing import Any

import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.core.protobuf import saved_model_pb2

from s2sd_tf.files import local_path

# Operations that read or write files, reach other machines, or call Python.
_OUTWARD = re.compile(
    "file|record|reader|dataset|iterator|lmdb|sql|remap|immutableconst|save|restore|checkpoint|summary|printv2|debug|dump"
    "|snapshot|pyfunc|rpc|socket|service|remote|bigquery|bigtable",
    re.IGNORECASE,
)


def load_saved_model(argument: str, path: str | os.PathLike) -> Any:
    """Loads a SavedModel like `tf.saved_model.load`, if its graphs only compute.

    A SavedModel is a program that TensorFlow runs. This function refuses it, before any of it runs, if a function that
    can be called reads or writes files, reaches other machines or calls Python.

    Args:
        argument: name of the argument that `path` was passed as, for error messages.
        path: folder of a SavedModel.

    Raises:
        FileNotFoundError: `path` is not a SavedModel.
        ValueError: the SavedModel is damaged or does more than compute.
    """
    path = local_path(argument, path)
    if not tf.saved_model.contains_saved_model(path):
        raise FileNotFoundError(f"{argument}: expected the folder of a SavedModel. Received: {path!r}")
    outward = sorted(name for name in _callable_operations(argument, path) if _OUTWARD.search(name))
    if outward:
        raise ValueError(
            f"{argument}: expected a model that only computes. Received: {path!r}, with the operations {outward}"
        )
    try:
        return tf.saved_model.load(path)
    except (tf.errors.OpError, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{argument}: expected an undamaged SavedModel. Received: {path!r}: {error}") from error


def signature_defs(argument: str, path: str | os.PathLike) -> dict[str, Any]:
    """Reads the signatures of a SavedModel, without loading it.

    Args:
        argument: name of the argument that `path` was passed as, for error messages.
        path: folder of a SavedModel.

    Returns:
        TensorFlow's SignatureDef messages by name.

    Raises:
        FileNotFoundError: `path` is not a SavedModel.
        ValueError: the SavedModel is damaged.
    """
    path = local_path(argument, path)
    if not tf.saved_model.contains_saved_model(path):
        raise FileNotFoundError(f"{argument}: expected the folder of a SavedModel. Received: {path!r}")
    # Names that begin with __ are TensorFlow's own.
    return {name: it for name, it in _read(argument, path).signature_def.items() if not name.startswith("__")}


def _read(argument, path):
    """Reads the one graph of a SavedModel of TensorFlow 2, a MetaGraphDef message."""
    found, wanted = saved_model_pb2.SavedModel(), f"{argument}: expected an undamaged SavedModel of TensorFlow 2"
    try:
        # TensorFlow would prefer another format, such as saved_model.cpb, to the saved_model.pb that is checked here.
        if sorted(name for name in os.listdir(path) if name.startswith("saved_model.")) != ["saved_model.pb"]:
            raise OSError("saved_model.pb is not its only saved_model.* file")
        with open(os.path.join(path, "saved_model.pb"), "rb") as file:
            found.ParseFromString(file.read())
    except (OSError, DecodeError) as error:
        raise ValueError(f"{wanted}. Received: {path!r}: {error}") from error
    # A SavedModel of TensorFlow 1 runs its graph when it is loaded.
    if len(found.meta_graphs) != 1 or not found.meta_graphs[0].HasField("object_graph_def"):
        raise ValueError(f"{wanted}. Received: {path!r}")
    return found.meta_graphs[0]


def _callable_operations(argument, path):
    """Returns the names of the operations that the functions of a SavedModel's objects can run."""
    meta = _read(argument, path)
    functions = {function.signature.name: function.node_def for function in meta.graph_def.library.function}
    waiting, seen, names = list(meta.object_graph_def.concrete_functions), set(), set()
    while waiting:
        function = waiting.pop()
        if function in seen or function not in functions:
            continue
        seen.add(function)
        for node in functions[function]:
            names.add(node.op)
            waiting.append(node.op)
            for attribute in node.attr.values():
                waiting += [attribute.func.name, *(each.name for each in attribute.list.func)]
    return names
