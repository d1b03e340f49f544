"""The data of a run, from its config."""

from typing import NamedTuple

from s2sd_tf import data
from s2sd_tf.data import augmentation, datasets
from s2sd_tf.models import backbones


class RunData(NamedTuple):
    """The parts of a run's data set.

    Attributes:
        train: `ImageSet` to train on.
        validation: `ImageSet` of held-out training classes or images to choose the best checkpoint on, or None.
        test: `ImageSet` of classes seen at the end only; the queries where there is a gallery.
        preprocessing: `Preprocessing`.
        gallery: `ImageSet` in which the test images search, or None: among themselves.
        augmentation: `Augmentation` of training images, or None.
    """

    train: data.ImageSet
    validation: data.ImageSet
    test: data.ImageSet
    preprocessing: data.Preprocessing
    gallery: data.ImageSet = None
    augmentation: data.Augmentation = None


def load_data(config):
    """`RunData` of a resolved config.

    Raises:
        ValueError, FileNotFoundError: what the data loaders raise.
    """
    section = config.data
    split = datasets.load(section.name, section.root, **section[section.name])
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
    train, validation = split.train, None
    if section.validation_classes:
        train, validation = data.hold_out_classes(train, section.validation_classes, config.seed)
    elif section.validation_fraction:
        train, validation = data.split_samples(train, section.validation_fraction, config.seed)
    return RunData(train, validation, split.test, preprocessing, split.gallery, chosen)


def _preprocessing(config):
    section = config.data
    size = augmentation.PRESET_SIZES.get(section.augmentation, section.image_size)
    # Random weights are trained on the scale of the library's.
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
