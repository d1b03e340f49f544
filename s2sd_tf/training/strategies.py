"""Distribution strategies by name, and the steps of a run under one."""

import functools
import os

import tensorflow as tf

from s2sd_tf.keras_compat import build_optimizer, keras

STRATEGIES = ("none", "mirrored", "multiworker")
# What the other workers' TensorFlow raises where one is lost.
LOST = (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.InternalError, tf.errors.CancelledError)


def get(name, devices=()):
    """A strategy for `train`, or None for "none"; before anything else of TensorFlow has run.

    Args:
        name: one of `STRATEGIES`: "mirrored" for the devices of this machine, "multiworker" for those of several
            processes, each of which is told of the others by the environment variable `TF_CONFIG`, as described in
            TensorFlow's guide of multi-worker training.
        devices: names such as "GPU:0" and "GPU:1", those of this process. Default: all GPUs, or else "CPU:0". "CPU:1"
            and further make the CPU into as many virtual devices, to try things out.

    Raises:
        ValueError: an unknown name or device, or no `TF_CONFIG` for "multiworker".
    """
    if name not in STRATEGIES:
        raise ValueError(f"strategy: expected one of {list(STRATEGIES)}. Received: {name!r}")
    if name == "none" and devices:
        raise ValueError(f"devices: expected none without a strategy. Received: {list(devices)}")
    if name == "none":
        return None
    kinds = _checked_devices(devices)
    if name == "mirrored":
        count = 1 + max(kinds.get("CPU", [0]))
        cpu = tf.config.list_physical_devices("CPU")[0]
        if count > 1:
            tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * count)
        return tf.distribute.MirroredStrategy(list(devices) or None)
    if not os.environ.get("TF_CONFIG"):
        raise ValueError(
            "strategy: expected the environment variable TF_CONFIG for 'multiworker', such as "
            '{"cluster": {"worker": ["host0:12345", "host1:12345"]}, "task": {"type": "worker", "index": 0}}. '
            "Received: none"
        )
    if devices:
        if kinds.get("CPU", [0]) != [0]:
            raise ValueError(f"devices: expected at most 'CPU:0' of a worker's CPUs. Received: {list(devices)}")
        gpus = tf.config.list_physical_devices("GPU")
        tf.config.set_visible_devices([gpus[index] for index in kinds.get("GPU", ())], "GPU")
    return tf.distribute.MultiWorkerMirroredStrategy()


def has_workers(strategy):
    """Whether the strategy spreads over several processes."""
    resolver = getattr(strategy, "cluster_resolver", None)
    return resolver is not None and len(resolver.cluster_spec().as_dict().get("worker", ())) > 1


def is_chief(strategy):
    """Whether this process is the one that writes."""
    if not has_workers(strategy):
        return True
    resolver = strategy.cluster_resolver
    if "chief" in resolver.cluster_spec().as_dict():
        return resolver.task_type == "chief"
    return (resolver.task_type, resolver.task_id) == ("worker", 0)


def described(strategy):
    """A JSON-able dict of what the strategy is, or None."""
    if strategy is None:
        return None
    found = {"name": type(strategy).__name__, "replicas": strategy.num_replicas_in_sync}
    if has_workers(strategy):
        found["cluster"] = strategy.cluster_resolver.cluster_spec().as_dict()
    return found


def of_all(strategy, values):
    """Waits for all workers; the ints `(n,)` that each replica's worker has handed over, `(replicas, n)`."""
    found = _collector(strategy)(tf.constant([values], tf.int64))
    return strategy.experimental_local_results(found)[0].numpy()


def of_chief(strategy, value):
    """The bool that the chief has handed over; all workers have to ask."""
    if not has_workers(strategy):
        return value
    marked = of_all(strategy, [is_chief(strategy), bool(value)])
    return bool(marked[marked[:, 0] == 1][0, 1])


def fit(model, strategy, batches, steps, initial_epoch, epochs, callbacks, verbose=0):
    """What `model.fit` does, under a strategy, where Keras 3 cannot (MultiWorkerMirroredStrategy), or takes a batch
    before it calls any callback.

    Callbacks are called outside of the strategy's scope. The logs of an epoch are those of all replicas.

    Args:
        model: compiled `S2SDModel`, made in the strategy's scope.
        strategy: `tf.distribute.Strategy`.
        batches: function from a `tf.distribute.InputContext` to the batches of the replicas of one process, one after
            the other; a pass is an epoch, and has not begun before `on_epoch_begin`.
        steps: int, batches of an epoch.
        initial_epoch, epochs: see Keras.
        callbacks: list of Keras callbacks.
        verbose: see Keras.
    """
    with strategy.scope():
        distributed = strategy.distribute_datasets_from_function(batches)
        # As a graph of several replicas cannot make Keras 3's variables.
        build_optimizer(model)

    @tf.function(reduce_retracing=True)
    def step(data):
        return strategy.run(model.train_step, args=(data,))

    read = metrics_reader(model)
    callbacks = keras.callbacks.CallbackList(
        callbacks, add_history=True, add_progbar=bool(verbose), model=model, verbose=verbose, epochs=epochs, steps=steps
    )
    model.stop_training = False
    callbacks.on_train_begin()
    logs = {}
    for epoch in range(initial_epoch, epochs):
        model.reset_metrics()
        callbacks.on_epoch_begin(epoch)
        iterator = iter(distributed)
        for number in range(steps):
            callbacks.on_train_batch_begin(number)
            found = step(next(iterator))
            # Those of one replica: all of them would take a copy from one to the other at every step.
            logs = {name: strategy.experimental_local_results(value)[0] for name, value in found.items()}
            callbacks.on_train_batch_end(number, logs)
        logs = read()
        callbacks.on_epoch_end(epoch, logs)
        if model.stop_training:
            break
    callbacks.on_train_end(logs)


def metrics_reader(model):
    """A function to the running means of the logged terms over all replicas, by name; all workers have to ask."""

    results = tf.function(lambda: {metric.name: metric.result() for metric in model.metrics})

    def read():
        with model.distribute_strategy.scope():
            return {name: float(value) for name, value in results().items()}

    return read


@functools.lru_cache(maxsize=1)
def _collector(strategy):
    """A graph that gathers `(1, n)` of every worker; one for all calls, as each is traced."""

    def gather(values):
        # An argument of a graph is on no device, where gathering wants one.
        return tf.distribute.get_replica_context().all_gather(tf.identity(values), axis=0)

    return tf.function(lambda values: strategy.run(gather, args=(values,)), reduce_retracing=True)


def _checked_devices(devices):
    """Indices by kind, as in {"GPU": [0, 1]}."""
    kinds = {}
    for device in devices:
        kind, _, index = str(device).partition(":")
        if kind not in ("CPU", "GPU") or not index.isdecimal():
            raise ValueError(f"devices: expected names such as 'GPU:0' or 'CPU:1'. Received: {device!r}")
        kinds.setdefault(kind, []).append(int(index))
    found = len(tf.config.list_physical_devices("GPU"))
    if len(set(devices)) < len(devices) or max(kinds.get("GPU", [-1])) >= found:
        raise ValueError(f"devices: expected different ones, and of the {found} GPUs. Received: {list(devices)}")
    return kinds
