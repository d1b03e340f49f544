"""Where the time of an epoch goes."""

import contextlib
import time

from absl import logging

# Share of the time from which on the input is called the limit.
_LIMIT = 0.3


class StepTimer:
    """Measures what the parts of an epoch take, and tells where training waits for its images.

    A loop calls `begin_steps`, then for every step `waiting` around what gives it its batch and `end_step`; at the end
    of the epoch `logs`, and `report` at the very end.
    """

    def __init__(self):
        self._measured = {}
        self.begin_steps()

    def begin_steps(self):
        """The steps of an epoch begin."""
        self._waited, self._images = 0.0, 0
        self._begin = self._end = time.monotonic()

    @contextlib.contextmanager
    def waiting(self):
        """The block waits for a batch."""
        begin = time.monotonic()
        yield
        self._waited += time.monotonic() - begin

    def end_step(self, images):
        """A step on so many images has ended."""
        self._images += images
        self._end = time.monotonic()

    @contextlib.contextmanager
    def measure(self, name):
        """The time of the block goes into the logs under `name`."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self._measured[name] = self._measured.get(name, 0.0) + time.monotonic() - begin

    def logs(self):
        """What an epoch logs of its time, a dict of floats.

        In seconds, "input_seconds", for which steps waited for their batches; "compute_seconds", the rest of the time
        from the first step to the last; what was measured under other names (see `measure`), of which
        "evaluation_seconds" and "checkpoint_seconds" are there always; and "images_per_second" of the steps. What is
        measured after it, as saving checkpoints is, is in the logs of the next epoch. Of an epoch that goes on after an
        interruption the times are those since.
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

    def report(self, epoch):
        """Tells in the log where the time of an epoch went, at the very end of it."""
        times = dict(self._logged)
        times["checkpoint_seconds"] = self._measured.get("checkpoint_seconds", 0.0)
        whole = times["compute_seconds"] + times["input_seconds"]
        share = times["input_seconds"] / whole if whole else 0.0
        told = ["compute_seconds", "input_seconds", "refresh_seconds", "evaluation_seconds", "checkpoint_seconds"]
        logging.info(
            "epoch %d: %s; %s",
            epoch + 1,
            ", ".join(f"{times[name]:.1f} s {name.removesuffix('_seconds')}" for name in told if name in times),
            "input-bound" if share >= _LIMIT else "compute-bound",
        )
        if share >= _LIMIT:
            logging.warning(
                "Epoch %d: %.0f%% of the time was spent waiting for images (%.0f images/s): reading and decoding are "
                "the limit. More cores help, and smaller images in shards (s2sd-shards).",
                epoch + 1,
                100 * share,
                times["images_per_second"],
            )
