"""Stops a run if its loss is not finite, and names the batch."""

import collections
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from s2sd_tf.data import ImageSet
from s2sd_tf.data.samplers import Sampler
from s2sd_tf.models import S2SDModel

# Steps between two checks.
CHECK_EVERY = 50
_SHOWN = 8


class NonFiniteLoss(FloatingPointError):
    """The loss of a training step was NaN or infinite.

    Attributes:
        step: the step of the run, from 0; None if only the epoch is known.
        epoch, step_in_epoch: from 0; `step_in_epoch` is None if `step` is.
        labels: labels of the batch; None if the batch cannot be drawn again.
        images: images of the batch, or None: paths (with the range for byte ranges of files), or positions in the
            training images.
    """

    def __init__(
        self,
        message: str,
        step: int | None,
        epoch: int,
        step_in_epoch: int | None,
        labels: np.ndarray | None = None,
        images: Sequence[str | int] | None = None,
    ) -> None:
        super().__init__(message)
        self.step = step
        self.epoch = epoch
        self.step_in_epoch = step_in_epoch
        self.labels = labels
        self.images = images


class FiniteLoss:
    """Raises `NonFiniteLoss` if the loss of a step is not finite.

    The model records the step on the device. Reading it is a copy to the host, so the training loop calls `check` only
    every `CHECK_EVERY` steps and before it saves a checkpoint.

    Args:
        model: the model that is trained.
        images: the training images.
        sampler, seed: as for `EpochBatches`.
        steps: steps per epoch.
        last_checkpoint: returns the name of the checkpoint that the run can resume from.
    """

    def __init__(
        self,
        model: S2SDModel,
        images: ImageSet,
        sampler: Sampler,
        steps: int,
        seed: int,
        last_checkpoint: Callable[[], str],
    ) -> None:
        self.model = model
        self.images = images
        self.sampler = sampler
        self.steps = steps
        self.seed = seed
        self.last_checkpoint = last_checkpoint

    def check(self) -> None:
        """Raises `NonFiniteLoss` if any loss since the start of the run was not finite."""
        step = int(tf.convert_to_tensor(self.model.s2sd_loss.first_nonfinite_step))
        if step < 0:
            return
        epoch, step_in_epoch = divmod(step, self.steps)
        chosen = self._draw(epoch, step_in_epoch)
        labels = images = None
        batch = "The batch cannot be drawn again: the stored embeddings have changed since"
        if chosen is not None:
            labels, images = self.images.labels[chosen], _named(self.images, chosen)
            classes = collections.Counter(self.images.class_names[label] for label in labels)
            batch = (
                f"The batch: classes {_some([f'{name} ({count})' for name, count in classes.items()])}; images "
                f"{_some(images)}"
            )
        where = f"step {step} (from 0; epoch {epoch + 1}, its step {step_in_epoch})"
        raise NonFiniteLoss(self._message(where, batch), step, epoch, step_in_epoch, labels, images)

    def check_mean(self, epoch: int, loss: float) -> None:
        """Raises `NonFiniteLoss` if the mean loss of an epoch is not finite. It can overflow even if no loss does."""
        if not np.isfinite(loss):
            raise NonFiniteLoss(self._message(f"epoch {epoch + 1}", ""), None, epoch, None)

    def _message(self, where, batch):
        return (
            f"loss: expected a finite number. Received: NaN or infinity in {where}. {batch + '. ' if batch else ''}"
            f"Nothing was saved after that; the last checkpoint is from {self.last_checkpoint()}. A deterministic run "
            "that resumes from it fails again. Start a new run with a lower config.optimizer.learning_rate, a warm-up, "
            "config.optimizer.settings.clipnorm or config.train.precision='float32', and look at these images"
        )

    def _draw(self, epoch, step_in_epoch):
        """Positions of the images of a batch; None if they cannot be drawn again."""
        storage = self.sampler.storage
        if storage is None:
            return self.sampler.epoch(self.images.labels, self.steps, self.seed, epoch)[step_in_epoch]
        with storage.lock:
            if storage.epoch != epoch:
                return None
            return self.sampler.epoch(self.images.labels, self.steps, self.seed, epoch)[step_in_epoch]


def _named(images, chosen):
    if images.kind == "paths":
        return [str(path) for path in images.images[chosen]]
    if images.kind == "slices":
        return [f"{path}[{offset}:{offset + length}]" for path, offset, length in images.images[chosen].tolist()]
    return [int(position) for position in chosen]


def _some(items):
    rest = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(str(item) for item in items[:_SHOWN]) + rest
