"""Embeds images into shards; after an interruption, it resumes with the missing shards."""

import concurrent.futures
import errno
import inspect
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from tqdm import tqdm

from s2sd_tf.checks import check_folder_to_write, checked_int
from s2sd_tf.data.decoding import first_line
from s2sd_tf.data.image_folder import EXTENSIONS, walk_folders
from s2sd_tf.evaluation.embeddings import read_items, shard_folders, shard_name, write_shard
from s2sd_tf.evaluation.search import build_index, check_index_settings
from s2sd_tf.files import has_content, local_path, only_writer, read_json, remove_leftovers, replacing, write_json
from s2sd_tf.serving.encoder import Encoder
from s2sd_tf.untrusted import image_excess, read_json_object

# Errors of one file, not of the system: it is reported, and the others are embedded.
_OF_ONE_FILE = {
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ESTALE),
    errno.ENAMETOOLONG,
}


class Item(NamedTuple):
    """An image to embed.

    Attributes:
        id: unique id.
        path: image file.
        label: class; empty for none.
    """

    id: str
    path: str
    label: str


def list_images(root: str | os.PathLike) -> list[Item]:
    """Lists all image files under a folder as `Item`s, sorted by id.

    The id is the path relative to `root`. The label is the file's folder relative to `root`, and empty for files in
    `root` itself. Links are followed, except a link to a folder that contains it. Other files, and folders that cannot
    be listed, are counted in a warning; names that begin with a dot are ignored.

    Raises:
        FileNotFoundError: `root` is not a folder.
        ValueError: there is no image file under `root`.
    """
    root = local_path("root", root)
    if not os.path.isdir(root):
        raise FileNotFoundError(f"images: expected a folder. Received: {root!r}")
    items = []
    skipped: list[tuple[str, str]] = []
    for folder, names in walk_folders(root, skipped):
        label = os.path.relpath(folder, root).replace(os.sep, "/")
        for name in names:
            path = os.path.join(folder, name)
            if name.lower().endswith(EXTENSIONS):
                items.append(
                    Item(os.path.relpath(path, root).replace(os.sep, "/"), path, "" if label == "." else label)
                )
            else:
                skipped.append((path, "not an image file by its extension"))
    if skipped:
        some = "\n".join([f"  {path}: {why}" for path, why in skipped[:10]] + ["  ..."] * (len(skipped) > 10))
        logging.warning("%d files or folders under %r are skipped:\n%s", len(skipped), root, some)
    if not items:
        raise ValueError(f"images: expected files {', '.join(EXTENSIONS)} under the folder. Received: {root!r}")
    return sorted(items)


def embed_images(
    items: Iterable[Item],
    encoder: Encoder,
    folder: str | os.PathLike,
    shard_size: int = 4096,
    batch_size: int = 64,
    index: dict[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Embeds images into `folder`, one shard at a time. If you call it again, it embeds the images that are not in a
    shard yet: after an interruption, or because images were added.

    Every shard is a folder such as `shard-00000`. It has `embeddings.npy`, `items.json` (ids and labels), `failed.json`
    if images could not be read, and an index if `index` is set. No image is embedded twice and none is lost.
    `summary.json` is written at the end.

    Finished shards are never changed. An image goes by its id, so one whose file changed, or could not be read, is not
    embedded again. If images are gone or have another label, the call is refused and names their shards; remove these
    and call again.

    Args:
        items: the images, with unique ids.
        encoder: the encoder.
        folder: folder to write; a new folder, or that of an earlier call with the same encoder, `shard_size` and
            `index`.
        shard_size, batch_size: >= 1, images per shard and images embedded at a time.
        index: arguments of `build_index` (method, metric, recall, k, dim, codes) for an index in every shard, or None.
        progress: whether to show a progress bar.

    Returns:
        The content of `summary.json`: "images", "embedded", "failed" (a list of `{"id", "error"}`), "dim", "shards".

    Raises:
        ValueError: an argument is invalid, `folder` was written with other settings or another encoder, its shards have
            images that are not among `items`, or another process is writing it.
    """
    items, folder = local_items(items), local_path("folder", folder)
    check_folder_to_write("folder", folder)
    shard_size, batch_size = checked_int("shard_size", shard_size, 1), checked_int("batch_size", batch_size, 1)
    if len({item.id for item in items}) < len(items) or not items:
        raise ValueError("items: expected at least one item, and unique ids. Received: none, or duplicate ids")
    check_index(index, encoder.dim)
    # None for the whole dimension, as for folders of earlier versions.
    dim = None if encoder.dim == encoder.dims[-1] else encoder.dim
    plan = {"encoder": encoder.fingerprint(), "dim": dim, "shard_size": shard_size, "index": index}
    with only_writer("folder", folder, inside=True):
        missing = _start(folder, plan, items)
        _embed(missing, len(items), encoder, folder, shard_size, batch_size, index, progress)
        return _summarize(folder, len(items), encoder.dim)


def check_index(index: Mapping[str, Any] | None, dim: int) -> None:
    """Checks the arguments of `build_index`, for embeddings of dimension `dim`, before any image is embedded.

    Raises:
        ValueError: a bad argument.
        ImportError: ScaNN is missing.
    """
    if index is None:
        return
    known = sorted(inspect.signature(check_index_settings).parameters)
    if not isinstance(index, Mapping) or not set(index) <= set(known):
        raise ValueError(f"index: expected arguments of build_index, {known}, or None. Received: {index!r}")
    try:
        check_index_settings(**index)
        if (index.get("dim") or 0) > dim:
            raise ValueError(f"dim: expected at most {dim}, that of the encoder. Received: {index['dim']}")
    except ValueError as error:
        raise ValueError(f"index, {error}") from None


def local_items(items: Iterable[Item]) -> list[Item]:
    """The items as a list, with their paths as `local_path` returns them.

    Raises:
        ValueError: something that is no item, or has no such path.
    """
    items = list(items) if isinstance(items, Iterable) else [items]
    if not all(isinstance(item, tuple) and len(item) == len(Item._fields) for item in items):
        raise ValueError(f"items: expected Items, (id, path, label). Received: {items[:3]!r}")
    return [Item(*item)._replace(path=local_path("items", item[1])) for item in items]


def _embed(missing, total, encoder, folder, shard_size, batch_size, index, progress):
    if len(missing) < total:
        logging.info("%s has %d of %d images; resuming", folder, total - len(missing), total)
    free = (name for name in map(shard_name, itertools.count()) if not os.path.isdir(os.path.join(folder, name)))
    bar = tqdm(total=total, initial=total - len(missing), desc="Embedding", unit="image", disable=not progress)
    with bar, concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for start in range(0, len(missing), shard_size):
            path = os.path.join(folder, next(free))
            _write(path, missing[start : start + shard_size], encoder, batch_size, index, pool, bar)


def _start(folder, plan, items):
    """Checks the folder, writes the plan, and returns the items that are in no shard."""
    missing = items
    path = os.path.join(folder, "plan.json")
    if os.path.exists(path):
        there = read_json_object(path)
        differing = sorted(key for key in plan if there.get(key) != plan[key])
        if differing:
            raise ValueError(
                f"folder: expected a new one, or one with the same encoder and settings. Received: {folder!r}, "
                f"which differs in {', '.join(differing)}"
            )
        missing = _missing(folder, items)
    elif os.path.isdir(folder) and has_content(folder):
        raise ValueError(f"folder: expected a new or empty one, or the folder of an earlier call. Received: {folder!r}")
    os.makedirs(folder, exist_ok=True)
    remove_leftovers(folder)
    if missing and os.path.exists(summary := os.path.join(folder, "summary.json")):
        # Without it, the folder counts as unfinished.
        os.remove(summary)
    write_json(path, plan)
    return missing


def _missing(folder, items):
    """The items that are in no shard of `folder`. Refuses shards with others."""
    labels = {item.id: item.label for item in items}
    done: set[str] = set()
    for shard in shard_folders(folder):
        ids, its_labels = read_items(shard)
        failed = [row["id"] for row in _failed(shard)]
        gone = [name for name in (*ids, *failed) if name not in labels]
        gone += [name for name, label in zip(ids, its_labels or ()) if labels.get(name, label) != label]
        if gone:
            raise ValueError(
                f"folder: expected shards whose images are still there, with the same label; remove {shard!r} to embed "
                f"the others of its images again. Received: {len(gone)} gone, such as {gone[0]!r}"
            )
        done.update(ids, failed)
    return [item for item in items if item.id not in done]


def _failed(shard):
    path = os.path.join(shard, "failed.json")
    return read_json(path) if os.path.exists(path) else []


def _write(path, items, encoder, batch_size, index, pool, bar):
    rows, kept, failed = [], [], []
    batches = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
    # While one batch is embedded, the next is read.
    reading = [pool.submit(read_item, item) for item in batches[0]]
    for position, batch in enumerate(batches):
        read = [future.result() for future in reading]
        reading = [
            pool.submit(read_item, item) for item in (batches[position + 1] if position + 1 < len(batches) else [])
        ]
        there = [item for item, (content, _) in zip(batch, read) if content is not None]
        embedded, errors = encoder.embed([content for content, _ in read if content is not None])
        failed += [(item.id, error) for item, (content, error) in zip(batch, read) if content is None]
        failed += [(there[at].id, error) for at, error in errors.items()]
        good = [at for at in range(len(there)) if at not in errors]
        rows.append(embedded[good])
        kept += [there[at] for at in good]
        bar.update(len(batch))
    write_items_as_shard(
        path,
        np.concatenate(rows),
        kept,
        [{"id": i, "error": e} for i, e in failed],
        index,
    )


def write_items_as_shard(
    path: str | os.PathLike,
    rows: np.ndarray,
    items: Sequence[Item],
    failed: Sequence[Mapping[str, str]],
    index: dict[str, Any] | None,
) -> None:
    """Writes a shard, completely or not at all.

    Args:
        path: folder of the shard.
        rows: the embeddings, float `(n, dim)`.
        items: the n embedded items.
        failed: `{"id", "error"}` of every image that failed.
        index: arguments of `build_index`, or None for no index. A shard without embeddings gets none.
    """
    ids = [item.id for item in items]
    labels = [item.label for item in items]
    built = None
    if index is not None and len(rows):
        built = build_index(rows, ids, labels, **index)
    with replacing(path) as temporary:
        write_shard(temporary, rows, ids, labels, built)
        if failed:
            write_json(os.path.join(temporary, "failed.json"), failed)


def read_item(item: Item) -> tuple[bytes | None, str | None]:
    """Returns `(content, error)` of an image file, one of them None. Raises errors that are not the file's fault."""
    try:
        if reason := image_excess(item.path):
            return None, reason
        with open(item.path, "rb") as file:
            return file.read(), None
    except OSError as error:
        if error.errno not in _OF_ONE_FILE:
            raise
        return None, first_line(error)


def _summarize(folder, images, dim):
    shards = shard_folders(folder)
    embedded = sum(len(read_items(shard)[0]) for shard in shards)
    failed = [row for shard in shards for row in _failed(shard)]
    summary = {"images": images, "embedded": embedded, "failed": failed, "dim": dim, "shards": len(shards)}
    write_json(os.path.join(folder, "summary.json"), summary)
    return summary
