"""Loading of `.keras` files without running what is in them."""

import builtins
import json
import os

from s2sd_tf.keras_compat import keras
from s2sd_tf.untrusted import open_archive, reading

# Layers of code, of other files, and of whole programs.
_REFUSED = (
    "Lambda", "__lambda__", "__tensor__", "ClassMethod", "InstanceMethod", "InstanceProperty",
    "StringLookup", "IntegerLookup", "TextVectorization",
    "TFSMLayer", "TorchModuleWrapper", "JaxLayer", "FlaxLayer",
)  # fmt: skip
_PACKAGES = ("keras", "s2sd_tf", "keras_cv", "tensorflow_addons")
# Keras's modules of functions that a layer may have.
_FUNCTIONS = ("activations", "losses", "metrics", "initializers", "regularizers", "constraints")
# The functions of TensorFlow that a layer of Keras 2 may name.
_TENSORFLOW = ("math.", "nn.", "__operators__.", "cast", "reshape", "concat", "split", "transpose")


def load_model(path):
    """A model of a `.keras` file, compiled as it was.

    Keras's `safe_mode` refuses code in the file. Beyond it, a file is refused with a layer that holds code or reads
    another file, and with a class or function of elsewhere than Keras, keras-cv, tensorflow-addons and this package,
    unless it is registered with `keras.utils.register_keras_serializable` by then.

    Args:
        path: `.keras` file. A `.h5` file or a SavedModel, whose code Keras 2 would run, is refused.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, a broken one, or one with something else in it; the message names it.
    """
    path = os.fspath(path)
    if not path.endswith(".keras") or os.path.isdir(path):
        raise ValueError(f"model: expected a .keras file. Received: {path!r}")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"model: expected a .keras file. Received: {path!r}, which is not there")
    with open_archive(path) as archive:
        config = json.loads(archive.read("config.json"))
    with reading(path, "a model of layers of Keras and of s2sd_tf"):
        _check(config)
        return keras.models.load_model(path, safe_mode=True)


def _check(value):
    """Raises ValueError where a config names a class or a function that is not to be looked up."""
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
        raise ValueError(f"a {looked_up} in it, which may run anything")
    if name in ("TFOpLambda", "SlicingOpLambda"):
        function = config.get("function")
        if not isinstance(function, str) or not function.startswith(_TENSORFLOW):
            raise ValueError(f"TensorFlow's function {function!r} in it")
        return
    # As Keras does: functions by their own name, classes by that of their registration.
    registered = looked_up if name == "function" else value.get("registered_name")
    if module is None or (isinstance(registered, str) and keras.utils.get_registered_object(registered) is not None):
        return
    parts = str(module).split(".")
    if name == "function":
        # Those that have a name alone, as "relu", are of the module "builtins".
        known = parts == ["builtins"] or (parts[0] == "keras" and parts[-1] in _FUNCTIONS)
        known = known and not hasattr(builtins, str(looked_up))
    else:
        known = parts[0] in _PACKAGES
    # Keras takes a dot for something inside of what is before it, as an imported module.
    if not known or "." in str(looked_up):
        raise ValueError(f"{module}.{looked_up} in it; what is not Keras's own has to be registered before")
