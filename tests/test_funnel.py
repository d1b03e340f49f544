"""Funnel search: shortlists by prefixes, tuned to a recall; saved, loaded, changed, and in the retrieval SavedModel."""

import concurrent.futures
import gc
import json
import tracemalloc

import numpy as np
import pytest
import tensorflow as tf
from conftest import needs_scann
from threadpoolctl import threadpool_info

import s2sd_tf
from s2sd_tf import data, evaluation, export
from s2sd_tf.evaluation import funnel_index
from s2sd_tf.evaluation import shortlist as shortlist_module
from s2sd_tf.evaluation.shortlist import CODES, make_shortlist
from s2sd_tf.files import read_json, write_json
from s2sd_tf.keras_compat import keras

SIZE, DIM = 1500, 12


@pytest.fixture(scope="module")
def rows():
    """Rows around 100 centres, with a variance that falls over the dimensions."""
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(100, DIM))[np.arange(SIZE) % 100] + 0.6 * generator.normal(size=(SIZE, DIM))
    return (rows / np.sqrt(np.arange(1, DIM + 1))).astype(np.float32)


@pytest.fixture(scope="module")
def queries(rows):
    return rows[:200] + 0.05 * np.random.default_rng(1).normal(size=(200, DIM)).astype(np.float32)


def recall(found, truth):
    return np.mean([len(set(one) & set(other)) / len(other) for one, other in zip(found.tolist(), truth.tolist())])


@pytest.mark.parametrize("codes", [*CODES[:-1], pytest.param("scann", marks=needs_scann)])
def test_it_is_tuned_to_the_requested_recall(rows, queries, codes):
    index = evaluation.build_index(rows, method="funnel", dim=6, codes=codes, recall=0.95, k=5)
    assert index.settings["codes"] == codes
    assert 5 < index.settings["shortlist"] < SIZE // 2
    assert 0.93 <= index.tuned["measured"] <= 1
    found, exact = index.search(queries, 5), evaluation.find_neighbors(queries, rows, 5)
    assert recall(found.indices, exact.indices) > 0.92
    same = found.indices == exact.indices
    np.testing.assert_allclose(found.similarities[same], exact.similarities[same], atol=1e-6)
    assert np.all(np.diff(found.similarities, axis=1) <= 0)


@pytest.mark.parametrize("codes", ["float32", "int8", "bits"])
@pytest.mark.parametrize("count", [1, 40, 5000])
def test_shortlists_are_those_of_all_products(rows, queries, codes, count, monkeypatch):
    monkeypatch.setattr(shortlist_module, "_QUERIES", 64)
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    shortlist = make_shortlist(units, 5, codes, 0.99, 10, 0)
    prefixes, wanted = s2sd_tf.truncate(units, 5), s2sd_tf.truncate(queries, 5)
    if codes == "int8":
        scale = np.abs(prefixes).max(axis=0) / 127
        prefixes = np.round(prefixes / scale) * scale
    elif codes == "bits":
        rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((5, 5)))[0].astype(np.float32)
        prefixes, wanted = np.where(prefixes @ rotation > 0, 1.0, -1.0), wanted @ rotation
    products = wanted.astype(np.float64) @ prefixes.T.astype(np.float64)
    found = shortlist.find(queries, count)
    assert found.shape == (len(queries), min(count, SIZE))
    assert all(len(set(row)) == len(row) for row in found.tolist())
    np.testing.assert_allclose(
        np.take_along_axis(products, found, axis=1), -np.sort(-products, axis=1)[:, :count], atol=1e-6
    )
    # The bits of the last tile, of 476 items, are padded to 60 bytes.
    assert shortlist.bytes_per_item == {"float32": 20, "int8": 5, "bits": 5 * (64 + 64 + 60) / SIZE}[codes]


@pytest.mark.parametrize("codes", ["float32", "int8"])
@pytest.mark.parametrize("count", [1, 40, 1200])
def test_shortlists_of_the_nearest_clusters(rows, queries, codes, count, monkeypatch):
    monkeypatch.setattr(shortlist_module, "_QUERIES", 64)
    monkeypatch.setattr(shortlist_module, "_ITEMS", 16)
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    centres = units[:30, :5] / np.linalg.norm(units[:30, :5], axis=1, keepdims=True)
    whole = make_shortlist(units, 5, codes, 0.99, 10, 0)
    # All clusters are all items.
    every = make_shortlist(units, 5, codes, 0.99, 10, 0, centres, 30).find(queries, count)
    np.testing.assert_array_equal(np.sort(every, axis=1), np.sort(whole.find(queries, count), axis=1))
    # Of some, the nearest; others only if these have too few.
    prefixes, wanted = s2sd_tf.truncate(units, 5), s2sd_tf.truncate(queries, 5)
    clusters = np.argmax(prefixes @ centres.T, axis=1)
    nearest = np.argsort(-(wanted @ centres.T), axis=1)
    found = make_shortlist(units, 5, codes, 0.99, 10, 0, centres, 4).find(queries, count)
    assert all(len(set(row)) == len(row) == count for row in found.tolist())
    searched = max(4, int(np.ceil(2 * count * 30 / SIZE)))
    for row, items in enumerate(whole.find(queries, SIZE)):
        there = items[np.isin(clusters[items], nearest[row, :searched])]
        wanted = there if searched <= 30 // 4 and len(there) >= count else items
        assert set(found[row]) == set(wanted[:count])


def test_equal_items_do_not_take_more_memory(monkeypatch):
    monkeypatch.setattr(shortlist_module, "_CANDIDATES", 2**12)
    units = np.tile(np.eye(4, dtype=np.float32)[:2], (1000, 1))
    found = make_shortlist(units, 2, "float32", 0.99, 10, 0).find(units[:5], 300)
    np.testing.assert_array_equal(found % 2, np.tile(np.arange(5) % 2, (300, 1)).T)


def test_one_query_with_many_equal_items_does_not_widen_the_others(monkeypatch):
    generator = np.random.default_rng(0)
    units = generator.normal(size=(4000, 4)).astype(np.float32)
    units[::2] = units[0]
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    shapes = []
    full = np.full
    monkeypatch.setattr(shortlist_module.np, "full", lambda shape, *rest: (shapes.append(shape), full(shape, *rest))[1])
    found = make_shortlist(units, 4, "float32", 0.99, 10, 0).find(np.r_[units[:1], units[1:200:2]], 5)
    assert (found[0] % 2 == 0).all()
    assert found[1:, 0].tolist() == list(range(1, 200, 2))
    sizes = [np.prod(shape) for shape in shapes if isinstance(shape, tuple)]
    assert max(sizes) < 101 * 200 < 101 * 2000


def test_the_whole_recall_and_more_neighbours_than_tuned_for(rows, queries):
    index = evaluation.build_index(rows, method="funnel", dim=DIM, recall=1.0, k=3)
    assert index.settings["shortlist"] <= 5
    exact = evaluation.find_neighbors(queries, rows, 9)
    np.testing.assert_array_equal(index.search(queries, 9).indices, exact.indices)
    assert index.length(9) == 3 * index.settings["shortlist"]


def test_exact_search_if_no_shortlist_reaches_the_recall(queries):
    rows = np.random.default_rng(0).normal(size=(1500, DIM)).astype(np.float32)
    rows[:, 0] *= 1e-3
    index = evaluation.build_index(rows, method="funnel", dim=1, recall=0.999)
    assert (index.settings["shortlist"], index.tuned["measured"]) == (None, 1.0)
    np.testing.assert_array_equal(index.search(queries, 4).indices, evaluation.find_neighbors(queries, rows, 4).indices)


@pytest.mark.parametrize("size", [1, 2, 11])
def test_small_galleries(rows, queries, size):
    index = evaluation.build_index(rows[:size], method="funnel", dim=3)
    found = index.search(queries[:5], 4)
    np.testing.assert_array_equal(found.indices, evaluation.find_neighbors(queries[:5], rows[:size], 4).indices)
    assert index.search(queries[:0], 4).indices.shape == (0, 4)


@pytest.mark.parametrize("codes", ["float32", "int8", "bits"])
def test_clusters_of_a_large_gallery(rows, queries, codes, monkeypatch, tmp_path):
    truth = evaluation.find_neighbors(queries, rows, 5).indices
    monkeypatch.setattr(funnel_index, "_CLUSTERED", 1000)
    index = evaluation.build_index(rows, method="funnel", dim=6, codes=codes, recall=0.95, k=5)
    assert (index.settings["clusters"], index.tuned["size"]) == (38, SIZE)
    assert 1 < index.settings["clusters_to_search"] <= 9
    assert index.tuned["measured"] > 0.93
    found = index.search(queries, 5)
    assert recall(found.indices, truth) > 0.92
    # More neighbours than tuned for, and than the clusters have.
    more = evaluation.find_neighbors(queries, rows, 10).indices
    assert recall(index.search(queries, 10).indices, more) > 0.9
    many = index.search(queries, 400).indices
    assert many.shape == (len(queries), 400)
    assert (np.diff(np.sort(many, axis=1), axis=1) > 0).all()
    index.save(tmp_path / "index")
    loaded = evaluation.load_index(tmp_path / "index")
    assert loaded.settings == index.settings
    for one, other in zip(found, loaded.search(queries, 5)):
        np.testing.assert_array_equal(one, other)
    loaded.add(-rows[:2], ["new", "newer"])
    assert [loaded.ids[at] for at in loaded.search(-rows[:2], 1).indices[:, 0]] == ["new", "newer"]
    # A gallery that has grown is divided again.
    loaded.add(np.tile(rows, (2, 1)) + 0.01, range(5000, 5000 + 2 * SIZE))
    assert loaded.settings["clusters"] == 67
    centres = tmp_path / "index" / "centres.npy"
    np.save(centres, np.load(centres)[1:])
    with pytest.raises(ValueError, match=r"centres\.npy: expected shape \(38, 6\)"):
        evaluation.load_index(tmp_path / "index")
    centres.unlink()
    with pytest.raises(FileNotFoundError, match=r"centres\.npy"):
        evaluation.load_index(tmp_path / "index")


def test_no_clusters_if_neighbours_are_in_many_of_them(rows, monkeypatch):
    monkeypatch.setattr(funnel_index, "_CLUSTERED", 1000)
    equal = evaluation.build_index(np.ones_like(rows), method="funnel", dim=6)
    assert equal.settings == {"dim": 6, "codes": "float32", "shortlist": None}
    rows = np.random.default_rng(0).normal(size=(1200, 24)).astype(np.float32)
    index = evaluation.build_index(rows, method="funnel", dim=20, recall=0.99)
    assert index.settings.keys() == {"dim", "codes", "shortlist"}


def test_codes_are_held_once():
    # The last tile has one item.
    units = np.eye(32, dtype=np.float32)[np.arange(2**16 + 1) % 32]
    tracemalloc.start()
    try:
        shortlist = make_shortlist(units, 32, "float32", 0.99, 10, 0)
        gc.collect()
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert units.nbytes == shortlist.bytes_per_item * len(units) <= held < 1.5 * units.nbytes


@pytest.mark.parametrize("codes", ["float32", "bits", pytest.param("scann", marks=needs_scann)])
def test_save_load_add_remove(rows, queries, codes, tmp_path):
    ids, labels = [f"i{n}" for n in range(SIZE)], [str(n % 100) for n in range(SIZE)]
    index = evaluation.build_index(rows, ids, labels, method="funnel", dim=6, codes=codes, recall=0.9)
    index.save(tmp_path / "index")
    loaded = evaluation.load_index(tmp_path / "index")
    assert (loaded.settings, loaded.tuned, loaded.labels) == (index.settings, index.tuned, labels)
    for one, other in zip(index.search(queries, 3), loaded.search(queries, 3)):
        np.testing.assert_array_equal(one, other)
    new = -rows[:2]
    loaded.add(new, ["new", "i1"], ["a", "b"])
    assert [loaded.ids[at] for at in loaded.search(new, 1).indices[:, 0]] == ["new", "i1"]
    loaded.remove(["new"])
    assert (len(loaded), loaded.labels[1]) == (SIZE, "b")


def test_an_index_that_grows_beyond_its_shortlist(rows):
    index = evaluation.build_index(rows[:5], method="funnel", dim=4)
    index.add(rows[5:40], [f"new{n}" for n in range(35)])
    assert (index.search(rows[:2], 10).indices >= 0).all()


def test_a_gallery_that_grows_keeps_its_recall(rows):
    truth = evaluation.find_neighbors(rows[:200], rows, 10).indices
    index = evaluation.build_index(rows[:150], method="funnel", dim=6, recall=0.9)
    before, tuned = index.settings["shortlist"], dict(index.tuned)
    assert tuned["size"] == 150
    index.add(rows[150:210], range(150, 210))
    assert (index.settings["shortlist"], index.tuned) == (before, tuned)
    assert index.length(10) == pytest.approx(before * 210 / 150, abs=1)
    index.add(rows[210:], range(210, SIZE))
    assert index.tuned["size"] == SIZE
    assert recall(index.search(rows[:200], 10).indices, truth) >= 0.88


def test_threads_search_at_the_same_time(rows, queries):
    index = evaluation.build_index(rows, method="funnel", dim=6, recall=0.9)
    expected, before = index.search(queries, 3), threadpool_info()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: index.search(queries, 3), range(24)):
            np.testing.assert_array_equal(found.indices, expected.indices)
    # The number of threads is that of before.
    assert threadpool_info() == before


def test_what_is_refused(rows, tmp_path):
    for settings, words in (
        ({"dim": None}, "dim: expected the dimension of the prefixes"),
        ({"dim": 13}, "dim: expected at most 12.*Received: 13"),
        ({"dim": 0}, "dim: expected an int >= 1"),
        ({"dim": 6, "codes": "int4"}, "codes: expected one of"),
        ({"dim": 6, "metric": "euclidean"}, "metric: expected one of"),
        ({"dim": 6, "recall": 0}, "recall: expected a number"),
        ({"dim": 6, "method": "exact"}, "dim: expected None unless method='funnel'. Received: 6"),
        ({"method": "exact", "codes": "bits"}, "codes: expected 'float32' unless method='funnel'. Received: 'bits'"),
    ):
        with pytest.raises(ValueError, match=words):
            evaluation.build_index(rows, **{"method": "funnel", **settings})
    index = evaluation.build_index(rows[:50], method="funnel", dim=6)
    index.save(tmp_path / "index")
    about = read_json(tmp_path / "index" / "index.json")
    for change in (
        {"dim": 13},
        {"codes": "pickle"},
        {"shortlist": -1},
        {"clusters": 3},
        {"clusters": 3, "clusters_to_search": 4},
        {"clusters": "3", "clusters_to_search": 1},
        {"clusters_to_search": "x"},
    ):
        write_json(tmp_path / "index" / "index.json", {**about, "settings": {**about["settings"], **change}})
        with pytest.raises(ValueError, match=r"index.json: expected what a funnel index writes"):
            evaluation.load_index(tmp_path / "index")


@needs_scann
def test_in_the_retrieval_saved_model(rows, queries, tmp_path):
    layers = [keras.layers.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(DIM)]
    export.export_encoder(keras.Sequential(layers), data.Preprocessing(8, 8, 1), tmp_path / "encoder")
    exact = evaluation.find_neighbors(queries, rows, 5)
    for codes in ("int8", "scann"):
        index = evaluation.build_index(rows, method="funnel", dim=6, codes=codes, recall=0.95, k=5)
        export.export_retrieval(tmp_path / "encoder", index, tmp_path / "retrieval", k=5)
        loaded = export.load_retrieval(tmp_path / "retrieval")
        found = loaded.signatures["embeddings"](embeddings=tf.constant(100 * queries))
        indices = np.char.decode(found["ids"].numpy().astype(bytes)).astype(int)
        assert recall(indices, exact.indices) > 0.93
        same = indices == exact.indices
        np.testing.assert_allclose(found["scores"].numpy()[same], exact.similarities[same], atol=1e-5)
        assert loaded.signatures["embeddings"](embeddings=tf.zeros([0, DIM]))["ids"].shape == (0, 5)


def test_the_program(call, rows, tmp_path):
    np.savez(tmp_path / "rows.npz", embeddings=rows)
    output = call(
        "index", f"--embeddings={tmp_path / 'rows.npz'}", f"--output={tmp_path / 'index'}", "--method=funnel",
        "--funnel_dim=6", "--codes=int8", "--recall=0.95", "--k=5",
    ).stdout  # fmt: skip
    assert "1,500 items, 12 dimensions, funnel, {'dim': 6, 'codes': 'int8', 'shortlist': " in output
    about = json.loads((tmp_path / "index" / "index.json").read_text())
    assert (about["method"], about["tuned"]["k"]) == ("funnel", 5)
