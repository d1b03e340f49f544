"""Where a run stands, on disk: checkpoints that are found out where they are damaged."""

import dataclasses
import os
import re
import shutil

import numpy as np
import tensorflow as tf
from absl import logging

from s2sd_tf.files import read_json, remove_leftovers, replacing, sha256, write_json
from s2sd_tf.training.embedding import load_model

# How the names begin of checkpoints that could not be read and were moved aside.
UNREADABLE = "unreadable_"

_NAME = re.compile(r"epoch_(\d{6})(?:_step_(\d{6}))?")
_MODEL, _STATE, _DIGESTS = "model.keras", "state.json", "sha256.json"


@dataclasses.dataclass
class RunState:
    """Where a run stands.

    Attributes:
        epoch: int, epochs that are done.
        step_in_epoch: int, steps done of the epoch after them; all of its steps where its end is still to come, with
            the evaluation.
        metrics: dict from the name of a metric to its variables' values, the sums over these steps; empty at 0 steps.
        best_epoch, best_value: the best of the metric on held-out classes or images, and its epoch; 0 and None before.
        history: list of dicts, the logs of the epochs that are done.
        seconds: float, of training and what it waits for.
    """

    epoch: int = 0
    step_in_epoch: int = 0
    metrics: dict = dataclasses.field(default_factory=dict)
    best_epoch: int = 0
    best_value: float = None
    history: list = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    def __str__(self):
        if not self.epoch and not self.step_in_epoch:
            return "the start"
        return f"epoch {self.epoch + 1}, step {self.step_in_epoch}" if self.step_in_epoch else f"epoch {self.epoch}"

    def position(self):
        """`(epoch, step)` from 0 of the batch that comes next."""
        return self.epoch, self.step_in_epoch

    def end_step(self):
        """Counts a step of the present epoch."""
        self.step_in_epoch += 1

    def end_epoch(self, logs, metric):
        """Counts the present epoch, which has logged `logs`; whether it is the best by `metric`, a name in them."""
        self.epoch, self.step_in_epoch, self.metrics = self.epoch + 1, 0, {}
        self.history.append({"epoch": self.epoch, **logs})
        value = logs.get(metric)
        if value is None or (self.best_value is not None and value <= self.best_value):
            return False
        self.best_value, self.best_epoch = value, self.epoch
        return True

    def keep_metrics(self, model):
        """Takes the running means of the logged terms from a model."""
        # In the scope of a strategy they are those of all its devices.
        with model.distribute_strategy.scope():
            self.metrics = {
                metric.name: [tf.convert_to_tensor(variable).numpy().tolist() for variable in metric.variables]
                for metric in model.metrics
            }

    def restore_metrics(self, model):
        """Gives a model the running means back."""
        with model.distribute_strategy.scope():
            for metric in model.metrics:
                for variable, value in zip(metric.variables, self.metrics.get(metric.name, ())):
                    variable.assign(np.asarray(value, tf.as_dtype(variable.dtype).as_numpy_dtype))


class Checkpoints:
    """The checkpoints of a run: folders of the model with its optimizer, the `RunState`, and digests of both.

    One that is damaged, in whatever byte, is never taken: it is moved aside, and the one before it counts.

    Args:
        workdir: folder of the run.
        kept: int >= 1, the last ones that are kept, beside the best.
        metric: name in the logs of what the best checkpoint is chosen by, or None: there is no best.

    Attributes:
        folder: where they are.
        latest: `RunState` of the last that was written or restored; a new one before.
    """

    def __init__(self, workdir, kept=2, metric=None):
        self.folder = os.path.join(workdir, "checkpoints")
        self.kept = kept
        self.metric = metric
        self.latest = RunState()
        self._latest_name = None

    def restore(self):
        """`(model, state)` of the last checkpoint that can be read; `(None, RunState())` where there are none yet.

        Raises:
            ValueError: there are checkpoints, and none can be read.
        """
        names = self._names()
        if os.path.isdir(self.folder):
            remove_leftovers(self.folder)
        unreadable = {}
        for name in reversed(names):
            try:
                model, state = self._read(name)
                break
            except _UnreadableError as error:
                unreadable[name] = error
        else:
            aside = [name for name in self._listed() if name.startswith(UNREADABLE)]
            if unreadable or aside:
                told = [*(f"{name} ({error})" for name, error in unreadable.items()), *aside]
                raise ValueError(
                    f"{self.folder}: expected a checkpoint that can be read. Received: {', '.join(told)}. Put one back "
                    "from a copy, or delete the folder to train anew"
                )
            return None, RunState()
        for name, error in unreadable.items():
            self._move_aside(name, error, f"the run goes on from {name_of(state)}")
        self._latest_name, self.latest = name_of(state), dataclasses.replace(state)
        self._check_best(state)
        return model, state

    def sweep(self):
        """Removes what a killed process left, and moves checkpoints aside that are damaged, but loads none.

        For one of several workers, before any of them loads the last.
        """
        if not os.path.isdir(self.folder):
            return
        remove_leftovers(self.folder)
        for name in reversed(self._names()):
            try:
                _verify(os.path.join(self.folder, name))
                return
            except _UnreadableError as error:
                self._move_aside(name, error, "the one before it is taken")

    def save(self, model, state):
        """Writes a checkpoint, whole or not at all, and removes those that are not kept any more.

        Raises:
            OutOfSpace: it could not be written; the others are as they were.
        """
        name = name_of(state)
        # It is there already, where nothing was trained since.
        if name != self._latest_name:
            with replacing(os.path.join(self.folder, name)) as folder:
                os.makedirs(folder)
                model.save(os.path.join(folder, _MODEL))
                write_json(os.path.join(folder, _STATE), dataclasses.asdict(state))
                digests = {file: sha256(os.path.join(folder, file)) for file in (_MODEL, _STATE)}
                write_json(os.path.join(folder, _DIGESTS), digests)
            self._latest_name, self.latest = name, dataclasses.replace(state)
        for other in self._names()[: -self.kept]:
            if other != name_of(RunState(epoch=state.best_epoch)):
                shutil.rmtree(os.path.join(self.folder, other))

    def load_latest(self):
        """The model of the last checkpoint that was written or restored."""
        return self._read(self._latest_name)[0]

    def load_best(self, state):
        """The model of the best epoch; where its checkpoint is damaged, of the best one that is there."""
        while state.best_epoch:
            try:
                return self._read(name_of(RunState(epoch=state.best_epoch)))[0]
            except _UnreadableError:
                self._check_best(state)
        raise ValueError(f"{self.folder}: expected the checkpoint of an epoch that was evaluated. Received: none")

    def _check_best(self, state):
        """Has the state name another best epoch where the checkpoint of its own cannot be read."""
        while state.best_epoch:
            name, reason = name_of(RunState(epoch=state.best_epoch)), "it is missing"
            if os.path.lexists(os.path.join(self.folder, name)):
                try:
                    _verify(os.path.join(self.folder, name))
                    return
                except _UnreadableError as error:
                    reason = error
            values = {row["epoch"]: row[self.metric] for row in state.history if self.metric in row}
            there = [int(found[1]) for found in map(_NAME.fullmatch, self._names()) if not found[2]]
            rest = [epoch for epoch in there if epoch in values and epoch != state.best_epoch]
            state.best_epoch = max(rest, key=values.get, default=0)
            state.best_value = values.get(state.best_epoch)
            advice = f"the best checkpoint is now that of epoch {state.best_epoch}" if rest else "the next is the best"
            if reason == "it is missing":
                logging.warning("%s was the best checkpoint and is missing: %s", name, advice)
            else:
                self._move_aside(name, reason, advice)

    def _read(self, name):
        folder = os.path.join(self.folder, name)
        has_digests = _verify(folder)
        try:
            fields = read_json(os.path.join(folder, _STATE))
            return load_model(os.path.join(folder, _MODEL)), RunState(**fields)
        except (ImportError, MemoryError, PermissionError):
            raise
        except Exception as error:
            # Where the files are what was written, it is not for the checkpoint that they cannot be taken.
            if has_digests:
                raise
            raise _UnreadableError(" ".join(str(error).split()) or repr(error)) from error

    def _move_aside(self, name, reason, advice):
        logging.warning("%s cannot be read and is moved aside: %s; %s", os.path.join(self.folder, name), reason, advice)
        target, count = os.path.join(self.folder, UNREADABLE + name), 1
        while os.path.lexists(target):
            count += 1
            target = os.path.join(self.folder, f"{UNREADABLE}{name}_{count}")
        os.rename(os.path.join(self.folder, name), target)

    def _names(self):
        """Names of the checkpoints, in the order in which they were trained."""
        return sorted(name for name in self._listed() if _NAME.fullmatch(name))

    def _listed(self):
        return os.listdir(self.folder) if os.path.isdir(self.folder) else []


class _UnreadableError(Exception):
    """A checkpoint is damaged; the message says how."""


def name_of(state):
    """The name of a checkpoint's folder."""
    return f"epoch_{state.epoch:06d}" + (f"_step_{state.step_in_epoch:06d}" if state.step_in_epoch else "")


def _verify(folder):
    """Raises `_UnreadableError` where a file is not what was written; whether there are digests to tell by."""
    try:
        if not os.path.isdir(folder):
            raise _UnreadableError("it is no folder")
        for file in (_MODEL, _STATE):
            if not os.path.exists(os.path.join(folder, file)):
                raise _UnreadableError(f"{file} is missing")
        if not os.path.exists(os.path.join(folder, _DIGESTS)):
            return False
        digests = read_json(os.path.join(folder, _DIGESTS))
        for file in (_MODEL, _STATE):
            if digests.get(file) != sha256(os.path.join(folder, file)):
                raise _UnreadableError(f"{file} is not what was written, by its sha256")
    except PermissionError:
        raise
    except (OSError, ValueError, AttributeError) as error:
        raise _UnreadableError(" ".join(str(error).split())) from error
    return True
