"""One training run in a work directory: train, resume, stop."""

import contextlib
import os
import shutil
import sys
import tempfile

from absl import logging

from s2sd_tf.files import OutOfSpace, read_json, remove_leftovers, write_json
from s2sd_tf.training import strategies
from s2sd_tf.training.build import build_batches, build_model, build_sampler, precision, set_up, steps_per_epoch
from s2sd_tf.training.callbacks import Refresh, TensorBoard, evaluation_callbacks
from s2sd_tf.training.checkpoints import Checkpoints
from s2sd_tf.training.collapse_alarm import CollapseAlarm
from s2sd_tf.training.config import resolve
from s2sd_tf.training.datasets import load_data
from s2sd_tf.training.finishing import finish
from s2sd_tf.training.finite_loss import FiniteLoss
from s2sd_tf.training.interruption import Interrupted, Interruption
from s2sd_tf.training.progress import Progress, fit
from s2sd_tf.training.record import check_data, record_session
from s2sd_tf.training.step_timer import StepTimer
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
            out every batch; see `strategies.get`. None: on one device.

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

    checkpoints = Checkpoints(workdir, config.train.checkpoints_kept, _selects_by(config))
    try:
        with Interruption() as interruption, precision(config):
            if strategies.is_chief(strategy):
                return _train(config, workdir, checkpoints, interruption, strategy)
            return _follow(config, workdir, interruption, strategy)
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


def _follow(config, workdir, interruption, strategy):
    """What a worker does that is not the chief: the same, in a folder of its own that is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="s2sd_tf-worker-") as own:
        checkpoints = Checkpoints(own, config.train.checkpoints_kept, _selects_by(config))
        return _train(config, own, checkpoints, interruption, strategy, workdir)


def _train(config, workdir, checkpoints, interruption, strategy=None, of_chief=None):
    """`of_chief`: the chief's work directory, in a worker that is not the chief."""
    workers = strategies.has_workers(strategy)
    with interruption.prompt():
        set_up(config)
        run_data = load_data(config)
        fingerprints = check_data(of_chief or workdir, run_data)
        if workers:
            _share_checkpoints(strategy, checkpoints, of_chief)
        with contextlib.nullcontext() if strategy is None else strategy.scope():
            model, state = checkpoints.restore()
            if model is None:
                model = build_model(config, run_data)
            else:
                logging.info("Resuming after %s", state)
        if workers and len({tuple(place) for place in strategies.of_all(strategy, state.position())}) > 1:
            raise ValueError(
                f"workdir: expected a folder that all workers see. Received: {of_chief or workdir!r}, in which they "
                "find checkpoints that differ"
            )
        sampler = build_sampler(config)
        sampler.check(run_data.train.labels)
        steps = steps_per_epoch(config, run_data)
        timer = StepTimer()

        def batches(input_context=None):
            replicas = 1 if input_context is None else input_context.num_replicas_in_sync
            dataset = build_batches(config, run_data, sampler, state.position, input_context)
            return timer.timed(dataset, sampler.batch_size // replicas)

        if os.path.isdir(workdir):
            remove_leftovers(workdir)
        # Only now, as a config that cannot be trained should leave nothing behind.
        write_json(os.path.join(workdir, "config.json"), config.to_dict())
        record_session(workdir, config, fingerprints, model, state, strategies.described(strategy))

    callbacks = _callbacks(config, run_data, sampler, steps, workdir, state, checkpoints, interruption, timer, strategy)
    verbose = 0 if of_chief else 1 if sys.stdout.isatty() else 2
    try:
        fit(
            model,
            batches() if strategy is None else batches,
            steps,
            config.train.epochs,
            state,
            callbacks,
            verbose,
            strategy,
        )
    except Interrupted:
        trained = state.position() != checkpoints.latest.position()
        # What a storage chooses takes the model as it was at the epoch's begin; and one worker cannot save alone.
        if trained and not workers and (sampler.storage is None or state.step_in_epoch in (0, steps)):
            callbacks[-1].save_place()
        raise
    with interruption.prompt():
        results = finish(config, run_data, workdir, checkpoints, state, model)
        if workers:
            # Whoever left before the others would count as lost.
            strategies.of_all(strategy, [0])
        return results


def _share_checkpoints(strategy, checkpoints, of_chief):
    """Gives a worker that is not the chief a copy of the chief's checkpoints, once that has looked them over."""
    if of_chief is None:
        checkpoints.sweep()
    strategies.of_all(strategy, [0])
    if of_chief is not None:
        there = Checkpoints(of_chief).folder
        if os.path.isdir(there):
            shutil.copytree(there, checkpoints.folder)
    strategies.of_all(strategy, [0])


def _callbacks(config, run_data, sampler, steps, workdir, state, checkpoints, interruption, timer, strategy):
    """The callbacks of a run in their order, `Progress` being the last."""
    finite_loss = FiniteLoss(run_data.train, sampler, steps, config.seed, lambda: str(checkpoints.latest))
    callbacks = [finite_loss]
    if sampler.storage is not None:
        callbacks.append(
            Refresh(
                sampler,
                run_data.train,
                run_data.preprocessing,
                seed=config.seed,
                start_epoch=state.epoch,
                interruption=interruption,
                timer=timer,
            )
        )
    progress = Progress(
        state,
        checkpoints,
        workdir,
        config.train.checkpoint_every,
        config.train.epochs,
        interruption,
        timer,
        finite_loss,
        strategy,
    )
    return [
        *callbacks,
        *evaluation_callbacks(config, run_data, interruption, timer),
        timer,
        CollapseAlarm(),
        TensorBoard(workdir, config.train.profile),
        progress,
    ]


def _selects_by(config):
    """The metric in the logs by which the best checkpoint is chosen, or None: the last is the best."""
    held_out = config.data.validation_classes or config.data.validation_fraction
    return f"val_{config.eval.select_by}" if held_out else None
