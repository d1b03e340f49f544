"""Neighbours, metrics, the callback and the pictures."""

import numpy as np
import pytest
from PIL import Image

from s2sd_tf import evaluation
from s2sd_tf.evaluation import neighbors as neighbors_module
from s2sd_tf.evaluation.pictures import choose_queries, save_curves, save_gallery
from s2sd_tf.keras_compat import keras


def naive_metrics(queries, query_labels, gallery, gallery_labels, ks, own):
    """Every metric by loops over a full sort, in float64."""
    queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    gallery = gallery / np.linalg.norm(gallery, axis=1, keepdims=True)
    rows = []
    for i, query in enumerate(queries):
        order = [j for j in np.argsort(-(gallery @ query), kind="stable") if not own or j != i]
        hits = [gallery_labels[j] == query_labels[i] for j in order]
        positives = sum(hits)
        if not positives:
            continue
        row = {f"recall@{k}": float(any(hits[:k])) for k in ks}
        row["precision@1"] = float(hits[0])
        row["r_precision"] = sum(hits[:positives]) / positives
        row["map@r"] = sum(sum(hits[: r + 1]) / (r + 1) for r in range(positives) if hits[r]) / positives
        row["mrr@1000"] = 1.0 / (hits.index(True) + 1)
        rows.append(row)
    return {name: np.mean([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize("method", ["exact", "scann"])
def test_golden(golden, method):
    values = golden("retrieval_metrics")
    found = evaluation.retrieval_metrics(
        values["embeddings"], values["labels"], ks=(1, 2, 4, 8, 10, 100), method=method, mrr_depth=27
    )
    names = {"mean_average_precision_at_r": "map@r", "precision_at_1": "precision@1", "r_precision": "r_precision"}
    names.update({f"recall_at_{k}": f"recall@{k}" for k in (1, 2, 4, 8, 10, 100)})
    # The library that made the golden values cuts the ranking at the largest number of positives, 27.
    names["mean_reciprocal_rank"] = "mrr@27"
    assert set(names) == set(values.files) - {"embeddings", "labels"}
    for golden_name, name in names.items():
        assert found[name] == pytest.approx(float(values[golden_name]), abs=1e-6), name


@pytest.mark.parametrize("method", ["exact", "scann"])
@pytest.mark.parametrize("own", [True, False])
def test_naive_rederivation(method, own, monkeypatch):
    monkeypatch.setattr(neighbors_module, "BLOCK_BYTES", 4 * 60 * 7)  # several blocks
    monkeypatch.setattr("s2sd_tf.evaluation.metrics._RANKS_BYTES", 8 * 60 * 11)
    generator = np.random.default_rng(0)
    gallery, gallery_labels = generator.normal(size=(60, 5)), generator.integers(0, 9, 60)
    gallery_labels[0] = 77  # a class of one
    queries, query_labels = (
        (gallery, gallery_labels) if own else (generator.normal(size=(23, 5)), generator.integers(0, 12, 23))
    )
    ks = (1, 3, 1000)
    expected = naive_metrics(queries, query_labels, gallery, gallery_labels, ks, own)
    rest = () if own else (gallery, gallery_labels)
    found = evaluation.retrieval_metrics(queries, query_labels, *rest, ks=ks, method=method, mrr_depth=1000)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-6), name
    assert found["queries"] == len(queries)
    assert found["queries_without_positive"] == sum(np.sum(gallery_labels == label) - own < 1 for label in query_labels)


@pytest.mark.parametrize("method", ["exact", "scann"])
def test_self_matches_go_by_identity_among_duplicates(method):
    rows = np.repeat(np.eye(4), 3, axis=0)
    ids = np.arange(12)
    found = evaluation.find_neighbors(rows, rows, 2, ids, ids, method=method)
    for i in range(12):
        assert set(found.indices[i]) == {j for j in range(12) if j // 3 == i // 3 and j != i}
    assert evaluation.retrieval_metrics(rows, ids // 3, method=method)["map@r"] == 1.0
    # The same image under two entries of the gallery: both go.
    both = evaluation.find_neighbors(rows[:1], rows, 12, [5], [5, 5, *range(10, 20)], method=method)
    assert set(both.indices[0]) == {*range(2, 12), -1}


@pytest.mark.parametrize("method", ["exact", "scann"])
def test_k_beyond_the_gallery_is_padded(method):
    found = evaluation.find_neighbors(np.eye(3), np.eye(3)[:2], 5, method=method)
    assert found.indices.shape == (3, 5)
    assert (found.indices[:, 2:] == -1).all()
    assert np.isneginf(found.similarities[:, 2:]).all()
    assert sorted(found.indices[0, :2]) == [0, 1]


def test_exact_and_scann_agree_beyond_the_brute_force_size(monkeypatch):
    monkeypatch.setattr(neighbors_module, "SCANN_BRUTE_FORCE_SIZE", 1000)
    centres = np.random.default_rng(0).normal(size=(50, 16))
    rows = (np.repeat(centres, 40, axis=0) + 0.3 * np.random.default_rng(1).normal(size=(2000, 16))).astype(np.float32)
    ids = np.arange(2000)
    exact, scann = (evaluation.find_neighbors(rows, rows, 10, ids, ids, method=m) for m in ("exact", "scann"))
    shared = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact.indices, scann.indices)])
    assert shared > 0.9
    assert not np.any(scann.indices == ids[:, None])


def test_empty_sets():
    assert evaluation.find_neighbors(np.zeros((0, 3)), np.eye(3), 2).indices.shape == (0, 2)
    assert (evaluation.find_neighbors(np.eye(3), np.zeros((0, 3)), 2).indices == -1).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"queries": np.zeros((0, 3)), "query_labels": []}, "at least one"),
        ({"query_labels": [0, 0]}, "query_labels: expected one for each of 3"),
        ({"query_labels": [0, 1, 2]}, "at least one query to have a positive"),
        ({"ks": ()}, "ks"),
        ({"ks": (0,)}, "ks"),
        ({"gallery": np.eye(3)}, "both or neither"),
        ({"method": "guess"}, "method"),
        ({"mrr_depth": 0}, "mrr_depth"),
        ({"queries": np.zeros((3, 3), int)}, "floating"),
        ({"queries": np.full((3, 3), np.nan)}, "finite"),
    ],
)
def test_errors_name_the_argument(arguments, words):
    with pytest.raises(ValueError, match=words):
        evaluation.retrieval_metrics(**{"queries": np.eye(3), "query_labels": [0, 0, 1], **arguments})


def test_callback_logs_every_n_epochs_and_the_last(small_model):
    from s2sd_tf import data

    train, test, preprocessing = data.load_digits()
    test = test.select_classes([0, 1])
    seen = []

    class After(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append({name for name in logs if name.startswith("unseen_")})

    model = small_model()
    model.compile(optimizer="adam")
    callback = evaluation.RetrievalEvaluation(
        data.evaluation_batches(test, preprocessing), test.labels, every=2, prefix="unseen_", ks=(1, 5)
    )
    batches = data.class_balanced_batches(train, preprocessing, 3, 4, steps_per_epoch=1)
    history = model.fit(batches, epochs=5, verbose=0, callbacks=[callback, After()]).history
    names = {"unseen_recall@1", "unseen_recall@5", "unseen_precision@1", "unseen_r_precision", "unseen_map@r"}
    assert seen == [set(), names, set(), names, names]
    assert len(history["unseen_map@r"]) == 3
    images = np.concatenate(list(data.evaluation_batches(test, preprocessing).as_numpy_iterator()))
    expected = evaluation.retrieval_metrics(model.predict(images, verbose=0), test.labels, ks=(1, 5))
    assert callback.latest["map@r"] == pytest.approx(expected["map@r"])
    with pytest.raises(ValueError, match="every"):
        evaluation.RetrievalEvaluation(images, test.labels, every=0)


def test_pictures(tmp_path):
    save_curves(tmp_path / "curves.png", {"a": {"one": ([1, 2], [3, 4])}, "b": {"two": ([1], [2], [0.5])}})
    images = dict(enumerate(np.random.default_rng(0).random((6, 5, 5, 1))))
    labels, found = np.array([0, 0, 1, 1, 2, 2]), np.array([[1, 2], [0, -1], [3, 0], [2, 1], [5, 0], [4, 0]])
    queries = choose_queries(labels, found, 4)
    assert len(set(queries)) == 4
    names = [["zero", "one", "a long name of a class"][label] for label in labels]
    rows = np.concatenate([queries[:, None], found[queries]], axis=1)
    save_gallery(tmp_path / "gallery.png", images, rows, names, "title")
    for name in ("curves.png", "gallery.png"):
        assert np.array(Image.open(tmp_path / name)).std() > 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.png", "gallery.png"]
