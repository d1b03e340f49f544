"""Thresholds on the similarity: of all pairs, of searches in an open set, and in an index."""

import numpy as np
import pytest
from conftest import METHODS
from scipy.optimize import brentq
from sklearn import metrics as sklearn_metrics
from sklearn.isotonic import IsotonicRegression

from s2sd_tf import evaluation
from s2sd_tf.evaluation import pairs as pairs_module
from s2sd_tf.evaluation.sharded_index import ShardedIndex
from s2sd_tf.files import read_json, write_json

FARS = (0.3, 1e-1, 1e-2, 1e-3, 1e-6)


def classes_of_points(classes, members, dim=16, noise=0.8, seed=0):
    """Rows around the centres of classes, and their labels, in random order."""
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.repeat(np.arange(classes), members))
    return generator.normal(size=(classes, dim))[labels] + noise * generator.normal(size=(len(labels), dim)), labels


def all_pairs(rows, labels, metric="cosine"):
    """`(similarities, same)` of all pairs, in float64."""
    rows = np.asarray(rows, np.float64)
    one, other = np.triu_indices(len(rows), 1)
    if metric == "euclidean":
        similarities = -np.linalg.norm(rows[one] - rows[other], axis=1)
    else:
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        similarities = (rows @ rows.T)[one, other]
    return similarities, labels[one] == labels[other]


def sklearn_values(similarities, same, fars):
    far, tar, _ = sklearn_metrics.roc_curve(same, similarities, drop_intermediate=False)
    precision, recall, _ = sklearn_metrics.precision_recall_curve(same, similarities)
    values = {f"tar@{limit:g}": tar[far <= limit].max() for limit in fars}
    values["eer"] = brentq(lambda rate: 1 - rate - np.interp(rate, far, tar), 0, 1, xtol=1e-15)
    values["auroc"] = sklearn_metrics.auc(far, tar)
    values["best_f1"] = np.max(2 * precision * recall / np.maximum(precision + recall, 1e-12))
    values["average_precision"] = -np.sum(np.diff(recall) * precision[:-1])
    return values


def accepted(result, similarities, same):
    """The numbers of accepted pairs of each kind at the thresholds of a result, counted one by one."""
    return [[int(np.sum(similarities[kind] >= t)) for t in result.thresholds] for kind in (same, ~same)]


@pytest.mark.parametrize(
    ("metric", "dtype", "classes"),
    [("cosine", np.float32, 200), ("cosine", np.float64, 30), ("euclidean", np.float32, 30), ("cosine", np.float16, 30),
     ("euclidean", np.float16, 30)],
)  # fmt: skip
def test_values_are_those_of_scikit_learn(metric, dtype, classes):
    rows, labels = classes_of_points(classes, 10)
    rows = rows.astype(dtype)
    found = evaluation.verification_metrics(rows, labels, metric=metric, fars=FARS)
    expected = sklearn_values(*all_pairs(rows, labels, metric), FARS)
    assert {name: value for name, value in found.values.items() if "threshold" not in name} == pytest.approx(
        expected, rel=0, abs=1e-9
    )
    assert found.resolution == 0
    assert len(found.tar) == len(found.far) == len(found.thresholds)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("kept", [pairs_module._SORTED, 0])
def test_every_threshold_accepts_what_a_loop_counts(metric, kept, monkeypatch):
    monkeypatch.setattr(pairs_module, "_SORTED", kept)
    monkeypatch.setattr(pairs_module, "_STEPS", 2**10)
    rows, labels = classes_of_points(9, 15, dim=3)
    # From parts and in little memory, so in blocks.
    shards = evaluation.EmbeddingShards([1000 * rows[:50], 1000 * rows[50:]])
    found = evaluation.verification_metrics(shards, labels, metric=metric, memory_mib=1)
    similarities, same = all_pairs(1000 * rows, labels, metric)
    slack = 1e-9 * np.abs(similarities).max()
    assert accepted(found, similarities + slack, same) == [found.true_accepts.tolist(), found.false_accepts.tolist()]
    assert (found.resolution > 0) == (kept == 0)
    steps = -np.diff(found.thresholds[1:])
    assert steps.min() >= found.resolution * (1 - 1e-6)
    # Each class counts its positives, and both classes of a negative count it.
    one, other = np.triu_indices(len(rows), 1)
    for label in range(9):
        of_class = (labels[one] == label) | (labels[other] == label)
        for kind, counts in ((same, found.class_true_accepts), (~same, found.class_false_accepts)):
            expected = [np.sum(similarities[of_class & kind] + slack >= t) for t in found.thresholds[found.counted]]
            assert counts[label].tolist() == expected


@pytest.mark.parametrize("kept", [pairs_module._SORTED, 0])
def test_a_gallery_and_excluded_pairs(kept, monkeypatch):
    monkeypatch.setattr(pairs_module, "_SORTED", kept)
    generator = np.random.default_rng(0)
    rows, labels = generator.integers(-2, 3, (170, 3)) + 0.5, generator.integers(0, 6, 170)
    ids = np.stack([labels, generator.integers(0, 3, 170)], axis=1)
    queries, gallery = slice(0, 60), slice(60, None)
    similarities, same = [], []
    for i in range(60):
        for j in range(60, 170):
            if tuple(ids[i]) != tuple(ids[j]):
                product = rows[i] @ rows[j] / np.sqrt((rows[i] @ rows[i]) * (rows[j] @ rows[j]))
                similarities.append(round(product, 9))
                same.append(labels[i] == labels[j])
    found = evaluation.verification_metrics(
        rows[queries], labels[queries], rows[gallery], labels[gallery], query_ids=ids[queries],
        gallery_ids=ids[gallery], memory_mib=1,
    )  # fmt: skip
    expected = sklearn_values(np.array(similarities), np.array(same), (1e-1, 1e-2))
    assert {name: found.values[name] for name in expected} == pytest.approx(expected, abs=1e-9)
    assert (found.true_accepts[-1], found.false_accepts[-1]) == (sum(same), len(same) - sum(same))
    # Few of the similarities of such rows differ.
    assert len(found.thresholds) == len(set(similarities)) + 1
    # Without a gallery, an identity is left out in the same camera too, and each pair counts once.
    alone = evaluation.verification_metrics(rows, labels, query_ids=ids)
    one, other = np.triu_indices(170, 1)
    kept_pairs = (ids[one] != ids[other]).any(axis=1)
    same = (labels[one] == labels[other])[kept_pairs]
    assert (alone.true_accepts[-1], alone.false_accepts[-1]) == (same.sum(), (~same).sum())


def test_all_similarities_equal_and_perfect_separation():
    labels = np.repeat([3, 8], 4)
    found = evaluation.verification_metrics(np.ones((8, 3)), labels)
    assert found.thresholds.tolist() == [np.inf, 1.0]
    assert found.values["auroc"] == found.values["eer"] == 0.5
    assert found.values["tar@0.1"] == 0.0
    assert found.values["threshold@0.1"] == np.inf
    assert found.values["average_precision"] == pytest.approx(12 / 28)
    with pytest.raises(ValueError, match="far: expected a rate that some threshold reaches"):
        found.threshold(far=0.1)
    found = evaluation.verification_metrics(np.eye(2)[labels // 5], labels)
    names = [name for name in found.values if "threshold" not in name]
    assert [found.values[name] for name in names] == [0.0 if name == "eer" else 1.0 for name in names]
    assert found.threshold() == found.threshold(far=1e-6) == found.values["threshold@eer"] == 1.0
    assert found.confidence_intervals(resamples=20)["auroc"] == (1.0, 1.0)


def test_hardly_any_distances(monkeypatch):
    monkeypatch.setattr(pairs_module, "_SORTED", 0)
    labels = np.repeat([3, 8], 4)
    found = evaluation.verification_metrics(np.full((8, 3), 1.1), labels, metric="euclidean")
    assert found.values["auroc"] == 0.5
    rows = 1.1 + 1e-9 * labels[:, None] * np.eye(2)[0]
    found = evaluation.verification_metrics(rows, labels, metric="euclidean")
    assert found.values["auroc"] == 1.0
    assert found.thresholds[-1] == pytest.approx(-5e-9, rel=1e-5)
    # A resample may have no positive.
    rows, labels = classes_of_points(12, 1)
    found = evaluation.verification_metrics([*rows, rows[0]], [*labels, labels[0]])
    for resamples in (1, 2, 3, 200):
        low, high = found.confidence_intervals(resamples=resamples)["eer"]
        assert low <= high or resamples < 200


def test_equal_rows_are_at_distance_0(monkeypatch):
    monkeypatch.setattr(pairs_module, "_SORTED", 0)
    rows = np.repeat(10.0 + np.random.default_rng(0).normal(size=(40, 5)), 2, axis=0)
    found = evaluation.verification_metrics(rows, np.repeat(np.arange(40), 2), metric="euclidean")
    assert (found.thresholds[1], found.true_accepts[1], found.false_accepts[1]) == (0.0, 40, 0)


def test_choosing_a_threshold():
    rows, labels = classes_of_points(30, 6)
    found = evaluation.verification_metrics(rows, labels, fars=(0.02,))
    similarities, same = all_pairs(rows, labels)
    similarities += 1e-9
    for far in (1.0, 0.02, 0.0007):
        threshold = found.threshold(far=far)
        lower = similarities[similarities < threshold]
        assert np.mean(similarities[~same] >= threshold) <= far
        assert not len(lower) or np.mean(similarities[~same] >= lower.max()) > far
    assert found.threshold(far=0.02) == found.values["threshold@0.02"]
    for precision in (0.5, 0.9):
        threshold = found.threshold(precision=precision)
        assert np.mean(same[similarities >= threshold]) >= precision
        order = np.argsort(-similarities)
        precisions = np.cumsum(same[order]) / np.arange(1, len(same) + 1)
        assert (precisions[similarities[order] < threshold] < precision).all()
    share = same[similarities >= found.threshold()]
    f1 = 2 * share.sum() / (len(share) + same.sum())
    assert f1 == pytest.approx(found.values["best_f1"])
    for arguments, words in (
        ({"far": 0.1, "precision": 0.5}, "at most one"), ({"far": 0.0}, "far: expected a number > 0"),
        ({"precision": 1.1}, "precision"), ({"far": "small"}, "far"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            found.threshold(**arguments)


def test_probability_is_isotonic_regression_on_all_pairs():
    rows, labels = classes_of_points(20, 6)
    found = evaluation.verification_metrics(rows, labels)
    similarities, same = all_pairs(rows, labels)
    asked = np.linspace(-1, 1, 40).reshape(8, 5)
    expected = IsotonicRegression(out_of_bounds="clip").fit(similarities, same).predict(asked.ravel())
    np.testing.assert_allclose(found.probability(asked).ravel(), expected, atol=1e-6)
    weights = np.where(same, 1 / same.sum(), 1 / (~same).sum())
    expected = IsotonicRegression(out_of_bounds="clip").fit(similarities, same, weights).predict(asked.ravel())
    balanced = found.probability(asked.astype(np.float32), prior=0.5)
    assert balanced.shape == asked.shape
    np.testing.assert_allclose(balanced.ravel(), expected, atol=1e-5)
    assert (balanced >= found.probability(asked) - 1e-6).all()
    with pytest.raises(ValueError, match="prior"):
        found.probability(asked, prior=1.0)
    missing = found.probability(np.array([[-np.inf, 1.0], [-5.0, 0.0]]))
    assert missing[0, 0] == 0.0
    assert found.probability(np.empty((0, 3))).shape == (0, 3)


def test_intervals_are_as_wide_as_those_of_classes_drawn_pair_by_pair():
    rows, labels = classes_of_points(25, 5)
    found = evaluation.verification_metrics(rows, labels, fars=(0.1, 0.01))
    similarities, same = all_pairs(rows, labels)
    one, other = (labels[side] for side in np.triu_indices(len(labels), 1))
    generator = np.random.default_rng(1)
    drawn = {"eer": [], "auroc": [], "average_precision": [], "tar@0.1": [], "best_f1": []}
    for _ in range(150):
        weights = np.bincount(generator.integers(0, 25, 25), minlength=25).astype(float)
        weight = np.where(same, weights[one], weights[one] * weights[other])
        far, tar, _ = sklearn_metrics.roc_curve(same, similarities, sample_weight=weight)
        precision, recall, _ = sklearn_metrics.precision_recall_curve(same, similarities, sample_weight=weight)
        drawn["eer"].append(far[np.argmin(np.abs(far + tar - 1))])
        drawn["tar@0.1"].append(np.interp(0.1, far, tar))
        drawn["auroc"].append(np.trapezoid(tar, far) if hasattr(np, "trapezoid") else np.trapz(tar, far))
        drawn["average_precision"].append(-np.sum(np.diff(recall) * precision[:-1]))
        drawn["best_f1"].append(np.max(2 * precision * recall / np.maximum(precision + recall, 1e-12)))
    intervals = found.confidence_intervals()
    for name, values in drawn.items():
        low, high = intervals[name]
        assert low < found.values[name] < high
        expected = np.diff(np.quantile(values, [0.025, 0.975]))[0]
        assert high - low == pytest.approx(expected, rel=0.35), name
    assert set(intervals) == {*drawn, "tar@0.01"}
    assert found.confidence_intervals(seed=1) == found.confidence_intervals(seed=1) != intervals
    for arguments, words in (({"level": 1.0}, "level"), ({"resamples": 0}, "resamples"), ({"seed": -1}, "seed")):
        with pytest.raises(ValueError, match=words):
            found.confidence_intervals(**arguments)


def naive_open_set(queries, query_labels, gallery, gallery_labels, far):
    nearest = []
    for row, label in zip(queries, query_labels):
        cosines = [row @ other / np.linalg.norm(row) / np.linalg.norm(other) for other in gallery]
        best = int(np.argmax(cosines))
        nearest.append((np.float32(cosines[best]), label in gallery_labels, gallery_labels[best] == label))
    known = [item for item in nearest if item[1]]
    unknown = [item for item in nearest if not item[1]]
    rate, threshold = 0.0, np.inf
    for candidate in sorted(similarity for similarity, _, _ in nearest):
        if sum(similarity >= candidate for similarity, _, _ in unknown) / len(unknown) <= far:
            rate = sum(similarity >= candidate and right for similarity, _, right in known) / len(known)
            threshold = candidate
            break
    wins = [(a[0] > b[0]) + 0.5 * (a[0] == b[0]) for a in known for b in unknown]
    return rate, threshold, np.mean(wins), len(known), len(unknown)


@pytest.mark.parametrize("ties", [False, True])
def test_open_set_equals_a_loop(ties):
    rows, labels = classes_of_points(20, 8, dim=5)
    if ties:
        rows = np.round(rows) + 0.25
    gallery = (labels < 14) & (np.arange(160) % 3 > 0)
    sets = (rows[~gallery], labels[~gallery], rows[gallery], labels[gallery])
    found = evaluation.open_set_metrics(*sets, fars=(0.5, 0.1, 0.001))
    for far in (0.5, 0.1, 0.001):
        rate, threshold, auroc, known, unknown = naive_open_set(*sets, far)
        assert found[f"dir@{far:g}"] == pytest.approx(rate)
        assert found[f"threshold@{far:g}"] == pytest.approx(threshold)
    assert found["auroc"] == pytest.approx(auroc)
    assert (found["known"], found["unknown"]) == (known, unknown)


def test_open_set_without_a_gallery_and_without_anything_to_find():
    rows, labels = classes_of_points(10, 4)
    labels[labels > 7] = np.arange(100, 100 + np.sum(labels > 7))  # classes of one image
    found = evaluation.open_set_metrics(rows, labels, fars=(0.2,), metric="euclidean")
    assert (found["known"], found["unknown"]) == (32, 8)
    assert found["threshold@0.2"] < 0
    # A query all of whose gallery is excluded finds nothing, and raises no alarm.
    found = evaluation.open_set_metrics(
        np.eye(2), [0, 1], np.eye(2), [0, 0], fars=(0.1,), query_ids=[5, 6], gallery_ids=[6, 6]
    )
    assert (found["auroc"], found["dir@0.1"], found["threshold@0.1"]) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("function", "labels", "arguments", "words"),
    [
        ("verification", [0, 0, 0], {}, "query_labels: expected pairs of one class and pairs of different classes"),
        ("verification", [0, 1, 2], {}, "Received: 0 and 3"),
        ("verification", [0, 0, 1], {"fars": (0.0,)}, "fars: expected a number > 0"),
        ("verification", [0, 0, 1], {"fars": 0.1}, "fars: expected a sequence"),
        ("verification", [0, 0, 1], {"metric": "dot"}, "metric: expected one of"),
        ("verification", [0, 0, 1], {"memory_mib": 0}, "memory_mib"),
        ("verification", [0, 0], {}, "query_labels: expected one for each of 3 rows"),
        ("verification", [0, 0, 1], {"gallery": np.eye(3)}, "gallery and gallery_labels: expected both or neither"),
        ("verification", [0, 0, 1], {"gallery_ids": [0, 1, 2]}, "gallery_ids: expected None"),
        ("open_set", [0, 0, 0], {}, "Received: 3 with and 0 without"),
        ("open_set", [0, 1, 2], {}, "Received: 0 with and 3 without"),
        ("open_set", [0, 0, 1], {"fars": "0.1"}, "fars"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(function, labels, arguments, words):
    with pytest.raises(ValueError, match=words):
        getattr(evaluation, f"{function}_metrics")(np.eye(3), labels, **arguments)


@pytest.mark.parametrize("method", METHODS)
def test_an_index_answers_no_match_below_its_threshold(method, tmp_path):
    rows, labels = classes_of_points(12, 5)
    rows = rows.astype(np.float32)
    index = evaluation.build_index(rows, labels=labels, method=method)
    every = index.search(rows, 10)
    # A similarity that is just reached.
    index.min_score = float(every.similarities[0, 4])
    index.save(tmp_path / "index")
    loaded = evaluation.load_index(tmp_path / "index")
    assert loaded.min_score == index.min_score
    for found in (loaded.search(rows, 10), ShardedIndex([loaded]).search(rows, 10)):
        reached = every.similarities >= index.min_score
        np.testing.assert_array_equal(found.indices, np.where(reached, every.indices, -1))
        np.testing.assert_array_equal(found.similarities, np.where(reached, every.similarities, -np.inf))
    np.testing.assert_array_equal(loaded.search(rows, 10, min_score=-2).indices, every.indices)
    for never in (float("nan"), 1.1):
        with pytest.raises(ValueError, match="min_score"):
            loaded.search(rows, 10, min_score=never)
    distances = evaluation.build_index(rows, method=method, metric="euclidean")
    with pytest.raises(ValueError, match=r"min_score: expected at most 0, .*a negative distance.* Received: 0.6"):
        distances.search(rows, 10, min_score=0.6)
    assert (distances.search(rows, 10, min_score=-0.1).indices[:, 0] >= 0).all()
    other = evaluation.build_index(rows, labels=labels, method=method)
    with pytest.raises(ValueError, match="min_score"):
        ShardedIndex([loaded, other])
    other.min_score = float("inf")
    with pytest.raises(ValueError, match="min_score"):
        other.save(tmp_path / "other")
    about = read_json(tmp_path / "index" / "index.json")
    write_json(tmp_path / "index" / "index.json", {**about, "min_score": "high"})
    with pytest.raises(ValueError, match=r"index\.json.*min_score"):
        evaluation.load_index(tmp_path / "index")
    # Indexes of earlier versions have no threshold.
    del about["min_score"]
    write_json(tmp_path / "index" / "index.json", about)
    assert evaluation.load_index(tmp_path / "index").min_score is None
