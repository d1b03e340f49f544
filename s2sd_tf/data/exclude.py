"""Leaves out images that a text file lists, such as the one that `s2sd-audit` writes."""

import os

import numpy as np
from absl import logging

from s2sd_tf.data.image_set import ImageSet
from s2sd_tf.data.retrieval_split import RetrievalSplit
from s2sd_tf.files import local_path


def exclude_images(split: RetrievalSplit, exclude: str | os.PathLike, root: str | os.PathLike = "") -> RetrievalSplit:
    """Leaves out the images that a file lists, and the classes without images left. Logs how many.

    Args:
        split: `RetrievalSplit` of paths.
        exclude: text file, UTF-8, one image per line: an absolute path, or the end of one, such as `chair/1.jpg`. Blank
            lines are ignored.
        root: folder of the data set. If a line is the end of several paths, the one directly under `root` is meant.

    Raises:
        FileNotFoundError: `exclude` is not a file.
        ValueError: images that are not files; lines that match no image, or several; or a part without images left.
    """
    exclude, root = local_path("exclude", exclude), local_path("root", root, empty=True)
    if not os.path.isfile(exclude):
        raise FileNotFoundError(f"exclude: expected a text file with one image per line. Received: {exclude!r}")
    # Names of files may have bytes that are not UTF-8.
    with open(exclude, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        entries = [line for line in (line.rstrip("\r\n") for line in file) if line.strip()]
    parts = split.parts()
    kinds = {images.kind for images in parts.values()}
    if kinds != {"paths"}:
        raise ValueError(f"exclude: expected a data set of image files. Received: images that are {sorted(kinds)}")
    paths = np.concatenate([images.images for images in parts.values()]).tolist()
    excluded = np.zeros(len(paths), bool)
    excluded[_found(entries, paths, root, exclude)] = True
    kept, start = {}, 0
    for name, images in parts.items():
        out = excluded[start : start + len(images)]
        start += len(images)
        if out.any():
            logging.warning("exclude: left out %d of %d images of %r, by %s", out.sum(), len(out), name, exclude)
        if out.all():
            raise ValueError(f"exclude: expected to leave images in the part {name!r}. Received: {exclude!r}, with all")
        kept[name] = images.select_images(np.flatnonzero(~out))
    tested = kept["test"].class_counts() + (kept["gallery"].class_counts() if "gallery" in kept else 0)
    return RetrievalSplit(
        **{
            name: _with_classes(images, images.class_counts() if name == "train" else tested)
            for name, images in kept.items()
        }
    )


def _with_classes(images: ImageSet, counts: np.ndarray) -> ImageSet:
    return images if counts.all() else images.select_classes(np.flatnonzero(counts))


def _found(entries, paths, root, file):
    """The positions in `paths` of the images that `entries` name."""
    wanted = {entry: _parts(entry) for entry in entries}
    matches: dict[tuple[str, ...], list[int]] = {parts: [] for parts in wanted.values()}
    lengths = sorted({len(parts) for parts in matches})
    for position, path in enumerate(paths):
        parts = _parts(os.path.abspath(path))
        for length in lengths:
            if parts[-length:] in matches:
                matches[parts[-length:]].append(position)
    found: list[int] = []
    wrong: dict[str, list[str]] = {"no": [], "several": []}
    for entry, parts in wanted.items():
        positions = matches[parts]
        if os.path.isabs(entry):
            positions = [position for position in positions if _parts(os.path.abspath(paths[position])) == parts]
        if len(positions) > 1:
            whole = os.path.abspath(os.path.join(root, entry))
            positions = [position for position in positions if os.path.abspath(paths[position]) == whole] or positions
        # A part may list an image of another.
        if len({paths[position] for position in positions}) == 1:
            found += positions
        else:
            wrong["several" if positions else "no"].append(entry)
    for number, lines in wrong.items():
        if lines:
            raise ValueError(
                f"exclude: expected lines that are each the path of one image, or its end. Received: {file!r}, where "
                f"{len(lines)} of {len(wanted)} match {number} images: {', '.join(map(repr, lines[:5]))}"
                + (", ..." if len(lines) > 5 else "")
            )
    return found


def _parts(path):
    return tuple(part for part in os.path.normpath(path).split(os.sep) if part)
