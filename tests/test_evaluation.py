"""Neighbours, metrics, the callback and pictures."""

import numpy as np
import pytest
from conftest import METHODS, needs_scann
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_fuzz import clear_errors, examples

from s2sd_tf import evaluation
from s2sd_tf.evaluation import embeddings as embeddings_module
from s2sd_tf.evaluation import exact
from s2sd_tf.evaluation import metrics as metrics_module
from s2sd_tf.evaluation.clustering import cluster_agreement
from s2sd_tf.keras_compat import keras
from s2sd_tf.reporting import EmbeddedImages, choose_queries, save_curves, save_gallery, save_report, thumbnail


def similarities_of(queries, gallery, metric):
    """All similarities in float64, as `find_neighbors` defines them."""
    queries, gallery = np.asarray(queries, np.float64), np.asarray(gallery, np.float64)
    if metric == "euclidean":
        return -np.linalg.norm(queries[:, None] - gallery[None], axis=2)
    queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    return queries @ (gallery / np.linalg.norm(gallery, axis=1, keepdims=True)).T


def naive_metrics(queries, query_labels, gallery, gallery_labels, same, ks, precision_ks, map_ks, metric="cosine"):
    """Every metric of every query by loops over a full sort; if `same(i, j)`, item j is left out for query i."""
    rows = []
    for i, similarity in enumerate(similarities_of(queries, gallery, metric)):
        order = [j for j in np.argsort(-similarity, kind="stable") if not same(i, j)]
        hits = [gallery_labels[j] == query_labels[i] for j in order]
        positives = sum(hits)
        if not positives:
            rows.append(None)
            continue
        row = {f"recall@{k}": float(any(hits[:k])) for k in ks}
        row.update({f"precision@{k}": sum(hits[:k]) / min(k, len(hits)) for k in precision_ks})
        row["r_precision"] = sum(hits[:positives]) / positives
        row["map@r"] = sum(sum(hits[: r + 1]) / (r + 1) for r in range(positives) if hits[r]) / positives
        for k in map_ks:
            found = sum(sum(hits[: r + 1]) / (r + 1) for r in range(min(k, len(hits))) if hits[r])
            row[f"map@{k}"] = found / min(k, positives)
        row["mrr"] = 1.0 / (hits.index(True) + 1)
        rows.append(row)
    return rows


@pytest.mark.parametrize("method", METHODS)
def test_golden(golden, method):
    values = golden("retrieval_metrics")
    found = evaluation.retrieval_metrics(
        values["embeddings"], values["labels"], ks=(1, 2, 4, 8, 10, 100), method=method, mrr_depth=27
    )
    names = {"mean_average_precision_at_r": "map@r", "precision_at_1": "precision@1", "r_precision": "r_precision"}
    names.update({f"recall_at_{k}": f"recall@{k}" for k in (1, 2, 4, 8, 10, 100)})
    # The library behind the golden values cuts the ranking at the largest number of positives, 27.
    names["mean_reciprocal_rank"] = "mrr@27"
    assert set(names) == set(values.files) - {"embeddings", "labels"}
    for golden_name, name in names.items():
        assert found[name] == pytest.approx(float(values[golden_name]), abs=1e-6), name


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["own", "gallery", "camera"])
def test_naive_rederivation(kind, method, metric):
    generator = np.random.default_rng(0)
    gallery, gallery_labels = generator.normal(size=(60, 5)) + 3.0, generator.integers(0, 9, 60)
    gallery_labels[0] = 77  # a class of one
    ids = np.stack([gallery_labels, generator.integers(0, 3, 60)], axis=1)
    queries, labels, arguments = gallery, gallery_labels, {}
    same = np.eye(60, dtype=bool)
    if kind == "gallery":
        queries, labels = generator.normal(size=(23, 5)) + 3.0, generator.integers(0, 12, 23)
        arguments, same = {"gallery": gallery, "gallery_labels": gallery_labels}, np.zeros((23, 60), bool)
    if kind == "camera":
        # As in person re-identification, the same identity in the same camera is left out.
        arguments, same = {"query_ids": ids}, (ids[:, None] == ids[None]).all(axis=2)
    at = {"ks": (1, 3, 1000), "precision_ks": (1, 4, 1000), "map_ks": (2, 5, 1000)}
    rows = naive_metrics(queries, labels, gallery, gallery_labels, lambda i, j: same[i, j], **at, metric=metric)
    # Little enough memory that the search works in blocks.
    depth = {} if method == "exact" else {"mrr_depth": 1000}
    found = evaluation.evaluate_retrieval(
        queries, labels, **arguments, **at, **depth, method=method, metric=metric, memory_mib=1
    )
    unanswerable = np.array([row is None for row in rows])
    assert (found.answerable == ~unanswerable).all()
    means = found.means()
    for name in next(row for row in rows if row):
        ours = found.values["mrr@1000" if name == "mrr" and depth else name]
        np.testing.assert_allclose(ours[~unanswerable], [row[name] for row in rows if row], atol=1e-6, err_msg=name)
        assert np.isnan(ours[unanswerable]).all()
        assert means["mrr@1000" if name == "mrr" and depth else name] == pytest.approx(np.nanmean(ours))
    assert means["queries"] == len(queries)
    assert means["queries_without_positive"] == unanswerable.sum()
    classes, counts, per_class = found.per_class()
    for position, label in enumerate(classes):
        of_class = [row for row, other in zip(rows, labels) if row and other == label]
        assert counts[position] == len(of_class)
        assert per_class["map@r"][position] == pytest.approx(np.mean([row["map@r"] for row in of_class]))


def test_confidence_intervals(unit_rows):
    labels = np.repeat(np.arange(20), 6)
    centres = np.repeat(unit_rows(20, 8), 6, axis=0)
    result = evaluation.evaluate_retrieval(centres + 0.25 * np.random.default_rng(0).normal(size=(120, 8)), labels)
    mean = result.means()["map@r"]
    by_class, by_query = (result.confidence_intervals(unit=unit)["map@r"] for unit in ("class", "query"))
    for low, high in (by_class, by_query):
        assert low < mean < high
    # Compare with the normal approximation.
    deviation = np.std(result.values["map@r"], ddof=1) / np.sqrt(120)
    assert by_query[1] - by_query[0] == pytest.approx(2 * 1.96 * deviation, rel=0.15)
    # Queries of the same class fail together.
    assert by_class[1] - by_class[0] > by_query[1] - by_query[0]
    assert result.confidence_intervals(seed=1) == result.confidence_intervals(seed=1) != result.confidence_intervals()
    for arguments, words in (({"level": 1.0}, "level"), ({"resamples": 0}, "resamples"), ({"unit": "item"}, "unit")):
        with pytest.raises(ValueError, match=words):
            result.confidence_intervals(**arguments)


def test_one_class_and_perfect_retrieval():
    rows = np.random.default_rng(0).normal(size=(7, 3))
    found = evaluation.retrieval_metrics(rows, np.zeros(7, int), ks=(1, 9), precision_ks=(1, 9), map_ks=(3, 9))
    assert {value for name, value in found.items() if isinstance(value, float)} == {1.0}


def test_a_positive_that_scann_misses_counts_as_wrong():
    ranks = [np.array([], int), np.array([2, 5])]
    values = metrics_module.metrics_of_ranks(ranks, np.array([3, 2]), np.array([9, 9]), (1, 2), (2,), (5,), None)
    assert {name: value[0] for name, value in values.items()} == dict.fromkeys(values, 0)
    assert values["map@5"][1] == pytest.approx((1 / 2 + 2 / 5) / 2)


@pytest.mark.parametrize("method", METHODS)
def test_self_matches_are_excluded_by_identity(method):
    rows = np.repeat(np.eye(4), 3, axis=0)
    ids = np.arange(12)
    found = evaluation.find_neighbors(rows, rows, 2, ids, ids, method=method)
    for i in range(12):
        assert set(found.indices[i]) == {j for j in range(12) if j // 3 == i // 3 and j != i}
    assert evaluation.retrieval_metrics(rows, ids // 3, method=method)["map@r"] == 1.0
    # If the gallery has the same image twice, both are left out.
    both = evaluation.find_neighbors(rows[:1], rows, 12, [5], [5, 5, *range(10, 20)], method=method)
    assert set(both.indices[0]) == {*range(2, 12), -1}


@pytest.mark.parametrize("method", METHODS)
def test_k_beyond_the_gallery_is_padded(method):
    found = evaluation.find_neighbors(np.eye(3), np.eye(3)[:2], 5, method=method)
    assert found.indices.shape == (3, 5)
    assert (found.indices[:, 2:] == -1).all()
    assert np.isneginf(found.similarities[:, 2:]).all()
    assert sorted(found.indices[0, :2]) == [0, 1]


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 200, 7), (150, 97, 1), (700, 1500, 20), (130, 2000, 300)])
def test_exact_search_equals_a_full_sort(shape, dtype, metric, monkeypatch):
    monkeypatch.setattr(exact, "_WIDTH", 512)
    queries, size, k = shape
    generator = np.random.default_rng(0)
    gallery = generator.normal(size=(size, 6)).astype(dtype)
    gallery[size // 2 :] = gallery[: size - size // 2]  # duplicates
    rows = generator.normal(size=(queries, 6)).astype(dtype)
    for one, same in ((rows, False), (gallery, True)):
        ids = (np.arange(len(one)), np.arange(size)) if same else (None, None)
        found = evaluation.find_neighbors(one, gallery, k, *ids, metric=metric)
        expected = similarities_of(one, gallery, metric)
        if same:
            np.fill_diagonal(expected, -np.inf)
        best = -np.sort(-expected, axis=1)[:, :k]
        found_there = found.similarities[:, : best.shape[1]]
        np.testing.assert_allclose(found_there, best, atol=5e-6 if metric == "cosine" else 1e-5)
        there = found.indices >= 0
        assert (there == np.isfinite(found.similarities)).all()
        of_found = np.take_along_axis(expected, np.maximum(found.indices, 0), axis=1)
        np.testing.assert_allclose(of_found[there], found.similarities[there], atol=1e-5)
        assert all(len(set(row[row >= 0])) == np.sum(row >= 0) for row in found.indices)


def test_searching_a_gallery_in_itself_equals_searching_a_copy(monkeypatch):
    monkeypatch.setattr(exact, "_WIDTH", 512)
    rows = np.random.default_rng(0).normal(size=(1900, 16)).astype(np.float32)
    ids = np.random.default_rng(1).integers(0, 40, 1900)
    for arguments in ((), (ids, ids)):
        once = evaluation.find_neighbors(rows, rows, 9, *arguments)
        twice = evaluation.find_neighbors(rows.copy(), rows, 9, *arguments)
        np.testing.assert_array_equal(once.indices, twice.indices)
        np.testing.assert_allclose(once.similarities, twice.similarities, atol=1e-6)


@pytest.mark.parametrize("order", [1, -1])
def test_a_gallery_whose_last_items_are_the_nearest(order, monkeypatch):
    monkeypatch.setattr(exact, "_WIDTH", 1024)
    gallery = np.random.default_rng(0).normal(size=(6000, 8)).astype(np.float32)
    gallery = gallery[np.argsort(gallery[:, 0] / np.linalg.norm(gallery, axis=1))[::order]]
    queries = (np.eye(8)[:1] + 1e-3 * np.random.default_rng(1).normal(size=(300, 8))).astype(np.float32)
    found = evaluation.find_neighbors(queries, gallery, 3)
    np.testing.assert_array_equal(
        found.indices, np.argsort(-similarities_of(queries, gallery, "cosine"), axis=1)[:, :3]
    )


def test_ranks_if_all_similarities_are_equal():
    labels = np.arange(3000) % 2
    result = evaluation.evaluate_retrieval(np.ones((3000, 4)), labels, ks=(1, 2))
    # Lower positions come first: 0 finds 1, 2, ..., and 1 finds 0, 2, 3.
    assert result.first_ranks[:4].tolist() == [2, 3, 1, 2]


def test_few_valid_queries_among_many():
    rows, labels = np.random.default_rng(0).normal(size=(5000, 4)), np.arange(5000)
    labels[[3, 4990]] = -1
    exact_ranks = evaluation.evaluate_retrieval(rows, labels).first_ranks[[3, 4990]]
    similarity = similarities_of(rows[[3, 4990]], rows, "cosine")
    similarity[[0, 1], [3, 4990]] = -np.inf
    assert exact_ranks.tolist() == [1 + np.sum(similarity[i] > similarity[i, j]) for i, j in ((0, 4990), (1, 3))]


def test_equal_similarities_are_ordered_by_position(monkeypatch):
    monkeypatch.setattr(exact, "_WIDTH", 256)
    gallery = np.tile(np.eye(4, dtype=np.float32), (500, 1))
    found = evaluation.find_neighbors(gallery, gallery, 7, np.arange(2000), np.arange(2000)).indices
    for i in (0, 1, 777, 1999):
        assert found[i].tolist() == [j for j in range(i % 4, 2000, 4) if j != i][:7]


def grid_similarities(rows, metric):
    """Similarities of integer rows by sums that are exact, rounded to float32."""
    if metric == "euclidean":
        return (-np.sqrt(((rows[:, None] - rows[None]) ** 2).sum(axis=2))).astype(np.float32)
    norms = np.maximum((rows**2).sum(axis=1), 1.0)
    return (rows @ rows.T / np.sqrt(norms[:, None] * norms)).astype(np.float32)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_search_and_metrics_order_ties_by_position(metric, monkeypatch):
    monkeypatch.setattr(exact, "_WIDTH", 64)
    generator = np.random.default_rng(0)
    for size, dim, factor in ((9, 1, 1.0), (40, 2, 2.0**67), (90, 2, 2.0**-100), (300, 3, 1.0), (300, 2, 1.0)):
        rows, labels = generator.integers(-3, 4, (size, dim)).astype(np.float64), generator.integers(0, 4, size)
        similarities = grid_similarities(rows, metric)
        np.fill_diagonal(similarities, -np.inf)
        order = np.argsort(-similarities, axis=1, kind="stable")[:, :-1]
        hits = labels[order] == labels[:, None]
        rows, ids = (rows * factor).astype(np.float32), np.arange(size)
        k = min(10, size - 1)
        found = evaluation.find_neighbors(rows, rows, k, ids, ids, metric=metric)
        np.testing.assert_array_equal(found.indices, order[:, :k])
        if factor == 1.0:
            np.testing.assert_array_equal(found.similarities, -np.sort(-similarities, axis=1)[:, :k])
        indexed = evaluation.build_index(rows, method="exact", metric=metric).search(rows, k).indices
        similarities = grid_similarities(rows.astype(np.float64) / factor, metric)
        np.testing.assert_array_equal(indexed, np.argsort(-similarities, axis=1, kind="stable")[:, :k])
        result = evaluation.evaluate_retrieval(rows, labels, metric=metric, memory_mib=1)
        first = np.where(hits.any(axis=1), hits.argmax(axis=1) + 1, 0)
        np.testing.assert_array_equal(result.first_ranks, first)
        precisions = np.cumsum(hits, axis=1) / np.arange(1, size)
        within = np.arange(size - 1) < hits.sum(axis=1, keepdims=True)
        expected = np.sum(precisions * hits * within, axis=1) / np.maximum(hits.sum(axis=1), 1)
        np.testing.assert_allclose(result.values["map@r"][hits.any(axis=1)], expected[hits.any(axis=1)])


def test_the_lower_position_comes_first_at_equal_distances():
    query, gallery = np.zeros((1, 2)), np.array([[-1.0, 1.0], [0.0, 1.0], [0.0, -1.0]])
    assert evaluation.find_neighbors(query, gallery, 1, metric="euclidean").indices.tolist() == [[1]]
    ranks = [
        evaluation.evaluate_retrieval(query, [0], gallery, (np.arange(3) != item) + 0, metric="euclidean").first_ranks[
            0
        ]
        for item in range(3)
    ]
    assert ranks == [3, 1, 2]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_rows_of_any_length(metric, method):
    generator = np.random.default_rng(0)
    labels = np.arange(40) // 8
    rows = np.round(generator.normal(size=(5, 4))[labels] * 64 + generator.normal(size=(40, 4)) * 32) / 16
    rows[7] = 0
    ids = np.arange(40)
    arguments = {"metric": metric, "method": method}
    expected = evaluation.evaluate_retrieval(rows, labels, **arguments).means()
    neighbors = evaluation.find_neighbors(rows, rows, 5, ids, ids, **arguments)
    geometry = evaluation.embedding_geometry(rows, labels, metric)
    clusters = evaluation.clustering_metrics(rows, labels, metric=metric)
    for factor, dtype in ((2.0**67, np.float32), (2.0**123, np.float32), (2.0**-100, np.float32),
                          (2.0**-900, np.float64), (2.0**-10, np.float16), (2.0**7, np.float16)):  # fmt: skip
        made = (rows * factor).astype(dtype)
        assert evaluation.evaluate_retrieval(made, labels, **arguments).means() == pytest.approx(expected)
        found = evaluation.find_neighbors(made, made, 5, ids, ids, **arguments)
        np.testing.assert_array_equal(found.indices, neighbors.indices)
        times = factor if metric == "euclidean" else 1.0
        np.testing.assert_allclose(found.similarities, np.float32(neighbors.similarities * times), rtol=1e-5, atol=1e-7)
        if method == "scann":
            continue
        scales = np.array([times, times, 1.0, 1.0])
        np.testing.assert_allclose(
            list(evaluation.embedding_geometry(made, labels, metric).values()), scales * list(geometry.values())
        )
        assert evaluation.clustering_metrics(made, labels, metric=metric) == pytest.approx(clusters)
        index = evaluation.build_index(made, **arguments)
        np.testing.assert_array_equal(index.search(made[:5], 1).indices[:, 0], ids[:5])
    if method == "scann" and metric == "euclidean":
        for factor in (2.0**67, 2.0**-100):
            with pytest.raises(ValueError, match=r"^embeddings: expected a largest absolute value"):
                evaluation.build_index(rows * factor, **arguments)
        with pytest.raises(ValueError, match=r"^queries: expected a largest absolute value"):
            evaluation.build_index(rows, **arguments).search(rows * 2.0**67, 1)
    # Subnormal rows lose digits. What remains of them is used.
    tiny = (rows * 2.0**-147).astype(np.float32)
    again = evaluation.evaluate_retrieval(tiny.astype(np.float64) * 2.0**147, labels, **arguments).means()
    assert evaluation.evaluate_retrieval(tiny, labels, **arguments).means() == pytest.approx(again)
    with pytest.raises(ValueError, match=r"^queries: expected finite float32 values"):
        evaluation.evaluate_retrieval(rows * 1e200, labels, **arguments)
    with pytest.raises(ValueError, match=r"^embeddings: expected finite float32 values"):
        evaluation.build_index(rows * 1e200, **arguments)
    ends = np.array([[3e38], [-3e38]], np.float32)
    apart = evaluation.find_neighbors(ends, ends, 2, **arguments)
    assert apart.indices.tolist() == [[0, 1], [1, 0]]
    assert np.isfinite(apart.similarities).all()


def test_searching_on_a_device_equals_searching_on_the_cpu(monkeypatch):
    rows = np.random.default_rng(0).normal(size=(300, 12)).astype(np.float32)
    ids = np.arange(300) // 2
    expected = evaluation.find_neighbors(rows, rows, 5, ids, ids)
    calls = []
    monkeypatch.setattr(exact, "_WIDTH", 128)
    update = exact._Best.update_on_device
    monkeypatch.setattr(exact._Best, "update_on_device", lambda *a: calls.append(1) or update(*a))
    monkeypatch.setattr(exact.tf.config, "get_visible_devices", lambda kind: [kind])
    found = evaluation.find_neighbors(rows, rows, 5, ids, ids)
    assert calls
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_allclose(found.similarities, expected.similarities, atol=1e-6)


def test_distances_are_exact_far_from_the_origin():
    generator = np.random.default_rng(0)
    rows = 1000.0 + 1e-2 * generator.normal(size=(200, 4))
    found = evaluation.find_neighbors(rows, rows, 3, np.arange(200), np.arange(200), metric="euclidean")
    expected = similarities_of(rows, rows, "euclidean")
    np.fill_diagonal(expected, -np.inf)
    np.testing.assert_array_equal(found.indices, np.argsort(-expected, axis=1)[:, :3])
    np.testing.assert_allclose(found.similarities, -np.sort(-expected, axis=1)[:, :3], rtol=1e-6)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_galleries_on_disk_are_read_in_parts(tmp_path, metric, monkeypatch):
    monkeypatch.setattr(exact, "_WIDTH", 256)
    rows = np.random.default_rng(0).normal(size=(1000, 8)).astype(np.float32)
    np.save(tmp_path / "all.npy", rows)
    for number, part in enumerate(np.split(rows, [10, 700])):
        np.save(tmp_path / f"{number}.npy", part)
    shards = evaluation.EmbeddingShards([np.load(tmp_path / f"{i}.npy", mmap_mode="r") for i in range(3)])
    labels = np.arange(1000) // 5
    expected = evaluation.find_neighbors(rows[:90], rows, 4, metric=metric)
    metrics = evaluation.retrieval_metrics(rows, labels, metric=metric)
    largest = []
    original = evaluation.EmbeddingShards.__getitem__
    monkeypatch.setattr(
        evaluation.EmbeddingShards,
        "__getitem__",
        lambda self, part: largest.append(part) or original(self, part),
    )
    for gallery in (np.load(tmp_path / "all.npy", mmap_mode="r"), shards):
        found = evaluation.find_neighbors(rows[:90], gallery, 4, metric=metric, memory_mib=1)
        np.testing.assert_array_equal(found.indices, expected.indices)
        assert evaluation.retrieval_metrics(gallery, labels, metric=metric) == pytest.approx(metrics)
    found = evaluation.find_neighbors(shards, shards, 2, metric=metric)
    assert (found.indices[:, 0] == np.arange(1000)).all()
    assert len(largest) > 8
    np.testing.assert_array_equal(shards.take_rows(np.array([0, 9, 10, 999, 5])), rows[[0, 9, 10, 999, 5]])
    np.testing.assert_array_equal(shards[5:705], rows[5:705])
    np.testing.assert_array_equal(shards[[-1, 3]], rows[[-1, 3]])
    np.testing.assert_array_equal(shards[labels < 3], rows[labels < 3])
    np.testing.assert_array_equal(shards[11], rows[11])
    np.testing.assert_array_equal(np.asarray(shards), rows)
    with pytest.raises(IndexError):
        shards[[1000]]


@pytest.mark.parametrize("method", METHODS)
def test_rows_are_checked_once(method, monkeypatch):
    read = []
    original = evaluation.EmbeddingShards.__getitem__
    monkeypatch.setattr(
        evaluation.EmbeddingShards,
        "__getitem__",
        lambda self, part: read.append((self, len(original(self, part)))) or original(self, part),
    )
    generator = np.random.default_rng(0)
    queries, gallery = (evaluation.EmbeddingShards([generator.normal(size=(size, 4))]) for size in (20, 300))
    evaluation.find_neighbors(queries, gallery, 3, method=method)
    # Read once for checking and once for searching. Of the exact search, the nearest are read once more.
    again = (20, 20 * 3) if method == "exact" else (0, 0)
    counts = [sum(count for rows, count in read if rows is one) for one in (queries, gallery)]
    assert counts == [2 * 20 + again[0], 2 * 300 + again[1]]
    read.clear()
    evaluation.build_index(gallery, method=method).search(queries, 3)
    counts = [sum(count for rows, count in read if rows is one) for one in (queries, gallery)]
    assert counts == [2 * 20, 2 * 300 + again[1]]


def test_memory_stays_within_the_budget(tmp_path, run_python):
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).normal(size=(60_000, 64)).astype(np.float32))
    code = """
import numpy as np
from s2sd_tf import evaluation
rows = np.load("rows.npy", mmap_mode="r")
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
evaluation.find_neighbors(rows[:64], rows[:64], 3)
before = peak()
evaluation.find_neighbors(rows[:2000], rows, 10, memory_mib=64)
print(peak() - before)
"""
    # All 2,000 x 60,000 similarities would take 458 MiB. The mapped file, 15 MiB, counts too.
    assert float(run_python("-c", code, cwd=tmp_path).stdout.split()[-1]) < 64 + 15


def test_empty_sets():
    assert evaluation.find_neighbors(np.zeros((0, 3)), np.eye(3), 2).indices.shape == (0, 2)
    assert (evaluation.find_neighbors(np.eye(3), np.zeros((0, 3)), 2).indices == -1).all()
    for method in METHODS:
        nothing = evaluation.find_neighbors(np.eye(3), np.zeros((0, 3)), 2, method=method)
        assert np.isneginf(nothing.similarities).all()


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
        ({"metric": "manhattan"}, "metric"),
        ({"map_ks": (0,)}, "map_ks"),
        ({"precision_ks": (1.5,)}, "precision_ks"),
        ({"query_labels": [0.0, 0.5, 1.0]}, "query_labels: expected integers"),
        ({"query_ids": np.zeros((3, 2, 2))}, "ids"),
        ({"gallery_ids": [0, 1, 2]}, "gallery_ids"),
        ({"memory_mib": 0}, "memory_mib"),
        ({"queries": np.zeros((3, 3), int)}, "floating"),
        ({"queries": np.full((3, 3), np.nan)}, "finite"),
    ],
)
def test_errors_name_the_argument(arguments, words):
    with pytest.raises(ValueError, match=words):
        evaluation.retrieval_metrics(**{"queries": np.eye(3), "query_labels": [0, 0, 1], **arguments})


LABELS = np.repeat([0, 1, 2], 4)


@pytest.mark.parametrize(
    "labels",
    [
        LABELS + 2**40,
        (LABELS + (2**63 - 9)).astype(np.uint64),
        LABELS.astype(np.uint8),
        LABELS[:, None],
        LABELS.tolist(),
        LABELS.astype(np.uint64) + np.uint64(2**63),
        LABELS.astype(float),
        LABELS + 0.5,
        LABELS.astype(str),
        LABELS.astype(object),
        np.eye(3, dtype=int)[LABELS],
        LABELS[1:],
        [[0], [1, 2]],
        3,
        None,
    ],
)
def test_labels_are_right_or_refused(labels, tmp_path):
    rows = np.random.default_rng(0).normal(size=(12, 4))
    result = evaluation.evaluate_retrieval(rows, LABELS)
    neighbors = evaluation.find_neighbors(rows, rows, 2)
    right = isinstance(labels, list) or getattr(labels, "dtype", np.dtype(object)).kind in "iuf"
    right = right and len(labels) == 12 and np.size(labels) == 12 and np.max(labels) < 2**63
    right = right and np.all(np.asarray(labels) == np.floor(labels))
    doors = {
        "query_labels": lambda: evaluation.retrieval_metrics(rows, labels),
        "gallery_labels": lambda: evaluation.retrieval_metrics(rows, LABELS, rows, labels),
        "labels": lambda: evaluation.clustering_metrics(rows, labels),
        "labels:": lambda: evaluation.embedding_geometry(rows, labels),
        "queries.labels": lambda: save_report(tmp_path / "a.html", result, neighbors, EmbeddedImages(rows, labels)),
    }
    if not right:
        for name, door in doors.items():
            with pytest.raises(ValueError, match=name) as raised:
                door()
            assert "\n" not in str(raised.value)
        assert not (tmp_path / "a.html").exists()
        return
    assert doors["query_labels"]() == result.means()
    assert doors["labels"]() == evaluation.clustering_metrics(rows, LABELS)
    assert doors["labels:"]() == evaluation.embedding_geometry(rows, LABELS)
    if np.ndim(labels) == 2:
        doors["queries.labels"]()
    shifted = np.asarray(labels).reshape(-1).astype(np.int64)
    assert evaluation.retrieval_metrics(rows, shifted, rows, labels) == evaluation.retrieval_metrics(
        rows, LABELS, rows, LABELS
    )


def test_ids_are_right_or_refused():
    rows = np.eye(4)
    large = 2**62 + np.arange(4)
    clean = evaluation.find_neighbors(rows, rows, 3, np.arange(4), np.arange(4)).indices
    for one, other in ((large, large), (large.astype(np.uint64), large)):
        np.testing.assert_array_equal(evaluation.find_neighbors(rows, rows, 3, one, other).indices, clean)
    for wrong in (large.astype(np.uint64) * 2 + 5, large.astype(str), [[1], [1, 2]], np.arange(4) + 0.5):
        with pytest.raises(ValueError, match=r"^gallery_ids: expected integers"):
            evaluation.find_neighbors(rows, rows, 3, large, wrong)


@pytest.mark.parametrize("kind", ["labels", "ids"])
def test_labels_and_ids_of_an_index(kind):
    import tensorflow as tf

    def texts(values):
        return getattr(evaluation.build_index(np.eye(3), method="exact", **{kind: values}), kind)

    for values in (["1", "2", "3"], [1, 2, 3], [1.0, 2.0, 3.0], [b"1", b"2", b"3"], np.array([1, 2, 3], np.uint64),
                   np.array(["1", "2", "3"]), np.array([b"1", b"2", b"3"]), np.array([[1.0], [2.0], [3.0]]),
                   tf.constant(["1", "2", "3"]), (i for i in (1, 2, 3)), np.array([1, 2, 3], object)):  # fmt: skip
        assert texts(values) == ["1", "2", "3"]
    assert texts([2**70, -1, 0]) == [str(2**70), "-1", "0"]
    for wrong in ([0.5, 1.5, 2.5], np.eye(3), [None, "a", "b"], [float("nan")] * 3, "abc", 3, [{}, [], 1], ["a"]):
        with pytest.raises(ValueError, match=f"^{kind}: expected"):
            texts(wrong)


@pytest.mark.parametrize(
    "content",
    [
        b"cat\ndog\ncat\n",
        b"\xef\xbb\xbfcat\ndog\ncat",
        b"cat\r\ndog\r\ncat\r\n",
        b"cat  \ndog\t\ncat\n\n\n",
        b"\xef\xbb\xbfcat \r\ndog\r\ncat\r\n \r\n",
        np.array(["cat", "dog", "cat"]),
        np.array([b"cat", b"dog", b"cat"]),
        np.array([["cat"], ["dog"], ["cat"]]),
    ],
)
def test_label_files(content, tmp_path):
    path = tmp_path / ("labels.npy" if isinstance(content, np.ndarray) else "labels.txt")
    np.save(path, content) if isinstance(content, np.ndarray) else path.write_bytes(content)
    assert embeddings_module.read_labels("labels", path, 3) == ["cat", "dog", "cat"]
    with pytest.raises(ValueError, match=r"^labels: expected 4 labels"):
        embeddings_module.read_labels("labels", path, 4)


def test_label_files_of_numbers_and_others(tmp_path):
    path = tmp_path / "labels.npy"
    for values in (np.array([1, 2]), np.array([1.0, 2.0]), np.array([1, 2], np.uint8), np.array(["1", "2"])):
        np.save(path, values)
        assert embeddings_module.read_labels("labels", path, 2) == ["1", "2"]
        np.savez(tmp_path / "a.npz", embeddings=np.eye(2), labels=values)
        assert [str(label) for label in evaluation.read_embeddings(tmp_path / "a.npz").labels] == ["1", "2"]
    for values in (np.array([0.5, 1.0]), np.eye(2), np.array(["a", {}], object), np.array([np.nan, 1.0])):
        np.save(path, values, allow_pickle=True)
        with pytest.raises(ValueError, match=r"^labels: .*expected integers or texts"):
            embeddings_module.read_labels("labels", path, 2)
    np.savez(tmp_path / "a.npz", embeddings=np.eye(2), labels=np.array([b"cat", b"dog"]))
    assert evaluation.read_embeddings(tmp_path / "a.npz").labels == ["cat", "dog"]
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\nb\n")
    with pytest.raises(ValueError, match=r"^labels: .*utf-8"):
        embeddings_module.read_labels("labels", tmp_path / "latin.txt", 2)
    (tmp_path / "odd.txt").write_text("a\u2028b\nc\x0bd\n", encoding="utf-8")
    assert embeddings_module.read_labels("labels", tmp_path / "odd.txt", 2) == ["a\u2028b", "c\x0bd"]


@examples(25)
@given(
    st.lists(st.sampled_from(["a", "b", "é", "c d", "1"]), min_size=4, max_size=9),
    st.sampled_from(["npy", "npz", "txt", "bytes", "float"]),
    st.sampled_from([np.float16, np.float32, np.float64, int, object, "mixed"]),
    st.integers(-160, 300),
    st.sampled_from(["", "\ufeff"]),
    st.sampled_from(["\n", "\r\n", " \n", "\t\r\n"]),
    st.integers(-1, 2),
    st.sampled_from(["cosine", "euclidean"]),
)
def test_embeddings_and_label_files_give_the_clean_result_or_an_error(
    tmp_path_factory, labels, kind, dtype, power, mark, end, more, metric
):
    folder = tmp_path_factory.mktemp("fuzz")
    clean = np.random.default_rng(len(labels)).integers(-8, 9, (len(labels), 3)).astype(np.float64)
    codes = np.unique(labels, return_inverse=True)[1]
    names = ("embeddings", "labels", "queries", "query_labels", "gallery_labels")
    with clear_errors(*names) as raised, np.errstate(over="ignore"):
        rows = clean * 2.0**power
        if dtype == "mixed":
            rows = [*rows.tolist()[1:], [1.0]]
        elif dtype is object:
            rows = rows.astype(object)
        else:
            rows = rows.astype(dtype) if dtype is not int else clean.astype(int)
        path = folder / ("labels.txt" if kind == "txt" else "labels.npy")
        if kind == "txt":
            path.write_bytes((mark + "".join(label + end for label in labels) + end * max(more, 0)).encode())
        else:
            values = codes * 1.0 if kind == "float" else np.array(labels)
            np.save(path, np.char.encode(values, "utf-8") if kind == "bytes" else values)
        read = embeddings_module.read_labels("labels", path, len(labels) - min(more, 0))
        found = np.unique(read, return_inverse=True)[1]
        result = evaluation.evaluate_retrieval(rows, found, metric=metric)
    if raised:
        stored = np.abs(clean * 2.0**power).max() <= np.finfo(np.float32).max
        fine = dtype in (np.float32, np.float64) and stored and more >= 0
        assert not fine or max(np.bincount(codes)) == 1, raised
        return
    if kind == "float" or dtype is np.float16 or power < -140:
        return
    np.testing.assert_array_equal(found, codes)
    expected = evaluation.evaluate_retrieval(clean, codes, metric=metric).means()
    assert result.means() == pytest.approx(expected, nan_ok=True)


@needs_scann
def test_mrr_of_scann_does_not_depend_on_the_other_metrics():
    rows, labels = np.random.default_rng(0).normal(size=(600, 6)), np.arange(600) // 2
    exact_mrr = evaluation.retrieval_metrics(rows, labels, mrr_depth=100)["mrr@100"]
    for more in ({}, {"map_ks": (1000,)}, {"ks": (1, 500)}):
        found = evaluation.retrieval_metrics(rows, labels, method="scann", **more)
        assert found["mrr"] == pytest.approx(exact_mrr)
    assert evaluation.retrieval_metrics(rows, labels, method="scann", mrr_depth=300)["mrr@300"] == pytest.approx(
        evaluation.retrieval_metrics(rows, labels, mrr_depth=300)["mrr@300"]
    )


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
    names.add("unseen_mrr")
    assert seen == [set(), names, set(), names, names]
    assert len(history["unseen_map@r"]) == 3
    images = np.concatenate(list(data.evaluation_batches(test, preprocessing).as_numpy_iterator()))
    expected = evaluation.retrieval_metrics(model.predict(images, verbose=0), test.labels, ks=(1, 5))
    assert callback.latest["map@r"] == pytest.approx(expected["map@r"])
    with pytest.raises(ValueError, match="every"):
        evaluation.RetrievalEvaluation(images, test.labels, every=0)


def naive_geometry(rows, labels, metric):
    """Geometry by loops over pairs."""

    def distance(a, b):
        return 1.0 - a @ b / np.linalg.norm(a) / np.linalg.norm(b) if metric == "cosine" else np.linalg.norm(a - b)

    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True) if metric == "cosine" else rows
    pairs = [(i, j) for i in range(len(rows)) for j in range(i) if labels[i] == labels[j]]
    means = [unit[labels == label].mean(axis=0) for label in np.unique(labels)]
    intra = np.mean([distance(unit[i], unit[j]) for i, j in pairs])
    inter = np.mean([distance(means[i], means[j]) for i in range(len(means)) for j in range(i)])
    values = np.sqrt(np.linalg.eigvalsh(unit.T @ unit))
    values /= values.sum()
    rho = np.sum(np.log(1 / len(values) / values)) / len(values)
    return {"intra": intra, "inter": inter, "ratio": intra / inter, "rho": rho}


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_geometry(metric, monkeypatch):
    monkeypatch.setattr("s2sd_tf.evaluation.geometry._BLOCK", 16)
    generator = np.random.default_rng(0)
    rows, labels = generator.normal(size=(70, 5)) + 1.0, generator.integers(0, 12, 70)
    found = evaluation.embedding_geometry(rows, labels, metric)
    assert found == pytest.approx(naive_geometry(rows, labels, metric), abs=1e-9)
    order = generator.permutation(70)
    assert evaluation.embedding_geometry(rows[order], labels[order], metric) == pytest.approx(found, abs=1e-9)


def test_geometry_with_undefined_values():
    rows = np.random.default_rng(0).normal(size=(6, 3))
    singles = evaluation.embedding_geometry(rows, np.arange(6))
    assert np.isnan(singles["intra"])
    assert np.isfinite(singles["inter"])
    one = evaluation.embedding_geometry(rows, np.zeros(6, int))
    assert np.isnan(one["inter"])
    assert np.isnan(one["ratio"])
    assert evaluation.embedding_geometry(rows * [1, 1, 0], np.zeros(6, int))["rho"] == np.inf
    with pytest.raises(ValueError, match="labels"):
        evaluation.embedding_geometry(rows, [0])


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_published_geometry(metric):
    generator = np.random.default_rng(0)
    # Classes of one to twelve items.
    rows, labels = generator.normal(size=(78, 13)) + 1.0, np.repeat(np.arange(12), np.arange(1, 13))
    found = evaluation.embedding_geometry(rows, labels, metric, published=True)
    naive = naive_geometry(rows, labels, metric)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True) if metric == "cosine" else rows
    of_classes = []
    for label in range(1, 12):
        own = unit[labels == label]
        pairs = [(a, b) for i, a in enumerate(own) for b in own[:i]]
        of_classes.append(np.mean([1 - a @ b if metric == "cosine" else np.linalg.norm(a - b) for a, b in pairs]))
    intra = np.mean(of_classes)
    assert intra != pytest.approx(naive["intra"], rel=1e-4)
    values = np.sort(np.sqrt(np.linalg.eigvalsh(unit.T @ unit)))[:0:-1]

    def divergence(p, q):
        return sum(a / sum(p) * np.log(a / sum(p) / b) for a, b in zip(p, q))

    expected = {"intra": intra, "inter": naive["inter"], "ratio": intra / naive["inter"]}
    for name, left_out in (("rho", 0), ("rho@2", 1), ("rho@10", 9)):
        kept = values[left_out:] / np.sum(values[left_out:])
        expected[name] = divergence(np.full(len(kept), 1 / len(kept)), kept)
    expected["rho@-1"] = divergence(values, np.full(12, 1 / 12))
    assert found == pytest.approx(expected, abs=1e-9)
    few = evaluation.embedding_geometry(rows[:, :8], labels, metric, published=True)
    assert np.isnan(few["rho@10"])
    assert np.isfinite(few["rho@2"])
    one = evaluation.embedding_geometry(rows[:, :1], labels, "euclidean", published=True)
    assert np.isnan([one["rho"], one["rho@-1"]]).all()


def naive_agreement(labels, clusters):
    """NMI by sums over a table, F1 by loops over pairs."""
    size = len(labels)
    pairs = [(labels[i] == labels[j], clusters[i] == clusters[j]) for i in range(size) for j in range(i)]
    both = sum(a and b for a, b in pairs)
    precision, recall = both / sum(b for _, b in pairs), both / sum(a for a, _ in pairs)
    p = {(a, b): np.mean((labels == a) & (clusters == b)) for a in set(labels) for b in set(clusters)}
    entropy = {axis: -sum(np.mean(values == v) * np.log(np.mean(values == v)) for v in set(values))
               for axis, values in (("a", labels), ("b", clusters))}  # fmt: skip
    mutual = sum(v * np.log(v / np.mean(labels == a) / np.mean(clusters == b)) for (a, b), v in p.items() if v)
    return mutual / (entropy["a"] + entropy["b"]) * 2, 2 * precision * recall / (precision + recall)


def test_agreement_like_scikit_learn():
    from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score

    generator = np.random.default_rng(0)
    for case in range(60):
        size = generator.integers(1, 80)
        labels, clusters = (generator.integers(0, generator.integers(1, 30), size) for _ in range(2))
        if case % 3 == 0:
            clusters = np.where(generator.random(size) < 0.7, labels, clusters)
        found = cluster_agreement(labels, clusters)
        assert found["nmi"] == pytest.approx(normalized_mutual_info_score(labels, clusters), abs=1e-9)
        assert found["ami"] == pytest.approx(adjusted_mutual_info_score(labels, clusters), abs=1e-9)


def test_clustering():
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(5), 12)
    clusters = np.where(generator.random(60) < 0.3, generator.integers(0, 7, 60), labels)
    nmi, f1 = naive_agreement(labels, clusters)
    found = cluster_agreement(labels, clusters)
    assert found["nmi"] == pytest.approx(nmi, abs=1e-9)
    assert found["f1"] == pytest.approx(f1, abs=1e-9)
    chance = [cluster_agreement(labels, generator.integers(0, 5, 60))["ami"] for _ in range(50)]
    assert abs(np.mean(chance)) < 0.02
    assert cluster_agreement(np.arange(4), np.arange(4)) == pytest.approx({"nmi": 1.0, "ami": 1.0, "f1": 1.0})

    centres = generator.normal(size=(5, 8))
    rows = centres[labels] + 0.01 * generator.normal(size=(60, 8))
    for metric in ("cosine", "euclidean"):
        assert evaluation.clustering_metrics(rows, labels, metric=metric, restarts=20)["nmi"] == pytest.approx(1.0)
    # Cosine ignores lengths.
    scaled = rows * generator.uniform(0.1, 10, (60, 1))
    assert evaluation.clustering_metrics(scaled, labels, restarts=20)["ami"] == pytest.approx(1.0)
    blurred = rows + generator.normal(size=rows.shape)
    assert evaluation.clustering_metrics(blurred, labels, 7) == evaluation.clustering_metrics(blurred, labels, 7)
    with pytest.raises(ValueError, match="num_clusters"):
        evaluation.clustering_metrics(rows, labels, 61)
    with pytest.raises(ValueError, match="labels"):
        evaluation.clustering_metrics(rows, labels[1:])


def test_pictures(tmp_path):
    save_curves(tmp_path / "curves.png", {"a": {"one": ([1, 2], [3, 4])}, "b": {"two": ([1], [2], [0.5])}})
    shapes = ((5, 5, 1), (9, 3, 3), (1, 1, 3), (7, 7), (1, 4, 1), (6, 1, 3))
    images = {at: np.random.default_rng(at).random(shape) for at, shape in enumerate(shapes)}
    labels, found = np.array([0, 0, 1, 1, 2, 2]), np.array([[1, 2], [0, -1], [3, 0], [2, 1], [5, 0], [4, 0]])
    queries = choose_queries(labels, found, 4)
    assert len(set(queries)) == 4
    assert set(labels[queries]) == {0, 1, 2}
    assert set(labels[choose_queries(labels, found, 3, seed=1)]) == {0, 1, 2}
    names = [["zero", "one", "a long name of a class"][label] for label in labels]
    rows = np.concatenate([queries[:, None], found[queries]], axis=1)
    save_gallery(tmp_path / "gallery.png", images, rows, names, "title")
    for name in ("curves.png", "gallery.png"):
        assert np.array(Image.open(tmp_path / name)).std() > 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.png", "gallery.png"]
    sizes = {(300, 100, 3): (20, 60), (30, 50, 1): (50, 30), (1, 1, 3): (1, 1), (105, 105): (60, 60)}
    assert {shape: thumbnail(np.zeros(shape, np.uint8), 60).size for shape in sizes} == sizes
