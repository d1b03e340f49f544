"""One training run in a work directory: train, resume, stop, and what the parts of a run are built from."""

import contextlib
import json
import os
import shutil
import sys
import tempfile

import tensorflow as tf
from absl import logging
from ml_collections import config_dict

from s2sd_tf import mining, objectives
from s2sd_tf.data import Preprocessing, samplers, training_batches
from s2sd_tf.files import LEFTOVER, OutOfSpace, read_json, remove_leftovers, write_json
from s2sd_tf.keras_compat import keras
from s2sd_tf.models import S2SDModel, backbones
from s2sd_tf.training import optimizers, strategies
from s2sd_tf.training.callbacks import Refresh, TensorBoard, evaluation_callbacks
from s2sd_tf.training.checkpoints import Checkpoints
from s2sd_tf.training.collapse_alarm import CollapseAlarm
from s2sd_tf.training.config import default_config, resolve, unknown_keys
from s2sd_tf.training.datasets import load_data
from s2sd_tf.training.embedding import load_model
from s2sd_tf.training.finishing import finish
from s2sd_tf.training.finite_loss import FiniteLoss
from s2sd_tf.training.interruption import Interrupted, Interruption
from s2sd_tf.training.progress import Progress, fit
from s2sd_tf.training.record import check_data, record_session
from s2sd_tf.training.step_timer import StepTimer
from s2sd_tf.untrusted import read_json_object, reading


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
    _check_workdir(config, workdir)
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


def steps_per_epoch(config, run_data):
    """Batches of an epoch of a resolved config."""
    batch = config.data.classes_per_batch * config.data.samples_per_class
    return config.train.steps_per_epoch or max(1, len(run_data.train) // batch)


@contextlib.contextmanager
def precision(config):
    """Within the block the layers that are made compute in what a resolved config says; Keras's global policy is put
    back at the end.
    """
    before = keras.mixed_precision.global_policy()
    keras.mixed_precision.set_global_policy(config.train.precision)
    try:
        yield
    finally:
        keras.mixed_precision.set_global_policy(before)


def set_up(config):
    """Threads, determinism and seeds, as a resolved config says; before anything of TensorFlow has run."""
    if config.train.threads:
        tf.config.threading.set_intra_op_parallelism_threads(config.train.threads)
        tf.config.threading.set_inter_op_parallelism_threads(config.train.threads)
    if config.train.deterministic:
        tf.config.experimental.enable_op_determinism()
    keras.utils.set_random_seed(config.seed)


def build_batches(config, run_data, sampler, position=None, input_context=None):
    """The training batches of a resolved config; `position` and `input_context` are those of `training_batches`."""
    return training_batches(
        run_data.train,
        run_data.preprocessing,
        sampler,
        steps_per_epoch=config.train.steps_per_epoch or None,
        seed=config.seed,
        position=position,
        augmentation=run_data.augmentation,
        input_context=input_context,
    )


def build_model(config, run_data):
    """The compiled `S2SDModel` of a resolved config."""
    settings = {}
    if config.model.backbone == "conv_blocks":
        settings = {"filters": tuple(config.model.filters), "pools": config.model.pools}
    backbone = backbones.get(
        config.model.backbone,
        run_data.preprocessing.output_shape,
        weights=config.model.weights or None,
        frozen_bn=config.model.frozen_bn or None,
        **settings,
    )
    enabled = config.s2sd.enabled
    target = config.s2sd.target_objective or config.objective.name
    model = S2SDModel(
        backbone,
        config.model.embedding_dim,
        objective=_objective(config, config.objective.name, run_data),
        target_objective=_objective(config, target, run_data),
        target_dims=config.s2sd.target_dims if enabled else (),
        pooling=config.model.pooling,
        target_pooling=config.s2sd.target_pooling if enabled else config.model.pooling,
        temperature=config.s2sd.temperature,
        distill_weight=config.s2sd.distill_weight,
        distill_warmup_steps=config.s2sd.distill_warmup_steps,
        feature_distill=config.s2sd.feature_distill and enabled,
        feature_distill_weight=config.s2sd.feature_distill_weight,
        feature_distill_delay=config.s2sd.feature_distill_delay,
        feature_distill_warmup_steps=config.s2sd.feature_distill_warmup_steps,
        num_classes=run_data.train.num_classes,
        l2=config.optimizer.l2,
        learning_rate_multipliers={
            "backbone": config.optimizer.backbone_multiplier,
            "heads": config.optimizer.heads_multiplier,
            "objectives": config.optimizer.objectives_multiplier,
            **_layer_multipliers(config),
        },
        log_per_target=config.s2sd.log_per_target,
        similarities=config.train.similarities,
        micro_batch_size=config.train.micro_batch_size or None,
        diagnostics=config.train.diagnostics,
    )
    learning_rate = build_schedule(config, run_data)
    optimizer = optimizers.get(config.optimizer.name, learning_rate, config.optimizer.settings.to_dict())
    model.compile(optimizer=optimizer, jit_compile=config.train.jit_compile)
    return model


def build_schedule(config, run_data):
    """The learning rate of a resolved config, a float or a Keras schedule."""
    return optimizers.schedule(
        config.optimizer.learning_rate,
        steps_per_epoch=steps_per_epoch(config, run_data),
        epochs=config.train.epochs,
        **config.optimizer.schedule,
    )


def _layer_multipliers(config):
    found = {}
    for entry in config.optimizer.layers:
        pattern, _, factor = str(entry).rpartition("=")
        try:
            found[f"backbone/{pattern}"] = float(factor)
        except ValueError:
            pattern = ""
        if not pattern:
            raise ValueError(
                f"config.optimizer.layers: expected '<pattern of layer names>=<factor>'. Received: {entry!r}"
            )
    return found


def build_sampler(config):
    """The `samplers.Sampler` of a resolved config."""
    name = config.sampler.name
    given = {
        "classes_per_batch": config.data.classes_per_batch,
        "samples_per_class": config.data.samples_per_class,
        "batch_size": config.data.classes_per_batch * config.data.samples_per_class,
    }
    known = samplers.settings(name)
    return samplers.get(name, **config.sampler[name], **{key: given[key] for key in given if key in known})


def load_run(workdir):
    """`(model, config, preprocessing)` of a finished work directory; the model is the chosen one.

    Raises:
        FileNotFoundError: no finished run there.
    """
    paths = {name: os.path.join(workdir, name) for name in ("config.json", "preprocessing.json", "best.keras")}
    for name, path in paths.items():
        if not os.path.exists(path):
            raise FileNotFoundError(f"workdir: expected a finished run, with {name}. Received: {workdir!r}")
    config = config_dict.FrozenConfigDict(_stored_config(paths["config.json"]))
    preprocessing = Preprocessing.load(paths["preprocessing.json"])
    return load_model(paths["best.keras"]), config, preprocessing


def _selects_by(config):
    """The metric in the logs by which the best checkpoint is chosen, or None: the last is the best."""
    held_out = config.data.validation_classes or config.data.validation_fraction
    return f"val_{config.eval.select_by}" if held_out else None


def _check_workdir(config, workdir):
    """Refuses a work directory that another config wrote, or that is something else."""
    path = os.path.join(workdir, "config.json")
    if os.path.exists(path):
        there = config_dict.FrozenConfigDict(_stored_config(path)).to_dict()
        differing = sorted(_differences(_used(there), _used(config.to_dict())))
        if differing:
            raise ValueError(
                f"workdir: expected a new folder or one written by this config. Received: {workdir!r}, whose config "
                f"differs in {', '.join(differing)}"
            )
    elif os.path.exists(workdir) and (
        not os.path.isdir(workdir) or any(not name.startswith(LEFTOVER) for name in os.listdir(workdir))
    ):
        raise ValueError(f"workdir: expected a new or empty folder, or that of a run. Received: {workdir!r}")


def _stored_config(path):
    """The config of a run, as a dict; keys that there were not when it began have their defaults.

    Raises:
        ValueError: it is no config, or has keys that there are no more.
    """

    def fill(defaults, stored):
        for key, value in defaults.items():
            if not isinstance(value, dict):
                stored.setdefault(key, value)
            elif isinstance(stored.setdefault(key, value), dict):
                fill(value, stored[key])
            else:
                raise ValueError(f"{key} is {stored[key]!r}, no section")
        return stored

    stored = read_json_object(path)
    with reading(path, "the config of a run"):
        config = config_dict.ConfigDict(fill(json.loads(default_config().to_json()), stored)).to_dict()
    unknown = unknown_keys(config)
    if unknown:
        raise ValueError(
            f"{path}: expected the keys of this version's configs. Received: {', '.join(unknown)}, of a run that an "
            "older version wrote: begin in a new folder"
        )
    return config


def _used(config):
    """The config without the settings of data sets, objectives, miners and samplers that the run does not use.

    So that a run can go on where more of them are known than when it began.
    """
    config = dict(config)
    objective, sampler = config["objective"], config.get("sampler", {})
    names = {objective["name"], config["s2sd"]["target_objective"] or objective["name"]}
    config["objective"] = {"name": objective["name"], **{name: objective.get(name) for name in names}}
    config["sampler"] = {key: sampler.get(key) for key in ("name", sampler.get("name"))}
    sections = [settings for settings in config["objective"].values() if isinstance(settings, dict)]
    miners = {settings["miner"] for settings in sections if "miner" in settings}
    config["miner"] = {name: config.get("miner", {}).get(name) for name in miners}
    kept = (config["data"]["name"], "augmentation_settings")
    config["data"] = {key: value for key, value in config["data"].items() if key in kept or not isinstance(value, dict)}
    return config


def _differences(one, other, prefix=""):
    for key in one.keys() | other.keys():
        a, b = one.get(key), other.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key} ({a!r} there, {b!r} here)"


def _objective(config, name, run_data):
    uses_classes = objectives.lookup(name).uses_classes
    settings = dict(config.objective[name])
    if "miner" in settings:
        settings["miner"] = mining.get(settings["miner"], **config.miner.get(settings["miner"], {}))
    if "seed" in objectives.settings(name):
        settings["seed"] = config.seed
    if uses_classes:
        settings["num_classes"] = run_data.train.num_classes
    return objectives.get(name, **settings)
