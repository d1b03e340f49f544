"""Puts the averaged weights of a Keras optimizer with `use_ema=True` into the model for a while."""

import contextlib
from collections.abc import Iterator

import tensorflow as tf

from s2sd_tf.models import S2SDModel


@contextlib.contextmanager
def averaged_weights(model: S2SDModel) -> Iterator[None]:
    """Within the block, the trainable weights of a compiled model are their averages, if its optimizer keeps averages.

    Keras 2 has no `SwapEMAWeights`. The optimizer averages before `learning_rate_multipliers` are applied. If a factor
    is not 1, the average is off by at most the average of what the factor removes from an update. Weights with factor 0
    do not change, and keep their own values here.
    """
    if not _keeps_averages(model.optimizer) or not int(tf.convert_to_tensor(model.optimizer.iterations)):
        yield
        return
    variables = model.trainable_variables
    own = [tf.identity(tf.convert_to_tensor(variable)) for variable in variables]
    kept = {
        id(variable) for _, group, multiplier in model.weight_updates.groups() if not multiplier for variable in group
    }
    # In the scope of a strategy, `assign` sets the variable on all its devices.
    with model.distribute_strategy.scope():
        model.optimizer.finalize_variable_values(variables)
        for variable, value in zip(variables, own):
            if id(variable) in kept:
                variable.assign(value)
    try:
        yield
    finally:
        with model.distribute_strategy.scope():
            for variable, value in zip(variables, own):
                variable.assign(value)


def _keeps_averages(optimizer):
    # A loss-scaling optimizer leaves averaging to the optimizer it wraps.
    return bool(getattr(getattr(optimizer, "inner_optimizer", optimizer), "use_ema", False))
