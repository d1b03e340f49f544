"""The data sets by name: what `config.data.name` and `s2sd-shards` choose among."""

import inspect
from collections.abc import Callable
from typing import NamedTuple


class _DataSet(NamedTuple):
    load: Callable
    counts: dict | None
    preprocessing: Callable | None


_data_sets = {}


def register(name, counts=None, preprocessing=None):
    """Decorator of a loading function: makes a data set known by `name`.

    The function returns a `RetrievalSplit`. Its arguments, `root` apart, are the settings of the data set: they and
    their defaults make up the section `config.data.<name>`.

    Args:
        name: str; a name of Python's, as it becomes a key of the config.
        counts: dict from part to `(images, classes)` of the published split, or None.
        preprocessing: function of `config.data.image_size` to the `Preprocessing` of a data set that has its own. None:
            the keys of `config.data` describe it.
    """

    def add(load):
        if name in _data_sets:
            raise ValueError(f"data set: the name {name!r} is taken by {_data_sets[name].load.__name__}")
        _data_sets[name] = _DataSet(load, counts, preprocessing)
        return load

    return add


def names():
    """Names of the data sets, sorted."""
    return sorted(_data_sets)


def settings(name):
    """Settings of a data set, as a dict to their defaults; "" where there is none."""
    parameters = inspect.signature(_lookup(name).load).parameters
    return {
        key: "" if parameter.default is parameter.empty else parameter.default
        for key, parameter in parameters.items()
        if key != "root"
    }


def counts(name):
    """Published `(images, classes)` of a data set, as a dict from part; None where no split is published."""
    return _lookup(name).counts


def preprocessing(name, image_size):
    """The `Preprocessing` of a data set that has its own, for images of `image_size` if it takes any; else None."""
    make = _lookup(name).preprocessing
    return None if make is None else make(image_size)


def load(name, root="", **chosen):
    """The `RetrievalSplit` of a data set.

    Example:
        >>> s2sd_tf.data.datasets.load("cub200", "CUB_200_2011", check="decode")

    Args:
        name: one of `names()`.
        root: folder of the data; one that is embedded needs none.
        **chosen: settings, see the data set's own function (`load_cub200`).

    Raises:
        ValueError: an unknown name or setting.
        FileNotFoundError, ValueError, ImportError: what the data set's own function raises.
    """
    function, known = _lookup(name).load, settings(name)
    unknown = sorted(set(chosen) - set(known))
    if unknown:
        raise ValueError(f"data set {name!r}: expected settings out of {sorted(known)}. Received: {unknown}")
    return function(root, **chosen) if "root" in inspect.signature(function).parameters else function(**chosen)


def _lookup(name):
    if name not in _data_sets:
        raise ValueError(f"name: expected one of {names()}. Received: {name!r}")
    return _data_sets[name]
