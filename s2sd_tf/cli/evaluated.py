"""What `s2sd-evaluate` and `s2sd-audit` work on: embeddings of a run, of images, or from files."""

import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from absl import logging

from s2sd_tf import evaluation, progress
from s2sd_tf.data import Preprocessing, load_image_folder
from s2sd_tf.data.image_folder import super_classes_in
from s2sd_tf.evaluation.embeddings import read_labels
from s2sd_tf.evaluation.rows import take
from s2sd_tf.export import load_model
from s2sd_tf.export.encoder import checked_trained
from s2sd_tf.reporting import EmbeddedImages
from s2sd_tf.serving import Encoder
from s2sd_tf.serving.encoder import decode_image, read_image, read_image_under
from s2sd_tf.training import load_run
from s2sd_tf.training.datasets import load_data
from s2sd_tf.training.embedding import embed
from s2sd_tf.training.record import check_data


class Evaluated(NamedTuple):
    """Queries, and the gallery that they search in.

    Ids are made to be shown: no absolute paths, but paths below the folder of the data.

    Attributes:
        queries: the queries.
        gallery: the gallery; None: the queries search among themselves.
        same: the arguments `query_ids` and `gallery_ids` of a search, by which an image that is in both does not find
            itself; empty if there is nothing to exclude.
    """

    queries: EmbeddedImages
    gallery: EmbeddedImages | None
    same: dict[str, np.ndarray]


def run(workdir: str, dims: Sequence[int] = ()) -> Evaluated:
    """Embeds the test images of a finished run, and its gallery if it has one.

    Raises:
        ValueError: the model was not trained for one of the dimensions `dims`.
    """
    with progress.stage("Loading the run"):
        model, config, preprocessing = load_run(workdir)
        _check_dims(dims, _trained_dims(model))
        run_data = load_data(config)
        try:
            check_data(workdir, run_data)
        except ValueError as error:
            logging.warning("%s. Evaluating the data as they are now.", error)
    sets = [images for images in (run_data.test, run_data.gallery) if images is not None]
    return _evaluated(
        [_part(embed(model, images, preprocessing), images, config.data.root) for images in sets],
        [_files(images) for images in sets],
    )


def model(path: str, images: str | None, gallery_images: str | None, dims: Sequence[int] = ()) -> Evaluated:
    """Embeds class folders with a SavedModel or a `.keras` file.

    Raises:
        ValueError: `images` is None, or the model was not trained for one of the dimensions `dims`.
        FileNotFoundError: the `.keras` file or its `preprocessing.json` does not exist.
    """
    if not images:
        raise ValueError("--images: expected a folder of class folders, with --model. Received: none")
    roots = [root for root in (images, gallery_images) if root]
    folders = [load_image_folder(root, on_corrupt="skip") for root in roots]
    names = sorted({name for folder in folders for name in folder.class_names})
    if not path.endswith(".keras"):
        with progress.stage("Loading the model"):
            encoder = Encoder(path)
        _check_dims(dims, encoder.dims)
        rows = [_embed_files(encoder, folder) for folder in folders]
    else:
        settings = os.path.join(os.path.dirname(path), "preprocessing.json")
        for name in (path, settings):
            if not os.path.exists(name):
                raise FileNotFoundError(
                    f"--model: expected a .keras file beside its preprocessing.json. Missing: {name}"
                )
        loaded, preprocessing = load_model(path), Preprocessing.load(settings)
        _check_dims(dims, _trained_dims(loaded))
        rows = [embed(loaded, folder, preprocessing) for folder in folders]
    return _evaluated(
        [_part(*part, names) for part in zip(rows, folders, roots)], [_files(folder) for folder in folders]
    )


def _trained_dims(model):
    if not hasattr(model, "s2sd_loss"):
        return tuple(model.output_shape[-1:])
    return model.s2sd_loss.nested_dims or (model.embedding_dim,)


def _check_dims(dims, trained):
    for dim in dims:
        checked_trained("--dims", dim, trained)


def _embed_files(encoder, images, batch=64):
    rows = []
    with progress.steps(len(images), "Embedding", "image") as bar:
        for start in range(0, len(images), batch):
            positions = range(start, min(start + batch, len(images)))
            rows.append(encoder([images.encoded(position) for position in positions]))
            bar.update(len(positions))
    return np.concatenate(rows)


def _part(rows, images, root, names=None):
    """Makes `EmbeddedImages` of an `ImageSet`; the labels are positions in `names`."""
    names = names or images.class_names
    positions = {name: number for number, name in enumerate(names)}
    position = np.array([positions[name] for name in images.class_names])
    shown = {"pixels": lambda i: images.images[i], "paths": lambda i: read_image(str(images.images[i]))}
    image = shown.get(images.kind, lambda i: decode_image(images.encoded(i)))
    ids = _below(images.images.tolist(), root) if images.kind == "paths" else None
    above = dict(zip(position.tolist(), images.super_classes)) or None
    return EmbeddedImages(rows, position[images.labels], dict(enumerate(names)), ids, image, above)


def _evaluated(parts, ids):
    """`Evaluated` of one or two `EmbeddedImages`. `ids` has what identifies the images of each, or None."""
    if len(parts) < 2:
        return Evaluated(parts[0], None, {})
    if None in ids:
        return Evaluated(parts[0], parts[1], {})
    codes = np.unique([*ids[0], *ids[1]], return_inverse=True)[1]
    same = {"query_ids": codes[: len(ids[0])], "gallery_ids": codes[len(ids[0]) :]}
    return Evaluated(parts[0], parts[1], same)


def _files(images):
    """The files of an `ImageSet`, None if it has none. Those of a link are those that it leads to."""
    return [os.path.realpath(path) for path in images.images.tolist()] if images.kind == "paths" else None


def _below(paths, root):
    """Paths relative to `root` if all are in it, else to the folder that they have in common."""
    paths = [pathlib.Path(os.path.abspath(path)) for path in paths]
    folder = pathlib.Path(os.path.abspath(root or os.sep))
    if not root or not all(path.is_relative_to(folder) for path in paths):
        folder = pathlib.Path(os.path.commonpath([path.parent for path in paths] or [os.sep]))
    return [path.relative_to(folder).as_posix() for path in paths]


def embeddings(
    queries: tuple[str, str | None, str | None],
    gallery: tuple[str, str | None, str | None] | None,
    dims: Sequence[int] = (),
    labeled_gallery: bool = True,
    same_ids: bool = False,
) -> Evaluated:
    """Reads embeddings of queries and gallery. Leaves out rows without a label, with a warning.

    Args:
        queries: path of the embeddings, path of their labels or None, and the folder of the images or None.
        gallery: the same for the gallery, or None.
        dims: dimensions that the embeddings must have as prefixes.
        labeled_gallery: whether the gallery needs labels; if not, none of its rows is left out.
        same_ids: whether equal ids in queries and gallery mean the same image.

    Raises:
        ValueError: no labels, a wrong number of them, fewer dimensions, or, with `same_ids`, no ids.
        FileNotFoundError: a file does not exist.
    """
    read = []
    for flag, (path, labels, root) in zip(("labels", "gallery_labels"), (queries, gallery) if gallery else (queries,)):
        rows, ids, its_labels = evaluation.read_embeddings(path)
        if same_ids and ids is None:
            raise ValueError(f"--same_ids: expected embeddings with ids. Received: {path!r}, which has none")
        if max(dims, default=0) > rows.shape[1]:
            wanted = f"at most {rows.shape[1]}, the dimension of {path!r}"
            raise ValueError(f"--dims: expected {wanted}. Received: {max(dims)}")
        if labels:
            its_labels = read_labels(f"--{flag}", labels, rows.shape[0])
            if "" in its_labels and (labeled_gallery or flag == "labels"):
                raise ValueError(
                    f"--{flag}: expected a label on every line. Received: {labels!r}, where {its_labels.count('')} "
                    f"have none, first line {its_labels.index('') + 1}"
                )
        if not labeled_gallery and flag == "gallery_labels":
            read.append((rows, [str(label) for label in its_labels or [""] * rows.shape[0]], ids, root))
            continue
        if its_labels is None:
            raise ValueError(f"--{flag}: expected labels of {path!r}, which has none. Received: none")
        texts = [str(label) for label in its_labels]
        if "" in texts:
            rows, texts, ids = _with_label(path, rows, texts, ids)
        read.append((rows, texts, ids, root))
    names, codes = np.unique([label for _, labels, _, _ in read for label in labels], return_inverse=True)
    parts, start = [], 0
    by_label, above = dict(enumerate(names.tolist())), dict(enumerate(super_classes_in(names.tolist()))) or None
    for rows, row_labels, ids, root in read:
        shown = _without_absolute(ids, root)
        image = _under(root, shown) if root and ids else None
        parts.append(EmbeddedImages(rows, codes[start : start + len(row_labels)], by_label, shown, image, above))
        start += len(row_labels)
    return _evaluated(parts, [ids if same_ids else None for _, _, ids, _ in read])


def _without_absolute(ids, root):
    """Ids, in which absolute paths are replaced by those below the folder of the images."""
    absolute = [name for name in ids or () if os.path.isabs(name)]
    return [*map(dict(zip(absolute, _below(absolute, root))).get, ids, ids)] if absolute else ids


def _under(root, ids):
    return lambda position: read_image_under(root, ids[position])


def _with_label(path, rows, labels, ids):
    """`(rows, labels, ids)` of the rows that have a label. Warns of the others."""
    kept = [position for position, label in enumerate(labels) if label]
    without = [position for position, label in enumerate(labels) if not label]
    if not kept:
        raise ValueError(f"labels: expected rows with a label. Received: {path!r}, where all {len(labels)} have none")
    names = [str(position) if ids is None else ids[position] for position in without]
    logging.warning(
        "%s: left out %d of %d rows, which have no label, such as images outside of class folders: %s",
        path,
        len(without),
        len(labels),
        ", ".join(names[:5]) + (", ..." if len(names) > 5 else ""),
    )
    return take(rows, np.array(kept)), [labels[i] for i in kept], None if ids is None else [ids[i] for i in kept]
