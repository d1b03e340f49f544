"""The data of a run, from its config."""

from typing import NamedTuple

from s2sd_tf import data
from s2sd_tf.data import augmentation, benchmarks
from s2sd_tf.models import backbones

_OTHERS = ("digits", "folder", "lists", "omniglot")


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
    split, preprocessing = _load_split(section)
    if preprocessing is None:
        size = augmentation.PRESET_SIZES.get(section.augmentation, section.image_size)
        # Random weights are trained on the scale of the library's.
        normalization = backbones.normalization(config.model.backbone, config.model.weights or None)
        if section.channels != 3:
            normalization = {}
        preprocessing = data.Preprocessing(
            size,
            size,
            section.channels,
            resize_size=section.resize_size or None,
            invert=section.invert,
            **normalization,
        )
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


def _load_split(section):
    """`(RetrievalSplit, Preprocessing)`; None for a `Preprocessing` that is the config's."""
    if section.name in _OTHERS and section.source not in ("auto", "files"):
        if (section.name, section.source) != ("folder", "shards"):
            raise ValueError(
                f"config.data.source: expected 'auto' or 'files' for {section.name!r}. Received: {section.source!r}"
            )
        return data.read_shards(section.root, "folder"), None
    if section.name in ("digits", "omniglot"):
        if section.name == "digits":
            train, test, preprocessing = data.load_digits()
        else:
            train, test, preprocessing = data.load_omniglot(section.root, section.image_size)
        return data.RetrievalSplit(train, test), preprocessing
    if section.name == "folder":
        return data.RetrievalSplit(*_load_folders(section)), None
    if section.name == "lists":
        for key in ("train_list", "test_list"):
            if not section[key]:
                raise ValueError(f"config.data.{key}: expected a text file of paths, with 'lists'. Received: none")
        return data.load_inaturalist(
            section.root, section.train_list, section.test_list, on_corrupt=section.on_corrupt, check=section.check
        ), None
    if section.name in benchmarks.names():
        return benchmarks.load(
            section.name, section.root, section.source, on_corrupt=section.on_corrupt, check=section.check
        ), None
    raise ValueError(
        f"config.data.name: expected one of {sorted([*_OTHERS, *benchmarks.names()])}. Received: {section.name!r}"
    )


def _load_folders(section):
    images = data.load_image_folder(section.root, section.on_corrupt, section.check)
    patterns = [pattern.strip() for pattern in section.test_classes.split(",") if pattern.strip()]
    if not section.test_root:
        if patterns:
            return data.split_classes(images, test_classes=patterns)
        return data.split_classes(images, test_fraction=section.test_fraction)
    test = data.load_image_folder(section.test_root, section.on_corrupt, section.check)
    if patterns:
        test = test.select_by_name(patterns)
    both = sorted(set(images.class_names) & set(test.class_names))
    if both:
        raise ValueError(
            "config.data.test_root: expected classes that are not trained on; choose with config.data.test_classes. "
            f"Received: {len(both)} classes that are in both roots, {both[:5]}"
        )
    return images, test
