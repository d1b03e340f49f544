"""Data sets as TFRecord shards: a few large files that other programs can read, with an index for random access."""

import os
from typing import Any

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from s2sd_tf.checks import check_above
from s2sd_tf.data.image_set import ImageSet, image_slices
from s2sd_tf.data.retrieval_split import RetrievalSplit
from s2sd_tf.files import check_replaceable, local_path, replacing, write_json
from s2sd_tf.untrusted import read_arrays, read_json_object, reading

DESCRIPTION = "s2sd_shards.json"
_INDEX = "index.npz"
_VERSION = 1
_ARRAYS = ("shard", "offset", "length", "label")
# Bytes around the data of a TFRecord: the length and its checksum before it, the data's checksum after it.
_RECORD_HEAD, _RECORD_TAIL = 12, 4


def write_shards(
    split: RetrievalSplit, folder: str | os.PathLike, shard_mib: float = 128, name: str = ""
) -> dict[str, int]:
    """Writes a `RetrievalSplit` as TFRecord shards, either completely or not at all.

    `<part>-00000-of-00007.tfrecord` are uncompressed records of `tf.train.Example`, in the order of the images:

    - `image/encoded` (bytes), unchanged; pixels are encoded as PNG;
    - `image/class/label` (int64) and `image/class/text` (bytes);
    - `image/super_class/text` (bytes), if there are super-classes;
    - `image/filename` (bytes), without the folder, if each image was a file.

    `s2sd_shards.json` has the name, the classes and the sizes of the shards. `index.npz` has the place of every encoded
    image.

    Args:
        split: `RetrievalSplit` of any kind of images.
        folder: a new folder, or a folder of shards, which is replaced.
        shard_mib: float > 0; a shard that has reached this size in MiB is followed by the next one.
        name: name of the data set, which `read_shards` checks.

    Returns:
        The number of shards by the name of the part.

    Raises:
        ValueError: a bad argument, a folder with other content, or an empty image.
        OSError: an image that cannot be read.
    """
    check_above("shard_mib", shard_mib, 0)
    check_replaceable("folder", folder, DESCRIPTION)
    if any(images.teachers for images in split.parts().values()):
        raise ValueError("split: expected images without teachers, which shards do not keep. Received: some with them")
    description: dict[str, Any] = {"version": _VERSION, "name": name, "parts": {}}
    index: dict[str, Any] = {}
    total = sum(len(images) for images in split.parts().values())
    with (
        replacing(folder) as temporary,
        tqdm(total=total, desc="Writing shards", unit="image", disable=total <= 1000) as bar,
    ):
        os.makedirs(temporary)
        for part, images in split.parts().items():
            places, names = _write_part(temporary, part, images, shard_mib * 2**20, bar)
            index.update({f"{part}_{name}": array for name, array in places.items()})
            description["parts"][part] = {
                "images": len(images),
                "class_names": list(images.class_names),
                "super_classes": list(images.super_classes),
                "shards": [{"name": name, "bytes": os.path.getsize(os.path.join(temporary, name))} for name in names],
            }
        np.savez(os.path.join(temporary, _INDEX), **index)
        write_json(os.path.join(temporary, DESCRIPTION), description)
    return {part: len(about["shards"]) for part, about in description["parts"].items()}


def read_shards(folder: str | os.PathLike, name: str | None = None) -> RetrievalSplit:
    """Opens what `write_shards` wrote as a `RetrievalSplit` of slices. Images are read only when they are needed.

    Args:
        folder: folder of shards.
        name: the expected data set; None accepts any. Shards without a name are always accepted.

    Raises:
        FileNotFoundError: `folder` has no `s2sd_shards.json`, or lacks a file that it names.
        ValueError: another format or data set; a shard whose size has changed; an index that does not fit the shards.
    """
    folder = local_path("folder", folder)
    path = os.path.join(folder, DESCRIPTION)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"folder: expected shards, with {DESCRIPTION}. Received: {folder!r}")
    description = read_json_object(path)
    with reading(path, f"what write_shards writes, version {_VERSION}"):
        if description["version"] != _VERSION:
            raise ValueError(f"version {description['version']!r}")
        parts = description["parts"]
        shards = {part: [(str(s["name"]), int(s["bytes"])) for s in about["shards"]] for part, about in parts.items()}
        classes = {
            part: (_texts(about["class_names"]), _texts(about["super_classes"])) for part, about in parts.items()
        }
        counts = {part: about["images"] for part, about in parts.items()}
        if any(len(super_classes) not in (0, len(names)) for names, super_classes in classes.values()):
            raise ValueError("super_classes for some classes only")
    if name is not None and description.get("name") not in ("", name):
        raise ValueError(f"{path}: expected shards of {name!r}. Received: of {description.get('name')!r}")
    if not {"train", "test"} <= set(parts) <= set(RetrievalSplit._fields):
        raise ValueError(f"{path}: expected the parts {list(RetrievalSplit._fields)}. Received: {sorted(parts)}")
    if "gallery" in parts and classes["gallery"] != classes["test"]:
        raise ValueError(f"{path}: expected the same classes in gallery and test. Received: different ones")
    for shard in (shard for of_part in shards.values() for shard in of_part):
        _check_shard(folder, *shard)
    index_path = os.path.join(folder, _INDEX)
    if not os.path.isfile(index_path):
        raise FileNotFoundError(f"folder: expected {_INDEX} beside {DESCRIPTION}. Received: {folder!r}")
    wanted = "the index that write_shards writes"
    index = read_arrays(index_path, wanted)
    with reading(index_path, wanted):
        places = {part: [index[f"{part}_{name}"] for name in _ARRAYS] for part in parts}
    for part, count in counts.items():
        if not all(array.shape == (count,) for array in places[part]):
            shapes = [array.shape for array in places[part]]
            raise ValueError(f"{index_path}: expected {count} images of {part}. Received: places of shape {shapes}")
    return RetrievalSplit(
        **{part: _image_set(folder, index_path, shards[part], places[part], *classes[part]) for part in parts}
    )


def _write_part(folder, part, images, shard_bytes, bar):
    """Writes the shards of a part. Returns `(places, names)`: the arrays of the index, and the names of the shards."""
    places = {name: np.zeros(len(images), np.int32 if name in ("shard", "label") else np.int64) for name in _ARRAYS}
    places["label"][:] = images.labels
    writer, written, shards = None, 0, 0
    try:
        for position in range(len(images)):
            if writer is None or written >= shard_bytes:
                if writer is not None:
                    writer.close()
                # A temporary name, because the number of shards is known only at the end.
                writer, written, shards = tf.io.TFRecordWriter(os.path.join(folder, f"{part}-{shards}")), 0, shards + 1
            encoded = _encoded(images, position)
            if not encoded:
                raise ValueError(f"split: expected encoded images. Received: an empty one, {position} of {part}")
            example = _example(images, position, encoded).SerializeToString()
            places["shard"][position] = shards - 1
            # Any place with these bytes holds the image.
            places["offset"][position] = written + _RECORD_HEAD + example.index(encoded)
            places["length"][position] = len(encoded)
            writer.write(example)
            written += _RECORD_HEAD + len(example) + _RECORD_TAIL
            bar.update()
    finally:
        if writer is not None:
            writer.close()
    names = [f"{part}-{number:05d}-of-{shards:05d}.tfrecord" for number in range(shards)]
    for number, name in enumerate(names):
        os.rename(os.path.join(folder, f"{part}-{number}"), os.path.join(folder, name))
    return places, names


def _encoded(images, position):
    if images.kind != "pixels":
        return images.encoded(position)
    with tf.device("CPU"):
        return tf.io.encode_png(images.images[position]).numpy()


def _example(images, position, encoded):
    label = int(images.labels[position])
    texts = {"image/encoded": encoded, "image/class/text": images.class_names[label].encode()}
    if images.super_classes:
        texts["image/super_class/text"] = images.super_classes[label].encode()
    if images.kind == "paths":
        texts["image/filename"] = os.path.basename(images.images[position]).encode()
    feature = {name: tf.train.Feature(bytes_list=tf.train.BytesList(value=[text])) for name, text in texts.items()}
    feature["image/class/label"] = tf.train.Feature(int64_list=tf.train.Int64List(value=[label]))
    return tf.train.Example(features=tf.train.Features(feature=feature))


def _texts(values):
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{values!r} instead of a list of names")
    return tuple(values)


def _check_shard(folder, name, size):
    if os.path.basename(name) != name:
        raise ValueError(f"{DESCRIPTION}: expected names of files in its folder. Received: {name!r}")
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"folder: expected the shard {name}. Received: {os.fspath(folder)!r} without it")
    if os.path.getsize(path) != size:
        raise ValueError(f"folder: expected the shard {path} to have {size} bytes. Received: {os.path.getsize(path)}")


def _image_set(folder, index_path, shards, places, class_names, super_classes):
    shard, offset, length, label = places
    sizes = np.array([size for _, size in shards], np.int64)
    fits = all(array.dtype.kind == "i" for array in places)
    fits = fits and (not len(shard) or 0 <= shard.min() <= shard.max() < len(shards))
    fits = fits and (not len(label) or 0 <= label.min() <= label.max() < len(class_names))
    if not fits or not ((offset >= 0) & (length > 0) & (length <= sizes[shard] - offset)).all():
        raise ValueError(
            f"{index_path}: expected places of images in the shards. Received: places that do not fit them"
        )
    paths = np.array([os.path.join(folder, name) for name, _ in shards], np.str_)
    return ImageSet(image_slices(paths[shard], offset, length), label.astype(np.int32), class_names, super_classes)
