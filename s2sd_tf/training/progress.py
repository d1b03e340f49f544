"""Training from wherever a run stands, and keeping where it stands."""

import time

import tensorflow as tf

from s2sd_tf.keras_compat import keras
from s2sd_tf.training import strategies
from s2sd_tf.training.averages import OwnWeights
from s2sd_tf.training.history import write_history


class Progress(keras.callbacks.Callback):
    """Keeps a `RunState` up to date and its checkpoints, the best epoch's among them; comes after whatever adds to the
    logs, and stops where an interruption is asked for.

    Args:
        state: `RunState`.
        checkpoints: `Checkpoints`.
        workdir: folder of the run, for the history.
        every: int >= 1, epochs between checkpoints.
        epochs: int >= 1, epochs of the run, the last of which is saved always.
        interruption: `Interruption`.
        timer: `StepTimer`.
        finite_loss: `FiniteLoss`, asked before anything is saved.
        strategy: `tf.distribute.Strategy`, whose workers all save when the chief does; or None.
    """

    def __init__(self, state, checkpoints, workdir, every, epochs, interruption, timer, finite_loss, strategy=None):
        super().__init__()
        self.state = state
        self.checkpoints = checkpoints
        self.workdir = workdir
        self.every = every
        self.epochs = epochs
        self.interruption = interruption
        self.timer = timer
        self.finite_loss = finite_loss
        self.strategy = strategy
        self._begin = None

    def on_epoch_begin(self, epoch, logs=None):
        self._begin = time.monotonic()
        self._first = self.state.step_in_epoch
        # Keras has just reset them.
        self.state.restore_metrics(self.model)

    def on_train_batch_end(self, batch, logs=None):
        self.state.step_in_epoch = self._first + batch + 1
        self.interruption.check()

    def on_epoch_end(self, epoch, logs=None):
        state, metric = self.state, self.checkpoints.metric
        self._count_seconds()
        state.epoch, state.step_in_epoch, state.metrics = epoch + 1, 0, {}
        state.history.append({"epoch": state.epoch, **{key: float(value) for key, value in (logs or {}).items()}})
        value, improved = (logs or {}).get(metric), False
        if value is not None and (state.best_value is None or value > state.best_value):
            state.best_value, state.best_epoch = float(value), state.epoch
            improved = True
        save = improved or state.epoch % self.every == 0 or state.epoch == self.epochs
        # Saving takes all workers, and rounding may have them find other epochs the best.
        if strategies.of_chief(self.strategy, save):
            self._save()
        self.timer.report(epoch)
        self.interruption.check()

    def save_place(self):
        """Saves where the run stands: after some steps of an epoch, or after all of them but before its end."""
        if self.state.step_in_epoch:
            self.state.keep_metrics(self.model)
        self._count_seconds()
        self._save()

    def _save(self):
        self.finite_loss.check()
        with self.timer.measure("checkpoint_seconds"):
            self.checkpoints.save(self.model, self.state)
            if self.state.history:
                write_history(self.workdir, self.state.history)

    def _count_seconds(self):
        if self._begin is not None:
            self.state.seconds += time.monotonic() - self._begin
            self._begin = None


def fit(model, batches, steps, epochs, state, callbacks, verbose=0, strategy=None):
    """`model.fit` up to the end of epoch `epochs`, from where `state` says, which `callbacks` keep up to date.

    The logs, the weights and the averages of an epoch that is gone on with are those of one that was not interrupted.

    Args:
        model: compiled `S2SDModel`.
        batches: `tf.data.Dataset` whose every pass goes from where `state` is at its begin to the end of the epoch;
            with a strategy the function from `tf.distribute.InputContext` to it.
        steps: int, batches of an epoch.
        epochs: int, epochs of the run.
        state: `RunState`, which changes.
        callbacks: list of Keras callbacks.
        verbose: see Keras.
        strategy: `tf.distribute.Strategy` in whose scope the model was made, or None.
    """
    callbacks = [OwnWeights(), *callbacks]

    def run(count, last):
        if strategy is not None:
            strategies.fit(model, strategy, batches, count, state.epoch, last, callbacks, verbose)
            return
        dataset = batches.apply(tf.data.experimental.assert_cardinality(count))
        # Keras 3 would warn that it cannot shuffle a dataset.
        model.fit(dataset, initial_epoch=state.epoch, epochs=last, shuffle=False, callbacks=callbacks, verbose=verbose)

    if state.step_in_epoch == steps:
        _end_epoch(model, steps, epochs, state, callbacks)
    elif state.step_in_epoch:
        # In a `fit` of its own, as Keras takes all epochs to be of one length.
        run(steps - state.step_in_epoch, state.epoch + 1)
    if state.epoch < epochs:
        run(steps, epochs)


def _end_epoch(model, steps, epochs, state, callbacks):
    """The end of an epoch whose steps are all done."""
    callbacks = keras.callbacks.CallbackList(callbacks, model=model, epochs=epochs, steps=steps)
    callbacks.on_train_begin()
    model.reset_metrics()
    callbacks.on_epoch_begin(state.epoch)
    logs = strategies.metrics_reader(model)()
    callbacks.on_epoch_end(state.epoch, logs)
    callbacks.on_train_end(logs)
