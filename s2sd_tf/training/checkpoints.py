"""Checkpoints of a run, with digests by which damage is detected."""

import dataclasses
import os
import re
import shutil
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from s2sd_tf.export import load_model
from s2sd_tf.files import local_path, read_json, remove_leftovers, replacing, sha256, write_json
from s2sd_tf.models import S2SDModel

# Prefix of the names of checkpoints that could not be read and were moved aside.
UNREADABLE = "unreadable_"

_NAME = re.compile(r"epoch_(\d{6})(?:_step_(\d{6}))?")
_MODEL, _STATE, _DIGESTS = "model.keras", "state.json", "sha256.json"


@dataclasses.dataclass
class RunState:
    """The progress of a run.

    Attributes:
        epoch: the number of finished epochs.
        step_in_epoch: the number of finished steps in the next epoch. After its last step the epoch is still unfinished
            until it is evaluated.
        metrics: maps the name of a metric to the values of its variables, summed over these steps; empty at 0 steps.
        best_epoch, best_value: the epoch with the best metric on held-out classes or images, and that metric; at first
            0 and None.
        history: the logs of the finished epochs.
        seconds: time of the epochs with their evaluations, without saving checkpoints.
    """

    epoch: int = 0
    step_in_epoch: int = 0
    metrics: dict[str, list] = dataclasses.field(default_factory=dict)
    best_epoch: int = 0
    best_value: float | None = None
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        if not self.epoch and not self.step_in_epoch:
            return "the start"
        return f"epoch {self.epoch + 1}, step {self.step_in_epoch}" if self.step_in_epoch else f"epoch {self.epoch}"

    def position(self) -> tuple[int, int]:
        """`(epoch, step)` of the next batch, both from 0."""
        return self.epoch, self.step_in_epoch

    def end_step(self) -> None:
        """Counts a step of the current epoch."""
        self.step_in_epoch += 1

    def end_epoch(self, logs: dict[str, float], metric: str | None) -> bool:
        """Ends the current epoch and keeps its logs. Returns whether it is the best so far by `metric`, a log name."""
        self.epoch, self.step_in_epoch, self.metrics = self.epoch + 1, 0, {}
        self.history.append({"epoch": self.epoch, **logs})
        value = None if metric is None else logs.get(metric)
        if value is None or (self.best_value is not None and value <= self.best_value):
            return False
        self.best_value, self.best_epoch = value, self.epoch
        return True

    def keep_metrics(self, model: S2SDModel) -> None:
        """Copies the running means of the logged terms from a model."""
        # In the scope of a strategy, the values are those over all its devices.
        with model.distribute_strategy.scope():
            self.metrics = {
                metric.name: [tf.convert_to_tensor(variable).numpy().tolist() for variable in metric.variables]
                for metric in model.metrics
            }

    def restore_metrics(self, model: S2SDModel) -> None:
        """Copies the running means back to a model."""
        with model.distribute_strategy.scope():
            for metric in model.metrics:
                for variable, value in zip(metric.variables, self.metrics.get(metric.name, ())):
                    variable.assign(np.asarray(value, tf.as_dtype(variable.dtype).as_numpy_dtype))


class Checkpoints:
    """The checkpoints of a run: folders with the model and its optimizer, the `RunState`, and digests of both.

    A checkpoint with any damaged byte is never loaded: it is moved aside, and the previous one is used.

    Args:
        workdir: work directory of the run.
        kept: >= 1, the number of latest checkpoints to keep, besides the best one.
        metric: the log name that chooses the best checkpoint; None: there is no best one.

    Attributes:
        folder: the folder of the checkpoints.
        latest: state of the checkpoint that was last written or restored; at first a new `RunState`.
    """

    def __init__(self, workdir: str | os.PathLike, kept: int = 2, metric: str | None = None) -> None:
        self.folder = os.path.join(local_path("workdir", workdir), "checkpoints")
        self.kept = kept
        self.metric = metric
        self.latest = RunState()
        self._latest_name: str | None = None

    def restore(self) -> tuple[S2SDModel | None, RunState]:
        """Loads the latest readable checkpoint.

        Returns:
            `(model, state)`; `(None, RunState())` if there are no checkpoints yet.

        Raises:
            ValueError: there are checkpoints, but none of them can be read.
        """
        names = self._names()
        if os.path.isdir(self.folder):
            remove_leftovers(self.folder)
        unreadable: dict[str, _UnreadableError] = {}
        for name in reversed(names):
            try:
                model, state = self._read(name)
                break
            except _UnreadableError as error:
                unreadable[name] = error
        else:
            aside = [name for name in self._listed() if name.startswith(UNREADABLE)]
            if unreadable or aside:
                found = [*(f"{name} ({reason})" for name, reason in unreadable.items()), *aside]
                raise ValueError(
                    f"{self.folder}: expected a readable checkpoint. Received: {', '.join(found)}. Restore one from a "
                    "backup, or delete the folder to train from scratch"
                )
            return None, RunState()
        for name, reason in unreadable.items():
            self._move_aside(name, reason, f"the run resumes from {name_of(state)}")
        self._latest_name, self.latest = name_of(state), dataclasses.replace(state)
        self._check_best(state)
        return model, state

    def sweep(self) -> None:
        """Removes the leftovers of killed processes and moves damaged checkpoints aside, without loading any.

        With several workers, one of them calls it before any of them loads the latest checkpoint.
        """
        if not os.path.isdir(self.folder):
            return
        remove_leftovers(self.folder)
        for name in reversed(self._names()):
            try:
                _verify(os.path.join(self.folder, name))
                return
            except _UnreadableError as error:
                self._move_aside(name, error, "the previous one is used")

    def save(self, model: S2SDModel, state: RunState) -> None:
        """Writes a checkpoint atomically, and removes old ones that are no longer kept.

        Raises:
            OutOfSpace: the checkpoint could not be written; the others are unchanged.
        """
        name = name_of(state)
        # If nothing was trained since, it exists already.
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

    def load_latest(self) -> S2SDModel:
        """Loads the model of the checkpoint that was last written or restored."""
        return self._read(self._latest_name)[0]

    def load_best(self, state: RunState) -> S2SDModel:
        """Loads the model of the best epoch. If its checkpoint is damaged, takes the next best and updates `state`."""
        while state.best_epoch:
            try:
                return self._read(name_of(RunState(epoch=state.best_epoch)))[0]
            except _UnreadableError:
                self._check_best(state)
        raise ValueError(f"{self.folder}: expected a readable checkpoint of an evaluated epoch. Received: none")

    def _check_best(self, state):
        """Changes the best epoch in `state` if its checkpoint cannot be read."""
        while state.best_epoch:
            name = name_of(RunState(epoch=state.best_epoch))
            reason: str | _UnreadableError = "it is missing"
            if os.path.lexists(os.path.join(self.folder, name)):
                try:
                    _verify(os.path.join(self.folder, name))
                    return
                except _UnreadableError as error:
                    reason = error
            values = {row["epoch"]: row[self.metric] for row in state.history if self.metric in row}
            there = [int(found[1]) for found in map(_NAME.fullmatch, self._names()) if found and not found[2]]
            rest = [epoch for epoch in there if epoch in values and epoch != state.best_epoch]
            state.best_epoch = max(rest, key=values.__getitem__, default=0)
            state.best_value = values.get(state.best_epoch)
            advice = f"the best checkpoint is now epoch {state.best_epoch}" if rest else "the next one will be the best"
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
            # The files are undamaged, so the error has another cause than the checkpoint.
            if has_digests:
                raise
            raise _UnreadableError(" ".join(str(error).split()) or repr(error)) from error

    def _move_aside(self, name, reason, advice):
        logging.warning(
            "%s cannot be read and was moved aside: %s; %s", os.path.join(self.folder, name), reason, advice
        )
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
    """A checkpoint is damaged; the message says in what way."""


def name_of(state: RunState) -> str:
    """The folder name of the checkpoint for a state."""
    return f"epoch_{state.epoch:06d}" + (f"_step_{state.step_in_epoch:06d}" if state.step_in_epoch else "")


def _verify(folder):
    """Raises `_UnreadableError` if a file differs from what was written. Returns whether there are digests to check."""
    try:
        if not os.path.isdir(folder):
            raise _UnreadableError("it is not a folder")
        for file in (_MODEL, _STATE):
            if not os.path.exists(os.path.join(folder, file)):
                raise _UnreadableError(f"{file} is missing")
        if not os.path.exists(os.path.join(folder, _DIGESTS)):
            return False
        digests = read_json(os.path.join(folder, _DIGESTS))
        for file in (_MODEL, _STATE):
            if digests.get(file) != sha256(os.path.join(folder, file)):
                raise _UnreadableError(f"{file} has changed: its sha256 differs")
    except PermissionError:
        raise
    except (OSError, ValueError, AttributeError) as error:
        raise _UnreadableError(" ".join(str(error).split())) from error
    return True
