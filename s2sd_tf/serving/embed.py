"""Embeds images into shards that are written whole, and goes on where it was."""

import concurrent.futures
import hashlib
import os
from typing import NamedTuple

import numpy as np
from absl import logging
from tqdm import tqdm

from s2sd_tf.checks import checked_int
from s2sd_tf.data.image_folder import EXTENSIONS, walk_folders
from s2sd_tf.evaluation.embeddings import read_items, shard_name, write_shard
from s2sd_tf.evaluation.search import build_index
from s2sd_tf.files import LEFTOVER, read_json, remove_leftovers, replacing, write_json
from s2sd_tf.serving.encoder import first_line
from s2sd_tf.untrusted import image_excess, read_json_object


class Item(NamedTuple):
    """An image to embed.

    Attributes:
        id: str, unlike all others.
        path: file of the image.
        label: str, its class; empty for none.
    """

    id: str
    path: str
    label: str


def list_images(root):
    """The `Item`s of all image files under a folder, sorted: the id is the path under the folder, the label the folder
    that the file is in, empty for the first one. Links are followed, but for one to a folder that it is in.

    Raises:
        FileNotFoundError: `root` is not a folder.
        ValueError: no image file under it.
    """
    if not os.path.isdir(root):
        raise FileNotFoundError(f"images: expected a folder. Received: {root!r}")
    items = []
    for folder, names in walk_folders(root):
        label = os.path.relpath(folder, root).replace(os.sep, "/")
        for name in names:
            if name.lower().endswith(EXTENSIONS):
                path = os.path.join(folder, name)
                items.append(
                    Item(os.path.relpath(path, root).replace(os.sep, "/"), path, "" if label == "." else label)
                )
    if not items:
        raise ValueError(f"images: expected files {', '.join(EXTENSIONS)} under the folder. Received: {root!r}")
    return sorted(items)


def embed_images(items, encoder, folder, shard_size=4096, batch_size=64, index=None, progress=True):
    """Embeds images into `folder`, a shard at a time; called again after an interruption, goes on with what is missing.

    Every shard is a folder `shard-00000` of `embeddings.npy`, `items.json` (ids and labels), `failed.json` where images
    could not be read, and with `index` an index. Which images go into which shard is settled by their order, so none is
    embedded twice and none is lost. `summary.json` is written at the end.

    Args:
        items: `Item`s with different ids.
        encoder: `Encoder`.
        folder: folder to write; a new one, or that of an earlier call with the same arguments.
        shard_size, batch_size: int >= 1, images.
        index: dict of arguments of `build_index` (method, metric, recall, k) for an index in every shard, or None.
        progress: bool, show a progress bar.

    Returns:
        The content of `summary.json`: "images", "embedded", "failed" (a list of `{"id", "error"}`), "dim", "shards".

    Raises:
        ValueError: bad arguments, or a folder that other images or another encoder wrote.
    """
    items = list(items)
    shard_size, batch_size = checked_int("shard_size", shard_size, 1), checked_int("batch_size", batch_size, 1)
    if len({item.id for item in items}) < len(items) or not items:
        raise ValueError("items: expected at least one, with different ids. Received: none, or duplicates")
    shards = -(-len(items) // shard_size)
    plan = {
        "images": len(items),
        "items": hashlib.sha256(
            "\n".join(f"{i.id}\t{i.label}" for i in items).encode(errors="surrogateescape")
        ).hexdigest(),
        "encoder": encoder.fingerprint(),
        "shard_size": shard_size,
        "index": index,
    }
    _start(folder, plan)
    names = [shard_name(number) for number in range(shards)]
    missing = [number for number, name in enumerate(names) if not os.path.isdir(os.path.join(folder, name))]
    if len(missing) < shards:
        logging.info("%s has %d of %d shards; going on", folder, shards - len(missing), shards)
    done = len(items) - sum(len(items[n * shard_size : (n + 1) * shard_size]) for n in missing)
    bar = tqdm(total=len(items), initial=done, desc="Embedding", unit="image", disable=not progress)
    with bar, concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for number in missing:
            _write(folder, number, items[number * shard_size : (number + 1) * shard_size], encoder, batch_size, index,
                   pool, bar)  # fmt: skip
    return _summarize(folder, names, len(items), encoder.dim)


def _start(folder, plan):
    path = os.path.join(folder, "plan.json")
    if os.path.exists(path):
        there = read_json_object(path)
        differing = sorted(key for key in plan if there.get(key) != plan[key])
        if differing:
            raise ValueError(
                f"folder: expected a new one, or one of the same images, encoder and settings. Received: {folder!r}, "
                f"which differs in {', '.join(differing)}"
            )
    elif os.path.isdir(folder) and any(not name.startswith(LEFTOVER) for name in os.listdir(folder)):
        raise ValueError(f"folder: expected a new or empty one, or that of an earlier call. Received: {folder!r}")
    os.makedirs(folder, exist_ok=True)
    remove_leftovers(folder)
    write_json(path, plan)


def _write(folder, number, items, encoder, batch_size, index, pool, bar):
    rows, kept, failed = [], [], []
    batches = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
    # The next batch is read while one is embedded.
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
        os.path.join(folder, shard_name(number)),
        np.concatenate(rows),
        kept,
        [{"id": i, "error": e} for i, e in failed],
        index,
    )


def write_items_as_shard(path, rows, items, failed, index):
    """Writes a shard of embedded `Item`s with what failed, and its index where one is asked for and there is a row."""
    ids = [item.id for item in items]
    labels = [item.label for item in items]
    built = None
    if index is not None and len(rows):
        built = build_index(rows, ids, labels, **index)
    with replacing(path) as temporary:
        write_shard(temporary, rows, ids, labels, built)
        if failed:
            write_json(os.path.join(temporary, "failed.json"), failed)


def read_item(item):
    """`(content, error)` of an image file, one of them None. Errors that are not the file's own are raised."""
    try:
        if reason := image_excess(item.path):
            return None, reason
        with open(item.path, "rb") as file:
            return file.read(), None
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        return None, first_line(error)


def _summarize(folder, names, images, dim):
    failed, embedded = [], 0
    for name in names:
        embedded += len(read_items(os.path.join(folder, name))[0])
        path = os.path.join(folder, name, "failed.json")
        if os.path.exists(path):
            failed += read_json(path)
    summary = {"images": images, "embedded": embedded, "failed": failed, "dim": dim, "shards": len(names)}
    write_json(os.path.join(folder, "summary.json"), summary)
    return summary
