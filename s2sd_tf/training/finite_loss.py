"""Stops a run whose loss is not a finite number, and says which batch it was."""

import collections

import numpy as np
import tensorflow as tf

# Steps between two looks.
CHECK_EVERY = 50
_SHOWN = 8


class NonFiniteLoss(FloatingPointError):
    """The loss of a training step was NaN or infinite.

    Attributes:
        step: int, the step from 0 since the run began; None: not known, a step of the epoch.
        epoch, step_in_epoch: ints from 0; `step_in_epoch` may be None as well.
        labels: int array of the batch's labels; None where it cannot be drawn again.
        images: list of the batch's images: paths, for byte ranges of files with the range, else positions in the
            training images; or None.
    """

    def __init__(self, message, step, epoch, step_in_epoch, labels=None, images=None):
        super().__init__(message)
        self.step = step
        self.epoch = epoch
        self.step_in_epoch = step_in_epoch
        self.labels = labels
        self.images = images


class FiniteLoss:
    """Raises `NonFiniteLoss` where a loss is not finite.

    The model notes the step by itself, on the device; it is asked now and then only, as each time is a copy to the
    host: every `CHECK_EVERY` steps, and before a checkpoint is saved.

    Args:
        model: `S2SDModel`.
        images: `ImageSet` that is trained on.
        sampler, steps, seed: as of `EpochBatches`; `steps` are those of an epoch.
        last_checkpoint: function of no arguments to str, from where the run can go on.
    """

    def __init__(self, model, images, sampler, steps, seed, last_checkpoint):
        self.model = model
        self.images = images
        self.sampler = sampler
        self.steps = steps
        self.seed = seed
        self.last_checkpoint = last_checkpoint

    def check(self):
        """Raises `NonFiniteLoss` where a loss since the run began was not finite."""
        step = int(tf.convert_to_tensor(self.model.s2sd_loss.first_nonfinite_step))
        if step < 0:
            return
        epoch, step_in_epoch = divmod(step, self.steps)
        chosen = self._draw(epoch, step_in_epoch)
        labels = images = None
        told = "The batch cannot be drawn again, as the embeddings are gone that it was drawn by"
        if chosen is not None:
            labels, images = self.images.labels[chosen], _named(self.images, chosen)
            classes = collections.Counter(self.images.class_names[label] for label in labels)
            told = (
                f"The batch: classes {_some([f'{name} ({count})' for name, count in classes.items()])}; images "
                f"{_some(images)}"
            )
        where = f"step {step} (from 0; epoch {epoch + 1}, its step {step_in_epoch})"
        raise NonFiniteLoss(self._message(where, told), step, epoch, step_in_epoch, labels, images)

    def check_mean(self, epoch, loss):
        """Raises `NonFiniteLoss` where the mean of an epoch's losses overflows, as it may where none of them does."""
        if not np.isfinite(loss):
            raise NonFiniteLoss(self._message(f"epoch {epoch + 1}", ""), None, epoch, None)

    def _message(self, where, told):
        return (
            f"loss: expected a finite number. Received: NaN or infinity in {where}. {told + '. ' if told else ''}"
            f"Nothing was saved since: the last checkpoint is that of {self.last_checkpoint()}, and going on from it "
            "ends the same way where runs are deterministic. What may help, in a new run: a lower "
            "config.optimizer.learning_rate or a warm-up, config.optimizer.settings.clipnorm, and "
            "config.train.precision='float32'; and a look at these images"
        )

    def _draw(self, epoch, step_in_epoch):
        """Positions of the images of a batch, or None."""
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
