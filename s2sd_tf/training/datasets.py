"""The data of a run, from its config."""

from typing import NamedTuple

from s2sd_tf import data


class RunData(NamedTuple):
    """The parts of a run's data set.

    Attributes:
        train: `ImageSet` to train on.
        validation: `ImageSet` of held-out training classes to choose the best checkpoint on, or None.
        test: `ImageSet` of classes seen at the end only.
        preprocessing: `Preprocessing`.
    """

    train: data.ImageSet
    validation: data.ImageSet
    test: data.ImageSet
    preprocessing: data.Preprocessing


def load_data(config):
    """`RunData` of a resolved config.

    Raises:
        ValueError, FileNotFoundError: what the data loaders raise.
    """
    section = config.data
    if section.name == "digits":
        train, test, preprocessing = data.load_digits()
    elif section.name == "omniglot":
        train, test, preprocessing = data.load_omniglot(section.root, section.image_size)
    elif section.name == "folder":
        train, test = _load_folders(section)
        preprocessing = data.Preprocessing(
            section.image_size,
            section.image_size,
            section.channels,
            resize_size=section.resize_size or None,
            invert=section.invert,
        )
    else:
        raise ValueError(
            f"config.data.name: expected one of ['digits', 'folder', 'omniglot']. Received: {section.name!r}"
        )
    validation = None
    if section.validation_classes:
        train, validation = data.hold_out_classes(train, section.validation_classes, config.seed)
    return RunData(train, validation, test, preprocessing)


def _load_folders(section):
    images = data.load_image_folder(section.root, section.on_corrupt)
    patterns = [pattern.strip() for pattern in section.test_classes.split(",") if pattern.strip()]
    if not section.test_root:
        if patterns:
            return data.split_classes(images, test_classes=patterns)
        return data.split_classes(images, test_fraction=section.test_fraction)
    test = data.load_image_folder(section.test_root, section.on_corrupt)
    if patterns:
        test = test.select_by_name(patterns)
    both = sorted(set(images.class_names) & set(test.class_names))
    if both:
        raise ValueError(
            "config.data.test_root: expected classes that are not trained on; choose with config.data.test_classes. "
            f"Received: {len(both)} classes that are in both roots, {both[:5]}"
        )
    return images, test
