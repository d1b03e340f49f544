"""Joins what concurrent callers want computed into batches, which one thread computes."""

import collections
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from s2sd_tf.checks import check_at_least, checked_int


class QueueFull(Exception):
    """More items wait than the queue holds."""


class Batcher:
    """Calls functions on batches of items, in one thread. Any thread may `submit`.

    Items with the same function that wait one after another form a batch. A batch is computed when it has `max_batch`
    items, or when its first item has waited for `wait_ms`; while the thread computes, the next batch gathers.

    Args:
        max_batch: >= 1, most items of a batch.
        wait_ms: >= 0, how long an item waits for others. 0 joins only what waits anyway.
        max_queue: >= 1, most items that wait.
        observe: None, or a function that is called with the size of every batch.

    Raises:
        ValueError: an argument is invalid.
    """

    def __init__(
        self,
        max_batch: int = 32,
        wait_ms: float = 2.0,
        max_queue: int = 256,
        observe: Callable[[int], Any] | None = None,
    ) -> None:
        self._max_batch = checked_int("max_batch", max_batch, 1)
        self._max_queue = checked_int("max_queue", max_queue, 1)
        check_at_least("wait_ms", wait_ms, 0)
        self._wait_s = wait_ms / 1000
        self._observe = observe
        self._waiting: collections.deque[_Waiting] = collections.deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """Number of items that wait."""
        return len(self._waiting)

    def submit(self, function: Callable[[list], Sequence], items: Sequence) -> list[Future]:
        """Queues all of the items, or none.

        Args:
            function: maps a list of items to as many results. A result that is an exception is raised by its future; an
                exception that the function raises, by all of the batch. Items are joined if their functions are equal.
            items: the items.

        Returns:
            The futures of the results. An item whose future was cancelled while it waited is not computed.

        Raises:
            QueueFull: the queue has no room for them.
            RuntimeError: the batcher is closed.
        """
        now = time.monotonic()
        new = [_Waiting(function, item, Future(), now) for item in items]
        with self._changed:
            if self._closed:
                raise RuntimeError("the batcher is closed")
            if len(self._waiting) + len(new) > self._max_queue:
                raise QueueFull(f"{len(self._waiting)} items wait, of at most {self._max_queue}")
            self._waiting.extend(new)
            self._changed.notify()
        return [waiting.future for waiting in new]

    def close(self, timeout_s: float | None = None) -> None:
        """Computes what waits, then ends the thread. Waits for its end for at most `timeout_s`; None: until then."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout_s)

    def _work(self):
        while (batch := self._next()) is not None:
            if not batch:
                continue
            if self._observe is not None:
                self._observe(len(batch))
            try:
                results = batch[0].function([waiting.item for waiting in batch])
                if len(results) != len(batch):
                    raise RuntimeError(f"expected {len(batch)} results. Received: {len(results)}")
            except Exception as error:  # the callers get it, and the thread lives on
                results = [error] * len(batch)
            for waiting, result in zip(batch, results):
                if isinstance(result, Exception):
                    waiting.future.set_exception(result)
                else:
                    waiting.future.set_result(result)

    def _next(self):
        """Waits for the next batch. It is empty if all of it was cancelled, and None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if not self._waiting:
                return None
            left = self._waiting[0].since + self._wait_s - time.monotonic()
            if left > 0:
                self._changed.wait_for(lambda: len(self._waiting) >= self._max_batch or self._closed, left)
            batch: list[_Waiting] = []
            function = self._waiting[0].function
            while self._waiting and len(batch) < self._max_batch and self._waiting[0].function == function:
                waiting = self._waiting.popleft()
                if waiting.future.set_running_or_notify_cancel():
                    batch.append(waiting)
            return batch


class _Waiting(NamedTuple):
    function: Callable[[list], Sequence]
    item: Any
    future: Future
    since: float
