"""A labelled set of images, in memory or in files, and ways to split it by class or by image."""

import dataclasses
import fnmatch
import math
import os
import reprlib
from collections.abc import Iterable, Sequence

import numpy as np

from s2sd_tf.checks import check_number, checked_int
from s2sd_tf.files import local_path


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSet:
    """Images with integer labels.

    Lists, tensors and arrays of other types are converted; the attributes say to what.

    Attributes:
        images: uint8 `(n, height, width, channels)`, pixels, with 1 or 3 channels; or object array `(n,)` of `bytes`,
            encoded images; or array `(n,)` of `str`, paths of image files; or structured array `(n,)` from
            `image_slices`, encoded images that are byte ranges of files. Pixels may be given without channels, with an
            alpha channel, which is dropped, as integers in [0, 255] or as floats in [0, 1].
        labels: int32 `(n,)`, positions in `class_names`. They may be given as names.
        class_names: names of the classes. Default: the sorted names in `labels`, or "0", "1", ... up to the greatest
            label.
        super_classes: the super-class of each class; empty if there are none.
        teachers: matrices, float32 `(n, any dimension)`, with the embeddings of the images by teachers from outside;
            see `S2SDLoss.external_teachers`. Training batches have their rows. A matrix may be given with a row for
            each class.

    Raises:
        ValueError: an argument that cannot be converted, or does not fit the others; the message names it.

    Example:
        >>> data.ImageSet(pixels, ["cat", "dog", "cat"]).class_names
        ('cat', 'dog')
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...] = ()
    super_classes: tuple[str, ...] = ()
    teachers: tuple[np.ndarray, ...] = ()

    def __post_init__(self) -> None:
        # The class is frozen.
        object.__setattr__(self, "images", _checked_images(self.images))
        for argument in ("class_names", "super_classes"):
            object.__setattr__(self, argument, _checked_names(argument, getattr(self, argument)))
        labels, class_names = _checked_labels(self.labels, self.class_names)
        object.__setattr__(self, "labels", labels)
        object.__setattr__(self, "class_names", class_names)
        if len(self.images) != len(self.labels):
            raise ValueError(
                f"labels: expected one for each of {len(self.images)} images. Received: {len(self.labels)} labels"
            )
        if len(self.super_classes) not in (0, len(self.class_names)):
            raise ValueError(
                f"super_classes: expected none, or one for each of {len(self.class_names)} classes. "
                f"Received: {len(self.super_classes)}"
            )
        rows = [_checked_teacher(teacher, labels, len(class_names)) for teacher in self.teachers]
        object.__setattr__(self, "teachers", tuple(rows))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """The number of classes, including classes without images."""
        return len(self.class_names)

    @property
    def kind(self) -> str:
        """What `images` holds: "pixels", "bytes", "paths" or "slices"."""
        if self.images.dtype == np.uint8:
            return "pixels"
        if self.images.dtype.names:
            return "slices"
        return "bytes" if self.images.dtype == object else "paths"

    def encoded(self, position: int) -> bytes:
        """The encoded image at a position, for every kind except "pixels".

        Raises:
            OSError: the image cannot be read.
        """
        image = self.images[position]
        if self.kind == "paths":
            with open(image, "rb") as file:
                return file.read()
        return read_slice(*image.item()) if self.kind == "slices" else image

    def class_counts(self) -> np.ndarray:
        """The number of images of each class, int `(num_classes,)`."""
        return np.bincount(self.labels, minlength=self.num_classes)

    def levels(self) -> np.ndarray:
        """The super-class and the class of each image, int32 `(n, 2)`: labels for an objective with a `relevance`.

        A super-class is the position of its name among the sorted names of `super_classes`.

        Raises:
            ValueError: the set has no super-classes.
        """
        if not self.super_classes:
            raise ValueError("super_classes: expected one for each class, to have levels. Received: none")
        numbers = np.unique(self.super_classes, return_inverse=True)[1].astype(np.int32)
        return np.stack([numbers[self.labels], self.labels], axis=1)

    def select_classes(self, classes: Sequence[int] | np.ndarray) -> "ImageSet":
        """The images of some classes (positions in `class_names`), relabelled from 0 in the given order."""
        classes = np.asarray(classes, np.int64)
        new_labels = np.full(self.num_classes, -1, np.int32)
        new_labels[classes] = np.arange(len(classes))
        chosen = np.flatnonzero(new_labels[self.labels] >= 0)
        return ImageSet(
            self.images[chosen],
            new_labels[self.labels[chosen]],
            tuple(self.class_names[c] for c in classes),
            tuple(self.super_classes[c] for c in classes) if self.super_classes else (),
            tuple(teacher[chosen] for teacher in self.teachers),
        )

    def select_images(self, positions: Sequence[int] | np.ndarray) -> "ImageSet":
        """The images at some positions, in the given order. Classes without images left are kept."""
        positions = np.asarray(positions, np.int64)
        return dataclasses.replace(
            self,
            images=self.images[positions],
            labels=self.labels[positions],
            teachers=tuple(teacher[positions] for teacher in self.teachers),
        )

    def select_by_name(self, patterns: Iterable[str]) -> "ImageSet":
        """The images of the classes that one of `patterns` names or matches as a shell pattern (`Sanskrit/*`).

        Raises:
            ValueError: a pattern without a match; the message lists some class names.
        """
        chosen = []
        for pattern in patterns:
            # An exact name comes first, because names may contain brackets.
            found = [c for c, name in enumerate(self.class_names) if name == pattern] or [
                c for c, name in enumerate(self.class_names) if fnmatch.fnmatchcase(name, pattern)
            ]
            if not found:
                some = ", ".join(self.class_names[:10])
                raise ValueError(f"classes: expected names or patterns of classes ({some}, ...). Received: {pattern!r}")
            chosen += [c for c in found if c not in chosen]
        return self.select_classes(sorted(chosen))


_WANTED = (
    "pixels (n, h, w) or (n, h, w, 1, 3 or 4), uint8 or floats in [0, 1]; or n encoded images, bytes; or n paths, str"
)


def _as_array(argument, values, wanted):
    """A list, tensor or array as an array; of texts and bytes as an object array."""
    if isinstance(values, np.ndarray):
        return values
    try:
        values = values.numpy() if hasattr(values, "numpy") else values
        if isinstance(values, (list, tuple)) and any(isinstance(v, (str, bytes, os.PathLike)) for v in values):
            array = np.empty(len(values), object)
            array[:] = values
            return array
        if isinstance(values, (list, tuple, range, np.ndarray)) or hasattr(values, "__array__"):
            return np.asarray(values)
    except Exception as error:  # values of many libraries end up here
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{argument}: expected {wanted}. Received: {type(values).__name__}: {reason}") from error
    raise ValueError(f"{argument}: expected {wanted}. Received: {reprlib.repr(values)}")


def _checked_images(images):
    images = _as_array("images", images, _WANTED)
    received = f"an array {images.shape} of {images.dtype}"
    if images.dtype.names:
        return images
    if images.dtype.kind == "U" and images.ndim == 1:
        return _checked_paths("images", images)
    if images.dtype == object and images.ndim == 1:
        if all(isinstance(image, bytes) for image in images):
            return images
        if all(isinstance(image, (str, os.PathLike)) for image in images):
            return _checked_paths("images", images)
        kinds = sorted({type(image).__name__ for image in images})
        raise ValueError(f"images: expected {_WANTED}. Received: {kinds}")
    if images.shape == (0,):
        return images.astype(np.str_)
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.dtype.kind not in "uif" or images.shape[-1] not in (1, 3, 4) or 0 in images.shape[1:]:
        raise ValueError(f"images: expected {_WANTED}. Received: {received}")
    if images.shape[-1] == 4:
        images = images[..., :3]
    if images.dtype == np.uint8:
        return images
    most = 1 if images.dtype.kind == "f" else 255
    if images.size and not (images.min() >= 0 and images.max() <= most):
        wanted = "floats in [0, 1]" if most == 1 else "integers in [0, 255]"
        raise ValueError(f"images: expected {wanted}. Received: {images.min()} to {images.max()}")
    return np.rint(images * 255.0 if most == 1 else images).astype(np.uint8)


def _checked_paths(argument, paths):
    """Paths as `local_path` returns them, in a `str` array."""
    if isinstance(paths, np.ndarray) and paths.dtype.kind == "U":
        odd = (paths == "") | np.char.startswith(paths, "~") | (np.char.find(paths, ":/") >= 0)
        if not odd.any():
            return paths
    return np.array([local_path(argument, path) for path in paths], np.str_)


def _checked_names(argument, names):
    names = tuple(_as_array(argument, names, "names").tolist())
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong:
        raise ValueError(f"{argument}: expected names, str. Received: {reprlib.repr(wrong[0])}")
    return names


def _checked_labels(labels, class_names):
    wanted = "integers or class names (n,)"
    labels = _as_array("labels", labels, wanted)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.dtype.kind in "OSU" and labels.ndim == 1 and len(labels):
        names = [label.decode(errors="replace") if isinstance(label, bytes) else label for label in labels.tolist()]
        if all(isinstance(name, str) for name in names):
            class_names = class_names or tuple(sorted(set(names)))
            unknown = sorted(set(names) - set(class_names))
            if unknown:
                raise ValueError(f"labels: expected names in class_names. Received: {unknown[:5]}")
            position = {name: at for at, name in enumerate(class_names)}
            return np.array([position[name] for name in names], np.int32), class_names
    if labels.ndim != 1 or (labels.dtype.kind not in "ui" and len(labels)):
        raise ValueError(f"labels: expected {wanted}. Received: an array {labels.shape} of {labels.dtype}")
    if len(labels):
        if not class_names and labels.min() >= 0 and labels.max() < 2**24:
            class_names = tuple(str(label) for label in range(int(labels.max()) + 1))
        if not 0 <= labels.min() <= labels.max() < len(class_names):
            raise ValueError(
                f"labels: expected integers in [0, {len(class_names)}). Received: {labels.min()} to {labels.max()}"
            )
    return labels.astype(np.int32, copy=False), class_names


def _checked_teacher(teacher, labels, num_classes):
    """A teacher's embeddings by image."""
    wanted = f"teachers: expected float matrices with {len(labels)} rows, one an image, or {num_classes}, one a class"
    teacher = _as_array("teachers", teacher, "matrices")
    rows = (len(labels), num_classes)
    if teacher.ndim != 2 or len(teacher) not in rows or not teacher.shape[1] or teacher.dtype.kind != "f":
        raise ValueError(f"{wanted}. Received: an array {teacher.shape} of {teacher.dtype}")
    if not np.isfinite(teacher).all():
        raise ValueError(f"{wanted}, all finite. Received: NaN or infinity")
    teacher = teacher.astype(np.float32, copy=False)
    return teacher if len(teacher) == len(labels) else teacher[labels]


def image_slices(
    paths: Sequence[str] | np.ndarray, offsets: Sequence[int] | np.ndarray, lengths: Sequence[int] | np.ndarray
) -> np.ndarray:
    """Makes `ImageSet.images` out of encoded images that are byte ranges of files.

    Args:
        paths: n file paths; one file may hold many images.
        offsets: n int >= 0, position of the first byte of each image in its file.
        lengths: n int >= 1, size of each image in bytes.

    Returns:
        Structured array `(n,)` with the fields "path" (str), "offset" and "length" (int64).
    """
    array = _checked_paths("paths", paths)
    slices = np.empty(len(array), [("path", array.dtype), ("offset", "<i8"), ("length", "<i8")])
    slices["path"], slices["offset"], slices["length"] = array, offsets, lengths
    return slices


def read_slice(path: str | bytes | os.PathLike, offset: int, length: int) -> bytes:
    """Reads `length` bytes of a file, starting at `offset`.

    Raises:
        OSError: the file cannot be read or is too short.
    """
    # No file object and no buffer, to be fast: this is called for every image of a batch.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        content = os.pread(descriptor, length, offset)
    finally:
        os.close(descriptor)
    if len(content) < length:
        raise OSError(f"{os.fsdecode(path)}: expected {length} bytes at offset {offset}. Received: {len(content)}")
    return content


def split_classes(
    images: ImageSet, test_classes: Iterable[str] | None = None, test_fraction: float | None = None
) -> tuple[ImageSet, ImageSet]:
    """Splits an `ImageSet` into `(train, test)` without common classes.

    Exactly one of `test_classes` and `test_fraction` is given.

    Args:
        images: the images to split.
        test_classes: names or shell patterns of the classes to test on; the others train.
        test_fraction: float in (0, 1), the share of the classes to test on. The last classes test, as in the published
            retrieval protocols.

    Raises:
        ValueError: both or neither given, a part without classes, or a name that no class has.
    """
    if (test_classes is None) == (test_fraction is None):
        raise ValueError(
            "split_classes: expected exactly one of test_classes and test_fraction. "
            f"Received: test_classes={test_classes!r}, test_fraction={test_fraction!r}"
        )
    if test_classes is not None:
        test = images.select_by_name(test_classes)
        names = set(test.class_names)
        train = images.select_classes([c for c, name in enumerate(images.class_names) if name not in names])
    else:
        assert test_fraction is not None
        check_number("test_fraction", test_fraction, "a number in (0, 1)")
        if not 0 < test_fraction < 1:
            raise ValueError(f"test_fraction: expected a number in (0, 1). Received: {test_fraction}")
        first = images.num_classes - max(1, math.floor(images.num_classes * test_fraction + 0.5))
        train = images.select_classes(range(first))
        test = images.select_classes(range(first, images.num_classes))
    if not train.num_classes or not test.num_classes:
        raise ValueError(
            "split_classes: expected at least one class to train on and one to test on. "
            f"Received: {train.num_classes} and {test.num_classes} of {images.num_classes}"
        )
    return train, test


def hold_out_classes(images: ImageSet, count: int, seed: int = 0) -> tuple[ImageSet, ImageSet]:
    """Holds out `count` classes drawn with `seed`, to select a model on, and returns `(rest, held_out)`.

    Raises:
        ValueError: fewer than 2 classes held out (retrieval within one class is always right), or fewer than 2 left.
    """
    if checked_int("hold_out_classes", count, 0) < 2 or images.num_classes - count < 2:
        raise ValueError(
            "hold_out_classes: expected at least 2 classes held out and 2 left. "
            f"Received: count={count} of {images.num_classes} classes"
        )
    held_out = np.sort(np.random.default_rng(seed).choice(images.num_classes, count, replace=False))
    rest = np.setdiff1d(np.arange(images.num_classes), held_out)
    return images.select_classes(rest), images.select_classes(held_out)


def split_samples(images: ImageSet, fraction: float, seed: int = 0) -> tuple[ImageSet, ImageSet]:
    """Splits the images of every class at random and returns `(train, rest)`.

    This is for data with too few classes, or too few images per class, to hold out classes. Both parts keep all classes
    and labels of `images`.

    Args:
        images: the images to split.
        fraction: float in (0, 1), the share of each class's images that goes to `rest`, rounded. A class with at least
            2 images has at least 1 in both parts; a single image goes to `train`.
        seed: int >= 0.

    Raises:
        ValueError: a bad argument, or no class with at least 2 images.
    """
    check_number("fraction", fraction, "a number in (0, 1)")
    if not 0 < fraction < 1:
        raise ValueError(f"fraction: expected a number in (0, 1). Received: {fraction}")
    rng = np.random.default_rng(checked_int("seed", seed, 0))
    counts = images.class_counts()
    if not (counts >= 2).any():
        raise ValueError("images: expected a class with at least 2 images. Received: none")
    # Sorted by class, in random order within a class.
    shuffled = np.lexsort((rng.random(len(images)), images.labels))
    rank = np.arange(len(images)) - np.repeat(np.cumsum(counts) - counts, counts)
    held_out = np.where(counts < 2, 0, np.clip(np.floor(counts * fraction + 0.5), 1, counts - 1))
    trains = rank >= np.repeat(held_out, counts)
    return images.select_images(np.sort(shuffled[trains])), images.select_images(np.sort(shuffled[~trains]))
