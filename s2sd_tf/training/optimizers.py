"""Creates optimizers of Keras and tensorflow-addons by name, and learning-rate schedules."""

import inspect
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from s2sd_tf.checks import check_above, check_at_least, check_within
from s2sd_tf.keras_compat import import_addons, keras
from s2sd_tf.registry import constructor_arguments

ADDONS = "addons/"
SCHEDULES = ("constant", "multi_step", "cosine")
# The alternative in Keras to each optimizer of tensorflow-addons, by lower-case class name.
_INSTEAD = {
    "adabelief": "Keras has no AdaBelief; 'adam' is the nearest",
    "adamw": "'adamw', with weight_decay / learning_rate as its weight_decay",
    "cocob": "Keras has no optimizer without a learning rate",
    "conditionalgradient": "Keras has no conditional gradient",
    "lamb": "'lamb' in Keras 3",
    "lazyadam": "'adam', the same for the dense gradients of an S2SDModel",
    "novograd": "Keras has no NovoGrad; 'adamw' is the nearest",
    "proximaladagrad": "'adagrad', the same without l1 and l2; with them 'ftrl' is the nearest",
    "rectifiedadam": "Keras has no RectifiedAdam; 'adam' is the nearest",
    "sgdw": "'sgd', with weight_decay / learning_rate as its weight_decay",
    "yogi": "Keras has no Yogi; 'adam' is the nearest",
    "lookahead": "Keras has no Lookahead; use_ema=True of any Keras optimizer averages weights too",
}
_LOOKAHEAD = ("optimizer", "slow_step_size", "sync_period")
# Their averages must be put into the model by hand, before every evaluation and at the end.
_AVERAGES = ("movingaverage", "swa")
# The optimizers of tensorflow-addons pass these to their base class through **kwargs.
_CLIPPING = ("clipnorm", "clipvalue", "global_clipnorm")
_GIVEN = ("name", "learning_rate", "gradient_aggregator", "gradient_transformers")


def get(
    name: str,
    learning_rate: float | keras.optimizers.schedules.LearningRateSchedule,
    settings: Mapping[str, Any] | None = None,
) -> Any:
    """Creates an optimizer from its name and settings, as in `config.optimizer`.

    Args:
        name: class name of a Keras optimizer, "TorchAdam", or "addons/" and the class name of a tensorflow-addons
            optimizer; case does not matter. "addons/lookahead" wraps the optimizer named by the setting `optimizer`
            (default "adam") and passes it all settings that are not its own.
        learning_rate: > 0 or a schedule. COCOB has no learning rate and ignores it.
        settings: further constructor arguments (`weight_decay`, `beta_1`, `momentum`, `clipnorm`, ...).

    Returns:
        A Keras optimizer; a legacy optimizer of Keras 2 if it comes from tensorflow-addons.

    Raises:
        ValueError: an unknown name or setting, a missing setting, or a value that the optimizer does not accept.
        ImportError: tensorflow-addons is missing; the message says what to install and what to use instead.
    """
    settings = {key: list(value) if isinstance(value, tuple) else value for key, value in (settings or {}).items()}
    if name.lower() != ADDONS + "lookahead":
        return _make(name, _lookup(name), learning_rate, settings)
    lookahead = _lookup(name)
    inner = settings.pop("optimizer", "adam")
    own = {key: settings.pop(key) for key in _LOOKAHEAD if key in settings}
    # Lookahead accepts only legacy optimizers.
    cls = _lookup(inner) if inner.lower().startswith(ADDONS) else _choose(inner, keras.optimizers.legacy)
    return _call(lookahead, name, _make(inner, cls, learning_rate, settings, also=_LOOKAHEAD), **own)


def schedule(
    learning_rate: float,
    name: str,
    steps_per_epoch: int,
    epochs: int,
    warmup_epochs: float = 0.0,
    milestones: Sequence[float] = (),
    gamma: float = 0.3,
    final_fraction: float = 0,
) -> float | keras.optimizers.schedules.LearningRateSchedule:
    """Creates a learning-rate schedule from the keys of `config.optimizer.schedule`.

    Args:
        learning_rate: > 0, the rate after the warm-up.
        name: "constant"; "multi_step", which multiplies the rate by `gamma` after each of `milestones`; or "cosine",
            which falls to `final_fraction * learning_rate` at the end of the last epoch (Loshchilov and Hutter,
            ICLR 2017).
        steps_per_epoch, epochs: >= 1.
        warmup_epochs: >= 0, length of the linear warm-up from 0.
        milestones: increasing epochs, each > 0.
        gamma: > 0.
        final_fraction: in [0, 1].

    Returns:
        A float if the rate is constant, else a schedule over steps.

    Raises:
        ValueError: an argument is out of range; the message names its key.
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
        raise ValueError(f"{key}.milestones: expected increasing epochs > 0. Received: {milestones!r}")
    if (name == "multi_step") != bool(milestones):
        raise ValueError(
            f"{key}.milestones: expected epochs with 'multi_step', and none otherwise. Received: {milestones!r} with "
            f"{name!r}"
        )
    warmup = round(warmup_epochs * steps_per_epoch)
    rate: Any = learning_rate
    if name == "multi_step":
        # Keras changes the rate after the step at the boundary.
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
    """A linear warm-up from 0, followed by another schedule. Keras has one only for cosine decay, in some versions.

    Args:
        schedule: the learning rate after the warm-up. The warm-up ends at its value there.
        steps: >= 1, length of the warm-up.
        offset: >= 0, the step that is step 0 of `schedule`.
    """

    def __init__(
        self, schedule: float | keras.optimizers.schedules.LearningRateSchedule, steps: int, offset: int = 0
    ) -> None:
        super().__init__()
        self.schedule = schedule
        self.steps = steps
        self.offset = offset

    def __call__(self, step: tf.Tensor | int) -> tf.Tensor:
        step = tf.cast(step, tf.float32)
        after = self.schedule
        if callable(after):
            after = after(tf.maximum(step, float(self.steps)) - self.offset)
        return tf.minimum((step + 1.0) / self.steps, 1.0) * after

    def get_config(self) -> dict[str, Any]:
        schedule = self.schedule
        if callable(schedule):
            schedule = keras.optimizers.schedules.serialize(schedule)
        return {"schedule": schedule, "steps": self.steps, "offset": self.offset}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "WarmUp":
        config = dict(config)
        if isinstance(config["schedule"], dict):
            config["schedule"] = keras.optimizers.schedules.deserialize(config["schedule"])
        return cls(**config)


@keras.utils.register_keras_serializable("s2sd_tf")
class TorchAdam(keras.optimizers.Adam):
    """Adam with PyTorch's update, m_hat / (sqrt(v_hat) + epsilon): algorithm 1 of Kingma and Ba, ICLR 2015.

    Keras adds epsilon to sqrt(v), before the bias correction. That amounts to an epsilon here of epsilon /
    sqrt(1 - beta_2^t): with the usual beta_2, 32 times epsilon in step 1 and epsilon after thousands of steps. The
    arguments are those of Keras's Adam, whose default epsilon is 1e-7; PyTorch's is 1e-8.
    """

    beta_1: Any
    beta_2: Any
    epsilon: Any

    def update_step(self, gradient: tf.Tensor, variable: tf.Variable, *learning_rate: tf.Tensor) -> None:
        """Updates one variable (Keras hook). Keras 3 passes the learning rate."""
        given = self.beta_1, self.beta_2, self.epsilon
        # Tensors, because Keras would round the betas of float64 weights to float32.
        self.beta_1, self.beta_2, epsilon = (tf.constant(value, variable.dtype) for value in given)
        step = tf.cast(tf.convert_to_tensor(self.iterations), variable.dtype) + 1.0
        # Keras's epsilon with which this step is PyTorch's.
        self.epsilon = epsilon * tf.sqrt(1.0 - self.beta_2**step)
        try:
            super().update_step(gradient, variable, *learning_rate)
        finally:
            self.beta_1, self.beta_2, self.epsilon = given


_OWN = {"torchadam": TorchAdam}


def _lookup(name):
    key = name.lower().removeprefix(ADDONS)
    if not name.lower().startswith(ADDONS):
        return _choose(name, keras.optimizers)
    if key in _AVERAGES:
        raise ValueError(
            f"config.optimizer.name: expected another optimizer than {name!r}, whose averages must be put into the "
            "model by hand. Use a Keras optimizer with config.optimizer.settings.use_ema=True"
        )
    if key not in _INSTEAD:
        raise ValueError(
            f"config.optimizer.name: expected one of {sorted(ADDONS + known for known in _INSTEAD)}. Received: {name!r}"
        )
    optimizers = import_addons(f"config.optimizer.name={name!r}", _INSTEAD[key]).optimizers
    return next(cls for cls in vars(optimizers).values() if isinstance(cls, type) and cls.__name__.lower() == key)


def _choose(name, optimizers):
    """The class with this name in `keras.optimizers` or `keras.optimizers.legacy`.

    `keras.optimizers.get` would return legacy optimizers in Keras 2.
    """
    found = {
        key.lower(): cls
        for key, cls in vars(optimizers).items()
        if isinstance(cls, type)
        and issubclass(cls, optimizers.Optimizer)
        # Excludes the base class and wrappers of other optimizers.
        and "learning_rate" in inspect.signature(cls).parameters
    }
    if optimizers is keras.optimizers:
        found.update(_OWN)
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
            f"config.optimizer.settings: expected a value for {missing}, which have no default in {name!r}. "
            f"Received: {settings}"
        )
    for key, value in settings.items():
        _check_type(key, value, known[key])
    if "learning_rate" in inspect.signature(cls).parameters:
        settings = {"learning_rate": learning_rate, **settings}
    return _call(cls, name, **settings)


def _settings(cls):
    """Constructor arguments of `cls` and its bases, with their defaults."""
    found = {key: default for key, default in constructor_arguments(cls.__mro__).items() if key not in _GIVEN}
    return {**dict.fromkeys(_CLIPPING), **found}


def _check_type(key, value, default):
    """Raises ValueError if a setting has the wrong type. The libraries do not check it: the first step would fail."""
    if isinstance(default, (bool, str)):
        expected, fits = f"a {type(default).__name__}", isinstance(value, type(default))
    elif key.startswith("exclude_"):
        expected, fits = "a list of patterns", isinstance(value, list) and all(isinstance(one, str) for one in value)
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
