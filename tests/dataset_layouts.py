"""Writes small copies of the image retrieval data sets, in their published layouts.

`LAYOUTS` lists the layouts of every data set, and `write` writes one. The functions `write_<name>` return what a loader
should find: a dict from part to a list of `(path, class name)` in order. Each class has its own colour. In each class
the first file has an unusual name, the second is gray and the third is CMYK.
"""

import numpy as np
import scipy.io
from PIL import Image

_MODES = ("RGB", "L", "CMYK")
# By the registered name of the data set.
LAYOUTS = {
    "cars196": ["archive", "devkit", "published"],
    "cub200": ["archive", "published"],
    "inshop": ["archive", "flat", "published"],
    "sop": ["archive", "published"],
}
# Layouts without annotation files, where a missing file cannot be noticed.
WITHOUT_ANNOTATIONS = [("cars196", "published"), ("cub200", "published")]


def write(name, root, **settings):
    """Writes the data set with this name; see `write_cub200` and the other functions."""
    return globals()[f"write_{name}"](root, **settings)


def write_image(path, seed=0, size=(40, 30), mode="RGB", colour=0):
    """Writes an image of `size` (height, width) in the format of the file name's extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    base = np.random.default_rng(colour).integers(40, 216, 3)
    noise = np.random.default_rng(seed).integers(-40, 40, (*size, 3))
    Image.fromarray((base + noise).astype(np.uint8)).convert(mode).save(path)


def write_cub200(root, classes=8, images_per_class=3, size=(40, 30), layout="archive"):
    """CUB200-2011 in the layout "archive" or "published" (the published code's)."""
    folder = root / ("CUB_200_2011" if layout == "archive" else "cub200")
    names = [f"{c + 1:03d}.{'Bird' if c % 2 else 'Auk'}_{c}" for c in range(classes)]
    found = _write_classes(folder / "images", names, names, images_per_class, size)
    if layout == "archive":
        relative = [path.relative_to(folder / "images").as_posix() for path, _ in found]
        _write_lines(folder / "classes.txt", [f"{c + 1} {name}" for c, name in enumerate(names)])
        _write_lines(folder / "images.txt", [f"{i + 1} {path}" for i, path in enumerate(relative)])
        labels = [names.index(name) + 1 for _, name in found]
        _write_lines(folder / "image_class_labels.txt", [f"{i + 1} {label}" for i, label in enumerate(labels)])
    return _halves(found, names)


def write_cars196(root, classes=8, images_per_class=3, size=(40, 30), layout="archive"):
    """CARS196 in the layout "archive", "devkit" or "published". In "published" the classes are sorted."""
    names = [f"{'BMW' if c < classes // 2 else 'Volvo'} Model {classes - c:03d}" for c in range(classes)]
    if layout == "published":
        names = sorted(names)
        found = _write_classes(root / "cars196" / "images", names, names, images_per_class, size)
        return _halves([(path, name) for path, name in sorted(found)], names)
    if layout == "archive":
        found = _write_classes(root / "car_ims", names, [""] * classes, images_per_class, size)
        records = [(path.relative_to(root).as_posix(), names.index(name) + 1) for path, name in found]
        write_annotations(root / "cars_annos.mat", "relative_im_path", records, class_names=names)
        return _halves(found, names)
    found = {}
    for part, odd in (("train", 0), ("test", 1)):
        images = _write_classes(root / f"cars_{part}", names, [""] * classes, images_per_class, size)
        found[part] = [pair for at, pair in enumerate(images) if at % 2 == odd]
        for at, (path, _) in enumerate(images):
            if at % 2 != odd:
                path.unlink()
        records = [(path.name, names.index(name) + 1) for path, name in found[part]]
        file = "cars_train_annos.mat" if part == "train" else "cars_test_annos_withlabels.mat"
        write_annotations(root / "devkit" / file, "fname", records)
    scipy.io.savemat(root / "devkit" / "cars_meta.mat", {"class_names": np.array(names, object)})
    return _halves(found["train"] + found["test"], names)


def write_sop(root, classes=8, images_per_class=3, size=(40, 30), layout="archive"):
    """Stanford Online Products in the layout "archive" or "published"; the first half of the classes trains."""
    folder = root / ("Stanford_Online_Products" if layout == "archive" else "online_products")
    images, lists = (folder, folder) if layout == "archive" else (folder / "images", folder / "Info_Files")
    names = [str(c + 1) for c in range(classes)]
    kinds = [("bicycle", "coffee_maker", "sofa")[c % 3] for c in range(classes)]
    found = _write_classes(images, names, [f"{kind}_final" for kind in kinds], images_per_class, size)
    parts = _halves(found, names)
    for part, pairs in parts.items():
        lines = ["image_id class_id super_class_id path"]
        for i, (path, name) in enumerate(pairs):
            lines.append(f"{i + 1} {name} {(int(name) - 1) % 3 + 1} {path.relative_to(images).as_posix()}")
        _write_lines(lists / f"Ebay_{part}.txt", lines)
    return parts


def write_inshop(root, classes=8, images_per_class=3, size=(40, 30), layout="archive"):
    """In-Shop in the layout "archive", "flat" (the partition beside `img`) or "published"; the first half of the
    classes trains, and the first image of each other class is a query.
    """
    folder = root / "in-shop" if layout == "published" else root
    images = folder / "Img" if layout == "archive" else folder
    names = [f"id_{c + 1:08d}" for c in range(classes)]
    kinds = [("WOMEN/Dresses", "MEN/Denim")[c % 2] for c in range(classes)]
    folders = [f"img/{kind}/{name}" for kind, name in zip(kinds, names)]
    found = _write_classes(images, names, folders, images_per_class, size)
    parts = {"train": [], "query": [], "gallery": []}
    lines = [str(len(found)), "image_name item_id evaluation_status"]
    seen = set()
    for path, name in found:
        tested = names.index(name) >= classes // 2
        part = ("gallery" if name in seen else "query") if tested else "train"
        seen.add(name)
        parts[part].append((path, name))
        lines.append(f"{path.relative_to(images).as_posix()}    {name} {part}")
    _write_lines(folder / ("" if layout == "flat" else "Eval") / "list_eval_partition.txt", lines)
    return {"train": parts["train"], "test": parts["query"], "gallery": parts["gallery"]}


def write_lists(root, classes=8, images_per_class=3, size=(40, 30)):
    """iNaturalist 2018 with its lists, `root/train.txt` and `root/test.txt`."""
    names = [f"{('Aves', 'Plantae')[c % 2]}/{c + 10}" for c in range(classes)]
    found = _write_classes(root / "train_val2018", names, names, images_per_class, size)
    parts = _halves(found, names)
    for part, pairs in parts.items():
        _write_lines(root / f"{part}.txt", [path.relative_to(root).as_posix() for path, _ in pairs])
    return parts


def write_annotations(path, path_field, records, **others):
    """Writes a MATLAB file with annotations from `records` of (path, class) and `others`, variables of lists of str."""
    path.parent.mkdir(parents=True, exist_ok=True)
    annotations = np.zeros(len(records), [("bbox_x1", "O"), ("class", "O"), (path_field, "O")])
    for at, (name, label) in enumerate(records):
        annotations[at] = (1, label, name)
    others = {name: np.array(values, object) for name, values in others.items()}
    scipy.io.savemat(path, {"annotations": annotations, **others})


def _write_classes(root, names, folders, images_per_class, size):
    """Writes the images of each class; returns their `(path, class name)`."""
    found = []
    for c, (name, folder) in enumerate(zip(names, folders)):
        for k in range(images_per_class):
            path = root / folder / (f"{c:03d} année 0.JPG" if k == 0 else f"{c:03d}_{k}.jpg")
            write_image(path, seed=c * images_per_class + k, size=size, mode=_MODES[k % 3], colour=c)
            found.append((path, name))
    return found


def _halves(found, names):
    first = set(names[: len(names) // 2])
    return {
        "train": [pair for pair in found if pair[1] in first],
        "test": [pair for pair in found if pair[1] not in first],
    }


def _write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
