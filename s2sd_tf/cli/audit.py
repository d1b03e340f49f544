"""s2sd-audit: finds what is probably wrong with labelled images, from their embeddings.

Finds near and exact duplicates, images that are also in a second set (leaks), probable label errors with the label that
their neighbours have, outliers, classes that are confused with each other, and classes that are two. Writes CSV tables,
audit.json, audit.html with pictures, and exclude.txt: look through it, then train with --config.data.exclude.

Use embeddings of a network that was not trained on these labels for long, or it has learned the wrong ones.

Examples:
  s2sd-audit --embeddings=embeddings --images=photos --output=audit
  s2sd-audit --embeddings=train.npz --gallery_embeddings=test.npz --output=audit
  s2sd-train --config=configs/folder.py --config.data.root=photos --config.data.exclude=audit/exclude.txt --workdir=run
"""

from absl import flags

from s2sd_tf.cli import app
from s2sd_tf.cli.tables import sections_table

_EMBEDDINGS = app.define_path(
    "embeddings", None, "Folder of s2sd-embed, or a .npy, .npz or .tfrecord file.", required=True
)
_LABELS = app.define_path("labels", None, "Labels, a .npy file or a text file in UTF-8 with one label per line.")
_IMAGES = app.define_path(
    "images", None, "Folder in which the ids are paths, for pictures, and for duplicates of equal files."
)
_GALLERY_EMBEDDINGS = app.define_path(
    "gallery_embeddings",
    None,
    "Embeddings of a second set that should share no image with the first, such as the test images.",
)
_GALLERY_LABELS = app.define_path("gallery_labels", None, "Labels of --gallery_embeddings, to be shown; see --labels.")
_GALLERY_IMAGES = app.define_path("gallery_images", None, "Folder of the second set; see --images.")
_OUTPUT = app.define_path("output", None, "Folder to write.", required=True)
_K = flags.DEFINE_integer("k", 20, "Number of neighbours of an image.", lower_bound=1)
_DUPLICATES = flags.DEFINE_float(
    "duplicate_similarity",
    None,
    "Least cosine similarity of near duplicates. By default 1 - 0.13 (1 - s), where s is the median similarity of an "
    "image and its nearest neighbour.",
    lower_bound=-1.0,
    upper_bound=1.0,
)
_LABEL_SCORE = flags.DEFINE_float(
    "label_score",
    0.5,
    "Least score of a label error: the share of one other class among the neighbours, less that of the own class, and "
    "less what is usual among the items of the own class.",
    lower_bound=0.0,
    upper_bound=1.0,
)
_OUTLIER_SCORE = flags.DEFINE_float(
    "outlier_score", 3.5, "Least score of an outlier, in robust standard deviations.", lower_bound=0.0
)
_MEMORY = flags.DEFINE_integer("memory_mib", 512, "Memory for exact search in MiB.", lower_bound=1)


def main() -> None:
    """The program `s2sd-audit`."""
    app.run(_main)


def _main(_):
    from s2sd_tf import evaluation
    from s2sd_tf.cli import evaluated
    from s2sd_tf.files import check_replaceable, only_writer
    from s2sd_tf.progress import stage
    from s2sd_tf.reporting import save_audit
    from s2sd_tf.reporting.audit_files import SUMMARY

    for more in (_GALLERY_LABELS, _GALLERY_IMAGES):
        if more.value and not _GALLERY_EMBEDDINGS.value:
            raise ValueError(f"--{more.name}: expected --gallery_embeddings too. Received: none")
    check_replaceable("--output", _OUTPUT.value, SUMMARY)
    gallery_files = (_GALLERY_EMBEDDINGS.value, _GALLERY_LABELS.value, _GALLERY_IMAGES.value)
    with only_writer("--output", _OUTPUT.value):
        images, gallery, _ = evaluated.embeddings(
            (_EMBEDDINGS.value, _LABELS.value, _IMAGES.value),
            gallery_files if _GALLERY_EMBEDDINGS.value else None,
            labeled_gallery=False,
        )
        with stage("Searching"):
            found = evaluation.audit(
                images.rows,
                images.labels,
                None if gallery is None else gallery.rows,
                k=_K.value,
                duplicate_similarity=_DUPLICATES.value,
                memory_mib=_MEMORY.value,
                progress=len(images.labels) > 20_000,
            )
        with stage("Comparing files"):
            first = (_IMAGES.value, images.ids)
            second = (_GALLERY_IMAGES.value, gallery.ids) if gallery is not None else first
            found = found._replace(
                duplicates=_with_equal_files(found.duplicates, first, first),
                leaks=_with_equal_files(found.leaks, first, second),
            )
        with stage("Writing"):
            summary = save_audit(
                _OUTPUT.value,
                found,
                images,
                gallery,
                label_score=_LABEL_SCORE.value,
                outlier_score=_OUTLIER_SCORE.value,
                about=f"{len(images.labels):,} images, {images.rows.shape[1]} dimensions",
            )
    print(
        sections_table(
            {
                title: [(name.replace("_", " "), f"{count:,}") for name, count in summary[title].items()]
                for title in ("found", "excluded")
            }
        )
    )
    print(f"\nPage: {_OUTPUT.value}/audit.html.")
    if images.ids is not None:
        print(f"Copy {_OUTPUT.value}/exclude.txt and look through it before you train without these images.")


def _with_equal_files(pairs, first, second):
    """The pairs, where those of equal files are equal too. `first` and `second` are folder and ids, or None."""
    import numpy as np

    if None in first or None in second or not len(pairs.first):
        return pairs
    digests = [
        _digests(folder, ids, np.unique(chosen))
        for (folder, ids), chosen in ((first, pairs.first), (second, pairs.second))
    ]
    same = [
        digests[0][one] is not None and digests[0][one] == digests[1][other]
        for one, other in zip(pairs.first.tolist(), pairs.second.tolist())
    ]
    return pairs._replace(equal=pairs.equal | np.array(same))


def _digests(folder, ids, positions):
    """Digests of files by position; None for those that cannot be read."""
    import os

    from s2sd_tf.data.annotations import path_under
    from s2sd_tf.files import sha256

    found = {}
    for position in positions.tolist():
        try:
            path = path_under(folder, ids[position], "id")
            found[position] = sha256(path) if os.path.isfile(path) else None
        except (OSError, ValueError):
            found[position] = None
    return found


if __name__ == "__main__":
    main()
