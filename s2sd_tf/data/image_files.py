"""Finds image files that cannot be read before training does, and refuses them or leaves them out."""

import concurrent.futures
import contextlib
import os
import re
from collections.abc import Iterator, Sequence

import tensorflow as tf
from absl import logging
from tqdm import tqdm

from s2sd_tf.data.decoding import FORMATS, NO_WEBP, decode_pixels, decodes_webp, first_line, why_not_decoded
from s2sd_tf.data.image_set import ImageSet
from s2sd_tf.untrusted import image_excess

CHECKS = ("none", "files", "decode")
ON_CORRUPT = ("raise", "skip")

# The first bytes of the supported formats, and the marker at the end of a complete file.
_FORMATS = {b"\xff\xd8\xff": b"\xff\xd9", b"\x89PNG\r\n\x1a\n": b"IEND", b"GIF8": b"", b"BM": b"", b"RIFF": b""}
# The marker is looked for in these last bytes first.
_TAIL_BYTES = 4096
_CHUNK = 64


def check_options(on_corrupt: str, check: str) -> None:
    """Raises ValueError if `on_corrupt` is not in `ON_CORRUPT` or `check` is not in `CHECKS`."""
    if on_corrupt not in ON_CORRUPT:
        raise ValueError(f"on_corrupt: expected 'raise' or 'skip'. Received: {on_corrupt!r}")
    if check not in CHECKS:
        raise ValueError(f"check: expected one of {list(CHECKS)}. Received: {check!r}")


def select_readable(
    parts: list[ImageSet],
    root: str | os.PathLike,
    on_corrupt: str,
    check: str,
    bad: Sequence[tuple[str, str]] = (),
) -> list[ImageSet]:
    """Leaves out the files that cannot be read. All classes are kept.

    Args:
        parts: image sets of paths.
        root: folder of the files, for the message.
        on_corrupt: "raise" refuses such files, "skip" leaves them out. Both report their paths.
        check: "none", "files" or "decode", see `unreadable`.
        bad: `(path, reason)` of files already known to be unreadable.

    Raises:
        ValueError: with "raise", files that cannot be read.
    """
    bad = [*bad, *unreadable([path for images in parts for path in images.images.tolist()], check)]
    if not bad:
        return parts
    lines = [f"  {path}: {why}" for path, why in bad]
    message = f"{len(bad)} files under {root!r} are not readable images"
    if on_corrupt == "raise":
        shown = "\n".join(lines[:20] + ["  ..."] * (len(lines) > 20))
        raise ValueError(f"{message}:\n{shown}\nPass on_corrupt='skip' to train without them.")
    logging.warning("%s and are skipped:\n%s", message, "\n".join(lines))
    left_out = {path for path, _ in bad}
    return [
        images.select_images([at for at, path in enumerate(images.images.tolist()) if path not in left_out])
        for images in parts
    ]


def unreadable(paths: Sequence[str], check: str) -> list[tuple[str, str]]:
    """Finds the files that are not readable images, with a progress bar for more than 1,000 files.

    Args:
        paths: the files.
        check: "none" opens no file. "files" reads the first bytes and the last 4 KiB of each file: it has to exist,
            begin as PNG, JPEG, BMP, GIF or WebP, and if it is PNG, JPEG or WebP have its end, which a truncated file
            lacks. Data after the end are allowed.
            "decode" decodes each file, as training does. Both also refuse files that are not regular files, have more
            than 64 MiB, or have more than 89 million pixels according to their header.

    Returns:
        `(path, reason)` of each unreadable file.
    """
    if check == "none":
        return []
    find = _decode_error if check == "decode" else _file_error
    chunks = [paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK)]
    bad: list[tuple[str, str]] = []
    with (
        concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=len(paths), desc="Checking images", unit="file", disable=len(paths) <= 1000) as bar,
    ):
        for chunk, reasons in zip(chunks, pool.map(lambda chunk: [find(path) for path in chunk], chunks)):
            bad += [(path, reason) for path, reason in zip(chunk, reasons) if reason]
            bar.update(len(chunk))
    return bad


@contextlib.contextmanager
def naming_unreadable(*parts: ImageSet) -> Iterator[None]:
    """Turns TensorFlow's error about an image that cannot be decoded, of a pipeline in the block, into one that names
    the image.

    Args:
        *parts: the image sets that the block reads.

    Raises:
        ValueError: an image cannot be decoded.
    """
    try:
        yield
    except tf.errors.InvalidArgumentError as error:
        if not re.search("image|decode|jpe?g|png|gif|bmp|webp", str(error), re.IGNORECASE):
            raise
        for images in parts:
            if found := _first_unreadable(images):
                raise ValueError(f"images: expected images that can be decoded. Received: {found}") from error
        raise


def _first_unreadable(images):
    """`<name>: <reason>` of the first image that cannot be decoded, or None."""
    if images.kind == "pixels":
        return None

    def find(position):
        encoded = images.encoded(position)
        if reason := image_excess(encoded):
            return reason
        try:
            with tf.device("CPU:0"):
                decode_pixels(tf.constant(encoded))
        except tf.errors.OpError as error:
            return why_not_decoded(encoded, error)
        return None

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(images), _CHUNK):
            positions = range(start, min(start + _CHUNK, len(images)))
            for position, reason in zip(positions, pool.map(find, positions)):
                if reason:
                    name = images.images[position] if images.kind == "paths" else f"image {position}"
                    return f"{name}: {reason}"
    return None


def _decode_error(path):
    try:
        if reason := image_excess(path):
            return reason
        with open(path, "rb") as file:
            content = file.read()
        if not content:
            return "empty file"
        with tf.device("CPU:0"):
            decode_pixels(tf.constant(content))
    except OSError as error:
        return error.strerror or first_line(error)
    except tf.errors.OpError as error:
        return why_not_decoded(content, error)
    return _name_error(path)


def _file_error(path):
    try:
        if reason := image_excess(path):
            return reason
        with open(path, "rb") as file:
            head = file.read(12)
            if not head:
                return "empty file"
            end = next((end for begin, end in _FORMATS.items() if head.startswith(begin)), None)
            if end is None:
                return f"not a {FORMATS} by its first bytes"
            if not _is_whole(file, head, end):
                return "truncated: its end is missing"
    except OSError as error:
        return error.strerror or first_line(error)
    if head.startswith(b"RIFF") and not decodes_webp():
        return NO_WEBP
    return _name_error(path)


def _is_whole(file, head, end):
    size = file.seek(0, os.SEEK_END)
    if head.startswith(b"RIFF"):
        return size >= 8 + int.from_bytes(head[4:8], "little")
    file.seek(max(0, size - _TAIL_BYTES))
    if end in file.read():
        return True
    # Cameras append data after the end of the image, such as a video.
    file.seek(0)
    content = file.read()
    return content.find(end, _scan_start(content)) >= 0


def _scan_start(content):
    """Where the pixels of a JPEG begin, after the segments, one of which may hold a whole thumbnail. 0 for others."""
    if not content.startswith(b"\xff\xd8"):
        return 0
    position = 2
    while position + 4 <= len(content) and content[position + 1] != 0xDA:
        position += 2 + int.from_bytes(content[position + 2 : position + 4], "big")
    return position


def _name_error(path):
    # TensorFlow accepts no other names.
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return "its name is not UTF-8"
    return None
