"""Weight of a distillation term as a function of the training step."""

import tensorflow as tf


def distillation_weight(
    weight: float, step: tf.Tensor | int, delay: int = 0, warmup_steps: int = 0, dtype: tf.DType = tf.float32
) -> tf.Tensor:
    """The weight of a distillation term at a step: 0 before `delay`, then a linear ramp up to `weight`.

    Args:
        weight: the full weight, >= 0.
        step: scalar integer tensor, the number of optimizer steps taken before this one.
        delay: >= 0; the weight is 0 while `step < delay` (feature distillation).
        warmup_steps: >= 0; with n > 0 the weight at step `delay + i` is `weight * min(1, (i + 1) / n)`.
        dtype: floating dtype of the result.

    Returns:
        Scalar tensor.
    """
    weight = tf.constant(weight, dtype)
    since = tf.cast(tf.cast(step, tf.int64) - delay, dtype)
    ramp = tf.clip_by_value((since + 1.0) / warmup_steps, 0.0, 1.0) if warmup_steps else tf.ones_like(weight)
    return tf.where(since >= 0.0, weight * ramp, tf.zeros_like(weight))
