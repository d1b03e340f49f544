"""A training step under any strategy, and the means of what the steps of an epoch log."""

import tensorflow as tf

from s2sd_tf.keras_compat import build_optimizer


def make_train_step(model, strategy):
    """The function that takes one training step on a batch, compiled as the model is.

    Args:
        model: compiled `S2SDModel`, made in the strategy's scope.
        strategy: `tf.distribute.Strategy`; the default one for one device.

    Returns:
        Function from a batch, an element of a dataset that the strategy distributes, to the running means of the logged
        terms: a dict of scalar tensors, those of this process's first replica.
    """
    # A graph of several replicas cannot create Keras 3's variables.
    build_optimizer(model)

    @tf.function(jit_compile=model.jit_compile, reduce_retracing=True)
    def step_of_all(batch):
        return strategy.run(model.train_step, args=(batch,))

    def train_step(batch):
        # Those of one replica: all of them would take a copy from one to the other at every step.
        return {name: strategy.experimental_local_results(value)[0] for name, value in step_of_all(batch).items()}

    return train_step


def make_means_reader(model):
    """A function to the running means of the logged terms over all replicas, by name; all workers have to ask."""
    results = tf.function(lambda: {metric.name: metric.result() for metric in model.metrics})

    def read_means():
        with model.distribute_strategy.scope():
            return {name: float(value) for name, value in results().items()}

    return read_means
