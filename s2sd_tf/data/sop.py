"""Stanford Online Products: 22,634 products of an online shop, 11,318 of them to train on."""

import os

from s2sd_tf.data.annotations import Row, as_int, find_root, image_set, path_under, read_columns
from s2sd_tf.data.datasets import register
from s2sd_tf.data.image_files import check_options
from s2sd_tf.data.retrieval_split import RetrievalSplit, readable_split
from s2sd_tf.data.sources import load_source
from s2sd_tf.files import local_path

_FOLDERS = ("", "Stanford_Online_Products", "online_products")
# Song et al., CVPR 2016, "Deep Metric Learning via Lifted Structured Feature Embedding".
_COUNTS = {"train": (59_551, 11_318), "test": (60_502, 11_316)}


@register("sop", _COUNTS)
def load_sop(
    root: str | os.PathLike, on_corrupt: str = "raise", check: str = "files", source: str = "auto"
) -> RetrievalSplit:
    """Loads Stanford Online Products (Song et al., CVPR 2016), split by its own lists.

    59,551 images of 11,318 classes train, 60,502 of 11,316 test; other counts are logged. The 12 super-classes are
    kinds of products ("bicycle"). Two layouts are supported, in `root` or in its folder `Stanford_Online_Products` or
    `online_products`:

    - the archive: `Ebay_train.txt`, `Ebay_test.txt` and `<super-class>_final/*`;
    - the published code: `Info_Files/Ebay_train.txt`, `Info_Files/Ebay_test.txt` and `images/<super-class>_final/*`.

    Args:
        root, on_corrupt, check, source: see `load_cub200`.

    Returns:
        `RetrievalSplit` without a gallery. Classes are named by their number in the lists and sorted by it.

    Raises:
        FileNotFoundError: `root` has neither layout, or one of its lists is missing.
        ValueError: see `load_cub200`.
    """
    root = local_path("root", root)
    check_options(on_corrupt, check)
    return load_source("sop", root, source, lambda: _read_files(root, on_corrupt, check))


def _read_files(root, on_corrupt, check):
    found = find_root(root, _FOLDERS, ["Ebay_train.txt", "Info_Files/Ebay_train.txt"])
    if not found:
        raise FileNotFoundError(
            "root: expected Stanford Online Products, Ebay_train.txt or Info_Files/Ebay_train.txt in one of "
            f"{list(_FOLDERS)} under it. Received: {root!r}"
        )
    folder, file = found
    lists = os.path.dirname(os.path.join(folder, file))
    images = folder if file == "Ebay_train.txt" else os.path.join(folder, "images")
    parts = [_part(os.path.join(lists, f"Ebay_{part}.txt"), images) for part in ("train", "test")]
    return readable_split(RetrievalSplit(*parts), folder, on_corrupt, check)


def _part(path, folder):
    rows = []
    super_class_of: dict[int, str] = {}
    for where, (_, class_id, _, relative) in read_columns(path, 4, header=1):
        number = as_int(class_id, "class_id", where)
        super_class_of.setdefault(number, relative.split("/")[0].removesuffix("_final"))
        rows.append(Row(path_under(folder, relative, where), str(number), where))
    numbers = sorted(super_class_of)
    return image_set(rows, [str(number) for number in numbers], [super_class_of[number] for number in numbers])
