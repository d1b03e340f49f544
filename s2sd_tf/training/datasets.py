"""Loads the data of a run from its config."""

import dataclasses
import inspect
from typing import NamedTuple

import numpy as np
from ml_collections import config_dict

from s2sd_tf import data
from s2sd_tf.data import augmentation, datasets
from s2sd_tf.evaluation.metrics import check_answerable
from s2sd_tf.models import backbones
from s2sd_tf.relevance import JACCARD
from s2sd_tf.training.config import AUTO, is_auto


class RunData(NamedTuple):
    """The parts of a run's data set.

    Attributes:
        train: images to train on.
        validation: held-out training classes or images, which the best checkpoint is chosen on, or None.
        test: images of the test classes; the queries if there is a gallery.
        preprocessing: how images become inputs of the model.
        gallery: images that the test images are compared with; None: with each other.
        augmentation: augmentation of training images, or None.
    """

    train: data.ImageSet
    validation: data.ImageSet | None
    test: data.ImageSet
    preprocessing: data.Preprocessing
    gallery: data.ImageSet | None = None
    augmentation: data.Augmentation | None = None


def load_data(config: config_dict.ConfigDict) -> RunData:
    """Loads the data of a resolved config.

    Raises:
        ValueError, FileNotFoundError: as the data loaders.
    """
    return divide(config, load_split(config))


def divide(config: config_dict.ConfigDict, split: data.RetrievalSplit) -> RunData:
    """Holds out classes or images of a data set as a resolved config says, and adds how its images are processed.

    Raises:
        ValueError: a value that is left open, too few classes or images, or settings that do not fit together; the
            message names the key.
    """
    for key in AUTO:
        if is_auto(config, key):
            raise ValueError(f"config.{key}: expected a value; only a run chooses one. Received: {AUTO[key]!r}")
    section = config.data
    preprocessing = datasets.preprocessing(section.name, section.image_size) or _preprocessing(config)
    chosen = _augmentation(section)
    if chosen is not None and chosen.crop == "random" and preprocessing.resize_size is None:
        raise ValueError(
            "config.data.resize_size: expected the side to scale the image to before the random crop of "
            f"{section.augmentation!r}. Received: {section.resize_size!r}"
        )
    if chosen is not None and chosen.changes_colors and preprocessing.channels == 1:
        raise ValueError(
            f"config.data.augmentation: expected one without colours for grayscale. Received: {section.augmentation!r}"
        )
    if has_levels(config):
        _check_levels(config, split.train)
    train, validation = hold_out(config, split.train, config.seed)
    return RunData(train, validation, split.test, preprocessing, split.gallery, chosen)


def has_levels(config: config_dict.ConfigDict) -> bool:
    """Whether a run trains with the super-class and the class of each image: its objective has a relevance."""
    return bool(config.objective[config.objective.name].get("relevance"))


def load_split(config: config_dict.ConfigDict) -> data.RetrievalSplit:
    """Loads the data set of a resolved config, before classes or images are held out.

    Raises:
        ValueError, FileNotFoundError: as the data loaders; or test images that cannot be evaluated.
    """
    section = config.data
    root = inspect.signature(datasets.loader(section.name)).parameters.get("root")
    if root is not None and root.default is root.empty and not section.root:
        raise ValueError(f"config.data.root: expected the folder with the data of {section.name!r}. Received: ''")
    split = datasets.load(section.name, section.root, **section[section.name])
    every = split.train
    if section.exclude:
        split = data.exclude_images(split, section.exclude, section.root)
    split = split._replace(train=_with_teachers(split.train, section.teachers, every))
    gallery = None if split.gallery is None else split.gallery.labels
    check_answerable("config.data, the test classes", split.test.labels, gallery)
    return split


def _with_teachers(images, paths, every):
    """The images with the embeddings of teachers from outside, read from files.

    These have rows for the images, or for `every` image before some were excluded.
    """
    for path in paths:
        try:
            rows = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            raise FileNotFoundError(f"config.data.teachers: expected .npy files. Received: {path!r}") from None
        except (OSError, ValueError) as error:
            raise ValueError(f"config.data.teachers: expected .npy files. Received: {path!r}: {error}") from error
        if len(rows) == len(every) != len(images):
            rows = rows[np.isin(every.images, images.images)]
        elif len(rows) == every.num_classes != images.num_classes:
            rows = rows[np.isin(every.class_names, images.class_names)]
        try:
            images = dataclasses.replace(images, teachers=(*images.teachers, rows))
        except ValueError as error:
            raise ValueError(f"config.data.teachers, {path!r}: {error}") from error
    return images


def hold_out(
    config: config_dict.ConfigDict, images: data.ImageSet, seed: int
) -> tuple[data.ImageSet, data.ImageSet | None]:
    """Divides training images into `(train, validation)` as a resolved config says, with another seed.

    Raises:
        ValueError: too few classes or images; the message names the key.
    """
    section, instead = config.data, "config.data.validation_classes=0 and config.data.validation_fraction=0.2"
    if section.validation_classes:
        most = images.num_classes - 2
        if not 2 <= section.validation_classes <= most:
            some = f"0, or 2 to {most}" if most >= 2 else "0"
            raise ValueError(
                f"config.data.validation_classes: expected {some}, as there are {images.num_classes} classes that do "
                f"not test, and 2 must train. Received: {section.validation_classes}. With few classes, hold out "
                f"images instead: {instead}"
            )
        train, validation = data.hold_out_classes(images, section.validation_classes, seed)
        check_answerable("config.data.validation_classes, the held-out classes", validation.labels)
        return train, validation
    if section.validation_fraction:
        if images.class_counts().max() < 2:
            raise ValueError(
                "config.data.validation_fraction: expected 0, as no training class has more than one image. "
                f"Received: {section.validation_fraction}"
            )
        train, validation = data.split_samples(images, section.validation_fraction, seed)
        check_answerable("config.data.validation_fraction, the held-out images", validation.labels)
        return train, validation
    return images, None


def _check_levels(config, images):
    """Raises ValueError unless the images have the labels that the objective's relevance is about."""
    name = config.objective.name
    relevance, key = config.objective[name].relevance, f"config.objective.{name}.relevance"
    if relevance == JACCARD or len(relevance) != 2:
        raise ValueError(
            f"{key}: expected (), or two numbers, for the same super-class and for the same class, such as (0.3, 1.0). "
            f"Received: {relevance!r}"
        )
    if not images.super_classes:
        raise ValueError(
            f"{key}: expected () for a data set without super-classes, such as {config.data.name!r}. "
            f"Received: {relevance!r}"
        )


def _preprocessing(config):
    section = config.data
    size = augmentation.PRESET_SIZES.get(section.augmentation, section.image_size)
    normalization = backbones.normalization(config.model.backbone, config.model.weights or None)
    return data.Preprocessing(
        size,
        size,
        section.channels,
        resize_size=section.resize_size or None,
        invert=section.invert,
        **(normalization if section.channels == 3 else {}),
    )


def _augmentation(section):
    if not section.augmentation:
        return None
    settings = {**augmentation.preset(section.augmentation), **dict(section.augmentation_settings)}
    try:
        return data.Augmentation(**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"config.data.augmentation_settings: expected settings of Augmentation. "
            f"Received: {dict(section.augmentation_settings)}. It says: {error}"
        ) from error
