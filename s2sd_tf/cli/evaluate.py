"""s2sd-evaluate: computes the retrieval metrics of a run, a model, or a file of embeddings.

Prints a table with recall@k, precision@k, MAP and clustering metrics, and what thresholds on the similarity accept: of
all pairs, and of searches whose class is not in the gallery; and if classes have super-classes, nDCG and the metrics of
both levels. Can also write JSON with confidence intervals and the
metrics of every class, an HTML report with pictures, and files for TensorBoard's embedding projector. Of nested
embeddings, --dims evaluates the prefixes.

Examples:
  s2sd-evaluate --workdir=runs/omniglot --report=report.html
  s2sd-evaluate --model=runs/omniglot/saved_model --images=photos
  s2sd-evaluate --embeddings=embeddings.npz --labels=labels.txt
  s2sd-evaluate --workdir=runs/nested --dims=8,16,32,64 --dims_plot=dims.png
"""

import datetime
import os
import textwrap
from typing import Any

import numpy as np
from absl import flags

import s2sd_tf
from s2sd_tf.cli import app, configs
from s2sd_tf.cli.tables import dims_table, metrics_table, thresholds_table

# The metrics that are explained where they are printed.
_EXPLAINED = ("ratio", "rho", "f1")

_WORKDIR = app.define_path("workdir", None, "Folder of a finished run, whose model is evaluated on its test classes.")
_MODEL = app.define_path("model", None, "SavedModel of s2sd-export, or a .keras file next to its preprocessing.json.")
_EMBEDDINGS = app.define_path("embeddings", None, "Folder of s2sd-embed, or a .npy, .npz or .tfrecord file.")
_IMAGES = app.define_path(
    "images", None, "With --model: folder of class folders. With --embeddings: folder in which the ids are paths."
)
_LABELS = app.define_path(
    "labels", None, "With --embeddings: labels, a .npy file or a text file in UTF-8 with one label per line."
)
_GALLERY_IMAGES = app.define_path(
    "gallery_images", None, "With --model: folder of class folders to search in; by default --images."
)
_GALLERY_EMBEDDINGS = app.define_path(
    "gallery_embeddings", None, "With --embeddings: embeddings to search in; by default --embeddings."
)
_GALLERY_LABELS = app.define_path("gallery_labels", None, "Labels of --gallery_embeddings; see --labels.")
_SAME_IDS = flags.DEFINE_bool(
    "same_ids", False, "With --gallery_embeddings: equal ids mean the same image, which then does not find itself."
)
_KS = flags.DEFINE_list("ks", ["1", "2", "4", "8"], "Values of k for recall@k, separated by commas.")
_PRECISION_KS = flags.DEFINE_list("precision_ks", ["1"], "Values of k for precision@k.")
_MAP_KS = flags.DEFINE_list("map_ks", ["1000"], "Values of k for map@k.")
_DIMS = flags.DEFINE_list(
    "dims",
    [],
    "Dimensions to evaluate too, separated by commas: of a model those of its nested_dims, of --embeddings any. For "
    "each, the metrics by cosine similarity, the bytes per item and the queries per second of exact search.",
)
_DIMS_PLOT = app.define_path("dims_plot", None, "With --dims: PNG file to write, with the metrics over the dimension.")
_METHODS = flags.DEFINE_list(
    "methods",
    None,
    "Search methods: exact, scann; both by default, if ScaNN is installed. With scann, mrr is over the 100 nearest.",
)
_METRICS = flags.DEFINE_list(
    "metrics", [], "Similarities: cosine, euclidean. By default cosine, and euclidean unless all rows have unit length."
)
_POSTPROCESS = flags.DEFINE_list(
    "postprocess",
    [],
    "Evaluate exact search by cosine similarity also after whiten (PCA whitening), augment (the gallery averaged with "
    "its neighbours), expand (alpha query expansion) or rerank (k-reciprocal re-ranking); several joined by +, in this "
    "order: augment+expand,rerank.",
)
_TRAINING_EMBEDDINGS = app.define_path(
    "training_embeddings", None, "Embeddings of training images, like --embeddings, for --postprocess=whiten."
)
_CLUSTERING = flags.DEFINE_bool("clustering", True, "Compute NMI, AMI and F1 of k-means.")
_VERIFICATION = flags.DEFINE_bool(
    "verification",
    None,
    "Compare all pairs, by default up to 400 million: true accept rate (tar) and threshold at false accept rates "
    "from 0.1 to 1e-06, equal error rate (eer), AUROC, best F1 and average precision, in percent. If some queries have "
    "no positive, also the detection-and-identification rate (dir) and threshold of a search at false-alarm rates of "
    "these queries.",
)
_LEVELS = flags.DEFINE_bool(
    "levels",
    None,
    "If the classes have super-classes (those of a run's data set, or the first folder of every class), compute nDCG, "
    "hierarchical average precision (h_ap) and the metrics of both levels; by default up to 400 million pairs.",
)
_PUBLISHED_SPACE = flags.DEFINE_bool(
    "published_space", False, "Measure intra, ratio and rho as the published code of S2SD does."
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of k-means, intervals and samples.", lower_bound=0)
_MEMORY = flags.DEFINE_integer("memory_mib", 512, "Memory for exact search in MiB.", lower_bound=1)
_REGISTER = configs.define_register()
_OUTPUT = app.define_path("output", None, "JSON file to write. With --workdir, by default evaluation.json in it.")
_REPORT = app.define_path("report", None, "HTML page to write; it needs no other file.")
_PROJECTOR = app.define_path("projector", None, "Folder to write for TensorBoard's embedding projector.")


def main() -> None:
    """The program `s2sd-evaluate`."""
    app.run(_main)


def _main(_):
    from s2sd_tf import evaluation
    from s2sd_tf.checks import check_choice, check_file_to_write
    from s2sd_tf.cli import postprocessed
    from s2sd_tf.evaluation.neighbors import METHODS, METRICS
    from s2sd_tf.evaluation.scann_searcher import import_scann, usable_methods
    from s2sd_tf.files import check_replaceable, write_json
    from s2sd_tf.progress import stage
    from s2sd_tf.reporting import save_figure, save_projector
    from s2sd_tf.reporting.charts import dimension_figure
    from s2sd_tf.reporting.meanings import meanings

    chosen = [flag.name for flag in (_WORKDIR, _MODEL, _EMBEDDINGS) if flag.value]
    if len(chosen) != 1:
        raise ValueError(f"expected exactly one of --workdir, --model and --embeddings. Received: {chosen or 'none'}")
    ks, precision_ks, map_ks = (_ints(flag) for flag in (_KS, _PRECISION_KS, _MAP_KS))
    methods = usable_methods() if _METHODS.value is None else _METHODS.value
    if not methods:
        raise ValueError("--methods: expected at least one. Received: none")
    for name, values, choices in (("--methods", methods, METHODS), ("--metrics", _METRICS.value, METRICS)):
        for value in values:
            check_choice(name, value, choices)
    for more, needed in (
        (_LABELS, [_EMBEDDINGS]),
        (_IMAGES, [_MODEL, _EMBEDDINGS]),
        (_GALLERY_EMBEDDINGS, [_EMBEDDINGS]),
        (_GALLERY_LABELS, [_GALLERY_EMBEDDINGS]),
        (_GALLERY_IMAGES, [_MODEL, _GALLERY_EMBEDDINGS]),
        (_SAME_IDS, [_GALLERY_EMBEDDINGS]),
    ):
        if more.value and not any(flag.value for flag in needed):
            raise ValueError(
                f"--{more.name}: expected {' or '.join(f'--{f.name}' for f in needed)} too. Received: none"
            )
    # Only the data of a run say whether it has a gallery.
    may_have_gallery = bool(_WORKDIR.value or _GALLERY_EMBEDDINGS.value or _GALLERY_IMAGES.value)
    postprocessed.check(_POSTPROCESS.value, may_have_gallery, bool(_TRAINING_EMBEDDINGS.value))
    dims = _ints(_DIMS)
    if _DIMS_PLOT.value and not dims:
        raise ValueError("--dims_plot: expected --dims too. Received: none")
    for flag in (_OUTPUT, _REPORT, _DIMS_PLOT):
        if flag.value:
            check_file_to_write(f"--{flag.name}", flag.value)
    if _PROJECTOR.value:
        check_replaceable("--projector", _PROJECTOR.value, "projector_config.pbtxt")
    if "scann" in (_METHODS.value or ()):
        # Before the embedding, which takes long.
        import_scann()
    configs.register(_REGISTER)
    training = evaluation.read_embeddings(_TRAINING_EMBEDDINGS.value).rows if _TRAINING_EMBEDDINGS.value else None
    queries, gallery, ids = _inputs(chosen[0], dims)
    has_levels = None not in [part.super_classes for part in (queries, gallery or queries)]
    if _LEVELS.value and not has_levels:
        raise ValueError("--levels: expected classes that have super-classes. Received: classes without")
    postprocessed.check(_POSTPROCESS.value, gallery is not None, bool(_TRAINING_EMBEDDINGS.value))
    whitening = postprocessed.fitted(training, queries.rows.shape[1])
    metrics = _METRICS.value or ["cosine", *([] if _is_unit(queries.rows) else ["euclidean"])]
    others = {} if gallery is None else {"gallery": gallery.rows, "gallery_labels": gallery.labels}
    settings: dict[str, Any] = {"ks": ks, "precision_ks": precision_ks, "map_ks": map_ks, "memory_mib": _MEMORY.value}
    results: dict[str, dict[str, float]] = {}
    first = None
    for method in methods:
        for metric in metrics:
            with stage(f"Searching, {method}, {metric}"):
                found = evaluation.evaluate_retrieval(
                    queries.rows,
                    queries.labels,
                    **others,
                    **ids,
                    **settings,
                    method=method,
                    metric=metric,
                    progress=len(queries.labels) > 20_000,
                )
            results[method if metric == metrics[0] else f"{method}, {metric}"] = found.means()
            first = first or found
    processed = postprocessed.metrics(_POSTPROCESS.value, queries, gallery, ids, whitening, settings)
    results.update({f"exact, {name}": found for name, found in processed.items()})
    print(metrics_table(results))
    by_dim: dict[int, dict[str, Any]] = {}
    if dims:
        with stage("Evaluating the dimensions"):
            by_dim = evaluation.metrics_by_dim(
                queries.rows,
                queries.labels,
                dims=dims,
                **others,
                **ids,
                **settings,
            )
        print(f"\n{dims_table(by_dim)}")
    space: dict[str, dict[str, float]] = {}
    for metric in metrics:
        with stage(f"Measuring the space, {metric}"):
            space[metric] = evaluation.embedding_geometry(
                queries.rows, queries.labels, metric, published=_PUBLISHED_SPACE.value
            )
        if _CLUSTERING.value:
            with stage(f"Clustering, {metric}"):
                space[metric].update(
                    evaluation.clustering_metrics(queries.rows, queries.labels, metric=metric, seed=_SEED.value)
                )
    few = len(queries.labels) * len((gallery or queries).labels) <= 20_000**2
    verify = few if _VERIFICATION.value is None else _VERIFICATION.value
    levels: dict[str, float | int] = {}
    if has_levels and (few if _LEVELS.value is None else _LEVELS.value):
        levels = _levels(queries, gallery, ids, ks, metrics[0])
    pairs, open_set = _thresholds(queries, others, ids, metrics, first) if verify else ({}, {})
    lines = (
        f"{metric}: " + ", ".join(f"{name} {value:.4g}" for name, value in row.items()) for metric, row in space.items()
    )
    print("\n" + "\n".join(lines))
    print("\n".join(textwrap.fill(text, 118, subsequent_indent="  ") for text in meanings(_EXPLAINED)))
    if levels:
        print(f"\nLevels, {metrics[0]}: ndcg {100 * levels['ndcg']:.1f}, h_ap {100 * levels['h_ap']:.1f}")
        print(metrics_table({name: _of_level(levels, number) for number, name in ((1, "super-class"), (2, "class"))}))
    if pairs:
        print(f"\nAll pairs\n{thresholds_table({metric: found.values for metric, found in pairs.items()})}")
    if open_set:
        print(f"\nSearches, some without a positive\n{thresholds_table(open_set)}")
    output = _OUTPUT.value or (_WORKDIR.value and os.path.join(_WORKDIR.value, "evaluation.json"))
    if output:
        with stage("Computing confidence intervals"):
            details = _details(first, queries, pairs)
        parts = {"dims": {str(dim): found for dim, found in by_dim.items()}, "levels": levels}
        asked = {name: found for name, found in parts.items() if found}
        write_json(output, _finite({**results, **asked, "space": space, "open_set": open_set, **details}))
    if _DIMS_PLOT.value:
        save_figure(_DIMS_PLOT.value, dimension_figure(by_dim))
    if _REPORT.value:
        with stage("Writing the report"):
            _report(queries, gallery, ids, first, results, space, metrics[0], by_dim, pairs)
        print(f"\nReport: {_REPORT.value}")
    if _PROJECTOR.value:
        labels = [queries.names[label] for label in queries.labels.tolist()]
        with stage("Writing the projector's files"):
            save_projector(_PROJECTOR.value, queries.rows, labels, queries.ids, queries.image)
        print(f"\ntensorboard --logdir={_PROJECTOR.value} shows the projector.")


def _inputs(chosen, dims):
    from s2sd_tf.cli import evaluated

    if chosen == "workdir":
        return evaluated.run(_WORKDIR.value, dims)
    if chosen == "model":
        return evaluated.model(_MODEL.value, _IMAGES.value, _GALLERY_IMAGES.value, dims)
    gallery = _GALLERY_EMBEDDINGS.value and (_GALLERY_EMBEDDINGS.value, _GALLERY_LABELS.value, _GALLERY_IMAGES.value)
    queries = (_EMBEDDINGS.value, _LABELS.value, _IMAGES.value)
    return evaluated.embeddings(queries, gallery, dims, same_ids=_SAME_IDS.value)


def _levels(queries, gallery, ids, ks, metric):
    """Returns the `hierarchical_metrics` of super-class and class."""
    from s2sd_tf import evaluation
    from s2sd_tf.progress import stage

    parts = [queries] if gallery is None else [queries, gallery]
    names = sorted({name for part in parts for name in part.super_classes.values()})
    number = {name: at for at, name in enumerate(names)}
    labels = [
        np.array([(number[part.super_classes[label]], label) for label in part.labels.tolist()], np.int64)
        for part in parts
    ]
    others = {} if gallery is None else {"gallery": gallery.rows, "gallery_labels": labels[1]}
    settings = {"ks": ks, "metric": metric, "memory_mib": _MEMORY.value, "progress": len(queries.labels) > 20_000}
    with stage(f"Evaluating the levels, {metric}"):
        return evaluation.hierarchical_metrics(queries.rows, labels[0], **others, **ids, **settings)


def _of_level(levels, number):
    prefix = f"level{number}_"
    return {name.removeprefix(prefix): value for name, value in levels.items() if name.startswith(prefix)}


def _thresholds(queries, others, ids, metrics, result):
    """Returns the `VerificationResult` and the open-set metrics of every metric; none if there is nothing to tell."""
    from s2sd_tf import evaluation
    from s2sd_tf.progress import stage

    settings = {**ids, "memory_mib": _MEMORY.value, "progress": len(queries.labels) > 20_000}
    pairs, open_set = {}, {}
    for metric in metrics:
        if len(np.unique(np.concatenate([queries.labels, others.get("gallery_labels", [])]))) > 1:
            with stage(f"Comparing all pairs, {metric}"):
                pairs[metric] = evaluation.verification_metrics(
                    queries.rows, queries.labels, **others, **settings, metric=metric
                )
        if not result.answerable.all():
            with stage(f"Searching with an open set, {metric}"):
                open_set[metric] = evaluation.open_set_metrics(
                    queries.rows, queries.labels, **others, **settings, metric=metric
                )
    return pairs, open_set


def _details(result, queries, pairs):
    """Returns the intervals of the metrics, the metrics of every class, and verification, for JSON."""
    classes, counts, means = result.per_class()
    per_class = {
        queries.names[label]: {"queries": int(count), **{name: float(means[name][i]) for name in means}}
        for i, (label, count) in enumerate(zip(classes.tolist(), counts))
    }
    verification = {}
    for metric, found in pairs.items():
        rates = {"threshold": found.thresholds, "far": found.far, "tar": found.tar}
        verification[metric] = {
            **found.values,
            "intervals": found.confidence_intervals(seed=_SEED.value),
            "positives": int(found.true_accepts[-1]),
            "negatives": int(found.false_accepts[-1]),
            "roc": {name: values[found.counted].tolist() for name, values in rates.items()},
        }
    intervals = result.confidence_intervals(seed=_SEED.value)
    return {"verification": verification, "intervals": intervals, "per_class": per_class}


def _report(queries, gallery, ids, result, results, more, metric, by_dim, pairs):
    from s2sd_tf import evaluation
    from s2sd_tf.reporting import save_report

    searched = queries if gallery is None else gallery
    if gallery is None:
        ids = dict.fromkeys(("query_ids", "gallery_ids"), np.arange(len(queries.labels)))
    found = evaluation.find_neighbors(queries.rows, searched.rows, 10, **ids, metric=metric, memory_mib=_MEMORY.value)
    rows = {name: dict(values) for name, values in results.items()}
    for kind, values in more.items():
        rows.setdefault("exact" if kind == metric else f"exact, {kind}", {}).update(values)
    for kind, values in pairs.items():
        rows["exact" if kind == metric else f"exact, {kind}"].update(values.values)
    facts, config = _facts(queries, gallery)
    save_report(
        _REPORT.value,
        result,
        found,
        queries,
        gallery,
        title="Retrieval evaluation",
        about=f"{_base(_WORKDIR.value or _MODEL.value or _EMBEDDINGS.value)}, {queries.rows.shape[1]} dimensions",
        table=rows,
        dims=by_dim,
        verification=pairs.get(metric),
        facts=facts,
        config=config,
        seed=_SEED.value,
    )


def _facts(queries, gallery):
    """What the report says of the model, the date and the data, and the config of a run. Paths lose their folders."""
    from s2sd_tf.training.workdir import stored_config
    from s2sd_tf.untrusted import read_json_object

    now = datetime.datetime.now(datetime.timezone.utc)
    facts, config, data = {}, {}, _base(_IMAGES.value or _EMBEDDINGS.value or "")
    if _WORKDIR.value:
        config = _without_folders(_used(stored_config(os.path.join(_WORKDIR.value, "config.json"))))
        facts["model"] = f"{config['model']['backbone']}, {queries.rows.shape[1]} dimensions"
        facts["run"] = _base(_WORKDIR.value)
        record = os.path.join(_WORKDIR.value, "run.json")
        if os.path.exists(record):
            started = str(read_json_object(record).get("sessions", [{}])[0].get("time", ""))
            facts["trained"] = f"{started[:10]}, {config['train']['epochs']} epochs"
        data = f"{config['data']['name']}{config['data']['root'] and ', ' + config['data']['root']}"
    elif _MODEL.value:
        facts["model"] = f"{_base(_MODEL.value)}, {queries.rows.shape[1]} dimensions"
    facts["data"] = f"{data}: {_counts(queries)}" + (f"; gallery: {_counts(gallery)}" if gallery else "")
    facts["evaluated"] = f"{now:%Y-%m-%d %H:%M} UTC, by s2sd_tf {s2sd_tf.__version__}"
    return facts, config


def _counts(images):
    return f"{len(images.labels):,} images of {len(np.unique(images.labels)):,} classes"


def _used(config):
    """A config without the settings of the data sets, samplers, objectives and miners that it does not name."""

    def kept(section, names):
        return {key: value for key, value in section.items() if not isinstance(value, dict) or key in names}

    def texts(sections):
        return {str(text) for section in sections if isinstance(section, dict) for text in section.values()}

    names = texts(config.values())
    used = {**config, **{part: kept(config[part], names) for part in ("data", "sampler", "objective")}}
    return {**used, "miner": kept(config["miner"], texts(used["objective"].values()))}


def _without_folders(value):
    """Replaces absolute paths, which are nobody else's business, by the names of the files."""
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_folders(item) for item in value]
    return _base(value) if isinstance(value, str) and os.path.isabs(value) else value


def _base(path):
    return os.path.basename(os.path.normpath(path))


def _finite(value):
    """Replaces what JSON has no number for by None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _ints(flag):
    if not all(k.isdecimal() and len(k) < 10 and int(k) for k in flag.value):
        raise ValueError(f"--{flag.name}: expected integers >= 1 separated by commas. Received: {','.join(flag.value)}")
    return [int(k) for k in flag.value]


def _is_unit(rows):
    some = np.asarray(rows[:10_000], np.float64)
    return bool(np.all(np.abs(np.linalg.norm(some, axis=1) - 1.0) < 1e-3))


if __name__ == "__main__":
    main()
