"""Indexes: results, tuning, saving and loading, adding and removing, parts; and embeddings on disk."""

import json
import pickle
import shutil
import types

import numpy as np
import pytest
import tensorflow as tf
from conftest import METHODS, needs_scann

from s2sd_tf import evaluation
from s2sd_tf.evaluation import embeddings as embeddings_module
from s2sd_tf.evaluation import scann_index, scann_searcher

KINDS = {"brute_force": (10**6, 10**6), "hashing": (10, 10**6), "tree": (5, 10)}


def clustered(size, dim=16, classes=60, seed=0):
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(classes, dim))
    return (centres[generator.integers(0, classes, size)] + 0.4 * generator.normal(size=(size, dim))).astype(np.float32)


def of_kind(kind, monkeypatch):
    brute_force, tree = KINDS[kind]
    monkeypatch.setattr(scann_searcher, "BRUTE_FORCE_SIZE", brute_force)
    monkeypatch.setattr(scann_searcher, "TREE_SIZE", tree)


@needs_scann
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("kind", KINDS)
def test_scann_is_tuned_to_the_requested_recall(kind, metric, monkeypatch):
    of_kind(kind, monkeypatch)
    rows = clustered(4000)
    index = evaluation.build_index(rows, metric=metric, recall=0.95, k=10)
    assert index.settings["kind"] == kind
    queries = clustered(500, seed=0)[:500] + 0.05
    exact = evaluation.find_neighbors(queries, rows, 10, metric=metric)
    found = index.search(queries, 10)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact.indices, found.indices)])
    assert recall > 0.92
    same = found.indices[:, 0] == exact.indices[:, 0]
    np.testing.assert_allclose(found.similarities[same, 0], exact.similarities[same, 0], atol=1e-4)
    assert (np.diff(found.similarities, axis=1) <= 1e-6).all()
    if kind == "brute_force":
        assert recall > 0.9999
        return
    assert index.tuned["measured"] > 0.93
    less = evaluation.build_index(rows, metric=metric, recall=0.5, k=10)
    work = [i.settings["reorder"] * i.settings.get("leaves_to_search", 1) for i in (less, index)]
    assert work[0] < work[1]


def test_only_small_galleries_are_searched_by_brute_force():
    assert scann_searcher.settings_for(19_999, True)["kind"] == "brute_force"
    assert scann_searcher.settings_for(20_000, True)["kind"] == "hashing"
    assert scann_searcher.settings_for(99_999, True)["kind"] == "hashing"
    assert scann_searcher.settings_for(1_000_000, True)["leaves"] == 2000


@needs_scann
def test_the_order_is_that_of_the_similarities_whatever_scann_returns(monkeypatch):
    index = evaluation.build_index(np.eye(3), metric="euclidean", method="scann")

    def search_batched_parallel(queries, **_):
        return np.array([[2, 7, 0, 1]], np.uint32), np.array([[4.0, 1.0, np.nan, 0.25]], np.float32)

    monkeypatch.setattr(index, "_searcher", types.SimpleNamespace(search_batched_parallel=search_batched_parallel))
    found = index.search(np.eye(3)[:1], 4)
    np.testing.assert_array_equal(found.indices, [[1, 2, -1, -1]])
    np.testing.assert_array_equal(found.similarities, np.float32([[-0.5, -2.0, -np.inf, -np.inf]]))


@needs_scann
def test_brute_force_if_quantisation_cannot_reach_the_recall(monkeypatch):
    of_kind("hashing", monkeypatch)
    monkeypatch.setattr(scann_index.ScannIndex, "_found", _only_exact(scann_index.ScannIndex._found))
    rows = clustered(600)
    index = evaluation.build_index(rows, recall=1.0)
    assert index.settings == {"kind": "brute_force"}
    assert (index.search(rows, 1).indices[:, 0] == np.arange(600)).all()


def _only_exact(found):
    def spoiled(self, queries, k, **numbers):
        indices, similarities = found(self, queries, k, **numbers)
        return indices, similarities if self.settings["kind"] == "brute_force" else similarities - 1.0

    return spoiled


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("kind", ["exact", *(pytest.param(kind, marks=needs_scann) for kind in KINDS)])
def test_save_load_move_add_remove(kind, metric, tmp_path, monkeypatch):
    if kind != "exact":
        of_kind(kind, monkeypatch)
    rows, queries = clustered(700), clustered(20, seed=5)
    names = [f"image {i}" for i in range(700)]
    index = evaluation.build_index(
        rows, names, [f"c{i % 7}" for i in range(700)], "exact" if kind == "exact" else "scann", metric
    )
    before = index.search(queries, 5)
    index.save(tmp_path / "one")
    # The folder does not contain its own path.
    shutil.move(tmp_path / "one", tmp_path / "other")
    assert not any(str(tmp_path).encode() in path.read_bytes() for path in (tmp_path / "other").rglob("*.*"))
    assert not list(tmp_path.rglob("*.pkl"))
    index = evaluation.load_index(tmp_path / "other")
    after = index.search(queries, 5)
    np.testing.assert_array_equal(before.indices, after.indices)
    # The order of ScaNN's sums depends on where the rows are in memory.
    np.testing.assert_allclose(after.similarities, before.similarities, rtol=0 if kind == "exact" else 1e-6)
    assert index.ids == names

    # Add an image far from the others, and replace an existing one.
    far, far2 = -10.0 * rows.mean(axis=0), 10.0 * np.roll(rows[0], 1)
    index.add(np.stack([far, far2]), ["new", "image 3"], ["c8", "c9"])
    assert len(index) == 701
    for row, name, label in ((far, "new", "c8"), (far2, "image 3", "c9")):
        position = index.search(row[None], 1).indices[0, 0]
        assert index.ids[position] == name
        assert index.labels[position] == label
    index.remove(["new", "image 0"])
    assert len(index) == len(index.ids) == len(index.labels) == 699
    found = index.search(rows[:1], 699)
    there = found.indices[found.indices >= 0]
    assert "image 0" not in [index.ids[i] for i in there]
    assert sorted(set(index.ids)) == sorted({*names} - {"image 0"})
    wrong = [i for i in there if index.ids[i] != "image 3" and index.labels[i] != f"c{int(index.ids[i][6:]) % 7}"]
    assert not wrong
    index.save(tmp_path / "changed")
    again = evaluation.load_index(tmp_path / "changed")
    assert again.ids == index.ids
    np.testing.assert_array_equal(again.search(queries, 5).indices, index.search(queries, 5).indices)


@needs_scann
@pytest.mark.parametrize("kind", KINDS)
def test_a_gallery_that_grows_is_tuned_again(kind, monkeypatch):
    of_kind(kind, monkeypatch)
    rows = clustered(4000)
    index = evaluation.build_index(rows[:300], method="scann", recall=0.9, k=10)
    assert index.tuned["size"] == 300
    index.add(rows[300:400], range(300, 400))
    assert (len(index), index.tuned["size"]) == (400, 300)
    index.add(rows[400:], range(400, 4000))
    assert (len(index), index.tuned["size"]) == (4000, 4000)
    exact = evaluation.find_neighbors(rows[:300], rows, 10).indices
    found = np.array(index.ids, int)[index.search(rows[:300], 10).indices]
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact, found)]) > 0.87
    index.remove(["5"])
    np.testing.assert_allclose(
        index.rows()[index.ids.index("3999")], rows[3999] / np.linalg.norm(rows[3999]), atol=1e-6
    )


@needs_scann
def test_parts_are_searched_together(tmp_path):
    rows, queries = clustered(900), clustered(30, seed=3)
    for number, part in enumerate(np.split(np.arange(900), [300, 310])):
        ids = [str(i) for i in part]
        index = evaluation.build_index(rows[part], ids, method="exact" if number == 1 else "scann")
        folder = tmp_path / embeddings_module.shard_name(number)
        embeddings_module.write_shard(str(folder), rows[part], ids, None, index)
    index = evaluation.load_index(tmp_path)
    expected = evaluation.find_neighbors(queries, rows, 20)
    found = index.search(queries, 20)
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_allclose(found.similarities, expected.similarities, atol=1e-5)
    assert len(index) == 900
    for change in (lambda: index.add(rows[:1], ["x"]), lambda: index.remove(["1"]), lambda: index.save(tmp_path / "x")):
        with pytest.raises(ValueError, match="one part"):
            change()


@needs_scann
def test_k_beyond_the_gallery_and_no_queries():
    index = evaluation.build_index(np.eye(3), method="scann")
    found = index.search(np.eye(3), 5)
    assert (found.indices[:, 3:] == -1).all()
    assert index.search(np.zeros((0, 3)), 2).indices.shape == (0, 2)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda i: i.search(np.eye(4), 1), "queries: expected dimension 3"),
        (lambda i: i.search(np.full((1, 3), np.nan), 1), "finite"),
        (lambda i: i.search(np.eye(3), 0), "k: expected an int >= 1"),
        (lambda i: i.add(np.eye(4), list("abcd")), "embeddings: expected dimension 3"),
        (lambda i: i.add(np.eye(3), list("aab")), "ids: expected different"),
        (lambda i: i.add(np.eye(3), list("ab")), "ids: expected one for each"),
        (lambda i: i.add(np.eye(3), list("abc"), list("abc")), "labels"),
        (lambda i: i.remove(["9"]), "ids"),
        (lambda i: i.remove(["0", "1", "2"]), "at least one item"),
        (lambda i: evaluation.build_index(np.eye(3), method="guess"), "method"),
        (lambda i: evaluation.build_index(np.eye(3), metric="guess"), "metric"),
        (lambda i: evaluation.build_index(np.eye(3), recall=1.5), "recall"),
        (lambda i: evaluation.build_index(np.zeros((0, 3))), "at least one row"),
        (lambda i: evaluation.build_index(np.full((2, 3), np.inf)), "finite"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_errors_name_the_argument(method, call, words):
    index = evaluation.build_index(np.eye(3), method=method)
    with pytest.raises(ValueError, match=words):
        call(index)
    assert index.ids == ["0", "1", "2"]


@needs_scann
def test_folders_that_are_not_an_index_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="index"):
        evaluation.load_index(tmp_path)
    evaluation.build_index(np.eye(3)).save(tmp_path / "index")
    about = json.loads((tmp_path / "index" / "index.json").read_text())
    (tmp_path / "index" / "index.json").write_text(json.dumps({**about, "format": 99}))
    with pytest.raises(ValueError, match="format"):
        evaluation.load_index(tmp_path / "index")
    evaluation.build_index(np.eye(3)).save(tmp_path / "index")
    path = tmp_path / "index" / "scann" / "scann_assets.pbtxt"
    path.write_text(path.read_text().replace('asset_path: "', 'asset_path: "../', 1))
    with pytest.raises(ValueError, match="names of files"):
        evaluation.load_index(tmp_path / "index")


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@needs_scann
def test_nothing_is_unpickled(tmp_path):
    evaluation.build_index(np.eye(3)).save(tmp_path / "index")
    (tmp_path / "index" / "scann" / "scann_docids.pkl").write_bytes(pickle.dumps(Payload(tmp_path / "run")))
    assert len(evaluation.load_index(tmp_path / "index")) == 3
    assert not (tmp_path / "run").exists()


def test_a_folder_with_other_content_is_not_replaced(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="folder: expected a new folder"):
        evaluation.build_index(np.eye(3)).save(tmp_path / "run")
    assert (tmp_path / "run" / "results.json").exists()
    for _ in range(2):
        evaluation.build_index(np.eye(3)).save(tmp_path / "index")


def test_an_interrupted_run_is_reported(tmp_path):
    embeddings_module.write_shard(
        str(tmp_path / "shard-00000"), np.eye(3), list("abc"), None, evaluation.build_index(np.eye(3))
    )
    (tmp_path / "plan.json").write_text("{}")
    for read in (evaluation.load_index, evaluation.read_embeddings):
        with pytest.raises(ValueError, match="interrupted"):
            read(tmp_path)
    (tmp_path / "summary.json").write_text("{}")
    assert len(evaluation.load_index(tmp_path)) == 3
    embeddings_module.write_shard(str(tmp_path / "shard-00001"), np.eye(3), list("def"))
    with pytest.raises(FileNotFoundError, match="one each"):
        evaluation.load_index(tmp_path)


@needs_scann
def test_more_neighbours_than_tuned_for(monkeypatch):
    of_kind("tree", monkeypatch)
    rows = clustered(3000, classes=300)
    index = evaluation.build_index(rows, k=2, recall=0.9)
    found = index.search(rows[:200], 400)
    assert (found.indices >= 0).all()
    exact = evaluation.find_neighbors(rows[:200], rows, 400)
    assert np.mean([len(set(a) & set(b)) / 400 for a, b in zip(exact.indices, found.indices)]) > 0.8


def test_without_scann_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "scann", None)
    with pytest.raises(ImportError, match=r"pip install scann==1.4.2"):
        evaluation.find_neighbors(np.eye(3), np.eye(3), 1, method="scann")


def write_tfrecord(path, rows, ids, labels):
    def feature(value):
        if isinstance(value, (str, bytes)):
            value = value.encode() if isinstance(value, str) else value
            return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
        if isinstance(value, int):
            return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))
        return tf.train.Feature(float_list=tf.train.FloatList(value=value))

    with tf.io.TFRecordWriter(str(path)) as writer:
        for values in zip(rows, ids, labels):
            features = {name: feature(v) for name, v in zip(embeddings_module.FEATURES, values)}
            writer.write(tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString())


def test_embeddings_in_every_format(tmp_path):
    rows, ids = clustered(12), [f"é{i}" for i in range(12)]
    np.save(tmp_path / "a.npy", rows)
    np.savez(tmp_path / "b.npz", embeddings=rows, labels=np.arange(12) // 2, ids=ids)
    np.savez_compressed(tmp_path / "c.npz", embeddings=rows, labels=[f"c{i // 2}" for i in range(12)])
    write_tfrecord(tmp_path / "d.tfrecord", rows, ids, (np.arange(12) // 2).tolist())
    write_tfrecord(tmp_path / "e.tfrecords", rows, list(range(12)), [f"c{i // 2}" for i in range(12)])
    for number, part in enumerate((slice(0, 5), slice(5, 5), slice(5, 12))):
        folder = tmp_path / "shards" / embeddings_module.shard_name(number)
        embeddings_module.write_shard(str(folder), rows[part], ids[part], ids[part])
    expected = {
        "a.npy": (None, None),
        "b.npz": (ids, (np.arange(12) // 2).tolist()),
        "c.npz": (None, [f"c{i // 2}" for i in range(12)]),
        "d.tfrecord": (ids, (np.arange(12) // 2).tolist()),
        "e.tfrecords": ([str(i) for i in range(12)], [f"c{i // 2}" for i in range(12)]),
        "shards": (ids, ids),
    }
    for name, (its_ids, its_labels) in expected.items():
        found = evaluation.read_embeddings(tmp_path / name)
        np.testing.assert_array_equal(np.asarray(found.rows[0:12]), rows)
        assert found.ids == its_ids
        assert found.labels == its_labels


@pytest.mark.parametrize(
    "name", ["none.npy", "some.txt", "broken.npz", "broken.npy", "empty.tfrecord", "pickle.npy", "b.npz"]
)
def test_embeddings_that_cannot_be_read(name, tmp_path):
    for broken in ("some.txt", "broken.npz", "broken.npy", "empty.tfrecord"):
        (tmp_path / broken).write_text("" if broken.startswith("empty") else "nothing")
    np.save(tmp_path / "pickle.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "b.npz", embeddings=np.eye(3), labels=[1, 2])
    with pytest.raises((ValueError, FileNotFoundError), match="embeddings: "):
        evaluation.read_embeddings(tmp_path / name)
