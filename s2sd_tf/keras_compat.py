"""Every branch between Keras 2 (classic stack) and Keras 3 (default stack), and why it is there.

All other code is the same for both. Where it goes around something that one of them cannot do, a comment there names
that Keras; `models/backbones/applications.py` has layers in place of those of Keras 2's ConvNeXt that cannot be loaded.
"""

import warnings

import tensorflow as tf

keras = tf.keras

# `keras.version` came with Keras 3; `tf.keras.__version__` is missing in the classic stack.
IS_KERAS_3 = hasattr(keras, "version")


def keras_version():
    """Version of the Keras behind `tf.keras`, as a string."""
    if IS_KERAS_3:
        return keras.version()
    from importlib.metadata import version

    return version("keras")


def loss_dtype(layer):
    """The dtype in which `layer` computes losses: float64 for a float64 layer, else float32.

    Keras 2 keeps the policy's variable and compute dtypes under the same public names, so one rule serves both.
    """
    return "float64" if layer.compute_dtype == "float64" else "float32"


def dtype_policy_config(model):
    """The dtype policy of a model for its config; Keras 2 leaves it out of a model's own."""
    return keras.utils.serialize_keras_object(model.dtype_policy) if IS_KERAS_3 else model.dtype_policy.name


def raw_variable(variable):
    """The `tf.Variable` that a Keras variable is in Keras 2, and wraps in Keras 3."""
    return variable.value if IS_KERAS_3 else variable


def resolve_jit_compile(jit_compile):
    """What `Model.compile` is handed for `jit_compile="auto"`: Keras's own choice with a GPU, else no XLA.

    Keras 3 jits every model by default; on a CPU XLA runs convolutions at roughly half the speed of the plain graph
    and compiles for tens of seconds first. Keras 2 knows no "auto" and never jits by itself.
    """
    if jit_compile != "auto":
        return jit_compile
    return "auto" if IS_KERAS_3 and tf.config.get_visible_devices("GPU") else False


def scale_loss(optimizer, loss):
    """The loss whose gradient the optimizer wants: scaled where it is a loss-scaling optimizer (mixed_float16)."""
    if IS_KERAS_3:
        return optimizer.scale_loss(loss)
    if isinstance(optimizer, keras.mixed_precision.LossScaleOptimizer):
        return optimizer.get_scaled_loss(loss)
    return loss


def share_of_loss(loss):
    """What a `keras.losses.Loss` returns on each of several replicas, so that `fit` has the mean of them: Keras 3
    divides by their number inside the loss, Keras 2 after it.
    """
    return loss / tf.distribute.get_strategy().num_replicas_in_sync if IS_KERAS_3 else loss


def apply_gradients(optimizer, gradients, variables):
    """Applies gradients of `scale_loss(...)`. Keras 3 unscales in the optimizer, Keras 2 leaves that to the step."""
    if not IS_KERAS_3 and isinstance(optimizer, keras.mixed_precision.LossScaleOptimizer):
        gradients = optimizer.get_unscaled_gradients(gradients)
    optimizer.apply_gradients(zip(gradients, variables))


def sums_gradients_too_late(optimizer):
    """Whether the optimizer wants to know of several replicas' gradients what they are together.

    Keras 3 clips each replica's own before they are summed, and a loss-scaling optimizer looks for overflows in those
    of the first replica alone. Keras 2 sums them first.
    """
    scales = hasattr(optimizer, "inner_optimizer")
    return IS_KERAS_3 and (scales or any(_clipping(optimizer)))


def apply_summed_gradients(optimizer, gradients, variables, replicas):
    """`apply_gradients` on several replicas, for gradients that have been summed over them."""
    clipnorm, global_clipnorm, clipvalue = _clipping(optimizer)
    scale = tf.cast(scale_loss(optimizer, tf.ones([])), tf.float32)
    # Clipped here, so that the optimizer finds nothing to clip in a replica's share of them.
    if global_clipnorm:
        gradients, _ = tf.clip_by_global_norm(gradients, global_clipnorm * scale)

    def share(gradient):
        if clipnorm:
            gradient = tf.clip_by_norm(gradient, tf.cast(clipnorm * scale, gradient.dtype))
        if clipvalue:
            limit = tf.cast(clipvalue * scale, gradient.dtype)
            # An overflow stays one.
            gradient = tf.where(tf.math.is_finite(gradient), tf.clip_by_value(gradient, -limit, limit), gradient)
        return gradient / replicas

    gradients = [None if gradient is None else share(gradient) for gradient in gradients]
    apply_gradients(optimizer, gradients, variables)


def _clipping(optimizer):
    """`(clipnorm, global_clipnorm, clipvalue)` of an optimizer, None for what it does not do."""
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    return [getattr(optimizer, name, None) for name in ("clipnorm", "global_clipnorm", "clipvalue")]


def build_optimizer(model):
    """Makes the optimizer's variables; Keras 2's legacy optimizers make theirs at the first step."""
    if hasattr(model.optimizer, "build"):
        with model.distribute_strategy.scope():
            model.optimizer.build(model.trainable_variables)


def optimizer_variables(optimizer):
    """List of the optimizer's variables; a method in Keras 2's legacy optimizers."""
    variables = optimizer.variables
    return variables() if callable(variables) else variables


def restores_random_layers():
    """Whether a layer's random numbers come from a variable that can be set back. Keras 2's come from nowhere."""
    return IS_KERAS_3


def report_first_replica(model):
    """Has `fit` and `evaluate` report the metrics of one replica, which are those of all: Keras 2 would sum them up."""
    if not IS_KERAS_3:
        model.distribute_reduction_method = "first"


def import_addons(wanted, instead):
    """The module `tensorflow_addons`, which there is for Keras 2 alone.

    Args:
        wanted: str, what it is imported for.
        instead: str, what does the same without it.

    Raises:
        ImportError: it is missing; the message says what to install, and what to use instead.
    """
    cause = None
    if not IS_KERAS_3:
        try:
            with warnings.catch_warnings():
                # Its import tells that its development has ended; who names something of it has chosen it.
                warnings.filterwarnings("ignore", r"\s*TensorFlow Addons \(TFA\) has ended", UserWarning)
                import tensorflow_addons
            return tensorflow_addons
        except ImportError as error:
            cause = error
    raise ImportError(
        f"{wanted}: expected tensorflow-addons, which the classic stack has: pip install 's2sd_tf[addons]' with Python "
        f"3.10 or 3.11, which brings TensorFlow 2.15.1 and Keras 2.15. Received: TensorFlow {tf.__version__} and Keras "
        f"{keras_version()} without it. Instead of it: {instead}"
    ) from cause


def legacy_optimizer_state(optimizer):
    """Arrays that a saved model lacks: the state of a legacy optimizer of Keras 2, as those of tensorflow-addons are.

    Empty for any other optimizer, whose state Keras saves, and for a legacy one that was not applied yet.
    """
    return optimizer.get_weights() if _is_legacy(optimizer) else []


def restore_legacy_optimizer_state(optimizer, variables, arrays):
    """Gives a legacy optimizer of `variables` its state back. One of another kind, for which `arrays` are not, is left
    as it is.
    """
    if not _is_legacy(optimizer):
        return
    # A loss-scaling one has no arrays of its own, and would take gradients of zero for ones it forgot to scale.
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    if not optimizer.get_weights():
        # It makes its variables when it is applied; with gradients of zero too it changes weights that it decays.
        before = [tf.identity(variable) for variable in variables]
        optimizer.apply_gradients([(tf.zeros_like(variable), variable) for variable in variables])
        for variable, value in zip(variables, before):
            variable.assign(value)
    shapes = [array.shape for array in optimizer.get_weights()]
    if shapes == [array.shape for array in arrays]:
        optimizer.set_weights(arrays)
    else:
        warnings.warn("optimizer: the saved state is that of another one and is not loaded", stacklevel=2)


def _is_legacy(optimizer):
    return not IS_KERAS_3 and isinstance(optimizer, keras.optimizers.legacy.Optimizer)
