"""Averaged weights: what a Keras optimizer with `use_ema=True` keeps, in the model's place for a while."""

import contextlib

import tensorflow as tf


@contextlib.contextmanager
def averaged_weights(model):
    """Within the block the model has the averages of its trainable weights, where its optimizer keeps any.

    Keras's own `SwapEMAWeights` is in Keras 3 alone. Averages are taken before the factors of
    `learning_rate_multipliers` come in: where a factor is not 1, an average is off by the average of what the factor
    takes from an update, at most. Weights whose factor is 0 have no averages here, as they do not move.

    Args:
        model: compiled `S2SDModel`.
    """
    if not _keeps_averages(model.optimizer) or not int(tf.convert_to_tensor(model.optimizer.iterations)):
        yield
        return
    variables = model.trainable_variables
    own = [tf.identity(tf.convert_to_tensor(variable)) for variable in variables]
    kept = {
        id(variable) for _, group, multiplier in model.weight_updates.groups() if not multiplier for variable in group
    }
    # In the scope of a strategy the variables of all its devices are assigned to.
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
    # A loss-scaling optimizer has the averages of the one inside it.
    return bool(getattr(getattr(optimizer, "inner_optimizer", optimizer), "use_ema", False))
