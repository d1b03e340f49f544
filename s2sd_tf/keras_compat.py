"""Every place where Keras 2 (classic stack) and Keras 3 (default stack) differ for this package, and why.

Everything else is written once, against the part of `tf.keras` that both share.
"""

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


def apply_gradients(optimizer, gradients, variables):
    """Applies gradients of `scale_loss(...)`. Keras 3 unscales in the optimizer, Keras 2 leaves that to the step."""
    if not IS_KERAS_3 and isinstance(optimizer, keras.mixed_precision.LossScaleOptimizer):
        gradients = optimizer.get_unscaled_gradients(gradients)
    optimizer.apply_gradients(zip(gradients, variables))
