"""The training loop: from where a run stands, epoch by epoch, to the end of the last one."""

import dataclasses
import sys
import time

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
from s2sd_tf.training.collapse_alarm import CollapseAlarm
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
    """A run that can train.

    Attributes:
        config: the resolved config.
        data: the images.
        sampler: what chooses the batches.
        model: the compiled model, made in the strategy's scope.
        state: where the run stands; it changes.
        checkpoints: where that is kept.
        workdir: folder that this process writes to; of a worker that is not the chief, one of its own.
        strategy: the default one for one device.
        interruption: says when to stop.
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
    """Trains a run to the end of its last epoch, in the middle of an epoch too.

    The weights, the averages and the logs of a run that is resumed are those of one that was not interrupted.

    Args:
        run: `Run`.
    """

    def __init__(self, run):
        config, model, images = run.config, run.model, run.data.train
        self.run = run
        self.epochs = config.train.epochs
        self.batches = build_batches(config, run.data, run.sampler)
        self.steps = self.batches.steps
        self.storage = None
        if run.sampler.storage is not None:
            self.storage = RefreshStorage(run.sampler, images, run.data.preprocessing, seed=config.seed)
        self.train_step = make_train_step(model, run.strategy)
        self.read_means = make_means_reader(model)
        self.evaluations = build_evaluations(config, run.data)
        self.alarm = CollapseAlarm()
        self.timer = StepTimer()
        checkpoints = run.checkpoints
        self.finite_loss = FiniteLoss(
            model, images, run.sampler, self.steps, config.seed, lambda: str(checkpoints.latest)
        )
        # 1: a bar, 2: a line an epoch.
        self.verbose = (1 if sys.stdout.isatty() else 2) if strategies.is_chief(run.strategy) else 0
        self.display = keras.callbacks.CallbackList(
            [TensorBoard(run.workdir, config.train.profile)],
            add_progbar=self.verbose > 0,
            model=model,
            verbose=self.verbose,
            epochs=self.epochs,
            steps=self.steps,
        )

    def train(self):
        """Takes the epochs that are left.

        Raises:
            Interrupted: the run was asked to stop; what was trained so far is saved, where it can be gone on with.
            NonFiniteLoss: the loss became NaN or infinite.
            OutOfSpace: there is no room to write.
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
                logs.update(self.evaluate(epoch))
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

    def refresh_storage(self, epoch):
        """Embeds the training images with the model as it is before the epoch, where the sampler chooses by that."""
        if self.storage is not None and self.run.state.step_in_epoch < self.steps:
            with self.timer.measure("refresh_seconds"), self.run.interruption.interruptible():
                self.storage.refresh(self.run.model, epoch)

    def take_steps(self, epoch):
        """Takes the steps of the epoch that are left."""
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
            logs = self.train_step(batch)
            timer.end_step(run.sampler.batch_size)
            # Only a bar reads them, which is a copy to the host.
            self.display.on_train_batch_end(number, logs if self.verbose == 1 else None)
            if (number + 1) % CHECK_EVERY == 0:
                self.finite_loss.check()
            state.end_step()
            run.interruption.check()

    def iterate(self, epoch, first_step):
        """The batches of the epoch from a step on, each shared out over the replicas."""

        def of_pipeline(input_context):
            return self.batches(epoch, first_step, input_context)

        return iter(self.run.strategy.distribute_datasets_from_function(of_pipeline))

    def evaluate(self, epoch):
        """The metrics on held-out and on test classes, of the averaged weights where there are any."""
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

    def end_epoch(self, logs):
        """Counts the epoch, and saves where it is time to, or it is the best."""
        state, train = self.run.state, self.run.config.train
        self.count_seconds()
        is_best = state.end_epoch(logs, self.run.checkpoints.metric)
        save = is_best or state.epoch % train.checkpoint_every == 0 or state.epoch == self.epochs
        # Saving takes all workers, and rounding may have them find other epochs the best.
        if strategies.broadcast_from_chief(self.run.strategy, save):
            self.save()

    def save_place(self):
        """Saves where the run stands: after some steps of an epoch, or after all of them but before its end.

        Not where nothing was trained since the last checkpoint, nor with several workers, as one cannot save alone; nor
        within an epoch that a storage chooses the batches of, which takes the model of the epoch's begin.
        """
        run, state = self.run, self.run.state
        trained = state.position() != run.checkpoints.latest.position()
        can_go_on = self.storage is None or state.step_in_epoch in (0, self.steps)
        if trained and can_go_on and not strategies.has_workers(run.strategy):
            if state.step_in_epoch:
                state.keep_metrics(run.model)
            self.count_seconds()
            self.save()

    def save(self):
        """Writes a checkpoint and the history, once all losses are known to be finite."""
        self.finite_loss.check()
        with self.timer.measure("checkpoint_seconds"):
            self.run.checkpoints.save(self.run.model, self.run.state)
            if self.run.state.history:
                write_history(self.run.workdir, self.run.state.history)

    def count_seconds(self):
        """Adds the time since the epoch began, or since the last call."""
        now = time.monotonic()
        self.run.state.seconds += now - self.begun
        self.begun = now
