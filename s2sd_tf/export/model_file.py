"""Loads `.keras` files without running code from them."""

import json
import os

from s2sd_tf.files import local_path
from s2sd_tf.keras_compat import keras
from s2sd_tf.untrusted import check_layers, open_archive, reading


def load_model(path: str | os.PathLike) -> keras.Model:
    """Loads a model from a `.keras` file, compiled if it was saved compiled.

    Keras's `safe_mode` refuses code in the file. This function also refuses layers that hold code or read other files,
    and classes and functions from anywhere except Keras, keras-cv, keras-hub, tensorflow-addons and this package. To
    load your own class, register it with `keras.utils.register_keras_serializable` first.

    Args:
        path: `.keras` file. `.h5` files and SavedModels are refused, as Keras 2 would run code from them.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is of another kind, is damaged, or has something that is refused; or it has
            layers of keras-hub, which is not installed. The message says what.
    """
    path = local_path("path", path)
    if not path.endswith(".keras") or os.path.isdir(path):
        raise ValueError(f"model: expected a .keras file. Received: {path!r}")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"model: expected a .keras file. Received: {path!r}, which does not exist")
    with open_archive(path) as archive:
        config = json.loads(archive.read("config.json"))
    with reading(path, "a model with only layers of Keras and s2sd_tf"):
        check_layers(config)
        return keras.models.load_model(path, safe_mode=True)
