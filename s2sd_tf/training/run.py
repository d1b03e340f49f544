"""Trains, resumes or stops a run in a work directory."""

import contextlib
import os
import shutil
import tempfile
from typing import Any

import tensorflow as tf
from absl import logging
from ml_collections import config_dict

from s2sd_tf.data.image_files import naming_unreadable
from s2sd_tf.files import OutOfSpace, local_path, only_writer, read_json, remove_leftovers, write_json
from s2sd_tf.training import strategies
from s2sd_tf.training.build import build_model, build_sampler, precision, set_up, steps_per_epoch, warn_of_short_run
from s2sd_tf.training.checkpoints import Checkpoints
from s2sd_tf.training.config import resolve
from s2sd_tf.training.datasets import divide, load_split
from s2sd_tf.training.finishing import finish
from s2sd_tf.training.interruption import Interrupted, Interruption
from s2sd_tf.training.loop import Loop, Run
from s2sd_tf.training.plan import describe, plan, take_from_run
from s2sd_tf.training.record import check_data, record_session
from s2sd_tf.training.workdir import check_workdir


def train(
    config: config_dict.ConfigDict, workdir: str | os.PathLike, strategy: tf.distribute.Strategy | None = None
) -> dict[str, Any]:
    """Trains a model in `workdir`. If called again after an interruption, resumes and ends with the same weights.

    If called again with a larger `config.train.epochs`, also after the end, the run is trained on, and all results are
    replaced at the new end. The weights are those of a run that had as many epochs from the start. Only a cosine
    schedule depends on the number of epochs, and refuses another one.

    The work directory holds `config.json`, `run.json` (how the run was made, see `record_session`), `checkpoints/`,
    `history.csv`, `tensorboard/`, and at the end `best.keras`, `preprocessing.json`, `results.json`, `curves.png`,
    `gallery.png` and `saved_model/`. Every file is complete or absent.

    On SIGTERM and on the first Ctrl-C, the function finishes the current step, saves the progress and raises
    `Interrupted`. Outside of the training steps it raises at once, and nothing is lost either. A sampler with stored
    embeddings needs the model at the start of the epoch, so steps of an unfinished epoch are not saved for it. A second
    Ctrl-C stops at once, like SIGKILL; the run then resumes from the last checkpoint. A damaged checkpoint is moved
    aside, and the previous one is used.

    Under MultiWorkerMirroredStrategy, make the same call in all processes, with a work directory that all of them can
    read and the chief can write. If one of them is lost or stopped, the others raise `Interrupted`. Call all of them
    again to resume from the last checkpoint.

    Args:
        config: has the keys of `default_config`.
        workdir: created if it does not exist.
        strategy: `tf.distribute.MirroredStrategy` or `MultiWorkerMirroredStrategy`, whose replicas split every batch;
            see `strategies.get`. Default: train on one device.

    Returns:
        The content of `results.json`.

    Raises:
        ValueError: a bad config; data that do not fit it, or differ from the data that the run started with; a work
            directory written by a different config, one that another process is writing, or one with only unreadable
            checkpoints.
        ImportError: the config uses tensorflow-addons, which the default stack does not have.
        Interrupted: the run was asked to stop and can resume; a `SystemExit` with code 75.
        NonFiniteLoss: the loss became NaN or infinite.
        OutOfSpace: the disk is full; the run can resume once there is space.
    """
    workdir = local_path("workdir", workdir)
    config = take_from_run(resolve(config), workdir)
    check_workdir(config, workdir)
    results_path = os.path.join(workdir, "results.json")
    if os.path.exists(results_path):
        results = read_json(results_path)
        if results["epochs"] >= config.train.epochs:
            logging.info("%s is finished; its results are in %s", workdir, results_path)
            return results

    if strategy is None:
        strategy = tf.distribute.get_strategy()
    with _own_folder(workdir, strategy) as own:
        # Again, now that no other process writes it: one may have started the same run just before.
        config = take_from_run(config, workdir)
        check_workdir(config, workdir)
        checkpoints = Checkpoints(own, config.train.checkpoints_kept)
        with _explaining_how_to_resume(checkpoints, strategy), Interruption() as interruption, precision(config):
            with interruption.interruptible():
                run = _begin(config, workdir, checkpoints, strategy, interruption)
            parts = [getattr(run.data, part) for part in ("train", "validation", "test", "gallery")]
            with naming_unreadable(*(images for images in parts if images is not None)):
                Loop(run).train()
            with interruption.interruptible():
                results = finish(run)
                _wait_for_all(strategy)
            return results


@contextlib.contextmanager
def _own_folder(workdir, strategy):
    """The folder that this process writes to: the work directory, locked, for the chief, else a temporary one."""
    if strategies.is_chief(strategy):
        with only_writer("workdir", workdir, inside=True):
            yield workdir
        return
    with tempfile.TemporaryDirectory(prefix="s2sd_tf-worker-") as own:
        yield own


@contextlib.contextmanager
def _explaining_how_to_resume(checkpoints, strategy):
    """Adds to the errors of the block where the run resumes."""
    try:
        yield
    except Interrupted as error:
        raise Interrupted(
            f"{error}: stopped at {checkpoints.latest}; the same command resumes from there"
        ) from error.__cause__
    except strategies.LOST as error:
        if not strategies.has_workers(strategy):
            raise
        reason = f"lost a worker ({str(error).splitlines()[0]})"
        raise Interrupted(f"{reason}; the same commands resume from the last checkpoint") from error
    except OutOfSpace as error:
        advice = f". Make room; the same command then resumes from {checkpoints.latest}"
        raise OutOfSpace(error.path, error.reason, advice) from error


def _begin(config, workdir, checkpoints, strategy, interruption):
    """Starts a `Run`, or resumes it from its last checkpoint, and writes its record beside `checkpoints`."""
    set_up(config)
    split = load_split(config)
    config = plan(config, split, strategy.num_replicas_in_sync)
    checkpoints.metric = _selects_by(config)
    run_data = divide(config, split)
    sampler = build_sampler(config, run_data.train, strategy.num_replicas_in_sync)
    fingerprints = check_data(workdir, run_data)
    if strategies.has_workers(strategy):
        _share_checkpoints(strategy, checkpoints, workdir)
    with strategy.scope():
        model, state = checkpoints.restore()
        if model is None:
            model = build_model(config, run_data)
        else:
            logging.info("Resuming after %s", state)
    if strategies.has_workers(strategy):
        _check_all_stand_alike(strategy, state, workdir)
    own = os.path.dirname(checkpoints.folder)
    if os.path.isdir(own):
        remove_leftovers(own)
    # Only now, because a config that cannot be trained must leave no files.
    write_json(os.path.join(own, "config.json"), config.to_dict())
    record_session(own, config, fingerprints, model, state, strategies.describe(strategy))
    warn_of_short_run(config, run_data)
    if strategy.num_replicas_in_sync == 1:  # else there is no model on one device to time
        done = state.epoch * steps_per_epoch(config, run_data) + state.step_in_epoch
        print(describe(config, run_data, model, done), flush=True)
    return Run(
        config=config,
        data=run_data,
        sampler=sampler,
        model=model,
        state=state,
        checkpoints=checkpoints,
        workdir=own,
        strategy=strategy,
        interruption=interruption,
    )


def _share_checkpoints(strategy, checkpoints, workdir):
    """Copies the chief's checkpoints to this worker, after the chief has moved damaged ones aside."""
    if strategies.is_chief(strategy):
        checkpoints.sweep()
    _wait_for_all(strategy)
    there = Checkpoints(workdir).folder
    if not strategies.is_chief(strategy) and os.path.isdir(there):
        shutil.copytree(there, checkpoints.folder)
    _wait_for_all(strategy)


def _check_all_stand_alike(strategy, state, workdir):
    """Raises ValueError if the workers found different checkpoints in the work directory."""
    if len({tuple(place) for place in strategies.all_gather(strategy, state.position())}) > 1:
        raise ValueError(
            f"workdir: expected a folder that all workers share. Received: {workdir!r}, in which they found different "
            "checkpoints"
        )


def _wait_for_all(strategy):
    """Waits for all workers: a worker that exits before the others counts as lost."""
    if strategies.has_workers(strategy):
        strategies.all_gather(strategy, [0])


def _selects_by(config):
    """The logged metric that chooses the best checkpoint; None: the last one is the best."""
    held_out = config.data.validation_classes or config.data.validation_fraction
    return f"val_{config.eval.select_by}" if held_out else None
