"""Settings of the whole process, for computations that may run in several threads at a time."""

import concurrent.futures
import contextlib
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf
from threadpoolctl import ThreadpoolController


class _Held:
    """A setting that holds from where the first thread begins a block until where the last one ends its own.

    If each thread restored what it had found, the first to end would change the setting under the others, and the last
    would leave that of the others behind.

    Args:
        change: makes the context manager that changes the setting and restores it.
    """

    def __init__(self, change: Callable[[], contextlib.AbstractContextManager]) -> None:
        self._change = change
        self._lock = threading.Lock()
        self._blocks = 0
        self._changed: Any = None

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if not self._blocks:
                self._changed = self._change()
                self._changed.__enter__()
            self._blocks += 1
        try:
            yield
        finally:
            with self._lock:
                self._blocks -= 1
                if not self._blocks:
                    self._changed.__exit__(None, None, None)


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    before = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    try:
        yield
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(before)


@functools.lru_cache(maxsize=1)
def _libraries(modules: int) -> ThreadpoolController:
    """What limits the loaded libraries. They are looked for again, in 3 ms, where the number of modules has changed."""
    del modules
    return ThreadpoolController()


@contextlib.contextmanager
def _one_blas_thread() -> Iterator[None]:
    # A thread of its own, as threadpoolctl lets only the thread that set a limit restore it, silently.
    with concurrent.futures.ThreadPoolExecutor(1) as holder:
        limit = holder.submit(lambda: _libraries(len(sys.modules)).limit(limits=1, user_api="blas")).result()
        holder.submit(limit.__enter__).result()
        try:
            yield
        finally:
            holder.submit(limit.__exit__, None, None, None).result()


# NumPy and SciPy multiply matrices with one thread. (OpenMP's number of threads is each thread's own.)
one_thread = _Held(_one_blas_thread)
# TensorFlow computes products in full float32 on a GPU too, where TensorFloat-32 is its default.
full_float32 = _Held(_without_tf32)


def threads() -> int:
    """How many threads NumPy's computations are shared among: as many as TensorFlow's operations may take."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return tf.config.threading.get_intra_op_parallelism_threads() or cores


@contextlib.contextmanager
def workers(most: int | None = None) -> Iterator[concurrent.futures.Executor]:
    """Threads, `most` at most, each of which multiplies matrices on its own."""
    with one_thread(), concurrent.futures.ThreadPoolExecutor(min(most or threads(), threads())) as pool:
        yield pool
