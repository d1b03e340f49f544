"""s2sd-search: finds the images of an index that are most similar to the given ones.

Prints JSON with the ids, labels and similarities of the nearest images, and can draw them. With a threshold, of
--min_score or stored in the index, images that are less similar are left out; the matches are empty if none reaches it.

Examples:
  s2sd-search --index=index --encoder=runs/omniglot/saved_model --image=query.png
  s2sd-search --index=index --encoder=encoder --image=a.jpg --image=b.jpg --picture=found.png --images=photos
"""

import json
import os
from typing import Any

from absl import flags

from s2sd_tf.cli import app

_INDEX = app.define_path("index", None, "Folder of s2sd-index or s2sd-beam.", required=True)
_ENCODER = app.define_path("encoder", None, "SavedModel of s2sd-export.", required=True)
_IMAGE = app.define_paths("image", None, "Image file to search with. Repeat the flag for several.", required=True)
_K = flags.DEFINE_integer("k", 10, "Number of images to find.", lower_bound=1)
_MIN_SCORE = flags.DEFINE_float(
    "min_score",
    None,
    "Least similarity of a match; negative distances if the index is euclidean. By default what the index stores, if "
    "anything; -2 finds all by cosine similarity. s2sd-evaluate prints thresholds.",
)
_PICTURE = app.define_path("picture", None, "PNG file to write, with the queries and the images found.")
_IMAGES = app.define_path("images", None, "Folder in which the ids are paths; needed for --picture.")


def main() -> None:
    """The program `s2sd-search`."""
    app.run(_main)


def _main(_):
    from s2sd_tf.checks import check_file_to_write
    from s2sd_tf.evaluation import load_index
    from s2sd_tf.reporting import save_matches
    from s2sd_tf.serving import Encoder
    from s2sd_tf.serving.encoder import read_image, read_image_under
    from s2sd_tf.untrusted import image_excess

    if _PICTURE.value and not _IMAGES.value:
        raise ValueError("--images: expected the folder in which the ids are paths, with --picture. Received: none")
    if _IMAGES.value and not _PICTURE.value:
        raise ValueError("--picture: expected the file to write, with --images. Received: none")
    if _PICTURE.value:
        check_file_to_write("--picture", _PICTURE.value)
    contents = []
    for path in _IMAGE.value:
        if not os.path.isfile(path):
            raise FileNotFoundError(f"--image: expected a file. Received: {path!r}")
        if reason := image_excess(path):
            raise ValueError(f"--image: expected an image. Received: {path!r}: {reason}")
        with open(path, "rb") as file:
            contents.append(file.read())
    index = load_index(_INDEX.value)
    encoder = Encoder(_ENCODER.value, index.dim)
    rows, errors = encoder.embed(contents)
    if errors:
        position, error = next(iter(errors.items()))
        raise ValueError(f"--image: expected an image. Received: {_IMAGE.value[position]!r}: {error}")
    found = index.search(rows, _K.value, _MIN_SCORE.value)
    answers: list[dict[str, Any]] = []
    for path, indices, similarities in zip(_IMAGE.value, *found):
        matches = []
        for item, similarity in zip(indices.tolist(), similarities.tolist()):
            if item >= 0:
                label = {"label": index.labels[item]} if index.labels else {}
                matches.append({"id": index.ids[item], **label, "similarity": similarity})
        answers.append({"query": path, "matches": matches})
    if _PICTURE.value:
        pictures = [
            [(read_image(answer["query"]), "query", None)]
            + [
                (read_image_under(_IMAGES.value, match["id"]), match.get("label") or match["id"], match["similarity"])
                for match in answer["matches"]
            ]
            for answer in answers
        ]
        save_matches(_PICTURE.value, pictures)
    # Ids may be file names that are not UTF-8; JSON gets an escape for them.
    print(json.dumps(answers, indent=2, ensure_ascii=False).encode(errors="backslashreplace").decode())


if __name__ == "__main__":
    main()
