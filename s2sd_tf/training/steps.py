"""A training step under any strategy, and the running means of the logged terms."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from s2sd_tf.keras_compat import LAYERS_NEED_AUTOGRAPH, build_optimizer
from s2sd_tf.models import S2SDModel


def make_train_step(model: S2SDModel, strategy: tf.distribute.Strategy) -> Callable[[Any], dict[str, tf.Tensor]]:
    """Returns a function that takes one training step on a batch. XLA compiles it if the model was compiled so.

    Args:
        model: compiled, created in the strategy's scope.
        strategy: TensorFlow's default strategy for one device.

    Returns:
        A function of a batch (an element of a dataset that the strategy distributes). It returns the running means of
        the logged terms by name, as scalar tensors of the first replica of this process.
    """
    # Keras 3 cannot create variables in a graph of several replicas.
    build_optimizer(model)

    @tf.function(jit_compile=model.jit_compile, reduce_retracing=True, autograph=LAYERS_NEED_AUTOGRAPH)
    def step_of_all(batch):
        return strategy.run(model.train_step, args=(batch,))

    def train_step(batch):
        # One replica is enough: the means over all replicas would cost a copy between devices at every step.
        return {name: strategy.experimental_local_results(value)[0] for name, value in step_of_all(batch).items()}

    return train_step


def make_means_reader(model: S2SDModel) -> Callable[[], dict[str, float]]:
    """Returns a function that reads the running means over all replicas, by name. All workers must call it together."""
    results = tf.function(lambda: {metric.name: metric.result() for metric in model.metrics}, autograph=False)

    def read_means():
        with model.distribute_strategy.scope():
            return {name: float(value) for name, value in results().items()}

    return read_means
