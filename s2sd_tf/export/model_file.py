"""Loads `.keras` files without running code from them."""

import builtins
import json
import os
from typing import Any

from s2sd_tf.files import local_path
from s2sd_tf.keras_compat import keras
from s2sd_tf.untrusted import open_archive, reading

# Layers that hold code, read other files, or wrap whole programs.
_REFUSED = (
    "Lambda", "__lambda__", "__tensor__", "ClassMethod", "InstanceMethod", "InstanceProperty",
    "StringLookup", "IntegerLookup", "TextVectorization",
    "TFSMLayer", "TorchModuleWrapper", "JaxLayer", "FlaxLayer",
)  # fmt: skip
_PACKAGES = ("keras", "s2sd_tf", "keras_cv", "tensorflow_addons")
# The Keras modules with functions that a layer may refer to.
_FUNCTIONS = ("activations", "losses", "metrics", "initializers", "regularizers", "constraints")
# The TensorFlow functions that a Keras 2 layer may refer to.
_TENSORFLOW = ("math.", "nn.", "__operators__.", "cast", "reshape", "concat", "split", "transpose")


def load_model(path: str | os.PathLike) -> keras.Model:
    """Loads a model from a `.keras` file, compiled if it was saved compiled.

    Keras's `safe_mode` refuses code in the file. This function also refuses layers that hold code or read other files,
    and classes and functions from anywhere except Keras, keras-cv, tensorflow-addons and this package. To load your own
    class, register it with `keras.utils.register_keras_serializable` first.

    Args:
        path: `.keras` file. `.h5` files and SavedModels are refused, as Keras 2 would run code from them.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is of another kind, is damaged, or has something that is refused; the message says what.
    """
    path = local_path("path", path)
    if not path.endswith(".keras") or os.path.isdir(path):
        raise ValueError(f"model: expected a .keras file. Received: {path!r}")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"model: expected a .keras file. Received: {path!r}, which does not exist")
    with open_archive(path) as archive:
        config = json.loads(archive.read("config.json"))
    with reading(path, "a model with only layers of Keras and s2sd_tf"):
        _check(config)
        return keras.models.load_model(path, safe_mode=True)


def _check(value: Any) -> None:
    """Raises ValueError if a config refers to a class or function that must not be looked up."""
    if isinstance(value, list):
        for item in value:
            _check(item)
    if not isinstance(value, dict):
        return
    name = value.get("class_name")
    if name is not None:
        _check_name(name, value)
    for item in value.values():
        _check(item)


def _check_name(name, value):
    module, config = value.get("module"), value.get("config")
    looked_up = config if name == "function" else name
    if name in _REFUSED or looked_up in _REFUSED:
        raise ValueError(f"a {looked_up}, which can run any code")
    if name in ("TFOpLambda", "SlicingOpLambda"):
        function = config.get("function")
        if not isinstance(function, str) or not function.startswith(_TENSORFLOW):
            raise ValueError(f"the TensorFlow function {function!r}")
        return
    # Keras looks up functions by their own name, and classes by their registered name.
    registered = looked_up if name == "function" else value.get("registered_name")
    if module is None or (isinstance(registered, str) and keras.utils.get_registered_object(registered) is not None):
        return
    parts = str(module).split(".")
    if name == "function":
        # Functions known by name only, such as "relu", have the module "builtins".
        known = parts == ["builtins"] or (parts[0] == "keras" and parts[-1] in _FUNCTIONS)
        known = known and not hasattr(builtins, str(looked_up))
    else:
        known = parts[0] in _PACKAGES
    # With a dot in the name, Keras would look inside other objects, such as modules that are imported there.
    if not known or "." in str(looked_up):
        raise ValueError(f"{module}.{looked_up}; register your own classes and functions before loading")
