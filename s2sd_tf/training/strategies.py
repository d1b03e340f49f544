"""Creates distribution strategies by name, and passes values between their workers."""

import functools
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

STRATEGIES = ("none", "mirrored", "multiworker")
# The errors that TensorFlow raises in the other workers if one is lost.
LOST = (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.InternalError, tf.errors.CancelledError)


def get(name: str, devices: Sequence[str] = ()) -> tf.distribute.Strategy:
    """Returns a strategy for `train`. Call it before TensorFlow runs anything else.

    Args:
        name: one of `STRATEGIES`: "none" for TensorFlow's default strategy, "mirrored" for the devices of this machine,
            "multiworker" for the devices of several processes. Each of these needs the environment variable
            `TF_CONFIG`, as described in TensorFlow's guide to multi-worker training.
        devices: the devices of this process, such as "GPU:0" and "GPU:1". Default: all GPUs, or "CPU:0" if there are
            none. With "CPU:1" and higher, the CPU is split into virtual devices, for tests.

    Raises:
        ValueError: an unknown name or device, or no `TF_CONFIG` for "multiworker".
    """
    if name not in STRATEGIES:
        raise ValueError(f"strategy: expected one of {list(STRATEGIES)}. Received: {name!r}")
    kinds = _checked_devices(name, devices)
    if name == "none":
        return tf.distribute.get_strategy()
    if name == "mirrored":
        count = 1 + max(kinds.get("CPU", [0]))
        cpu = tf.config.list_physical_devices("CPU")[0]
        if count > 1:
            tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * count)
        return tf.distribute.MirroredStrategy(list(devices) or None)
    _checked_cluster()
    if devices:
        if kinds.get("CPU", [0]) != [0]:
            raise ValueError(f"devices: expected no CPU except 'CPU:0' for a worker. Received: {list(devices)}")
        gpus = tf.config.list_physical_devices("GPU")
        tf.config.set_visible_devices([gpus[index] for index in kinds.get("GPU", ())], "GPU")
    return tf.distribute.MultiWorkerMirroredStrategy()


def replicas(name: str, devices: Sequence[str] = ()) -> int:
    """The number of replicas that a strategy of `get` has. This does not make it, which would wait for all workers."""
    _checked_devices(name, devices)
    if name == "none":
        return 1
    own = len(devices) or max(1, len(tf.config.list_physical_devices("GPU")))
    if name == "mirrored":
        return own
    cluster = _checked_cluster()
    return own * max(1, sum(len(cluster.get(kind, ())) for kind in ("chief", "worker")))


def has_workers(strategy: tf.distribute.Strategy) -> bool:
    """Whether the strategy uses several processes."""
    resolver = strategy.cluster_resolver
    return resolver is not None and len(resolver.cluster_spec().as_dict().get("worker", ())) > 1


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Whether this process is the chief, which writes the files of the run. True for a single process."""
    if not has_workers(strategy):
        return True
    resolver = strategy.cluster_resolver
    if "chief" in resolver.cluster_spec().as_dict():
        return resolver.task_type == "chief"
    return (resolver.task_type, resolver.task_id) == ("worker", 0)


def describe(strategy: tf.distribute.Strategy) -> dict[str, Any] | None:
    """A description of the strategy for JSON; None for the default strategy, which has one device."""
    if strategy is tf.distribute.get_strategy():
        return None
    found = {"name": type(strategy).__name__, "replicas": strategy.num_replicas_in_sync}
    if has_workers(strategy):
        found["cluster"] = strategy.cluster_resolver.cluster_spec().as_dict()
    return found


def all_gather(strategy: tf.distribute.Strategy, values: Sequence[int]) -> np.ndarray:
    """Gathers the `n` values of every replica's worker into int64 `(replicas, n)`. Waits until all workers call it."""
    found = _collector(strategy)(tf.constant([values], tf.int64))
    return strategy.experimental_local_results(found)[0].numpy()


def broadcast_from_chief(strategy: tf.distribute.Strategy, value: bool) -> bool:
    """Returns the chief's `value` on every worker. All workers must call it."""
    if not has_workers(strategy):
        return value
    marked = all_gather(strategy, [is_chief(strategy), bool(value)])
    return bool(marked[marked[:, 0] == 1][0, 1])


@functools.lru_cache(maxsize=1)
def _collector(strategy):
    """A function that gathers `(1, n)` from every worker. It is cached because every new one is traced."""

    def gather(values):
        # `all_gather` needs a tensor on a device; an argument of a graph has none.
        return tf.distribute.get_replica_context().all_gather(tf.identity(values), axis=0)

    return tf.function(lambda values: strategy.run(gather, args=(values,)), reduce_retracing=True, autograph=False)


def _checked_cluster():
    """The cluster in `TF_CONFIG`: the addresses of the tasks by their type."""
    if not os.environ.get("TF_CONFIG"):
        raise ValueError(
            "strategy: expected the environment variable TF_CONFIG for 'multiworker', such as "
            '{"cluster": {"worker": ["host0:12345", "host1:12345"]}, "task": {"type": "worker", "index": 0}}. '
            "Received: none"
        )
    return json.loads(os.environ["TF_CONFIG"]).get("cluster", {})


def _checked_devices(name, devices):
    """Checks the devices of a strategy and returns their indices by kind, such as {"GPU": [0, 1]}."""
    if name == "none" and devices:
        raise ValueError(f"devices: expected none without a strategy. Received: {list(devices)}")
    kinds: dict[str, list[int]] = {}
    for device in devices:
        kind, _, index = str(device).partition(":")
        if kind not in ("CPU", "GPU") or not index.isdecimal():
            raise ValueError(f"devices: expected names such as 'GPU:0' or 'CPU:1'. Received: {device!r}")
        kinds.setdefault(kind, []).append(int(index))
    found = len(tf.config.list_physical_devices("GPU"))
    if len(set(devices)) < len(devices) or max(kinds.get("GPU", [-1])) >= found:
        raise ValueError(f"devices: expected distinct names; this machine has {found} GPUs. Received: {list(devices)}")
    return kinds
