"""Every branch between Keras 2 (classic stack) and Keras 3 (default stack), and the reason for it.

All other code is the same for both. Where it works around a limit of one of them, a comment names that Keras version;
`models/backbones/applications.py` replaces layers of Keras 2's ConvNeXt that cannot be loaded.
"""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

# This is `tf.keras`, in a form that type checkers accept in annotations.
from tensorflow import keras

# `keras.version` came with Keras 3; `tf.keras.__version__` is missing in the classic stack.
IS_KERAS_3 = hasattr(keras, "version")

# `autograph` of a `tf.function` that calls a model. Keras 2 passes layers through AutoGraph if their caller passes, as
# in `fit`; Keras 3 never does. Elsewhere AutoGraph only costs seconds at every start.
LAYERS_NEED_AUTOGRAPH = not IS_KERAS_3


def keras_version() -> str:
    """Version of the Keras behind `tf.keras`."""
    if IS_KERAS_3:
        return keras.version()
    from importlib.metadata import version

    return version("keras")


def is_keras_tensor(value: Any) -> bool:
    """Whether `value` is a symbolic tensor of a functional model. Keras 2 raises an error for what is no tensor."""
    if not IS_KERAS_3 and not hasattr(value, "type_spec"):
        return False
    return keras.backend.is_keras_tensor(value)


def loss_dtype(layer: keras.layers.Layer) -> str:
    """The dtype in which `layer` computes losses: float64 for a float64 layer, else float32.

    Both versions have the dtypes of the policy under the same public names, so one rule serves both.
    """
    return "float64" if layer.compute_dtype == "float64" else "float32"


def dtype_policy_config(model: keras.Model) -> Any:
    """The dtype policy of a model, serialized for its config. Keras 2's own `get_config` of a model omits it."""
    return keras.utils.serialize_keras_object(model.dtype_policy) if IS_KERAS_3 else model.dtype_policy.name


def raw_variable(variable: Any) -> tf.Variable:
    """The `tf.Variable` behind a Keras variable: the variable itself in Keras 2, the one it wraps in Keras 3."""
    return variable.value if IS_KERAS_3 else variable


def resolve_jit_compile(jit_compile: bool | str) -> bool | str:
    """The value to pass to `Model.compile`. "auto" leaves the choice to Keras on a GPU and turns XLA off on a CPU.

    Keras 3 jits every model by default. On a CPU, XLA runs convolutions at roughly half the speed of the plain graph
    and first compiles for tens of seconds. Keras 2 has no "auto" and never jits on its own, so "auto" is False there.
    """
    if jit_compile != "auto":
        return jit_compile
    return "auto" if IS_KERAS_3 and tf.config.get_visible_devices("GPU") else False


def scale_loss(optimizer: Any, loss: tf.Tensor) -> tf.Tensor:
    """The loss to differentiate: scaled if the optimizer is a loss-scaling one (mixed_float16), else `loss`."""
    if IS_KERAS_3:
        return optimizer.scale_loss(loss)
    if isinstance(optimizer, keras.mixed_precision.LossScaleOptimizer):
        return optimizer.get_scaled_loss(loss)
    return loss


def share_of_loss(loss: tf.Tensor) -> tf.Tensor:
    """What a `keras.losses.Loss` must return on each replica so that `fit` uses the mean over the replicas.

    In Keras 3 the loss itself divides by the number of replicas, in Keras 2 `fit` does it afterwards.
    """
    return loss / tf.distribute.get_strategy().num_replicas_in_sync if IS_KERAS_3 else loss


def apply_gradients(optimizer: Any, gradients: Sequence[tf.Tensor | None], variables: Sequence[Any]) -> None:
    """Applies gradients of `scale_loss(...)`. Keras 3's optimizer unscales them itself, Keras 2's must be asked to."""
    if not IS_KERAS_3 and isinstance(optimizer, keras.mixed_precision.LossScaleOptimizer):
        gradients = optimizer.get_unscaled_gradients(gradients)
    optimizer.apply_gradients(zip(gradients, variables))


def sums_gradients_too_late(optimizer: Any) -> bool:
    """Whether gradients must be summed over the replicas before the optimizer gets them.

    Keras 3 clips the gradients of each replica before it sums them, and its loss-scaling optimizer looks for overflows
    in the first replica only. Keras 2 sums first.
    """
    scales = hasattr(optimizer, "inner_optimizer")
    return IS_KERAS_3 and (scales or any(_clipping(optimizer)))


def apply_summed_gradients(
    optimizer: Any, gradients: Sequence[tf.Tensor | None], variables: Sequence[Any], replicas: int
) -> None:
    """Applies gradients of `scale_loss(...)` that were already summed over the replicas. `replicas` is their number."""
    clipnorm, global_clipnorm, clipvalue = _clipping(optimizer)
    scale = tf.cast(scale_loss(optimizer, tf.ones([])), tf.float32)
    # Clip here, so that the optimizer finds nothing left to clip in a replica's share.
    if global_clipnorm:
        gradients, _ = tf.clip_by_global_norm(gradients, global_clipnorm * scale)

    def share(gradient):
        if clipnorm:
            gradient = tf.clip_by_norm(gradient, tf.cast(clipnorm * scale, gradient.dtype))
        if clipvalue:
            limit = tf.cast(clipvalue * scale, gradient.dtype)
            # Keep overflows: the loss-scaling optimizer must see them.
            gradient = tf.where(tf.math.is_finite(gradient), tf.clip_by_value(gradient, -limit, limit), gradient)
        return gradient / replicas

    gradients = [None if gradient is None else share(gradient) for gradient in gradients]
    apply_gradients(optimizer, gradients, variables)


def _clipping(optimizer):
    """`[clipnorm, global_clipnorm, clipvalue]` of an optimizer, None for those it does not use."""
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    return [getattr(optimizer, name, None) for name in ("clipnorm", "global_clipnorm", "clipvalue")]


def build_optimizer(model: keras.Model) -> None:
    """Creates the optimizer's variables. Keras 2's legacy optimizers create theirs at the first step instead."""
    if hasattr(model.optimizer, "build"):
        with model.distribute_strategy.scope():
            model.optimizer.build(model.trainable_variables)


def optimizer_variables(optimizer: Any) -> list:
    """List of the optimizer's variables. In Keras 2's legacy optimizers `variables` is a method."""
    variables = optimizer.variables
    return variables() if callable(variables) else variables


def restores_random_layers() -> bool:
    """Whether the random state of layers is in variables that can be restored. Keras 2 has no such variables."""
    return IS_KERAS_3


def report_first_replica(model: keras.Model) -> None:
    """Makes `fit` and `evaluate` report the metrics of one replica. All replicas have the same, and Keras 2 would add
    them up.
    """
    if not IS_KERAS_3:
        model.distribute_reduction_method = "first"


def import_addons(wanted: str, instead: str) -> Any:
    """Imports the module `tensorflow_addons`, which exists for Keras 2 only.

    Args:
        wanted: what it is imported for, for the error message.
        instead: what to use without it, for the error message.

    Raises:
        ImportError: it is missing; the message says what to install and what to use instead.
    """
    cause = None
    if not IS_KERAS_3:
        try:
            with warnings.catch_warnings():
                # The import warns that TFA is no longer developed. The user has chosen it by name anyway.
                warnings.filterwarnings("ignore", r"\s*TensorFlow Addons \(TFA\) has ended", UserWarning)
                import tensorflow_addons
            return tensorflow_addons
        except ImportError as error:
            cause = error
    raise ImportError(
        f"{wanted}: expected tensorflow-addons, which needs the classic stack: pip install 's2sd_tf[addons]' with "
        f"Python 3.10 or 3.11, which installs TensorFlow 2.15.1 and Keras 2.15. Received: TensorFlow {tf.__version__} "
        f"and Keras {keras_version()} without it. Alternative: {instead}"
    ) from cause


def legacy_optimizer_state(optimizer: Any) -> list[np.ndarray]:
    """State of a Keras 2 legacy optimizer, such as those of tensorflow-addons, which a saved model lacks.

    Empty for other optimizers, whose state Keras saves, and for a legacy one that was never applied.
    """
    return optimizer.get_weights() if _is_legacy(optimizer) else []


def restore_legacy_optimizer_state(optimizer: Any, variables: Iterable[Any], arrays: Sequence[np.ndarray]) -> None:
    """Restores what `legacy_optimizer_state` returned to a legacy optimizer of `variables`.

    Other optimizers are left as they are. So is a legacy one whose arrays have other shapes, with a warning.
    """
    if not _is_legacy(optimizer):
        return
    # A loss-scaling wrapper has no arrays of its own, and would take the zero gradients below for unscaled ones.
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    if not optimizer.get_weights():
        # It creates its variables when first applied. Weight decay changes the weights even with zero gradients.
        before = [tf.identity(variable) for variable in variables]
        optimizer.apply_gradients([(tf.zeros_like(variable), variable) for variable in variables])
        for variable, value in zip(variables, before):
            variable.assign(value)
    shapes = [array.shape for array in optimizer.get_weights()]
    if shapes == [array.shape for array in arrays]:
        optimizer.set_weights(arrays)
    else:
        warnings.warn("optimizer: the saved state is of another optimizer and is not loaded", stacklevel=2)


def _is_legacy(optimizer):
    return not IS_KERAS_3 and isinstance(optimizer, keras.optimizers.legacy.Optimizer)
