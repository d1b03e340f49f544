"""The end of a run: chooses the model, evaluates it on the test classes, exports it and draws the figures."""

import os
from typing import Any

import numpy as np
import tensorflow as tf

from s2sd_tf import progress
from s2sd_tf.data.decoding import decode_pixels
from s2sd_tf.evaluation import find_neighbors, retrieval_metrics
from s2sd_tf.evaluation.scann_searcher import usable_methods
from s2sd_tf.export import export_encoder
from s2sd_tf.files import replacing, write_json
from s2sd_tf.keras_compat import keras_version
from s2sd_tf.reporting import choose_queries, save_curves, save_gallery, thumbnail
from s2sd_tf.training.averages import averaged_weights
from s2sd_tf.training.embedding import embed
from s2sd_tf.training.history import write_history
from s2sd_tf.training.loop import Run

# The longest side of an image in the gallery, in pixels.
_PICTURE_SIDE = 160


def finish(run: Run) -> dict[str, Any]:
    """Writes the result files of a run, with `results.json` last, and returns the content of `results.json`.

    Args:
        run: a run after its last epoch. A model on several replicas is replaced by the one in the latest checkpoint.
    """
    model, state = run.model, run.state
    steps = int(tf.convert_to_tensor(model.s2sd_loss.step))
    if run.data.validation is None:
        state.best_epoch = state.epoch
    else:
        model = run.checkpoints.load_best(state)
    if model.distribute_strategy.num_replicas_in_sync > 1:
        model = run.checkpoints.load_latest()
    with averaged_weights(model):
        results = _evaluate_and_export(run, model, steps)
    write_json(os.path.join(run.workdir, "results.json"), results)
    return results


def _evaluate_and_export(run, model, steps):
    config, run_data, workdir, state = run.config, run.data, run.workdir, run.state
    with replacing(os.path.join(workdir, "best.keras")) as temporary:
        model.save(temporary)
    embeddings = embed(model, run_data.test, run_data.preprocessing)
    labels = run_data.test.labels
    gallery: tuple = ()
    if run_data.gallery is not None:
        gallery = (embed(model, run_data.gallery, run_data.preprocessing), run_data.gallery.labels)
    test = {}
    for method in usable_methods():
        with progress.stage(f"Evaluating, {method} search"):
            test[method] = retrieval_metrics(embeddings, labels, *gallery, ks=config.eval.ks, method=method)
    results = {
        "test": test,
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
            "training_only": _count((*model.target_heads, model.s2sd_loss)),
        },
        "versions": {"tensorflow": tf.__version__, "keras": keras_version()},
    }
    with progress.stage("Exporting"):
        export_encoder(model, run_data.preprocessing, os.path.join(workdir, "saved_model"))
    write_json(os.path.join(workdir, "preprocessing.json"), run_data.preprocessing.get_config())
    write_history(workdir, state.history)
    with progress.stage("Drawing"):
        _draw(config, workdir, state.history, run_data, embeddings, *gallery)
    return results


def _held_out(config):
    return "held-out training classes" if config.data.validation_classes else "held-out images of training classes"


def _count(layers):
    return int(sum(np.prod(variable.shape) for layer in layers for variable in layer.trainable_variables))


def _draw(config, workdir, history, run_data, embeddings, gallery=None, gallery_labels=None):
    """Writes `curves.png` and `gallery.png`."""
    part = {"val_": _held_out(config), "test_": "test classes"}
    panels = {
        "loss": {name: name.replace("_", " ") for name in ("loss", "objective", "target_objective")},
        "retrieval on unseen classes": {
            prefix + metric: f"{metric}, {part[prefix]}" for prefix in part for metric in ("recall@1", "map@r")
        },
        "spread of the embeddings": {
            "mean_similarity": "mean similarity",
            "target_mean_similarity": "mean similarity, targets",
            "embedding_rank": "rank / dimensions",
        },
        "norm of the gradient": {"gradient_norm": "all weights"},
    }
    # Divided by the dimension, so that it fits on the axis of the similarities. The rank of the targets is left out: it
    # may come from a target of any dimension.
    history = [
        {**row, "embedding_rank": row["embedding_rank"] / config.model.embedding_dim}
        if "embedding_rank" in row
        else row
        for row in history
    ]
    panels = {
        title: {key: value for name, label in names.items() for key, value in _curve(history, name, label).items()}
        for title, names in panels.items()
    }
    save_curves(os.path.join(workdir, "curves.png"), {title: curves for title, curves in panels.items() if curves})
    ids = np.arange(len(run_data.test))
    labels = run_data.test.labels
    if gallery is None:
        found = find_neighbors(embeddings, embeddings, 6, ids, ids).indices
        searched, before = run_data.test, 0
    else:
        found = find_neighbors(embeddings, gallery, 6).indices
        searched, before = run_data.gallery, len(ids)
    # Number the images: the queries first, then the gallery if it is a separate set.
    found = np.where(found >= 0, found + before, found)
    labels = labels if gallery is None else np.concatenate([labels, gallery_labels])
    queries = choose_queries(labels, found, 8)
    rows = np.concatenate([queries[:, None], found[queries]], axis=1)
    shown: dict[int, np.ndarray] = {}
    for images, first in dict.fromkeys([(run_data.test, 0), (searched, before)]):
        chosen = rows[(rows >= first) & (rows < first + len(images))] - first
        shown.update((position + first, _picture(images, position)) for position in np.unique(chosen).tolist())
    save_gallery(
        os.path.join(workdir, "gallery.png"),
        shown,
        rows,
        [run_data.test.class_names[label] for label in labels],
        "Queries of unseen classes and their nearest neighbours",
    )


def _picture(images, position):
    """An image as it was given: the model's input may be smaller, cropped or inverted. uint8 `(h, w[, c])`."""
    pixels = images.images[position] if images.kind == "pixels" else decode_pixels(images.encoded(position)).numpy()
    return np.asarray(thumbnail(pixels, _PICTURE_SIDE))


def _curve(history, name, label):
    rows = [row for row in history if name in row]
    return {label: ([row["epoch"] for row in rows], [row[name] for row in rows])} if rows else {}
