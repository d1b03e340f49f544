"""s2sd-evaluate: retrieval metrics of a run, a model or a file of embeddings; table, JSON, HTML page, projector.

s2sd-evaluate --workdir=runs/digits8 --report=report.html
s2sd-evaluate --model=encoder --images=<folder of class folders>
s2sd-evaluate --embeddings=embeddings.npz
"""

import os

import numpy as np
from absl import flags

from s2sd_tf import evaluation
from s2sd_tf.checks import check_file_to_write
from s2sd_tf.cli import app
from s2sd_tf.cli.tables import metrics_table
from s2sd_tf.data import Preprocessing, load_image_folder
from s2sd_tf.export import load_model
from s2sd_tf.files import check_replaceable, write_json
from s2sd_tf.reporting import EmbeddedImages, save_projector, save_report
from s2sd_tf.serving import Encoder
from s2sd_tf.serving.encoder import decode_image, read_image, read_image_under
from s2sd_tf.training import load_run
from s2sd_tf.training.datasets import load_data
from s2sd_tf.training.embedding import embed
from s2sd_tf.untrusted import read_array, reading

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a finished run: its model on its test classes.")
_MODEL = flags.DEFINE_string("model", None, "SavedModel of s2sd-export, or .keras file beside its preprocessing.json.")
_EMBEDDINGS = flags.DEFINE_string("embeddings", None, "Folder of s2sd-embed, or .npy, .npz, .tfrecord.")
_IMAGES = flags.DEFINE_string(
    "images", None, "With --model: folder of class folders. With --embeddings: folder that the ids are paths under."
)
_LABELS = flags.DEFINE_string("labels", None, "With --embeddings: .npy file, or text file of one label a line.")
_GALLERY_IMAGES = flags.DEFINE_string("gallery_images", None, "With --model: class folders to search instead.")
_GALLERY_EMBEDDINGS = flags.DEFINE_string("gallery_embeddings", None, "With --embeddings: those to search instead.")
_GALLERY_LABELS = flags.DEFINE_string("gallery_labels", None, "Their labels; see --labels.")
_SAME_IDS = flags.DEFINE_bool(
    "same_ids", False, "With --gallery_embeddings: equal ids are the same image, which is not to find itself."
)
_KS = flags.DEFINE_list("ks", ["1", "2", "4", "8"], "The k of recall@k, separated by commas.")
_PRECISION_KS = flags.DEFINE_list("precision_ks", ["1"], "The k of precision@k.")
_MAP_KS = flags.DEFINE_list("map_ks", ["1000"], "The k of map@k.")
_METHODS = flags.DEFINE_list("methods", ["exact", "scann"], "Search methods, out of exact and scann.")
_METRICS = flags.DEFINE_list(
    "metrics", [], "Out of cosine and euclidean; default: cosine, and euclidean where rows are not of unit length."
)
_CLUSTERING = flags.DEFINE_bool("clustering", True, "NMI, AMI and F1 of k-means.")
_SEED = flags.DEFINE_integer("seed", 0, "Of k-means, intervals and samples.", lower_bound=0)
_MEMORY = flags.DEFINE_integer("memory_mib", 512, "MiB that exact search may take.", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write; with --workdir: evaluation.json in it.")
_REPORT = flags.DEFINE_string("report", None, "HTML page to write, which needs no other file.")
_PROJECTOR = flags.DEFINE_string("projector", None, "Folder to write for TensorBoard's embedding projector.")


def main():
    app.run(_main)


def _main(_):
    chosen = [flag.name for flag in (_WORKDIR, _MODEL, _EMBEDDINGS) if flag.value]
    if len(chosen) != 1:
        raise ValueError(f"expected exactly one of --workdir, --model and --embeddings. Received: {chosen or 'none'}")
    ks, precision_ks, map_ks = (_ints(flag) for flag in (_KS, _PRECISION_KS, _MAP_KS))
    if not _METHODS.value:
        raise ValueError("--methods: expected at least one. Received: none")
    for more, needed in ((_GALLERY_LABELS, _GALLERY_EMBEDDINGS), (_GALLERY_EMBEDDINGS, _EMBEDDINGS)):
        if more.value and not needed.value:
            raise ValueError(f"--{more.name}: expected --{needed.name} too. Received: none")
    for output in (_OUTPUT, _REPORT):
        if output.value:
            check_file_to_write(f"--{output.name}", output.value)
    if _PROJECTOR.value:
        check_replaceable("--projector", _PROJECTOR.value, "projector_config.pbtxt")
    queries, gallery = {"workdir": _of_workdir, "model": _of_model, "embeddings": _of_embeddings}[chosen[0]]()
    metrics = _METRICS.value or ["cosine", *([] if _is_unit(queries.rows) else ["euclidean"])]
    others = () if gallery is None else (gallery.rows, gallery.labels)
    ids = {} if gallery is None else _shared_ids(queries, gallery)
    results, first = {}, None
    for method in _METHODS.value:
        for metric in metrics:
            found = evaluation.evaluate_retrieval(
                queries.rows,
                queries.labels,
                *others,
                **ids,
                ks=ks,
                precision_ks=precision_ks,
                map_ks=map_ks,
                method=method,
                metric=metric,
                memory_mib=_MEMORY.value,
                progress=len(queries.labels) > 20_000,
            )
            results[method if metric == metrics[0] else f"{method}, {metric}"] = found.means()
            first = first or found
    print(metrics_table(results))
    more = {}
    for metric in metrics:
        more[metric] = evaluation.embedding_geometry(queries.rows, queries.labels, metric)
        if _CLUSTERING.value:
            more[metric].update(
                evaluation.clustering_metrics(queries.rows, queries.labels, metric=metric, seed=_SEED.value)
            )
    lines = (
        f"{metric}: " + ", ".join(f"{name} {value:.4g}" for name, value in row.items()) for metric, row in more.items()
    )
    print("\n" + "\n".join(lines))
    output = _OUTPUT.value or (_WORKDIR.value and os.path.join(_WORKDIR.value, "evaluation.json"))
    if output:
        write_json(output, _finite({**results, "space": more, **_details(first, queries)}))
    if _REPORT.value:
        _report(queries, gallery, ids, first, results, more, metrics[0])
        print(f"\nReport: {_REPORT.value}")
    if _PROJECTOR.value:
        labels = [queries.names[label] for label in queries.labels.tolist()]
        save_projector(_PROJECTOR.value, queries.rows, labels, queries.ids, queries.image)
        print(f"\ntensorboard --logdir={_PROJECTOR.value} shows the projector.")


def _details(result, queries):
    """Intervals of the metrics, and the metrics of every class, for JSON."""
    classes, counts, means = result.per_class()
    per_class = {
        queries.names[label]: {"queries": int(count), **{name: float(means[name][i]) for name in means}}
        for i, (label, count) in enumerate(zip(classes.tolist(), counts))
    }
    return {"intervals": result.confidence_intervals(seed=_SEED.value), "per_class": per_class}


def _shared_ids(queries, gallery):
    """Arguments that keep an image that is in both sets from finding itself: known by its file, or by its id."""
    if queries.ids is None or gallery.ids is None or (_EMBEDDINGS.value and not _SAME_IDS.value):
        return {}
    codes = np.unique([*queries.ids, *gallery.ids], return_inverse=True)[1]
    return {"query_ids": codes[: len(queries.ids)], "gallery_ids": codes[len(queries.ids) :]}


def _report(queries, gallery, ids, result, results, more, metric):
    searched = queries if gallery is None else gallery
    if gallery is None:
        ids = dict.fromkeys(("query_ids", "gallery_ids"), np.arange(len(queries.labels)))
    found = evaluation.find_neighbors(queries.rows, searched.rows, 10, **ids, metric=metric, memory_mib=_MEMORY.value)
    rows = {name: dict(values) for name, values in results.items()}
    for kind, values in more.items():
        rows.setdefault("exact" if kind == metric else f"exact, {kind}", {}).update(values)
    about = _WORKDIR.value or _MODEL.value or _EMBEDDINGS.value
    save_report(
        _REPORT.value,
        result,
        found,
        queries,
        gallery,
        title="Retrieval evaluation",
        about=f"{os.path.basename(os.path.normpath(about))}, {queries.rows.shape[1]} dimensions",
        table=rows,
        seed=_SEED.value,
    )


def _of_workdir():
    model, config, preprocessing = load_run(_WORKDIR.value)
    run_data = load_data(config)
    parts = [images for images in (run_data.test, run_data.gallery) if images is not None]
    parts = [_part(embed(model, images, preprocessing), images) for images in parts]
    return parts[0], parts[1] if len(parts) > 1 else None


def _of_model():
    if not _IMAGES.value:
        raise ValueError("--images: expected a folder of class folders, with --model. Received: none")
    folders = [load_image_folder(root) for root in (_IMAGES.value, _GALLERY_IMAGES.value) if root]
    names = sorted({name for images in folders for name in images.class_names})
    if not _MODEL.value.endswith(".keras"):
        encoder = Encoder(_MODEL.value)
        parts = [_part(_embed_files(encoder, images), images, names) for images in folders]
    else:
        path = os.path.join(os.path.dirname(_MODEL.value), "preprocessing.json")
        for name in (_MODEL.value, path):
            if not os.path.exists(name):
                raise FileNotFoundError(
                    f"--model: expected a .keras file beside its preprocessing.json. Missing: {name}"
                )
        model, preprocessing = load_model(_MODEL.value), Preprocessing.load(path)
        parts = [_part(embed(model, images, preprocessing), images, names) for images in folders]
    return parts[0], parts[1] if len(parts) > 1 else None


def _embed_files(encoder, images, batch=64):
    rows = []
    for start in range(0, len(images), batch):
        positions = range(start, min(start + batch, len(images)))
        rows.append(encoder([images.encoded(position) for position in positions]))
    return np.concatenate(rows)


def _part(rows, images, names=None):
    """`EmbeddedImages` of an `ImageSet`, whose classes get their positions in `names`."""
    names = list(names or images.class_names)
    position = np.array([names.index(name) for name in images.class_names])
    shown = {"pixels": lambda i: images.images[i], "paths": lambda i: read_image(str(images.images[i]))}
    image = shown.get(images.kind, lambda i: decode_image(images.encoded(i)))
    ids = [os.path.realpath(path) for path in images.images] if images.kind == "paths" else None
    return EmbeddedImages(rows, position[images.labels], dict(enumerate(names)), ids, image)


def _of_embeddings():
    given = [(_EMBEDDINGS, _LABELS, _IMAGES), (_GALLERY_EMBEDDINGS, _GALLERY_LABELS, _GALLERY_IMAGES)]
    read = []
    for embeddings, labels, root in given:
        if not embeddings.value:
            continue
        rows, ids, its_labels = evaluation.read_embeddings(embeddings.value)
        if labels.value:
            its_labels = _read_labels(labels.value)
        if its_labels is None:
            raise ValueError(
                f"--{labels.name}: expected labels of {embeddings.value!r}, which has none. Received: none"
            )
        if "" in its_labels:
            raise ValueError(
                f"--{labels.name}: expected a label of every row. Received: {embeddings.value!r}, where "
                f"{list(its_labels).count('')} have none, as images outside of class folders"
            )
        if len(its_labels) != rows.shape[0]:
            raise ValueError(f"--{labels.name}: expected {rows.shape[0]} labels. Received: {len(its_labels)}")
        read.append((rows, [str(label) for label in its_labels], ids, root.value))
    names, codes = np.unique([label for _, labels, _, _ in read for label in labels], return_inverse=True)
    parts, start = [], 0
    for rows, labels, ids, root in read:
        image = _under(root, ids) if root and ids else None
        parts.append(
            EmbeddedImages(rows, codes[start : start + len(labels)], dict(enumerate(names.tolist())), ids, image)
        )
        start += len(labels)
    return parts[0], parts[1] if len(parts) > 1 else None


def _finite(value):
    """The same with None for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _under(root, ids):
    return lambda position: read_image_under(root, ids[position])


def _read_labels(path):
    if not os.path.isfile(path):
        raise FileNotFoundError(f"labels: expected a file. Received: {path!r}")
    if path.endswith(".npy"):
        return read_array(path).reshape(-1).tolist()
    with reading(path, "a label a line"), open(path, encoding="utf-8") as file:
        return file.read().splitlines()


def _ints(flag):
    if not all(k.isdecimal() and len(k) < 10 and int(k) for k in flag.value):
        raise ValueError(f"--{flag.name}: expected integers >= 1 separated by commas. Received: {','.join(flag.value)}")
    return [int(k) for k in flag.value]


def _is_unit(rows):
    some = np.asarray(rows[:10_000], np.float64)
    return bool(np.all(np.abs(np.linalg.norm(some, axis=1) - 1.0) < 1e-3))


if __name__ == "__main__":
    main()
