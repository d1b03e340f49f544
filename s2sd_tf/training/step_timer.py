"""Measures where the time of an epoch goes."""

import contextlib
import time
from collections.abc import Iterator

from absl import logging

# An epoch is input-bound if steps wait for at least this share of the time.
_LIMIT = 0.3
# The first steps of an epoch wait for the input pipeline to start, so fewer steps than these say little.
_FEWEST_STEPS = 20


class StepTimer:
    """Measures the time of the parts of an epoch, and logs a warning if training waits for its images.

    Epochs of a few steps give no warning.

    In every epoch, a training loop calls `begin_steps`; for every step `waiting` (around fetching the batch) and
    `end_step`; after the evaluation `logs`; and at the very end `report`.
    """

    def __init__(self) -> None:
        self._measured: dict[str, float] = {}
        self.begin_steps()

    def begin_steps(self) -> None:
        """Starts to time the steps of an epoch."""
        self._waited, self._images, self._steps = 0.0, 0, 0
        self._begin = self._end = time.monotonic()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time of the block as waiting for a batch."""
        begin = time.monotonic()
        yield
        self._waited += time.monotonic() - begin

    def end_step(self, images: int) -> None:
        """Ends a step on this number of images."""
        self._images += images
        self._steps += 1
        self._end = time.monotonic()

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Adds the time of the block to the logs under `name`."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self._measured[name] = self._measured.get(name, 0.0) + time.monotonic() - begin

    def logs(self) -> dict[str, float]:
        """Returns the times of the epoch, for its logs, and starts new ones.

        In seconds: "input_seconds", the time steps waited for their batches; "compute_seconds", the rest of the time
        from the first step to the last; and the times from `measure` by name, always with "evaluation_seconds" and
        "checkpoint_seconds". Also "images_per_second" of the steps. Times measured after this call, such as saving
        checkpoints, go into the logs of the next epoch. A resumed epoch has the times since it was resumed.
        """
        seconds = self._end - self._begin
        waited = min(self._waited, seconds)
        self._logged = {
            "input_seconds": waited,
            "compute_seconds": seconds - waited,
            "evaluation_seconds": 0.0,
            "checkpoint_seconds": 0.0,
            **self._measured,
            "images_per_second": self._images / seconds if seconds else 0.0,
        }
        self._measured = {}
        return self._logged

    def report(self, epoch: int) -> None:
        """Logs where the time of the epoch (from 0) went. Call it last in an epoch."""
        times = dict(self._logged)
        times["checkpoint_seconds"] = self._measured.get("checkpoint_seconds", 0.0)
        whole = times["compute_seconds"] + times["input_seconds"]
        share = times["input_seconds"] / whole if whole else 0.0
        names = ["compute_seconds", "input_seconds", "refresh_seconds", "evaluation_seconds", "checkpoint_seconds"]
        logging.info(
            "epoch %d: %s; %s",
            epoch + 1,
            ", ".join(f"{times[name]:.1f} s {name.removesuffix('_seconds')}" for name in names if name in times),
            "input-bound" if share >= _LIMIT else "compute-bound",
        )
        if share >= _LIMIT and self._steps >= _FEWEST_STEPS:
            logging.warning(
                "Epoch %d: %.0f%% of the time was spent waiting for images (%.0f images/s): reading and decoding "
                "limit the speed. Use more cores, or smaller images in shards (s2sd-shards).",
                epoch + 1,
                100 * share,
                times["images_per_second"],
            )
