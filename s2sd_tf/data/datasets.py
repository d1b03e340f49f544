"""Registry of the data sets that `config.data.name` and `s2sd-shards` choose from."""

import inspect
import os
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from s2sd_tf.data.preprocessing import Preprocessing
from s2sd_tf.data.retrieval_split import RetrievalSplit
from s2sd_tf.files import local_path


class _DataSet(NamedTuple):
    load: Callable[..., RetrievalSplit]
    counts: dict[str, tuple[int, int]] | None
    preprocessing: Callable[[int], Preprocessing] | None


_Load = TypeVar("_Load", bound=Callable[..., RetrievalSplit])
_data_sets: dict[str, _DataSet] = {}


def register(
    name: str,
    counts: dict[str, tuple[int, int]] | None = None,
    preprocessing: Callable[[int], Preprocessing] | None = None,
) -> Callable[[_Load], _Load]:
    """Decorator that registers a loading function as the data set `name`.

    The function's parameters, except `root`, are the settings of the data set. With their defaults they make up the
    config section `config.data.<name>`.

    Args:
        name: a Python identifier, because it becomes a config key.
        counts: dict from a part's name to `(images, classes)` of the published split, or None.
        preprocessing: function from `config.data.image_size` to the data set's own preprocessing. None: the keys of
            `config.data` describe it.
    """

    def add(load: _Load) -> _Load:
        if name in _data_sets:
            raise ValueError(f"data set: the name {name!r} is taken by {_data_sets[name].load.__name__}")
        _data_sets[name] = _DataSet(load, counts, preprocessing)
        return load

    return add


def names() -> list[str]:
    """Names of the registered data sets, sorted."""
    return sorted(_data_sets)


def settings(name: str) -> dict[str, Any]:
    """The settings of a data set with their defaults; "" for a setting without one."""
    parameters = inspect.signature(_lookup(name).load).parameters
    return {
        key: "" if parameter.default is parameter.empty else parameter.default
        for key, parameter in parameters.items()
        if key != "root"
    }


def path_settings(name: str) -> list[str]:
    """The settings of a data set that are paths, by their type hints."""
    parameters = inspect.signature(_lookup(name).load).parameters
    return [key for key, parameter in parameters.items() if key != "root" and "PathLike" in str(parameter.annotation)]


def loader(name: str) -> Callable[..., RetrievalSplit]:
    """The function that loads a data set."""
    return _lookup(name).load


def describe(name: str) -> str:
    """Returns one line about a data set."""
    return inspect.getdoc(loader(name)).split("\n", 1)[0]  # type: ignore[union-attr]


def counts(name: str) -> dict[str, tuple[int, int]] | None:
    """`(images, classes)` of each part of the published split, or None if none is published."""
    return _lookup(name).counts


def preprocessing(name: str, image_size: int) -> Preprocessing | None:
    """The data set's own preprocessing, or None. A data set with a fixed image size ignores `image_size`."""
    make = _lookup(name).preprocessing
    return None if make is None else make(image_size)


def load(name: str, root: str | os.PathLike = "", **chosen: Any) -> RetrievalSplit:
    """Loads a data set by name.

    Example:
        >>> s2sd_tf.data.datasets.load("cub200", "CUB_200_2011", check="decode")

    Args:
        name: one of `names()`.
        root: folder of the data; embedded data sets need none.
        **chosen: settings, see the data set's own function, such as `load_cub200`.

    Raises:
        ValueError: an unknown name or setting.
        FileNotFoundError, ValueError, ImportError: see the data set's own function.
    """
    function, known = _lookup(name).load, settings(name)
    root = local_path("root", root, empty=True)
    unknown = sorted(set(chosen) - set(known))
    if unknown:
        raise ValueError(f"data set {name!r}: expected settings from {sorted(known)}. Received: {unknown}")
    chosen.update({key: local_path(key, chosen[key], empty=True) for key in path_settings(name) if key in chosen})
    return function(root, **chosen) if "root" in inspect.signature(function).parameters else function(**chosen)


def _lookup(name: str) -> _DataSet:
    if name not in _data_sets:
        raise ValueError(f"name: expected one of {names()}. Received: {name!r}")
    return _data_sets[name]
