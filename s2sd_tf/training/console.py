"""What a person sees while a run trains: one line per epoch, and on a terminal a progress bar over the whole run."""

import sys
import time
from typing import Any

from tqdm import tqdm

from s2sd_tf.keras_compat import keras

# Endings of the names of the logs to show. history.csv and TensorBoard have all of them.
_SHOWN = ("loss", "recall@1", "map@r")


class Console(keras.callbacks.Callback):
    """Prints the progress of training.

    Args:
        epochs, steps: int, the number of epochs and of steps per epoch.
        position: int, the number of steps that were taken before.
    """

    def __init__(self, epochs: int, steps: int, position: int = 0) -> None:
        super().__init__()
        self._epochs, self._steps, self._position = epochs, steps, position

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._begun, self._taken = time.monotonic(), 0
        self._bar = tqdm(
            total=self._epochs * self._steps,
            initial=self._position,
            desc="Training",
            unit="step",
            file=sys.stdout,
            disable=not sys.stdout.isatty(),
            leave=False,
        )

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self._taken += 1
        self._bar.update()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        left = self._epochs * self._steps - self._position - self._taken
        seconds = (time.monotonic() - self._begun) / max(self._taken, 1) * left
        shown = [f"{name} {value:.4g}" for name, value in (logs or {}).items() if name.endswith(_SHOWN)]
        self._bar.write(
            f"epoch {epoch + 1}/{self._epochs}  {'  '.join(shown)}  {tqdm.format_interval(seconds)} left",
            file=sys.stdout,
        )
        sys.stdout.flush()  # for who follows a log file

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        self._bar.close()
