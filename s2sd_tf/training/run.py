"""One training run in a work directory: train, resume, choose, evaluate, export, draw."""

import csv
import dataclasses
import json
import os
import shutil
import sys
import time

import numpy as np
import tensorflow as tf
from absl import logging
from ml_collections import config_dict

from s2sd_tf import mining, objectives
from s2sd_tf.data import Preprocessing, RefreshStorage, evaluation_batches, samplers, training_batches
from s2sd_tf.evaluation import RetrievalEvaluation, find_neighbors, retrieval_metrics
from s2sd_tf.evaluation.pictures import choose_queries, save_curves, save_gallery
from s2sd_tf.export import export_encoder
from s2sd_tf.files import LEFTOVER, read_json, remove_leftovers, replacing, write_json
from s2sd_tf.keras_compat import keras, keras_version
from s2sd_tf.models import S2SDModel, backbones
from s2sd_tf.training import optimizers
from s2sd_tf.training.averages import averaged_weights
from s2sd_tf.training.config import default_config, resolve
from s2sd_tf.training.datasets import load_data
from s2sd_tf.training.input_timer import InputTimer

CHECKPOINTS_KEPT = 2


def train(config, workdir):
    """Trains as `config` says, in `workdir`; called again, goes on where it was and ends with the same weights.

    The work directory holds `config.json`, `checkpoints/`, `history.csv`, `tensorboard/`, and at the end `best.keras`,
    `preprocessing.json`, `results.json`, `curves.png`, `gallery.png` and `saved_model/`.

    Args:
        config: `ConfigDict` with the keys of `default_config`.
        workdir: folder; made if it is missing.

    Returns:
        The content of `results.json`.

    Raises:
        ValueError: a bad config, data that do not fit it, or a work directory written by another config.
        ImportError: something of tensorflow-addons is asked for on the default stack.
    """
    config = resolve(config)
    _check_workdir(config, workdir)
    results_path = os.path.join(workdir, "results.json")
    if os.path.exists(results_path):
        logging.info("%s is finished; its results are in %s", workdir, results_path)
        return read_json(results_path)

    set_up(config)
    run_data = load_data(config)

    state = _State(workdir)
    model = state.restore()
    if model is None:
        model = build_model(config, run_data)
    else:
        logging.info("Resuming after epoch %d from %s", state.epoch, state.path)
    sampler = build_sampler(config)
    batches = build_batches(config, run_data, sampler, state.epoch)
    timer = InputTimer(batches, config.data.classes_per_batch * config.data.samples_per_class)
    if os.path.isdir(workdir):
        remove_leftovers(workdir)
    # Only now, as a config that cannot be trained should leave nothing behind.
    write_json(os.path.join(workdir, "config.json"), config.to_dict())
    if state.epoch < config.train.epochs:
        model.fit(
            timer.batches,
            epochs=config.train.epochs,
            initial_epoch=state.epoch,
            # Keras 3 would warn that it cannot shuffle a dataset.
            shuffle=False,
            callbacks=[timer, *_callbacks(config, run_data, sampler, workdir, state)],
            verbose=1 if sys.stdout.isatty() else 2,
        )
    return _finish(config, run_data, workdir, state, model)


def set_up(config):
    """Threads, determinism and seeds, as a resolved config says; before anything of TensorFlow has run."""
    if config.train.threads:
        tf.config.threading.set_intra_op_parallelism_threads(config.train.threads)
        tf.config.threading.set_inter_op_parallelism_threads(config.train.threads)
    if config.train.deterministic:
        tf.config.experimental.enable_op_determinism()
    keras.utils.set_random_seed(config.seed)


def build_batches(config, run_data, sampler, start_epoch=0):
    """The training batches of a resolved config from an epoch on."""
    return training_batches(
        run_data.train,
        run_data.preprocessing,
        sampler,
        steps_per_epoch=config.train.steps_per_epoch or None,
        seed=config.seed,
        start_epoch=start_epoch,
        augmentation=run_data.augmentation,
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
    )
    learning_rate = build_schedule(config, run_data)
    model.compile(optimizer=optimizers.get(config.optimizer.name, learning_rate, config.optimizer.settings.to_dict()))
    return model


def build_schedule(config, run_data):
    """The learning rate of a resolved config, a float or a Keras schedule."""
    batch = config.data.classes_per_batch * config.data.samples_per_class
    return optimizers.schedule(
        config.optimizer.learning_rate,
        steps_per_epoch=config.train.steps_per_epoch or max(1, len(run_data.train) // batch),
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
    preprocessing = Preprocessing(**read_json(paths["preprocessing.json"]))
    return load_model(paths["best.keras"]), config, preprocessing


def load_model(path):
    """A saved `S2SDModel`, ready to go on training."""
    return keras.models.load_model(path)


def embed(model, images, preprocessing):
    """Embeddings float32 `(n, embedding_dim)` of an `ImageSet`, in its order."""
    return model.predict(evaluation_batches(images, preprocessing), verbose=0)


class _State:
    """Where a run stands: its last checkpoint, best checkpoint and history."""

    def __init__(self, workdir):
        self.folder = os.path.join(workdir, "checkpoints")
        self.epoch = 0
        self.best_epoch = 0
        self.best_value = None
        self.history = []
        self.seconds = 0.0

    @property
    def path(self):
        """Folder of the checkpoint of the present epoch."""
        return os.path.join(self.folder, f"epoch_{self.epoch:06d}")

    @property
    def best_path(self):
        """The model of the best epoch so far, whose checkpoint is kept."""
        return os.path.join(self.folder, f"epoch_{self.best_epoch:06d}", "model.keras")

    def restore(self):
        """The model of the last checkpoint, or None."""
        if not os.path.isdir(self.folder):
            return None
        remove_leftovers(self.folder)
        found = self._checkpoints()
        if not found:
            return None
        folder = os.path.join(self.folder, found[-1])
        vars(self).update(read_json(os.path.join(folder, "state.json")))
        return load_model(os.path.join(folder, "model.keras"))

    def save(self, model):
        """Writes a checkpoint, and removes the others but for the last before it and the best."""
        fields = {name: getattr(self, name) for name in ("epoch", "best_epoch", "best_value", "history", "seconds")}
        with replacing(self.path) as folder:
            os.makedirs(folder)
            model.save(os.path.join(folder, "model.keras"))
            write_json(os.path.join(folder, "state.json"), fields)
        for name in self._checkpoints()[:-CHECKPOINTS_KEPT]:
            if name != f"epoch_{self.best_epoch:06d}":
                shutil.rmtree(os.path.join(self.folder, name))

    def _checkpoints(self):
        return sorted(name for name in os.listdir(self.folder) if name.startswith("epoch_"))


class _Checkpoints(keras.callbacks.Callback):
    """Keeps the history and the checkpoints, the best epoch's among them; comes after whatever adds to the logs."""

    def __init__(self, config, workdir, state, has_validation):
        super().__init__()
        self.config = config
        self.history_path = os.path.join(workdir, "history.csv")
        self.state = state
        self.metric = f"val_{config.eval.select_by}" if has_validation else None

    def on_epoch_begin(self, epoch, logs=None):
        self._begin = time.monotonic()

    def on_epoch_end(self, epoch, logs=None):
        state = self.state
        state.epoch = epoch + 1
        state.seconds += time.monotonic() - self._begin
        state.history.append({"epoch": state.epoch, **{key: float(value) for key, value in (logs or {}).items()}})
        value, improved = (logs or {}).get(self.metric), False
        if value is not None and (state.best_value is None or value > state.best_value):
            state.best_value, state.best_epoch = float(value), state.epoch
            improved = True
        if improved or state.epoch % self.config.train.checkpoint_every == 0 or state.epoch == self.config.train.epochs:
            state.save(self.model)
            _write_history(self.history_path, state.history)


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
    """The config of a run, as a dict; keys that there were not when it began have their defaults."""

    def fill(defaults, stored):
        for key, value in defaults.items():
            if isinstance(value, dict) and isinstance(stored.get(key), dict):
                fill(value, stored[key])
            else:
                stored.setdefault(key, value)
        return stored

    return fill(json.loads(default_config().to_json()), read_json(path))


def _used(config):
    """The config without the settings of objectives, miners and samplers that the run does not use.

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


def _callbacks(config, run_data, sampler, workdir, state):
    callbacks = []
    if sampler.storage is not None:
        callbacks.append(
            RefreshStorage(sampler, run_data.train, run_data.preprocessing, seed=config.seed, start_epoch=state.epoch)
        )
    every = config.eval.every or config.train.epochs
    if run_data.validation is not None:
        callbacks.append(_evaluation(run_data, "validation", None, "val_", config, every))
    callbacks.append(_evaluation(run_data, "test", run_data.gallery, "test_", config, every))
    callbacks.append(keras.callbacks.TensorBoard(os.path.join(workdir, "tensorboard"), write_graph=False))
    callbacks.append(_Checkpoints(config, workdir, state, run_data.validation is not None))
    return callbacks


class _Evaluation(RetrievalEvaluation):
    """With the averaged weights, where the optimizer keeps averages."""

    def on_epoch_end(self, epoch, logs=None):
        with averaged_weights(self.model):
            super().on_epoch_end(epoch, logs)


def _evaluation(run_data, part, gallery, prefix, config, every):
    images = getattr(run_data, part)
    searched = {}
    if gallery is not None:
        searched = {
            "gallery_images": evaluation_batches(gallery, run_data.preprocessing, cache=None),
            "gallery_labels": gallery.labels,
        }
    batches = evaluation_batches(images, run_data.preprocessing, cache=None)
    return _Evaluation(batches, images.labels, every=every, prefix=prefix, ks=config.eval.ks, **searched)


def _finish(config, run_data, workdir, state, model):
    """Chooses the model, evaluates it on the test classes, exports it and draws the pictures."""
    steps = int(tf.convert_to_tensor(model.step))
    if run_data.validation is None:
        state.best_epoch = state.epoch
    else:
        model = load_model(state.best_path)
    with averaged_weights(model):
        results = _evaluate_and_export(config, run_data, workdir, state, model, steps)
    write_json(os.path.join(workdir, "results.json"), results)
    return results


def _evaluate_and_export(config, run_data, workdir, state, model, steps):
    with replacing(os.path.join(workdir, "best.keras")) as temporary:
        model.save(temporary)
    embeddings = embed(model, run_data.test, run_data.preprocessing)
    labels = run_data.test.labels
    gallery = ()
    if run_data.gallery is not None:
        gallery = (embed(model, run_data.gallery, run_data.preprocessing), run_data.gallery.labels)
    results = {
        "test": {
            method: retrieval_metrics(embeddings, labels, *gallery, ks=config.eval.ks, method=method)
            for method in ("exact", "scann")
        },
        "best_epoch": state.best_epoch,
        "selected_by": "last epoch"
        if run_data.validation is None
        else f"{config.eval.select_by} on {_held_out(config)}",
        "best_value": state.best_value,
        "epochs": state.epoch,
        "steps": steps,
        "train_seconds": round(state.seconds, 2),
        "counts": {
            part: {"classes": images.num_classes, "images": len(images)}
            for part, images in [
                ("train", run_data.train),
                ("validation", run_data.validation),
                ("test", run_data.test),
                ("gallery", run_data.gallery),
            ]
            if images is not None
        },
        "embedding_dim": config.model.embedding_dim,
        "parameters": {
            "encoder": _count((model.backbone, model.embedding_head)),
            "training_only": _count((*model.auxiliary_heads, model.objective, *model.target_objectives)),
        },
        "versions": {"tensorflow": tf.__version__, "keras": keras_version()},
    }
    export_encoder(model, run_data.preprocessing, os.path.join(workdir, "saved_model"))
    write_json(os.path.join(workdir, "preprocessing.json"), run_data.preprocessing.get_config())
    _write_history(os.path.join(workdir, "history.csv"), state.history)
    _draw(config, workdir, state.history, run_data, embeddings, *gallery)
    return results


def _held_out(config):
    return "held-out training classes" if config.data.validation_classes else "held-out images of training classes"


def _count(layers):
    return int(sum(np.prod(variable.shape) for layer in layers for variable in layer.trainable_variables))


def _draw(config, workdir, history, run_data, embeddings, gallery=None, gallery_labels=None):
    """Writes `curves.png` and `gallery.png`."""
    panels = {"loss": {}, "retrieval on unseen classes": {}}
    for name in ("loss", "objective", "target_objective"):
        panels["loss"].update(_curve(history, name, name.replace("_", " ")))
    for prefix, part in (("val_", _held_out(config)), ("test_", "test classes")):
        for metric in ("recall@1", "map@r"):
            panels["retrieval on unseen classes"].update(_curve(history, prefix + metric, f"{metric}, {part}"))
    save_curves(os.path.join(workdir, "curves.png"), {title: curves for title, curves in panels.items() if curves})
    ids = np.arange(len(run_data.test))
    labels = run_data.test.labels
    if gallery is None:
        found = find_neighbors(embeddings, embeddings, 6, ids, ids).indices
        searched, before = run_data.test, 0
    else:
        found = find_neighbors(embeddings, gallery, 6).indices
        searched, before = run_data.gallery, len(ids)
    # Positions of the pictures: the queries, then the gallery where it is another set.
    found = np.where(found >= 0, found + before, found)
    labels = labels if gallery is None else np.concatenate([labels, gallery_labels])
    queries = choose_queries(labels, found, 8)
    rows = np.concatenate([queries[:, None], found[queries]], axis=1)
    shown = {}
    for images, first in dict.fromkeys([(run_data.test, 0), (searched, before)]):
        chosen = np.unique(rows[(rows >= first) & (rows < first + len(images))]) - first
        part = dataclasses.replace(images, images=images.images[chosen], labels=images.labels[chosen])
        pixels = evaluation_batches(part, run_data.preprocessing.without_normalization()).unbatch()
        shown.update(zip((chosen + first).tolist(), pixels.as_numpy_iterator()))
    save_gallery(
        os.path.join(workdir, "gallery.png"),
        shown,
        rows,
        [run_data.test.class_names[label] for label in labels],
        "Queries of unseen classes and their nearest neighbours",
    )


def _curve(history, name, label):
    rows = [row for row in history if name in row]
    return {label: ([row["epoch"] for row in rows], [row[name] for row in rows])} if rows else {}


def read_history(workdir):
    """The epochs' logs of a run: a list of dicts of floats, without what an epoch did not log."""
    with open(os.path.join(workdir, "history.csv"), newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def _write_history(path, history):
    """Writes the epochs' logs as CSV, whole or not at all; what an epoch did not log is empty."""
    columns = list(dict.fromkeys(key for row in history for key in row))
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(history)
