"""Names for classes: what the objective and miner registries share."""

import importlib
import inspect
import pkgutil


class Registry:
    """Classes by name, and instances from names.

    Args:
        kind: what the classes are, for error messages ("objective").
        base: the class an instance must be of.
    """

    def __init__(self, kind, base):
        self._kind = kind
        self._base = base
        self._classes = {}

    def add(self, name, cls):
        """Registers `cls` under `name`; the class gets it as `registered_name`."""
        if name in self._classes:
            raise ValueError(f"{self._kind}: the name {name!r} is taken by {self._classes[name].__name__}")
        cls.registered_name = name
        self._classes[name] = cls
        return cls

    def names(self):
        """Registered names, sorted."""
        return sorted(self._classes)

    def lookup(self, name):
        """The class registered under `name`."""
        if name not in self._classes:
            raise ValueError(f"{self._kind}: expected one of {self.names()}. Received: {name!r}")
        return self._classes[name]

    def settings(self, name):
        """Constructor arguments of the class of that name, its bases' included, as a dict to their defaults."""
        ancestors = self.lookup(name).__mro__
        return constructor_arguments(ancestors[: ancestors.index(self._base) + 1])

    def get(self, identifier, **settings):
        """An instance: `identifier` itself, or of the class of that name with `settings`."""
        if isinstance(identifier, self._base):
            if settings:
                raise ValueError(f"{self._kind}: settings go with a name, not with an instance. Received: {settings}")
            return identifier
        if not isinstance(identifier, str):
            raise ValueError(
                f"{self._kind}: expected a name out of {self.names()} or an instance of {self._base.__name__}. "
                f"Received: {identifier!r}"
            )
        cls = self.lookup(identifier)
        known = self.settings(identifier)
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise ValueError(
                f"{self._kind} {identifier!r}: expected settings out of {sorted(known)}. Received: {unknown}"
            )
        return cls(**settings)


def import_modules(package, path):
    """Imports every module of a package, so that the classes they register are known.

    Args:
        package: `__name__` of the package.
        path: `__path__` of the package.
    """
    for name in sorted(module.name for module in pkgutil.iter_modules(path)):
        importlib.import_module(f"{package}.{name}")


def constructor_arguments(classes):
    """Arguments by name of the constructors of a class and its bases, nearest first, as a dict to their defaults."""
    found = {}
    for cls in classes:
        if "__init__" in vars(cls):
            for key, parameter in list(inspect.signature(cls.__init__).parameters.items())[1:]:
                if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                    found.setdefault(key, parameter.default)
    return found
