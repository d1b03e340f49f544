"""Distribution strategies by name, and what the workers of one tell each other."""

import functools
import os

import tensorflow as tf

STRATEGIES = ("none", "mirrored", "multiworker")
# What the other workers' TensorFlow raises where one is lost.
LOST = (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.InternalError, tf.errors.CancelledError)


def get(name, devices=()):
    """A strategy for `train`, the default one for "none"; before anything else of TensorFlow has run.

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
        return tf.distribute.get_strategy()
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
    resolver = strategy.cluster_resolver
    return resolver is not None and len(resolver.cluster_spec().as_dict().get("worker", ())) > 1


def is_chief(strategy):
    """Whether this process is the one that writes."""
    if not has_workers(strategy):
        return True
    resolver = strategy.cluster_resolver
    if "chief" in resolver.cluster_spec().as_dict():
        return resolver.task_type == "chief"
    return (resolver.task_type, resolver.task_id) == ("worker", 0)


def describe(strategy):
    """A JSON-able dict of what the strategy is; None for the default one, of one device."""
    if strategy is tf.distribute.get_strategy():
        return None
    found = {"name": type(strategy).__name__, "replicas": strategy.num_replicas_in_sync}
    if has_workers(strategy):
        found["cluster"] = strategy.cluster_resolver.cluster_spec().as_dict()
    return found


def all_gather(strategy, values):
    """Waits for all workers; the ints `(n,)` that each replica's worker has handed over, `(replicas, n)`."""
    found = _collector(strategy)(tf.constant([values], tf.int64))
    return strategy.experimental_local_results(found)[0].numpy()


def broadcast_from_chief(strategy, value):
    """The bool that the chief has handed over; all workers have to ask."""
    if not has_workers(strategy):
        return value
    marked = all_gather(strategy, [is_chief(strategy), bool(value)])
    return bool(marked[marked[:, 0] == 1][0, 1])


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
