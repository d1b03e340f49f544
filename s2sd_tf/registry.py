"""Names for classes: what the objective and miner registries share."""

import inspect


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
        known = parameters(cls)
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise ValueError(f"{self._kind} {identifier!r}: expected settings out of {sorted(known)}. Received: {unknown}")
        return cls(**settings)


def parameters(cls):
    """Constructor arguments of `cls`, with those it hands on to its bases as `**kwargs`; name to default."""
    found = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        signature = inspect.signature(base.__init__).parameters
        for name, parameter in list(signature.items())[1:]:
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                found.setdefault(name, parameter.default)
        if not any(parameter.kind == parameter.VAR_KEYWORD for parameter in signature.values()):
            break
        if base.__mro__[1].__module__.split(".")[0] != cls.__module__.split(".")[0]:
            break
    return found
