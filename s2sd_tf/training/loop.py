"""The training loop, which starts or resumes a run and trains it to the end of its last epoch."""

import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any

import tensorflow as tf
from ml_collections import config_dict

from s2sd_tf.data import RefreshStorage
from s2sd_tf.data.samplers import Sampler
from s2sd_tf.keras_compat import keras
from s2sd_tf.models import S2SDModel
from s2sd_tf.training import strategies
from s2sd_tf.training.averages import averaged_weights
from s2sd_tf.training.build import build_batches, build_evaluations
from s2sd_tf.training.checkpoints import Checkpoints, RunState
from s2sd_tf.training.collapse_alarm import FIRST_STEPS, CollapseAlarm
from s2sd_tf.training.console import Console
from s2sd_tf.training.datasets import RunData
from s2sd_tf.training.embedding import predict
from s2sd_tf.training.finite_loss import CHECK_EVERY, FiniteLoss
from s2sd_tf.training.history import write_history
from s2sd_tf.training.interruption import Interrupted, Interruption
from s2sd_tf.training.step_timer import StepTimer
from s2sd_tf.training.steps import make_means_reader, make_train_step
from s2sd_tf.training.tensorboard import TensorBoard


@dataclasses.dataclass
class Run:
    """Everything that a run needs to train.

    Attributes:
        config: the resolved config.
        data: the images.
        sampler: chooses the images of each batch.
        model: the compiled model, created in the strategy's scope.
        state: the progress of the run; training updates it.
        checkpoints: the checkpoints of the run.
        workdir: folder that this process writes to; a worker that is not the chief has its own.
        strategy: TensorFlow's default strategy for one device.
        interruption: reports whether to stop.
    """

    config: config_dict.ConfigDict
    data: RunData
    sampler: Sampler
    model: S2SDModel
    state: RunState
    checkpoints: Checkpoints
    workdir: str
    strategy: tf.distribute.Strategy
    interruption: Interruption


class Loop:
    """Trains a run to the end of its last epoch. It can start in the middle of an epoch.

    A resumed run ends with the same weights, averages and logs as an uninterrupted one.
    """

    def __init__(self, run: Run) -> None:
        config, model, images = run.config, run.model, run.data.train
        self.run = run
        self.epochs = config.train.epochs
        self.batches = build_batches(config, run.data, run.sampler)
        self.steps = self.batches.steps
        self.storage = None
        if run.sampler.storage is not None:
            self.storage = RefreshStorage(
                run.sampler,  # type: ignore[arg-type]
                images,
                run.data.preprocessing,
                seed=config.seed,
            )
        self.train_step = make_train_step(model, run.strategy)
        self.read_means = make_means_reader(model)
        self.evaluations = build_evaluations(config, run.data)
        warmup = math.ceil(config.optimizer.schedule.warmup_epochs * self.steps)
        self.alarm = CollapseAlarm(after_steps=max(FIRST_STEPS, warmup))
        self.timer = StepTimer()
        checkpoints = run.checkpoints
        self.finite_loss = FiniteLoss(
            model, images, run.sampler, self.steps, config.seed, lambda: str(checkpoints.latest)
        )
        callbacks = [TensorBoard(run.workdir, config.train.profile)]
        if strategies.is_chief(run.strategy):
            position = run.state.epoch * self.steps + run.state.step_in_epoch
            callbacks.append(Console(self.epochs, self.steps, position))
        self.display = keras.callbacks.CallbackList(callbacks, model=model)

    def train(self) -> None:
        """Trains the remaining epochs.

        Raises:
            Interrupted: the run was asked to stop; the progress is saved if the run can resume from it.
            NonFiniteLoss: the loss became NaN or infinite.
            OutOfSpace: the disk is full.
        """
        model, state, interruption = self.run.model, self.run.state, self.run.interruption
        self.display.on_train_begin()
        try:
            for epoch in range(state.epoch, self.epochs):
                self.begun = time.monotonic()
                self.display.on_epoch_begin(epoch)
                self.refresh_storage(epoch)
                self.take_steps(epoch)
                logs = self.read_means()
                self.finite_loss.check()
                self.finite_loss.check_mean(epoch, logs["loss"])
                if epoch + 1 == self.epochs:
                    # What fails, or is killed, from here on costs no steps.
                    self.save_place()
                try:
                    logs.update(self.evaluate(epoch))
                except Exception:
                    self.save_place()
                    raise
                logs.update(self.timer.logs())
                self.alarm.check(model, epoch, logs)
                self.display.on_epoch_end(epoch, logs)
                self.end_epoch(logs)
                self.timer.report(epoch)
                interruption.check()
        except Interrupted:
            self.save_place()
            raise
        self.display.on_train_end()

    def refresh_storage(self, epoch: int) -> None:
        """Embeds the images with the model at the start of the epoch, if the sampler needs stored embeddings."""
        if self.storage is not None and self.run.state.step_in_epoch < self.steps:
            with self.timer.measure("refresh_seconds"), self.run.interruption.interruptible():
                self.storage.refresh(self.run.model, epoch)

    def take_steps(self, epoch: int) -> None:
        """Takes the remaining steps of the epoch."""
        run, state, timer = self.run, self.run.state, self.timer
        run.model.reset_metrics()
        state.restore_metrics(run.model)
        timer.begin_steps()
        if state.step_in_epoch == self.steps:
            return
        with timer.waiting():
            iterator = self.iterate(epoch, state.step_in_epoch)
        for number in range(state.step_in_epoch, self.steps):
            self.display.on_train_batch_begin(number)
            with timer.waiting():
                batch = next(iterator)
            self.train_step(batch)
            timer.end_step(run.sampler.batch_size)  # type: ignore[attr-defined]
            self.display.on_train_batch_end(number)
            if (number + 1) % CHECK_EVERY == 0:
                self.finite_loss.check()
            state.end_step()
            run.interruption.check()

    def iterate(self, epoch: int, first_step: int) -> Iterator[Any]:
        """Iterates over the batches of the epoch from `first_step`, each split over the replicas."""

        def of_pipeline(input_context):
            return self.batches(epoch, first_step, input_context)

        return iter(self.run.strategy.distribute_datasets_from_function(of_pipeline))

    def evaluate(self, epoch: int) -> dict[str, float]:
        """Returns the metrics of the evaluations that are due, of the averaged weights if the optimizer keeps any."""
        run, found = self.run, {}
        for evaluation in self.evaluations:
            if evaluation.is_due(epoch, self.epochs):
                with (
                    self.timer.measure("evaluation_seconds"),
                    averaged_weights(run.model),
                    run.interruption.interruptible(),
                ):
                    found.update(evaluation.evaluate(lambda images: predict(run.model, images)))
        return found

    def end_epoch(self, logs: dict[str, float]) -> None:
        """Counts the epoch, and saves a checkpoint if one is due or the epoch is the best so far."""
        state, train = self.run.state, self.run.config.train
        self.count_seconds()
        is_best = state.end_epoch(logs, self.run.checkpoints.metric)
        save = is_best or state.epoch % train.checkpoint_every == 0 or state.epoch == self.epochs
        # All workers must save together, but rounding may make them disagree on the best epoch: the chief decides.
        if strategies.broadcast_from_chief(self.run.strategy, save):
            self.save()

    def save_place(self) -> None:
        """Saves a checkpoint of the current state, which may be within an epoch.

        Does nothing if nothing was trained since the last checkpoint; with several workers, because one cannot save
        alone; and between the steps of an epoch whose batches depend on stored embeddings, because resuming them needs
        the model at the start of the epoch.
        """
        run, state = self.run, self.run.state
        trained = state.position() != run.checkpoints.latest.position()
        can_resume = self.storage is None or state.step_in_epoch in (0, self.steps)
        if trained and can_resume and not strategies.has_workers(run.strategy):
            if state.step_in_epoch:
                state.keep_metrics(run.model)
            self.count_seconds()
            self.save()

    def save(self) -> None:
        """Checks that all losses were finite, then writes a checkpoint and the history."""
        self.finite_loss.check()
        with self.timer.measure("checkpoint_seconds"):
            self.run.checkpoints.save(self.run.model, self.run.state)
            if self.run.state.history:
                write_history(self.run.workdir, self.run.state.history)

    def count_seconds(self) -> None:
        """Adds the time since the start of the epoch, or since the last call, to the state."""
        now = time.monotonic()
        self.run.state.seconds += now - self.begun
        self.begun = now
