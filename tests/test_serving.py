"""From images to searchable embeddings: embedding in this process and with Beam, and the retrieval SavedModel."""

import json
import os
import pathlib
import shutil
import signal
import sys
import time

import numpy as np
import pytest
import tensorflow as tf
from conftest import needs_scann
from PIL import Image
from processes import start_python

import s2sd_tf
from s2sd_tf import data, evaluation, export
from s2sd_tf.evaluation.embeddings import read_items, shard_folders
from s2sd_tf.files import read_json
from s2sd_tf.serving import Encoder, Item, beam, embed_images, list_images
from s2sd_tf.serving import embed as embed_module
from s2sd_tf.serving.encoder import read_image_under

IMAGES, BROKEN = 90, ("c1/broken.png", "c2/empty.jpg", "cut.png")


@pytest.fixture(scope="module")
def encoder_path(tmp_path_factory):
    """A SavedModel of a small untrained encoder."""
    tf.keras.utils.set_random_seed(0)
    backbone = s2sd_tf.models.backbones.conv_blocks((8, 8, 1), filters=(6, 8), pools=1)
    path = str(tmp_path_factory.mktemp("encoder") / "encoder")
    model = s2sd_tf.S2SDModel(backbone, 4, target_dims=(8,))
    export.export_encoder(model, data.Preprocessing(8, 8, 1), path)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of 90 images in three classes, and three files that are not images."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for i in range(IMAGES):
        (root / f"c{i % 3}").mkdir(exist_ok=True)
        pixels = generator.integers(0, 256, (10, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(
            root / f"c{i % 3}" / f"{i:03d} ü.{'png' if i % 2 else 'JPG'}", "PNG" if i % 2 else "JPEG"
        )
    for name, content in zip(BROKEN, (b"no image", b"", (root / "c1" / "001 ü.png").read_bytes()[:-40])):
        (root / name).write_bytes(content)
    (root / ".hidden.png").write_bytes(b"")
    (root / "notes.txt").write_text("no image")
    return root


def content_of(item):
    return pathlib.Path(item.path).read_bytes()


def one_by_one(encoder, items):
    """A dict from id to embedding, with each image embedded alone."""
    return {item.id: encoder([content_of(item)])[0] for item in items if item.id not in BROKEN}


def check(folder, summary, encoder, items):
    """Checks that the output is complete and correct, without repeats."""
    expected = one_by_one(encoder, items)
    found = evaluation.read_embeddings(folder)
    assert sorted(found.ids) == sorted(expected)
    np.testing.assert_allclose(found.rows[:], [expected[name] for name in found.ids], atol=1e-5)
    assert found.labels == [name.rpartition("/")[0] for name in found.ids]
    assert summary == read_json(os.path.join(folder, "summary.json"))
    assert (summary["embedded"], summary["dim"]) == (IMAGES, 4)
    errors = {row["id"]: row["error"] for row in summary["failed"]}
    assert sorted(errors) == sorted(BROKEN)
    assert errors["c2/empty.jpg"] == "empty"
    assert "Unknown image file format" in errors["c1/broken.png"]
    assert "PNG" in errors["cut.png"]
    assert not [path for path in os.listdir(folder) if path.startswith(".")]


def test_embedding_a_folder(encoder_path, images, tmp_path):
    items, encoder = list_images(images), Encoder(encoder_path)
    assert len(items) == IMAGES + len(BROKEN)
    folder = str(tmp_path / "out")
    summary = embed_images(items, encoder, folder, shard_size=16, batch_size=5, index={}, progress=False)
    check(folder, summary, encoder, items)
    assert summary["shards"] == len(shard_folders(folder)) == 6
    # A second call writes nothing.
    times = {path: os.stat(path).st_mtime_ns for path in shard_folders(folder)}
    assert embed_images(items, encoder, folder, shard_size=16, batch_size=7, index={}, progress=False) == summary
    assert times == {path: os.stat(path).st_mtime_ns for path in shard_folders(folder)}
    index = evaluation.load_index(folder)
    query = encoder([content_of(items[5])])
    assert index.ids[index.search(query, 1).indices[0, 0]] == items[5].id
    relabelled = [items[0]._replace(label="x"), *items[1:]]
    for change in ({"shard_size": 17}, {"items": items[1:]}, {"items": relabelled}, {"index": None}):
        with pytest.raises(ValueError, match=r"folder: expected (a new one|shards whose images are still there)"):
            embed_images(
                **{"items": items, "encoder": encoder, "folder": folder, "shard_size": 16, "index": {}, **change}
            )


def test_embedding_a_folder_that_has_grown(encoder_path, images, tmp_path, monkeypatch):
    items, encoder, folder = list_images(images), Encoder(encoder_path), str(tmp_path / "out")
    settings = {"shard_size": 16, "progress": False}
    # New images are anywhere in the order.
    embed_images(items[1::2], encoder, folder, **settings)
    times = {path: os.stat(path).st_mtime_ns for path in shard_folders(folder)}
    # An interruption while it grows.
    write = embed_module.write_items_as_shard
    with monkeypatch.context() as patched:
        patched.setattr(embed_module, "write_items_as_shard", lambda path, *rest: write(path, *rest) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            embed_images(items, encoder, folder, **settings)
    with pytest.raises(ValueError, match="interrupted"):
        evaluation.read_embeddings(folder)
    summary = embed_images(items, encoder, folder, **settings)
    check(folder, summary, encoder, items)
    assert times.items() <= {path: os.stat(path).st_mtime_ns for path in shard_folders(folder)}.items()
    # An image is gone: its shard is named, and embedded again once it is removed.
    kept = [item for item in items if item.id != items[1].id]
    with pytest.raises(ValueError, match=rf"shard-00000'.*1 gone, such as '{items[1].id}'"):
        embed_images(kept, encoder, folder, **settings)
    shutil.rmtree(os.path.join(folder, "shard-00000"))
    assert embed_images(kept, encoder, folder, **settings)["images"] == len(kept)
    found = evaluation.read_embeddings(folder)
    assert sorted(found.ids) == sorted(item.id for item in kept if item.id not in BROKEN)


def test_after_a_kill_it_resumes_without_losing_or_repeating_a_shard(call, encoder_path, images, tmp_path):
    folder = tmp_path / "out"
    arguments = [f"--encoder={encoder_path}", f"--images={images}", f"--output={folder}", "--shard_size=3"]
    arguments += ["--batch_size=1"]
    seen = {}
    for _ in range(2):
        with start_python("-m", "s2sd_tf.cli.embed", *arguments) as process:
            deadline = time.monotonic() + 120
            while len(shard_folders(folder)) < len(seen) + 4 and time.monotonic() < deadline:
                assert process.is_alive()
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
            process.wait()
        now = {path: os.stat(path).st_mtime_ns for path in shard_folders(folder)}
        assert seen.items() <= now.items()
        seen = now
    assert 8 <= len(seen) < 31
    (folder / ".writing-rest").mkdir()
    done = call("embed", *arguments)
    assert "90 images, 4 dimensions, 31 shards" in done.stdout
    assert seen.items() <= {path: os.stat(path).st_mtime_ns for path in shard_folders(folder)}.items()
    check(str(folder), read_json(folder / "summary.json"), Encoder(encoder_path), list_images(images))
    # Every image is in the shard for its position.
    order = [item.id for item in list_images(images)]
    for number, path in enumerate(shard_folders(folder)):
        assert read_items(path)[0] == [name for name in order[3 * number : 3 * number + 3] if name not in BROKEN]


def test_beam_embeds_files_like_this_process(encoder_path, images, tmp_path):
    odd, gone = tmp_path / "photos" / os.fsdecode(b"\xff.png"), os.fsdecode(b"gone\xff.png")
    odd.parent.mkdir()
    shutil.copy(list_images(images)[0].path, odd)
    items, folder = [*list_images(images)[1:], Item(odd.name, str(odd), "")], str(tmp_path / "out")
    summary = beam.run(
        [*items, Item(gone, str(tmp_path / gone), "")],
        encoder_path,
        folder,
        shards=4,
        batch_size=7,
        index={"method": "funnel", "dim": 2, "recall": 0.9},
    )
    assert "No such file" in next(row["error"] for row in summary["failed"] if row["id"] == gone)
    summary["failed"] = [row for row in summary["failed"] if row["id"] != gone]
    summary["images"] -= 1
    (tmp_path / "out" / "summary.json").write_text(json.dumps(summary))
    check(folder, summary, Encoder(encoder_path), items)
    index, found = evaluation.load_index(folder), evaluation.read_embeddings(folder)
    assert len(index.indexes) == summary["shards"] == 4
    queries = found.rows[:20]
    expected = evaluation.find_neighbors(queries, found.rows, 7)
    merged = index.search(queries, 7)
    assert index.ids == found.ids
    np.testing.assert_allclose(merged.similarities, expected.similarities, atol=1e-5)
    with pytest.raises(ValueError, match="folder: expected a new"):
        beam.run(items, encoder_path, folder)


def test_a_runner_that_loses_images_fails(encoder_path, images, tmp_path, monkeypatch):
    items = list_images(images)
    monkeypatch.setattr(beam.beam, "Reshuffle", lambda: beam.beam.Filter(lambda batch: batch[0].id != items[0].id))
    with pytest.raises(ValueError, match=rf"all of {len(items)} images. Received: {len(items) - 4}"):
        beam.run(items, encoder_path, tmp_path / "out", batch_size=4, index={"method": "exact"})
    assert not list((tmp_path / "out").glob("*"))


def test_beam_embeds_tfrecords(encoder_path, images, tmp_path):
    items = list_images(images)

    def feature(value):
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))

    for part in range(2):
        with tf.io.TFRecordWriter(str(tmp_path / f"images-{part}.tfrecord")) as writer:
            for item in items[part::2]:
                content = {"image": content_of(item), "id": item.id.encode(), "label": item.label.encode()}
                features = tf.train.Features(feature={name: feature(value) for name, value in content.items()})
                writer.write(tf.train.Example(features=features).SerializeToString())
    folder = str(tmp_path / "out")
    summary = beam.run(str(tmp_path / "images-*.tfrecord"), encoder_path, folder, shards=3)
    check(folder, summary, Encoder(encoder_path), items)


@pytest.mark.parametrize("labels", [{"int64_list": [1, 2]}, {"bytes_list": [b"a", b"b"]}])
def test_beam_refuses_several_labels_of_an_image(encoder_path, tmp_path, labels):
    features = tf.train.Features()
    for name, content in (("image", b"-"), ("id", b"a")):
        features.feature[name].bytes_list.value.append(content)
    for kind, values in labels.items():
        getattr(features.feature["label"], kind).value.extend(values)
    with tf.io.TFRecordWriter(str(tmp_path / "images.tfrecord")) as writer:
        writer.write(tf.train.Example(features=features).SerializeToString())
    with pytest.raises(Exception, match="expected at most one value of the feature 'label'"):
        beam.run(str(tmp_path / "images.tfrecord"), encoder_path, tmp_path / "out")
    for name in ("shards", "batch_size"):
        with pytest.raises(ValueError, match=f"{name}: expected an int >= 1. Received: 0"):
            beam.run(str(tmp_path / "images.tfrecord"), encoder_path, tmp_path / "out", **{name: 0})
    assert not (tmp_path / "out").exists()


def test_a_file_that_cannot_be_opened_fails_alone(encoder_path, images, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "good.png").write_bytes((images / "c1" / "001 ü.png").read_bytes())
    (tmp_path / "photos" / "loop.png").symlink_to("loop.png")
    summary = embed_images(
        list_images(tmp_path / "photos"), Encoder(encoder_path), str(tmp_path / "out"), progress=False
    )
    assert (summary["embedded"], [row["id"] for row in summary["failed"]]) == (1, ["loop.png"])


def test_errors_not_caused_by_an_image_are_raised(encoder_path, images, tmp_path, monkeypatch):
    encoder = Encoder(encoder_path)

    def broken(self, encoded):
        raise tf.errors.InternalError(None, None, "the device is gone")

    monkeypatch.setattr(Encoder, "__call__", broken)
    with pytest.raises(tf.errors.InternalError):
        embed_images(list_images(images), encoder, str(tmp_path / "out"), progress=False)
    assert not shard_folders(str(tmp_path / "out"))
    monkeypatch.undo()
    summary = embed_images(list_images(images), encoder, str(tmp_path / "out"), progress=False)
    assert summary["embedded"] == IMAGES


def test_a_bad_image_whose_batch_is_cancelled_fails_alone(encoder_path, images, monkeypatch):
    encode, good = Encoder.__call__, (images / "c1" / "001 ü.png").read_bytes()

    def cancelled(self, encoded):
        # As in TensorFlow, where the error of a loop that was cancelled may come before that of the image.
        if len(encoded) > 1 and b"no image" in encoded:
            raise tf.errors.CancelledError(None, None, "Loop execution was cancelled.")
        return encode(self, encoded)

    monkeypatch.setattr(Encoder, "__call__", cancelled)
    rows, errors = Encoder(encoder_path).embed([good, b"no image", good])
    assert np.isfinite(rows).all(axis=1).tolist() == [True, False, True]
    assert list(errors) == [1]
    assert "Unknown image file format" in errors[1]


def test_an_image_outside_the_folder_is_not_shown(images, tmp_path):
    assert read_image_under(images, "c1/001 ü.png").shape == (10, 12, 3)
    (tmp_path / "other.png").write_bytes((images / "c1" / "001 ü.png").read_bytes())
    for name in (str(tmp_path / "other.png"), os.path.relpath(tmp_path / "other.png", images)):
        assert read_image_under(images, name) is None


def test_errors_of_embedding_name_the_argument(encoder_path, images, tmp_path):
    encoder = Encoder(encoder_path)
    with pytest.raises(FileNotFoundError, match="encoder"):
        Encoder(tmp_path)
    tf.saved_model.save(tf.Module(), str(tmp_path / "other"))
    with pytest.raises(ValueError, match="encoded_images"):
        Encoder(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="images"):
        list_images(tmp_path / "none")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="images"):
        list_images(tmp_path / "nothing")
    items = list_images(images)
    with pytest.raises(ValueError, match="unique ids"):
        embed_images([items[0], items[0]], encoder, str(tmp_path / "out"))
    with pytest.raises(ValueError, match="shard_size"):
        embed_images(items, encoder, str(tmp_path / "out"), shard_size=0)
    for index, message in (
        ({"size": 3}, "index: expected arguments of build_index"),
        ({"method": "funel"}, "index, method: .*'funnel'"),
        ({"method": "funnel"}, "index, dim: expected the dimension"),
        ({"method": "funnel", "dim": 1000}, "index, dim: expected at most"),
        ({"recall": 2.0}, "index, recall"),
    ):
        with pytest.raises(ValueError, match=message):
            embed_images(items, encoder, str(tmp_path / "out"), index=index)
    with pytest.raises(ValueError, match="new or empty"):
        embed_images(items, encoder, str(tmp_path / "other"))
    assert not (tmp_path / "out").exists()


LOADER = """
import sys, json
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("s2sd_tf", "keras_cv", "tensorflow_addons"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import numpy as np, tensorflow as tf
from scann.scann_ops.py import scann_ops
loaded = tf.saved_model.load(sys.argv[1])
image, rows = open(sys.argv[2], "rb").read(), np.load(sys.argv[3])
calls = {
    "encoded_images": {"encoded_images": tf.constant([image, image])},
    "serving_default": {"images": tf.image.decode_image(image, channels=3)[None, :, :, :1] / 255},
    "embeddings": {"embeddings": tf.constant(rows)},
}
found = {name: loaded.signatures[name](**arguments) for name, arguments in calls.items()}
decode = lambda v: v.numpy().tolist() if v.dtype != tf.string else [[w.decode() for w in r] for r in v.numpy().tolist()]
print(json.dumps({name: {key: decode(value) for key, value in f.items()} for name, f in found.items()}))
"""


@needs_scann
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("kind", ["exact", "brute_force", "hashing", "tree"])
def test_a_retrieval_saved_model_in_another_process(
    kind, metric, encoder_path, images, tmp_path, run_python, monkeypatch
):
    sizes = {"hashing": (10, 10**6), "tree": (5, 10)}.get(kind, (10**6, 10**6))
    monkeypatch.setattr("s2sd_tf.evaluation.scann_searcher.BRUTE_FORCE_SIZE", sizes[0])
    monkeypatch.setattr("s2sd_tf.evaluation.scann_searcher.TREE_SIZE", sizes[1])
    items = [item for item in list_images(images) if item.id not in BROKEN]
    rows = Encoder(encoder_path)([content_of(item) for item in items])
    labels = [item.label for item in items]
    ids = [item.id for item in items]
    index = evaluation.build_index(rows, ids, labels, "exact" if kind == "exact" else "scann", metric)
    path = str(tmp_path / "retrieval")
    export.export_retrieval(encoder_path, index, path, k=5)
    np.save(tmp_path / "rows.npy", rows[:30])
    here = {
        key: value.numpy()
        for key, value in export.load_retrieval(path).signatures["embeddings"](tf.constant(rows[:30])).items()
    }
    (tmp_path / "loader.py").write_text(LOADER)
    arguments = (tmp_path / "loader.py", path, items[7].path, tmp_path / "rows.npy")
    output = run_python(*arguments, cwd=tmp_path).stdout
    there = json.loads(output.splitlines()[-1])
    # Identical to the last bit.
    assert there["embeddings"]["scores"] == here["scores"].tolist()
    assert there["embeddings"]["ids"] == [[name.decode() for name in row] for row in here["ids"].tolist()]
    exact = evaluation.find_neighbors(rows[:30], rows, 5, metric=metric)
    np.testing.assert_allclose(here["scores"][:, 0], exact.similarities[:, 0], atol=2e-3)
    agreement = np.mean(
        [len({n.decode() for n in a} & {ids[i] for i in b}) / 5 for a, b in zip(here["ids"], exact.indices)]
    )
    assert agreement > 0.9
    by_image = there["encoded_images"]
    assert by_image["ids"][0] == by_image["ids"][1]
    assert by_image["ids"][0][0] == items[7].id
    assert by_image["labels"][0][0] == items[7].label
    assert len(there["serving_default"]["ids"][0]) == 5


@needs_scann
def test_a_retrieval_saved_model_without_scann(encoder_path, tmp_path, run_python, monkeypatch):
    index = evaluation.build_index(np.eye(4, dtype=np.float32))
    path = tmp_path / "retrieval"
    export.export_retrieval(encoder_path, index, str(path), k=9)
    code = "import sys, tensorflow as tf; tf.saved_model.load(sys.argv[1])"
    done = run_python("-c", code, path, check=False)
    assert done.returncode
    assert "Scann>" in done.stderr
    assert "Scann>" in (path / "assets.extra" / "README.txt").read_text()
    assert str(tmp_path) not in (path / "assets.extra" / "README.txt").read_text()
    monkeypatch.setitem(sys.modules, "scann.scann_ops.py.scann_ops", None)
    with pytest.raises(ImportError, match="pip install scann"):
        export.load_retrieval(path)
    with pytest.raises(FileNotFoundError, match="path"):
        export.load_retrieval(tmp_path)


def test_an_index_with_another_dimension_is_refused(encoder_path, tmp_path):
    with pytest.raises(ValueError, match=r"index\.dim: expected one of \[4\], .*Received: 3"):
        export.export_retrieval(encoder_path, evaluation.build_index(np.eye(3)), str(tmp_path / "retrieval"))
    assert not (tmp_path / "retrieval").exists()
