"""An Apache Beam pipeline that embeds images on as many machines as the runner has.

Like `embed_images`, it writes shards of embeddings, each with an index. `evaluation.load_index` searches all shards and
merges the results. The output is a folder on a file system that all workers share.
"""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Sequence
from typing import Any

import apache_beam as beam
import numpy as np
import tensorflow as tf
from apache_beam.utils.shared import Shared
from google.protobuf.message import DecodeError

from s2sd_tf.checks import check_folder_to_write, checked_int
from s2sd_tf.evaluation.embeddings import shard_name
from s2sd_tf.files import has_content, local_path, only_writer, read_json, reporting_out_of_space, write_json
from s2sd_tf.serving.embed import Item, check_index, local_items, read_item, write_items_as_shard
from s2sd_tf.serving.encoder import Encoder

# Names of the features in a TFRecord example: encoded image, id, and optional label.
FEATURES = ("image", "id", "label")
_PLAN, _SUMMARY = "plan.json", "summary.json"


class EmbedImages(beam.PTransform):
    """Embeds images into shards in a folder; outputs JSON for every shard, with "shard", "embedded" and "failed".

    The input is a collection of `Item`s, whose files the workers read, or of `(Item, bytes)`. The hash of its id
    determines the shard of an image, whichever worker embeds it; within a shard, images are sorted by id. A shard is
    written under a temporary name and then renamed, so a worker can safely retry. An image that cannot be read or
    decoded is only reported in the shard's `failed.json`.

    Args:
        encoder: SavedModel folder that `export_encoder` wrote; the workers must be able to read it.
        folder: folder to write.
        shards: >= 1, the maximum number of shards; shards without images are not written.
        batch_size: >= 1, images embedded at a time; None: the input is a collection of lists of images, a batch each.
        index: arguments of `build_index`, or None for shards without an index.
        dim: dimension of the embeddings; see `Encoder`.
    """

    def __init__(
        self,
        encoder: str | os.PathLike,
        folder: str | os.PathLike,
        shards: int = 16,
        batch_size: int | None = 64,
        index: dict[str, Any] | None = None,
        dim: int | None = None,
    ) -> None:
        super().__init__()
        encoder, folder = local_path("encoder", encoder), local_path("folder", folder)
        shards = checked_int("shards", shards, 1)
        batch_size = None if batch_size is None else checked_int("batch_size", batch_size, 1)
        self.encoder, self.folder, self.shards, self.batch_size, self.index = encoder, folder, shards, batch_size, index
        # An invalid encoder is reported here, not by a worker.
        self.dim = Encoder(encoder, dim).dim
        check_index(index, self.dim)

    def expand(self, images: beam.PCollection) -> beam.PCollection:
        if self.batch_size is not None:
            images |= "Batch" >> beam.BatchElements(min_batch_size=self.batch_size, max_batch_size=self.batch_size)
        return (
            images
            | "Embed" >> beam.ParDo(_Embed(self.encoder, self.dim, self.shards))
            | "Group" >> beam.GroupByKey()
            | "Write" >> beam.Map(_write, folder=self.folder, index=self.index, dim=self.dim)
        )


def examples_to_images(records: beam.PCollection) -> beam.PCollection:
    """Parses serialized `tf.train.Example`s with the features `image`, `id` and maybe `label` to `(Item, bytes)`."""
    return records | "Parse" >> beam.Map(_parse)


def run(
    source: Sequence[Item] | str,
    encoder: str | os.PathLike,
    folder: str | os.PathLike,
    shards: int = 16,
    batch_size: int = 64,
    index: dict[str, Any] | None = None,
    options: list[str] | None = None,
    dim: int | None = None,
) -> dict[str, Any]:
    """Runs the pipeline and writes `summary.json`. If it fails, nothing is left in `folder`.

    Args:
        source: the items, or the pattern of TFRecord files (see `examples_to_images`).
        encoder, folder, shards, batch_size, index, dim: see `EmbedImages`.
        options: options of the pipeline ("--runner=..."), or None for the DirectRunner.

    Returns:
        The content of `summary.json`: "images", "embedded", "failed" (a list of `{"id", "error"}`), "dim", "shards".

    Raises:
        ValueError: `folder` is not empty, another process is writing it, `encoder` is invalid, or the runner lost
            images.
    """
    folder = local_path("folder", folder)
    # A pattern may be a URL, because Beam reads it.
    source = os.path.expanduser(source) if isinstance(source, str) else local_items(source)
    check_folder_to_write("folder", folder)
    batch_size = checked_int("batch_size", batch_size, 1)
    # Lists of files come in batches, because DaskRunner loses what `BatchElements` has left at the end.
    embed = EmbedImages(encoder, folder, shards, batch_size if isinstance(source, str) else None, index, dim)
    with only_writer("folder", folder, inside=True):
        if has_content(folder):
            raise ValueError(f"folder: expected a new or empty one. Received: {folder!r}")
        try:
            _run(source, embed, options, batch_size)
            summary = read_json(os.path.join(folder, _SUMMARY))
            if not isinstance(source, str) and summary["images"] != len(source):
                raise ValueError(
                    f"options: expected a runner that passes on all of {len(source):,} images. Received: "
                    f"{summary['images']:,}"
                )
        except Exception:
            # It was empty, and it cannot be resumed.
            for name in os.listdir(folder):
                if name in (_PLAN, _SUMMARY) or name.startswith("shard-"):
                    path = os.path.join(folder, name)
                    shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
            raise
        return summary


def _run(source, embed, options, batch_size):
    """Runs the pipeline, which writes the shards and the summary into the folder of `embed`."""
    folder = embed.folder
    # A folder with a plan and without a summary counts as unfinished.
    write_json(os.path.join(folder, _PLAN), {"shards": embed.shards, "index": embed.index})
    chosen = beam.options.pipeline_options.PipelineOptions(options or [])
    # Beam raises the errors of its workers as others.
    with reporting_out_of_space(folder), beam.Pipeline(options=chosen) as pipeline:
        if isinstance(source, str):
            records = pipeline | "Read" >> beam.io.ReadFromTFRecord(source)
            images = examples_to_images(records)
        else:
            batches = [source[start : start + batch_size] for start in range(0, len(source), batch_size)]
            images = pipeline | "List" >> beam.Create(batches) | "Spread" >> beam.Reshuffle()
        done = images | embed
        # The workers may be on other machines, so the summary comes back as a file.
        (
            done
            | "One" >> beam.combiners.ToList()
            | "Summary" >> beam.Map(_summarize, path=os.path.join(folder, _SUMMARY), dim=embed.dim)
        )


class _Embed(beam.DoFn):
    def __init__(self, encoder: str | os.PathLike, dim: int, shards: int) -> None:
        super().__init__()
        self._path, self._dim, self._shards = encoder, dim, shards
        # All threads of a worker share one encoder.
        self._shared = Shared()

    def setup(self):
        self._encoder = self._shared.acquire(lambda: Encoder(self._path, self._dim))

    def process(self, batch):
        """Yields for every image its shard and `(packed item and error, row)`; the error is empty or the row None."""
        there, contents = [], []
        for image in batch:
            item, content = image if not isinstance(image, Item) else (image, None)
            item = Item(*item)
            content, error = read_item(item) if content is None else (content, None)
            if error is not None:
                yield self._shard(item), (_packed(*item, error), None)
                continue
            there.append(item)
            contents.append(content)
        rows, errors = self._encoder.embed(contents)
        for position, item in enumerate(there):
            error = errors.get(position)
            yield self._shard(item), (_packed(*item, error or ""), None if error else rows[position])

    def _shard(self, item):
        digest = hashlib.sha256(item.id.encode(errors="surrogateescape")).digest()
        return int.from_bytes(digest[:8], "big") % self._shards


def _packed(*texts):
    """Texts as bytes: Beam passes on no texts that are not UTF-8, such as some names of files."""
    return tuple(text.encode(errors="surrogateescape") for text in texts)


def _unpacked(packed):
    """The item and the error that were packed."""
    *item, error = (text.decode(errors="surrogateescape") for text in packed)
    return Item(*item), error


def _write(group, folder, index, dim):
    shard, found = group
    found = sorted(((_unpacked(packed), row) for packed, row in found), key=lambda one: one[0])
    failed = [{"id": item.id, "error": error} for (item, error), _ in found if error]
    items = [item for (item, error), _ in found if not error]
    rows = [row for (_, error), row in found if not error]
    repeated = sorted({a.id for a, b in itertools.pairwise(items) if a.id == b.id})
    if repeated:
        raise ValueError(f"images: expected unique ids. Received more than once: {repeated[:5]}")
    path = os.path.join(folder, shard_name(shard))
    vectors = np.stack(rows) if rows else np.empty((0, dim), np.float32)
    write_items_as_shard(path, vectors, items, failed, index)
    # In ASCII, whatever the ids.
    return json.dumps({"shard": shard, "embedded": len(items), "failed": failed})


def _parse(record):
    try:
        features = tf.train.Example.FromString(record).features.feature
    except DecodeError as error:
        raise ValueError(f"tfrecords: expected serialized tf.train.Examples. Received: {error}") from error
    image, name, label = (features[key] for key in FEATURES)
    if not image.bytes_list.value or not name.bytes_list.value:
        raise ValueError(
            f"tfrecords: expected examples with the bytes features {FEATURES[:2]}. Received: {sorted(features)}"
        )
    labels = [text.decode() for text in label.bytes_list.value] or [str(number) for number in label.int64_list.value]
    if len(labels) > 1:
        raise ValueError(f"tfrecords: expected at most one value of the feature 'label'. Received: {labels}")
    label = "".join(labels)
    return Item(name.bytes_list.value[0].decode(), "", label), image.bytes_list.value[0]


def _summarize(done, path, dim):
    done = [json.loads(shard) for shard in done]
    failed = sorted((row for shard in done for row in shard["failed"]), key=lambda row: row["id"])
    embedded = sum(shard["embedded"] for shard in done)
    summary = {
        "images": embedded + len(failed),
        "embedded": embedded,
        "failed": failed,
        "dim": dim,
        "shards": len(done),
    }
    write_json(path, summary)
