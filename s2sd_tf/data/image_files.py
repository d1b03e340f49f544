"""Finds image files that cannot be read before training does, and refuses them or leaves them out."""

import concurrent.futures
import os
from collections.abc import Sequence

import tensorflow as tf
from absl import logging
from tqdm import tqdm

from s2sd_tf.data.image_set import ImageSet
from s2sd_tf.data.preprocessing import decode_rgb
from s2sd_tf.untrusted import image_excess

CHECKS = ("none", "files", "decode")
ON_CORRUPT = ("raise", "skip")

# The first bytes of the supported formats, and the marker near the end of a complete file.
_FORMATS = {b"\xff\xd8\xff": b"\xff\xd9", b"\x89PNG\r\n\x1a\n": b"IEND", b"GIF8": b"", b"BM": b""}
# Cameras and editors append data to a JPEG after its end marker.
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
            begin as PNG, JPEG, BMP or GIF, and if it is PNG or JPEG have the end marker, which a truncated file lacks.
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


def _decode_error(path):
    try:
        if reason := image_excess(path):
            return reason
        with open(path, "rb") as file:
            content = file.read()
        if not content:
            return "empty file"
        with tf.device("CPU:0"):
            decode_rgb(content)
    except (OSError, tf.errors.OpError) as error:
        return _first_line(error)
    return _name_error(path)


def _file_error(path):
    try:
        if reason := image_excess(path):
            return reason
        with open(path, "rb") as file:
            head = file.read(8)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            tail = file.read()
    except OSError as error:
        return error.strerror or _first_line(error)
    if not head:
        return "empty file"
    ends = [end for begin, end in _FORMATS.items() if head.startswith(begin)]
    if not ends:
        return "not a PNG, JPEG, BMP or GIF by its first bytes"
    return _name_error(path) if ends[0] in tail else "truncated: its end marker is missing"


def _name_error(path):
    # TensorFlow accepts no other names.
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return "its name is not UTF-8"
    return None


def _first_line(error):
    return str(error).strip().splitlines()[0][:200]
