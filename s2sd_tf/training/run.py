"""One training run in a work directory: train, resume, stop."""

import contextlib
import os
import shutil
import tempfile

import tensorflow as tf
from absl import logging

from s2sd_tf.files import OutOfSpace, read_json, remove_leftovers, write_json
from s2sd_tf.training import strategies
from s2sd_tf.training.build import build_model, build_sampler, precision, set_up
from s2sd_tf.training.checkpoints import Checkpoints
from s2sd_tf.training.config import resolve
from s2sd_tf.training.datasets import load_data
from s2sd_tf.training.finishing import finish
from s2sd_tf.training.interruption import Interrupted, Interruption
from s2sd_tf.training.loop import Loop, Run
from s2sd_tf.training.record import check_data, record_session
from s2sd_tf.training.workdir import check_workdir


def train(config, workdir, strategy=None):
    """Trains as `config` says, in `workdir`; called again, goes on where it was and ends with the same weights.

    The work directory holds `config.json`, `run.json` (what the run was, see `record_session`), `checkpoints/`,
    `history.csv`, `tensorboard/`, and at the end `best.keras`, `preprocessing.json`, `results.json`, `curves.png`,
    `gallery.png` and `saved_model/`. Every file is whole or not there.

    On SIGTERM, and on the first Ctrl-C, the step in progress ends, what was trained so far is saved, and the function
    raises `Interrupted`; outside of the training steps it raises at once, and nothing is lost either. For a sampler
    with stored embeddings, whose choice takes the model of the epoch's begin, steps of an epoch that was not ended are
    not saved. A second Ctrl-C ends it at once, as SIGKILL does, and it goes on after the last checkpoint. One whose
    files are damaged is moved aside, and the one before it is taken.

    Under MultiWorkerMirroredStrategy all processes are called alike, with a work directory that all of them can read
    and the chief writes. Where one of them is lost or stopped, the others end with `Interrupted`, and all are called
    again: they go on after the last checkpoint.

    Args:
        config: `ConfigDict` with the keys of `default_config`.
        workdir: folder; made if it is missing.
        strategy: `tf.distribute.MirroredStrategy` or `MultiWorkerMirroredStrategy` to train under, whose replicas share
            out every batch; see `strategies.get`. Default: on one device.

    Returns:
        The content of `results.json`.

    Raises:
        ValueError: a bad config, data that do not fit it or are others than when the run began, a work directory
            written by another config, or one in which no checkpoint can be read.
        ImportError: something of tensorflow-addons is asked for on the default stack.
        Interrupted: it was asked to stop, and can go on; a `SystemExit` with code 75.
        NonFiniteLoss: the loss became NaN or infinite.
        OutOfSpace: there is no room to write; the run can go on once there is.
    """
    config = resolve(config)
    check_workdir(config, workdir)
    results_path = os.path.join(workdir, "results.json")
    if os.path.exists(results_path):
        logging.info("%s is finished; its results are in %s", workdir, results_path)
        return read_json(results_path)

    if strategy is None:
        strategy = tf.distribute.get_strategy()
    with _own_folder(workdir, strategy) as own:
        checkpoints = Checkpoints(own, config.train.checkpoints_kept, _selects_by(config))
        with _what_to_do(checkpoints, strategy), Interruption() as interruption, precision(config):
            with interruption.interruptible():
                run = _begin(config, workdir, checkpoints, strategy, interruption)
            Loop(run).train()
            with interruption.interruptible():
                results = finish(run)
                _wait_for_all(strategy)
            return results


@contextlib.contextmanager
def _own_folder(workdir, strategy):
    """The folder that this process writes to: the chief's is the work directory, the others' are removed at the end."""
    if strategies.is_chief(strategy):
        yield workdir
        return
    with tempfile.TemporaryDirectory(prefix="s2sd_tf-worker-") as own:
        yield own


@contextlib.contextmanager
def _what_to_do(checkpoints, strategy):
    """Has what ends the block say from where the run goes on."""
    try:
        yield
    except Interrupted as error:
        raise Interrupted(
            f"{error}: stopped at {checkpoints.latest}; the same command goes on from there"
        ) from error.__cause__
    except strategies.LOST as error:
        if not strategies.has_workers(strategy):
            raise
        told = f"lost a worker ({str(error).splitlines()[0]})"
        raise Interrupted(f"{told}: the same commands go on after the last checkpoint") from error
    except OutOfSpace as error:
        advice = f". Nothing is lost before {checkpoints.latest}; the same command goes on once there is room"
        raise OutOfSpace(error.path, error.reason, advice) from error


def _begin(config, workdir, checkpoints, strategy, interruption):
    """The `Run`, begun or as its last checkpoint has it; written down in the folder of `checkpoints`."""
    set_up(config)
    run_data = load_data(config)
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
    sampler = build_sampler(config)
    sampler.check(run_data.train.labels)
    own = os.path.dirname(checkpoints.folder)
    if os.path.isdir(own):
        remove_leftovers(own)
    # Only now, as a config that cannot be trained should leave nothing behind.
    write_json(os.path.join(own, "config.json"), config.to_dict())
    record_session(own, config, fingerprints, model, state, strategies.describe(strategy))
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
    """Gives a worker that is not the chief a copy of the chief's checkpoints, once that has looked them over."""
    if strategies.is_chief(strategy):
        checkpoints.sweep()
    _wait_for_all(strategy)
    there = Checkpoints(workdir).folder
    if not strategies.is_chief(strategy) and os.path.isdir(there):
        shutil.copytree(there, checkpoints.folder)
    _wait_for_all(strategy)


def _check_all_stand_alike(strategy, state, workdir):
    """Refuses a work directory in which the workers have found different checkpoints."""
    if len({tuple(place) for place in strategies.all_gather(strategy, state.position())}) > 1:
        raise ValueError(
            f"workdir: expected a folder that all workers see. Received: {workdir!r}, in which they find checkpoints "
            "that differ"
        )


def _wait_for_all(strategy):
    """Waits for all workers; whoever leaves before the others counts as lost."""
    if strategies.has_workers(strategy):
        strategies.all_gather(strategy, [0])


def _selects_by(config):
    """The metric in the logs by which the best checkpoint is chosen, or None: the last is the best."""
    held_out = config.data.validation_classes or config.data.validation_fraction
    return f"val_{config.eval.select_by}" if held_out else None
