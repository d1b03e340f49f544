"""Whitening, query expansion and re-ranking, against plain versions in loops."""

import numpy as np
import pytest
import tensorflow as tf

from s2sd_tf import evaluation
from s2sd_tf.cli import postprocessed
from s2sd_tf.files import read_json


def clustered(size, dim, classes=6, seed=0):
    random = np.random.default_rng(seed)
    labels = np.arange(size) % classes
    rows = random.normal(size=(classes, dim))[labels] + 0.8 * random.normal(size=(size, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), labels


class TestWhitening:
    def test_training_rows_become_white(self):
        rows, _ = clustered(300, 7)
        rows *= np.linspace(0.1, 1.0, 7, dtype=np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        for dim in (None, 4):
            whitening = evaluation.Whitening.fit(5.0 * rows, dim)
            white = (rows - whitening.mean) @ whitening.matrix
            np.testing.assert_allclose(white.mean(axis=0), 0.0, atol=1e-5)
            np.testing.assert_allclose(np.cov(white.T), np.eye(dim or 7), atol=1e-4)
            unit = white / np.linalg.norm(white, axis=1, keepdims=True)
            np.testing.assert_allclose(whitening(tf.constant(rows)), unit, atol=1e-5)

    def test_errors_name_the_argument(self):
        rows, _ = clustered(30, 5)
        flat = rows.copy()
        flat[:, 3:] = 0.0
        for arguments, message in (
            ((rows, 6), "dim: expected at most 5"),
            ((rows[:4], 4), "dim: expected at most 3"),
            ((flat, 4), "dim: expected at most 3, as the embeddings vary in no more"),
            ((np.ones((9, 2)),), "dim: expected at most 0"),
            ((rows[:1],), "embeddings: expected at least 2 rows"),
            ((rows, 0), "dim"),
        ):
            with pytest.raises(ValueError, match=message):
                evaluation.Whitening.fit(*arguments)
        assert evaluation.Whitening.fit(flat).matrix.shape == (5, 3)
        with pytest.raises(ValueError, match="embeddings: expected dimension 5"):
            evaluation.Whitening.fit(rows)(rows[:, :4])


def plain_expand(queries, gallery, k, alpha, same):
    expanded = []
    for i, query in enumerate(queries):
        scores = [float(query @ item) for item in gallery]
        order = sorted(range(len(gallery)), key=lambda j: (-scores[j], j))
        order = [j for j in order if not (same and i == j)][:k]
        total = query + sum(max(scores[j], 0.0) ** alpha * gallery[j] for j in order if scores[j] > 0)
        expanded.append(total / np.linalg.norm(total))
    return np.array(expanded)


@pytest.mark.parametrize(("k", "alpha"), [(3, 3.0), (1, 0.0), (100, 1.0)])
def test_expansion_equals_loops(k, alpha):
    rows, _ = clustered(40, 5)
    queries, gallery = rows[:15], rows[15:]
    np.testing.assert_allclose(
        evaluation.expand(2.0 * queries, gallery, k, alpha), plain_expand(queries, gallery, k, alpha, False), atol=1e-5
    )
    ids = np.arange(len(gallery))
    augmented = evaluation.expand(gallery, tf.constant(gallery), k, alpha, ids, ids)
    np.testing.assert_allclose(augmented, plain_expand(gallery, gallery, k, alpha, True), atol=1e-5)


def plain_reranked(queries, gallery, k1, k2, weight):
    """Distances `(queries, gallery)`; queries None: those of the gallery among themselves."""
    rows = gallery if queries is None else np.concatenate([gallery, queries])
    size = len(rows)
    original = 1.0 - rows.astype(np.float64) @ rows.T.astype(np.float64)
    order = [[i] + [j for j in np.argsort(original[i], kind="stable") if j != i] for i in range(size)]

    def reciprocal(i, k):
        return {j for j in order[i][: k + 1] if i in order[j][: k + 1]}

    vectors = np.zeros((size, size))
    for i in range(size):
        members = reciprocal(i, k1)
        for j in reciprocal(i, k1):
            half = reciprocal(j, round(k1 / 2))
            if 3 * len(reciprocal(i, k1) & half) >= 2 * len(half):
                members |= half
        for j in members:
            vectors[i, j] = np.exp(-original[i, j])
        vectors[i] /= vectors[i].sum()
    vectors = np.array([np.mean([vectors[j] for j in order[i][:k2]], axis=0) for i in range(size)])
    start = 0 if queries is None else len(gallery)
    distances = np.empty((size - start, len(gallery)))
    for q in range(start, size):
        for g in range(len(gallery)):
            low = np.minimum(vectors[q], vectors[g]).sum()
            high = np.maximum(vectors[q], vectors[g]).sum()
            distances[q - start, g] = weight * original[q, g] + (1.0 - weight) * (1.0 - low / high)
    return distances


@pytest.mark.parametrize(("k1", "k2", "weight"), [(6, 3, 0.3), (5, 1, 0.0), (200, 2, 0.5)])
@pytest.mark.parametrize("alone", [False, True])
def test_reranking_equals_loops(k1, k2, weight, alone):
    rows, _ = clustered(44, 4)
    queries, gallery = (rows, rows) if alone else (rows[:12], rows[12:])
    distances = plain_reranked(None if alone else queries, gallery, k1, k2, weight)
    settings = {"k1": k1, "k2": k2, "weight": weight}
    for k in (5, len(gallery) + 3):
        found = evaluation.reranked_neighbors(queries, gallery, k, **settings)
        count = min(k, len(gallery))
        expected = np.sort(distances, axis=1)[:, :count]
        np.testing.assert_allclose(1.0 - found.similarities[:, :count], expected, atol=1e-6)
        there = np.take_along_axis(distances, found.indices[:, :count], axis=1)
        np.testing.assert_allclose(there, expected, atol=1e-6)
        assert (found.indices[:, count:] == -1).all()
    if alone:
        ids = np.arange(len(rows))
        found = evaluation.reranked_neighbors(rows, rows, 4, ids, ids, **settings)
        np.fill_diagonal(distances, np.inf)
        np.testing.assert_allclose(1.0 - found.similarities, np.sort(distances, axis=1)[:, :4], atol=1e-6)


def test_reranking_of_weight_1_is_the_original_ranking():
    rows, _ = clustered(50, 8)
    found = evaluation.reranked_neighbors(rows[:20], rows[20:], 7, weight=1.0)
    expected = evaluation.find_neighbors(rows[:20], rows[20:], 7)
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_allclose(found.similarities, expected.similarities, atol=1e-6)


def test_reranking_of_equal_rows_and_single_items():
    rows = np.repeat(np.eye(2, dtype=np.float32), 30, axis=0)
    found = evaluation.reranked_neighbors(rows, rows, 3, k1=5)
    assert (found.indices // 30 == (np.arange(60) // 30)[:, None]).all()
    found = evaluation.reranked_neighbors(rows[:1], rows[:1], 1)
    assert found.indices.tolist() == [[0]]
    none = evaluation.reranked_neighbors(rows[:0], rows[:0], 3)
    assert none.indices.shape == (0, 3)


def test_expansion_by_an_empty_gallery_changes_nothing():
    rows, _ = clustered(5, 4)
    np.testing.assert_allclose(evaluation.expand(rows, rows[:0]), rows, atol=1e-6)


def test_metrics_of_neighbors_that_were_found_otherwise():
    rows, labels = clustered(60, 6)
    queries, gallery = rows[:20], rows[20:]
    found = evaluation.find_neighbors(queries, gallery, 40)
    settings = {"ks": (1, 3), "map_ks": (5,)}
    expected = evaluation.retrieval_metrics(queries, labels[:20], gallery, labels[20:], **settings)
    assert evaluation.retrieval_metrics(
        queries, labels[:20], gallery, labels[20:], **settings, neighbors=found
    ) == pytest.approx(expected)
    for wrong in (found, tuple(found), found._replace(indices=found.indices[:19] + 40)):
        with pytest.raises(ValueError, match=r"neighbors: expected Neighbors with integer indices \(19, k\) below 40"):
            evaluation.retrieval_metrics(queries[:19], labels[:19], gallery, labels[20:], neighbors=wrong)
    # A query does not count as its own positive.
    found = evaluation.find_neighbors(rows, rows, 60)
    alone = evaluation.retrieval_metrics(rows, labels, neighbors=found)
    assert alone == pytest.approx(evaluation.retrieval_metrics(rows, labels))


class TestProgram:
    @pytest.fixture
    def files(self, tmp_path):
        rows, labels = clustered(90, 6)
        for name, part in (("queries", slice(0, 30)), ("gallery", slice(30, 60)), ("train", slice(60, 90))):
            np.savez(tmp_path / f"{name}.npz", embeddings=rows[part], labels=labels[part])
        return tmp_path

    def test_metrics_after_each_step(self, files, call):
        output = call(
            "evaluate", f"--embeddings={files / 'queries.npz'}", f"--gallery_embeddings={files / 'gallery.npz'}",
            f"--training_embeddings={files / 'train.npz'}", "--postprocess=whiten,augment+expand,rerank",
            "--methods=exact", "--noclustering", "--noverification", f"--output={files / 'out.json'}",
        ).stdout  # fmt: skip
        found = read_json(files / "out.json")
        rows, labels = clustered(90, 6)
        whitening = evaluation.Whitening.fit(rows[60:])
        expected = evaluation.retrieval_metrics(
            whitening(rows[:30]), labels[:30], whitening(rows[30:60]), labels[30:60]
        )
        assert found["exact, whiten"]["map@r"] == pytest.approx(expected["map@r"])
        ids = np.arange(30)
        gallery = evaluation.expand(rows[30:60], rows[30:60], query_ids=ids, gallery_ids=ids)
        expected = evaluation.retrieval_metrics(
            evaluation.expand(rows[:30], gallery), labels[:30], gallery, labels[30:60]
        )
        assert found["exact, augment+expand"]["map@r"] == pytest.approx(expected["map@r"])
        neighbors = evaluation.reranked_neighbors(rows[:30], rows[30:60], 30)
        expected = evaluation.retrieval_metrics(rows[:30], labels[:30], rows[30:60], labels[30:60], neighbors=neighbors)
        assert found["exact, rerank"]["map@r"] == pytest.approx(expected["map@r"])
        assert all(
            f"\n{name} " in output for name in ("exact", "exact, whiten", "exact, augment+expand", "exact, rerank")
        )

    @pytest.mark.parametrize(
        ("flag", "message"),
        [
            ("wite", "expected one of"),
            ("expand+augment", "in the order"),
            ("whiten", "--training_embeddings too"),
            ("augment", "expected a gallery"),
        ],
    )
    def test_errors_come_first(self, flag, message):
        with pytest.raises(ValueError, match=f"--postprocess.*{message}"):
            postprocessed.check([flag], False, False)
