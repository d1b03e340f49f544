"""In-Shop Clothes Retrieval (DeepFashion): 7,982 items, 3,997 of them to train on, with queries and a gallery."""

import os

from absl import logging

from s2sd_tf.data.annotations import Row, as_int, find_root, image_set, path_under, read_columns
from s2sd_tf.data.datasets import register
from s2sd_tf.data.image_files import check_options
from s2sd_tf.data.retrieval_split import RetrievalSplit, readable_split
from s2sd_tf.data.sources import load_source
from s2sd_tf.files import local_path

_FOLDERS = ("", "in-shop", "inshop", "In-shop Clothes Retrieval Benchmark")
_PARTITIONS = ("Eval/list_eval_partition.txt", "list_eval_partition.txt")
_PARTS = {"train": "train", "query": "test", "gallery": "gallery"}
_COUNTS = {"train": (25_882, 3_997), "test": (14_218, 3_985), "gallery": (12_612, 3_985)}


@register("inshop", _COUNTS)
def load_inshop(
    root: str | os.PathLike, on_corrupt: str = "raise", check: str = "files", source: str = "auto"
) -> RetrievalSplit:
    """Loads In-Shop Clothes Retrieval (Liu et al., CVPR 2016, "DeepFashion"), split by its own partition file.

    25,882 images of 3,997 items train; 14,218 queries and 12,612 gallery images of 3,985 other items test. Other counts
    are logged, and so are queried items that are missing from the gallery. The super-class is the kind of clothing
    ("WOMEN/Dresses"), taken from the item's first image if its images differ. The partition file is
    `Eval/list_eval_partition.txt` or `list_eval_partition.txt` and the images are in `Img/img` or `img`, in `root` or
    in its folder `in-shop` (as in the published code), `inshop` or `In-shop Clothes Retrieval Benchmark`.

    Args:
        root, on_corrupt, check, source: see `load_cub200`. TensorFlow Datasets does not have In-Shop.

    Returns:
        `RetrievalSplit` with a gallery. Classes are named by the item ("id_00000002") and sorted.

    Raises:
        FileNotFoundError: the partition file or the folder of images is not under `root`.
        ValueError: see `load_cub200`.
    """
    root = local_path("root", root)
    check_options(on_corrupt, check)
    split = load_source("inshop", root, source, lambda: _read_files(root, on_corrupt, check))
    _warn_of_missing_items(split)
    return split


def _read_files(root, on_corrupt, check):
    found = find_root(root, _FOLDERS, _PARTITIONS)
    if not found:
        raise FileNotFoundError(
            f"root: expected In-Shop Clothes Retrieval, {_PARTITIONS[0]} or {_PARTITIONS[1]} in one of "
            f"{list(_FOLDERS)} under it. Received: {root!r}"
        )
    folder, partition = found
    images = find_root(folder, ["Img", ""], ["img"])
    if not images:
        raise FileNotFoundError(f"root: expected the images in Img/img or img. Received: {folder!r} without them")
    return readable_split(_read_partition(os.path.join(folder, partition), images[0]), folder, on_corrupt, check)


def _read_partition(path, folder):
    rows: dict[str, list[Row]] = {part: [] for part in _PARTS}
    super_class_of: dict[str, str] = {}
    for where, (relative, item, part) in read_columns(path, 3, header=2, path_first=True):
        if part not in _PARTS:
            raise ValueError(f"{where}: expected one of {list(_PARTS)} as evaluation_status. Received: {part!r}")
        folders = relative.split("/")
        if len(folders) < 4:
            raise ValueError(f"{where}: expected img/<gender>/<kind>/.../<file>. Received: {relative!r}")
        super_class_of.setdefault(item, "/".join(folders[1:3]))
        rows[part].append(Row(path_under(folder, relative, where), item, where))
    where, (count,) = next(read_columns(path, 1), (path, ("nothing",)))
    found = sum(map(len, rows.values()))
    if as_int(count, "the number of images", where) != found:
        raise ValueError(f"{where}: expected the number of images listed in the file, {found}. Received: {count}")

    def images(part, rows_of_classes):
        items = sorted({row.class_name for row in rows_of_classes})
        return image_set(rows[part], items, [super_class_of[item] for item in items])

    tested = rows["query"] + rows["gallery"]
    return RetrievalSplit(images("train", rows["train"]), images("query", tested), images("gallery", tested))


def _warn_of_missing_items(split):
    missing = [
        name
        for name, queries, there in zip(split.test.class_names, split.test.class_counts(), split.gallery.class_counts())
        if queries and not there
    ]
    if missing:
        logging.warning(
            "inshop: expected every queried item in the gallery. Received: %d items that are missing from it, %s; "
            "their queries have no match",
            len(missing),
            missing[:5],
        )
