"""A registry of classes by name, used for objectives, miners and samplers."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterable
from typing import Any

from s2sd_tf.checks import check_choice


class Registry:
    """Finds classes by name and makes instances of them.

    Args:
        kind: what the classes are, for error messages ("objective").
        base: base class of all registered classes.
    """

    def __init__(self, kind: str, base: type) -> None:
        self._kind = kind
        self._base = base
        self._classes: dict[str, Any] = {}

    def add(self, name: str, cls: Any) -> Any:
        """Registers the class `cls` under `name`, sets its `registered_name`, and returns it.

        A class that is defined again, as by running a cell of a notebook twice, replaces the earlier one.

        Raises:
            ValueError: the name, or the name of the class, which saved models refer to, is taken by another class.
        """
        for taken, other in self._classes.items():
            same = (other.__module__, other.__qualname__) == (cls.__module__, cls.__qualname__)
            if taken == name and not same:
                raise ValueError(f"{self._kind}: the name {name!r} is taken by {other.__module__}.{other.__name__}")
            if taken != name and other.__name__ == cls.__name__:
                raise ValueError(
                    f"{self._kind}: the class name {cls.__name__!r} is taken by {taken!r}, and saved models refer to "
                    f"it. Rename the class of {name!r}"
                )
        cls.registered_name = name
        self._classes[name] = cls
        return cls

    def names(self) -> list[str]:
        """Registered names, sorted."""
        return sorted(self._classes)

    def lookup(self, name: str) -> Any:
        """The class registered under `name`.

        Raises:
            ValueError: no such name.
        """
        check_choice(self._kind, name, self.names())
        return self._classes[name]

    def settings(self, name: str) -> dict[str, Any]:
        """Constructor arguments of the class registered under `name`, including those of its bases, with defaults."""
        ancestors = self.lookup(name).__mro__
        return constructor_arguments(ancestors[: ancestors.index(self._base) + 1])

    def get(self, identifier: Any, **settings: Any) -> Any:
        """Returns `identifier` if it is an instance, else an instance of the class of that name with `settings`.

        Raises:
            ValueError: neither a registered name nor an instance, unknown settings, or settings for an instance.
        """
        if isinstance(identifier, self._base):
            if settings:
                raise ValueError(f"{self._kind}: settings go with a name, not with an instance. Received: {settings}")
            return identifier
        if not isinstance(identifier, str):
            raise ValueError(
                f"{self._kind}: expected one of {self.names()} or an instance of {self._base.__name__}. "
                f"Received: {identifier!r}"
            )
        cls = self.lookup(identifier)
        known = self.settings(identifier)
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise ValueError(
                f"{self._kind} {identifier!r}: expected settings from {sorted(known)}. Received: {unknown}"
            )
        return cls(**settings)


def check_config(cls: type) -> None:
    """Raises ValueError if a class has settings and no `get_config`, because saved models would lose the settings."""
    if "__init__" in vars(cls) and "get_config" not in vars(cls):
        inherited = constructor_arguments(cls.__mro__[1:])
        new = [name for name in constructor_arguments([cls]) if name not in inherited]
        if new:
            raise ValueError(
                f"{cls.__name__}: expected a method get_config that returns its settings {new}, which a saved model "
                "would lose. Received: none"
            )


def import_modules(package: str, path: Iterable[str]) -> None:
    """Imports every module of a package, so that they register their classes.

    Args:
        package: `__name__` of the package.
        path: `__path__` of the package.
    """
    for name in sorted(module.name for module in pkgutil.iter_modules(path)):
        importlib.import_module(f"{package}.{name}")


def constructor_arguments(classes: Iterable[type]) -> dict[str, Any]:
    """Constructor arguments of a class and its bases, as a dict from name to default. Put the class itself first."""
    found: dict[str, Any] = {}
    for cls in classes:
        if "__init__" in vars(cls):
            for key, parameter in list(inspect.signature(vars(cls)["__init__"]).parameters.items())[1:]:
                if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                    found.setdefault(key, parameter.default)
    return found
