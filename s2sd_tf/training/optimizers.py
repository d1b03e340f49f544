"""Optimizers by name, with their settings: Keras's, and those of tensorflow-addons; and learning-rate schedules."""

import inspect
import numbers

import tensorflow as tf

from s2sd_tf.checks import check_above, check_at_least, check_within
from s2sd_tf.keras_compat import import_addons, keras
from s2sd_tf.registry import constructor_arguments

ADDONS = "addons/"
SCHEDULES = ("constant", "multi_step", "cosine")
# What Keras has instead of each optimizer of tensorflow-addons; every class has its lower-case name here.
_INSTEAD = {
    "adabelief": "Keras has no AdaBelief; 'adam' is the nearest",
    "adamw": "'adamw', whose weight_decay is theirs / learning_rate",
    "cocob": "Keras has no optimizer without a learning rate",
    "conditionalgradient": "Keras has no conditional gradient",
    "lamb": "'lamb', of Keras 3",
    "lazyadam": "'adam', the same for the dense gradients of an S2SDModel",
    "novograd": "Keras has no NovoGrad; 'adamw' is the nearest",
    "proximaladagrad": "'adagrad', the same without l1 and l2; with them 'ftrl' is the nearest",
    "rectifiedadam": "Keras has no RectifiedAdam; 'adam' is the nearest",
    "sgdw": "'sgd', whose weight_decay is theirs / learning_rate",
    "yogi": "Keras has no Yogi; 'adam' is the nearest",
    "lookahead": "Keras has no Lookahead; use_ema=True of any of its optimizers averages weights too",
}
_LOOKAHEAD = ("optimizer", "slow_step_size", "sync_period")
# Averages that a script has to put into the model by hand, before every evaluation and at the end.
_AVERAGES = ("movingaverage", "swa")
# Arguments of the bases of tensorflow-addons' optimizers, which they take as **kwargs.
_CLIPPING = ("clipnorm", "clipvalue", "global_clipnorm")
_GIVEN = ("name", "learning_rate", "gradient_aggregator", "gradient_transformers")


def get(name, learning_rate, settings=None):
    """An optimizer from its name and settings, as `config.optimizer` has them.

    Args:
        name: class name of a Keras optimizer, or "addons/" and the class name of one of tensorflow-addons; case does
            not matter. "addons/lookahead" goes around the optimizer that the setting `optimizer` names, "adam" unless
            given, and the settings that are not its own go to that.
        learning_rate: float > 0, or a Keras schedule. COCOB has none, and it is not used there.
        settings: dict of further arguments of the constructor (`weight_decay`, `beta_1`, `momentum`, `clipnorm`, ...).

    Returns:
        A Keras optimizer; those of tensorflow-addons are legacy optimizers of Keras 2.

    Raises:
        ValueError: an unknown name or setting, a missing setting, or a value that the optimizer refuses.
        ImportError: tensorflow-addons is missing; the message says what to install and what Keras has instead.
    """
    settings = {key: list(value) if isinstance(value, tuple) else value for key, value in (settings or {}).items()}
    if name.lower() != ADDONS + "lookahead":
        return _make(name, _lookup(name), learning_rate, settings)
    lookahead = _lookup(name)
    inner = settings.pop("optimizer", "adam")
    own = {key: settings.pop(key) for key in _LOOKAHEAD if key in settings}
    # It takes legacy optimizers alone.
    cls = _lookup(inner) if inner.lower().startswith(ADDONS) else _choose(inner, keras.optimizers.legacy)
    return _call(lookahead, name, _make(inner, cls, learning_rate, settings, also=_LOOKAHEAD), **own)


def schedule(
    learning_rate, name, steps_per_epoch, epochs, warmup_epochs=0.0, milestones=(), gamma=0.3, final_fraction=0
):
    """A learning rate over steps, as `config.optimizer.schedule` has it: Keras's schedules, after a linear warm-up.

    Args:
        learning_rate: float > 0, after the warm-up.
        name: "constant"; "multi_step", times `gamma` after each of `milestones`; or "cosine", down to
            `final_fraction * learning_rate` at the end of the last epoch (Loshchilov and Hutter, ICLR 2017).
        steps_per_epoch, epochs: int >= 1.
        warmup_epochs: float >= 0, epochs of a linear rise from 0.
        milestones: epochs, rising, each > 0.
        gamma: float > 0.
        final_fraction: float in [0, 1].

    Returns:
        A float where it is constant throughout, else a `keras.optimizers.schedules.LearningRateSchedule`.

    Raises:
        ValueError: an argument out of its range; the message names its key.
    """
    key = "config.optimizer.schedule"
    check_above("config.optimizer.learning_rate", learning_rate, 0)
    check_at_least(f"{key}.warmup_epochs", warmup_epochs, 0)
    check_above(f"{key}.gamma", gamma, 0)
    check_within(f"{key}.final_fraction", final_fraction, 0, 1)
    if warmup_epochs >= epochs:
        raise ValueError(f"{key}.warmup_epochs: expected fewer than the {epochs} epochs. Received: {warmup_epochs!r}")
    for epoch in milestones:
        check_above(f"{key}.milestones", epoch, 0)
    if list(milestones) != sorted(set(milestones)):
        raise ValueError(f"{key}.milestones: expected rising epochs > 0. Received: {milestones!r}")
    if (name == "multi_step") != bool(milestones):
        raise ValueError(
            f"{key}.milestones: expected epochs with 'multi_step', and with that alone. Received: {milestones!r} with "
            f"{name!r}"
        )
    warmup = round(warmup_epochs * steps_per_epoch)
    rate = learning_rate
    if name == "multi_step":
        # Keras's changes after the boundary's step.
        boundaries = [round(epoch * steps_per_epoch) - 1 for epoch in milestones]
        values = [learning_rate * gamma**power for power in range(len(milestones) + 1)]
        rate = keras.optimizers.schedules.PiecewiseConstantDecay(boundaries, values)
    elif name == "cosine":
        rate = keras.optimizers.schedules.CosineDecay(
            learning_rate, max(1, steps_per_epoch * epochs - warmup), final_fraction
        )
    return WarmUp(rate, warmup, offset=warmup if name == "cosine" else 0) if warmup else rate


@keras.utils.register_keras_serializable("s2sd_tf")
class WarmUp(keras.optimizers.schedules.LearningRateSchedule):
    """A linear rise from 0, and then another schedule. Keras has it for cosine decay alone, and not in all versions.

    Args:
        schedule: float, or `keras.optimizers.schedules.LearningRateSchedule`, the learning rate afterwards; the rise
            ends at its value there.
        steps: int >= 1, length of the rise.
        offset: int >= 0, the step at which `schedule` begins to count.
    """

    def __init__(self, schedule, steps, offset=0):
        super().__init__()
        self.schedule = schedule
        self.steps = steps
        self.offset = offset

    def __call__(self, step):
        step = tf.cast(step, tf.float32)
        after = self.schedule
        if callable(after):
            after = after(tf.maximum(step, float(self.steps)) - self.offset)
        return tf.minimum((step + 1.0) / self.steps, 1.0) * after

    def get_config(self):
        schedule = self.schedule
        if callable(schedule):
            schedule = keras.optimizers.schedules.serialize(schedule)
        return {"schedule": schedule, "steps": self.steps, "offset": self.offset}

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        if isinstance(config["schedule"], dict):
            config["schedule"] = keras.optimizers.schedules.deserialize(config["schedule"])
        return cls(**config)


def _lookup(name):
    key = name.lower().removeprefix(ADDONS)
    if not name.lower().startswith(ADDONS):
        return _choose(name, keras.optimizers)
    if key in _AVERAGES:
        raise ValueError(
            f"config.optimizer.name: expected no {name!r}, whose averages a script has to put into the model by hand. "
            "A Keras optimizer with config.optimizer.settings.use_ema=True does that by itself"
        )
    if key not in _INSTEAD:
        raise ValueError(
            f"config.optimizer.name: expected one of {sorted(ADDONS + known for known in _INSTEAD)}. Received: {name!r}"
        )
    optimizers = import_addons(f"config.optimizer.name={name!r}", _INSTEAD[key]).optimizers
    return next(cls for cls in vars(optimizers).values() if isinstance(cls, type) and cls.__name__.lower() == key)


def _choose(name, optimizers):
    """The class of that name in `keras.optimizers` or `keras.optimizers.legacy`.

    Not by `keras.optimizers.get`, which gives Keras 2's legacy optimizers for names.
    """
    found = {
        key.lower(): cls
        for key, cls in vars(optimizers).items()
        if isinstance(cls, type)
        and issubclass(cls, optimizers.Optimizer)
        # Leaves out the base, and what goes around other optimizers.
        and "learning_rate" in inspect.signature(cls).parameters
    }
    if name.lower() not in found:
        others = [] if optimizers is not keras.optimizers else [ADDONS + key for key in _INSTEAD]
        raise ValueError(f"config.optimizer.name: expected one of {sorted([*found, *others])}. Received: {name!r}")
    return found[name.lower()]


def _make(name, cls, learning_rate, settings, also=()):
    known = _settings(cls)
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ValueError(
            f"config.optimizer.settings: expected settings of {name!r} out of {sorted({*known, *also})}. "
            f"Received: {unknown}"
        )
    missing = sorted(
        key for key, default in known.items() if default is inspect.Parameter.empty and key not in settings
    )
    if missing:
        raise ValueError(
            f"config.optimizer.settings: expected a value for {missing}, of which {name!r} has no default. "
            f"Received: {settings}"
        )
    for key, value in settings.items():
        _check_type(key, value, known[key])
    if "learning_rate" in inspect.signature(cls).parameters:
        settings = {"learning_rate": learning_rate, **settings}
    return _call(cls, name, **settings)


def _settings(cls):
    """Arguments of the constructor of `cls` and its bases, as a dict to their defaults."""
    found = {key: default for key, default in constructor_arguments(cls.__mro__).items() if key not in _GIVEN}
    return {**dict.fromkeys(_CLIPPING), **found}


def _check_type(key, value, default):
    """Neither Keras nor tensorflow-addons looks, and a value of another type fails in the first step."""
    if key.startswith("exclude_"):
        expected, fits = "a list of patterns", isinstance(value, list) and all(isinstance(one, str) for one in value)
    elif isinstance(default, (bool, str)):
        expected, fits = f"a {type(default).__name__}", isinstance(value, type(default))
    else:
        expected, fits = "a number", isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not fits and (value is not None or default is not None):
        raise ValueError(f"config.optimizer.settings.{key}: expected {expected}. Received: {value!r}")


def _call(cls, name, *arguments, **settings):
    try:
        return cls(*arguments, **settings)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"config.optimizer.settings: expected what {name!r} takes. Received: {settings}. It says: {error}"
        ) from error
