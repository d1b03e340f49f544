"""Images with several labels: graded relevance in objectives, loss, model, data and evaluation."""

import math

import naive_objectives as naive
import numpy as np
import pytest
import tensorflow as tf
from conftest import small_config
from dataset_layouts import write_sop
from sklearn.metrics import average_precision_score, ndcg_score

import s2sd_tf
from s2sd_tf import data, evaluation, objectives
from s2sd_tf.keras_compat import keras
from s2sd_tf.training import resolve, train
from s2sd_tf.training.build import build_batches, build_model, build_sampler
from s2sd_tf.training.datasets import load_data

GRADED = {"multi_similarity": {}, "supcon": {}, "contrastive": {"miner": "all"}}
GRADES = (0.3, 1.0)
# A hierarchy whose classes are numbered from 0 in every super-class, and multi-hot labels, one row of them empty.
LEVELS = np.array([[0, 0], [0, 0], [0, 1], [0, 1], [1, 0], [1, 0], [1, 1], [2, 0], [2, 0]])
HOT = np.array([[1, 0, 0, 1], [1, 0, 0, 1], [1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0]])


def grades_between(labels, relevance):
    """The relevance of all pairs, by definition."""

    def one(first, second):
        if relevance == "jaccard":
            union = sum(a or b for a, b in zip(first, second))
            return sum(a and b for a, b in zip(first, second)) / union if union else 0.0
        shared = [list(first[: level + 1]) == list(second[: level + 1]) for level in range(len(relevance))]
        return max([grade for grade, same in zip(relevance, shared) if same], default=0.0)

    return np.array([[one(first, second) for second in labels] for first in labels])


def naive_loss(name, x, grades, o):
    """The loss of an objective from the relevance of every pair."""
    size = range(len(x))
    pairs = {i: [j for j in size if j != i] for i in size}
    positives = {i: [j for j in pairs[i] if grades[i, j] > 0] for i in size}
    negatives = {i: [j for j in pairs[i] if grades[i, j] < 1] for i in size}
    s = x @ x.T
    if name == "contrastive":

        def weighted(chosen, weight, loss):
            terms = [(weight(grades[i, j]), loss(np.linalg.norm(x[i] - x[j]))) for i in size for j in chosen[i]]
            total = sum(w for w, _ in terms)
            return sum(w * value for w, value in terms) / total if total else 0.0

        return weighted(positives, lambda r: r, lambda d: max(0, d - o.positive_margin)) + weighted(
            negatives, lambda r: 1 - r, lambda d: max(0, o.negative_margin - d)
        )
    losses = []
    for i in size:
        if not positives[i] or not negatives[i]:
            continue
        if name == "supcon":
            total = naive.log_sum_exp([s[i, j] / o.temperature for j in pairs[i]])
            weights = [grades[i, j] for j in positives[i]]
            terms = [w * (total - s[i, j] / o.temperature) for w, j in zip(weights, positives[i])]
            losses.append(sum(terms) / sum(weights))
            continue
        easiest, hardest = min(s[i, j] for j in positives[i]), max(s[i, j] for j in negatives[i])
        kept = [j for j in positives[i] if s[i, j] - o.epsilon < hardest]
        others = [j for j in negatives[i] if s[i, j] + o.epsilon > easiest]
        if kept and others:
            pull = 1 + sum(grades[i, j] * math.exp(-o.alpha * (s[i, j] - o.lambda_)) for j in kept)
            push = 1 + sum((1 - grades[i, j]) * math.exp(o.beta * (s[i, j] - o.lambda_)) for j in others)
            losses.append(math.log(pull) / o.alpha + math.log(push) / o.beta)
    return float(np.mean(losses)) if losses else 0.0


def value_and_gradient(objective, rows, labels, training=False):
    rows = tf.constant(rows)
    with tf.GradientTape() as tape:
        tape.watch(rows)
        loss = objective(rows, labels, training=training)
    return loss.numpy(), tape.gradient(loss, rows).numpy()


@pytest.mark.parametrize("name", GRADED)
@pytest.mark.parametrize(("relevance", "labels"), [(GRADES, LEVELS), ((0.2, 0.6, 1.0), None), ("jaccard", HOT)])
def test_losses_by_definition(name, relevance, labels, unit_rows):
    labels = np.array([[0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0]]) if labels is None else labels
    x = unit_rows(len(labels), 5)
    objective = objectives.get(name, relevance=relevance, dtype="float64", **GRADED[name])
    expected = naive_loss(name, x, grades_between(labels.tolist(), relevance), objective)
    assert expected > 0
    loss, gradient = value_and_gradient(objective, x, labels)
    assert loss == pytest.approx(expected, rel=1e-12)
    assert np.abs(gradient).max() > 1e-4
    for jit in (False, True):
        graph = tf.function(objective, jit_compile=jit)
        assert float(graph(tf.constant(x), tf.constant(labels, tf.int32))) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", GRADED)
def test_relevances_of_0_and_1_are_the_plain_objective(name, unit_rows):
    coarse, fine = LEVELS[:, 0], np.array([0, 0, 1, 1, 2, 2, 3, 4, 4])
    rows = unit_rows(9, 5).astype(np.float32)
    hot = np.eye(5, dtype=bool)[fine]
    for relevance, labels, plain in (((0, 1), LEVELS, fine), ((1, 1), LEVELS, coarse), ("jaccard", hot, fine)):
        objective = objectives.get(name, relevance=relevance, **GRADED[name])
        loss, gradient = value_and_gradient(objective, rows, labels)
        expected, expected_gradient = value_and_gradient(objectives.get(name, **GRADED[name]), rows, plain)
        assert loss == expected
        np.testing.assert_array_equal(gradient, expected_gradient)


@pytest.mark.parametrize("name", GRADED)
def test_the_memory_keeps_levels(name, unit_rows):
    rows = unit_rows(18, 5).astype(np.float32)
    memory = {"memory_size": 12, "memory_start": 0, **GRADED[name]}
    found = []
    for relevance, labels in (((0.0, 1.0), LEVELS), ((), LEVELS[:, 0] * 10 + LEVELS[:, 1])):
        objective = objectives.get(name, relevance=relevance, **memory)
        found.append([float(objective(part, labels, training=True)) for part in (rows[:9], rows[9:])])
    assert found[0] == found[1]
    # Against a memory of the batch itself, by definition.
    objective = objectives.get(name, relevance=GRADES, memory_size=9, memory_start=0, dtype="float64", **GRADED[name])
    first = float(objective(unit_rows(9, 5), LEVELS, training=True))
    second = float(objective(unit_rows(9, 5), LEVELS, training=True))
    assert np.isfinite(second)
    assert second > first


@pytest.mark.parametrize("name", GRADED)
@pytest.mark.parametrize(
    "labels",
    [LEVELS[:1], np.zeros((4, 2), int), np.arange(8).reshape(4, 2), np.zeros((3, 2), int)],
    ids=["one image", "one class", "nothing in common", "no labels at all"],
)
def test_degenerate_batches(name, labels, unit_rows):
    for relevance in (GRADES, "jaccard"):
        if relevance == "jaccard" and labels.max() > 1:
            continue
        objective = objectives.get(name, relevance=relevance, dtype="float64", **GRADED[name])
        loss, gradient = value_and_gradient(objective, unit_rows(len(labels), 5), labels)
        assert np.isfinite(loss)
        assert np.isfinite(gradient).all()
        if name != "contrastive":
            assert loss == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"relevance": (0.3, 0.9)}, r"relevance: expected .* the last one 1.*Received: \(0.3, 0.9\)"),
        ({"relevance": (0.5, 0.3, 1.0)}, "not decreasing"),
        ({"relevance": (-0.5, 1.0)}, "relevance: expected"),
        ({"relevance": (float("nan"), 1.0)}, "relevance: expected"),
        ({"relevance": (1.0,)}, "relevance: expected"),
        ({"relevance": 0.3}, r"relevance: expected .*Received: 0.3"),
        ({"relevance": "dice"}, "Received: 'dice'"),
        ({"relevance": GRADES, "miner": "semi_hard"}, "miner: expected 'all' .*supcon. Received: 'semi_hard'"),
        ({"relevance": "jaccard", "memory_size": 4}, "memory_size: expected 0 .*Received: 4"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        objectives.get("supcon", **settings)
    assert "\n" not in str(error.value)


def test_labels_that_are_refused(unit_rows):
    rows = unit_rows(9, 5).astype(np.float32)
    graded, hot = (objectives.get("supcon", relevance=relevance) for relevance in (GRADES, "jaccard"))
    for objective, labels, message in (
        (graded, LEVELS[:, 0], r"labels: expected integers \(batch, 2\).*Received: int64 of shape \(9,\)"),
        (graded, np.zeros((9, 3), int), r"expected integers \(batch, 2\).*Received: int64 of shape \(9, 3\)"),
        (graded, LEVELS[:8], "Received: 8 labels for 9 images"),
        (graded, LEVELS / 3, "whole numbers"),
        (hot, LEVELS[:, 0], r"expected integers \(batch, labels\)"),
        (
            objectives.get("supcon"),
            LEVELS,
            r"several labels need an objective with a relevance.*Received: int64 of shape \(9, 2\)",
        ),
        (objectives.get("triplet"), LEVELS, "several labels need an objective with a relevance"),
    ):
        for call in (objective, tf.function(objective)):
            with pytest.raises(ValueError, match=message):
                call(rows, labels if call is objective else tf.constant(labels))
            if labels.dtype.kind == "f":
                break
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"labels: expected integers in \[0, 2\)"):
        hot(rows, LEVELS)
    assert np.isnan(tf.function(hot, jit_compile=True)(rows, tf.constant(LEVELS)))
    with pytest.raises(ValueError, match=r"expected settings from .*relevance"):
        objectives.get("triplet", relevance=GRADES)


class TestLossAndModel:
    images = np.random.default_rng(1).normal(size=(9, 8, 8, 1)).astype(np.float32)

    def test_targets_and_prefixes_have_the_relevance_of_the_base(self, small_model):
        base = objectives.get("supcon", relevance=GRADES)
        for settings in ({"target_objective": "multi_similarity"}, {}, {"nested_dims": (2, 4)}):
            loss = small_model(objective=base, **settings).s2sd_loss
            made = (*loss.target_objectives, *loss.nested_objectives)
            assert {objective.relevance for objective in made} == {GRADES}
        with pytest.raises(ValueError, match=r"target_objective: .*\(0.3, 1.0\).*Received: 'triplet' with \(\)"):
            s2sd_tf.S2SDLoss(base, "triplet")
        with pytest.raises(ValueError, match=r"target_objective: .* base objective, \(\);.*Received: 'supcon'"):
            s2sd_tf.S2SDLoss("triplet", base)
        assert s2sd_tf.S2SDLoss(base, "triplet", target_dims=()).label_columns == 2

    @pytest.mark.parametrize(("relevance", "labels"), [(GRADES, LEVELS), ("jaccard", np.concatenate([HOT, HOT[:2]]))])
    def test_fit_save_load(self, small_model, tmp_path, relevance, labels):
        model = small_model(
            objective=objectives.get("supcon", relevance=relevance), target_objective="multi_similarity"
        )
        model.compile(optimizer="sgd")
        history = model.fit(self.images, labels, batch_size=9, epochs=2, verbose=0).history
        assert np.isfinite(history["loss"]).all()
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        assert loaded.s2sd_loss.objective.relevance == relevance
        terms = [float(each.compute_losses(self.images, labels)["loss"]) for each in (model, loaded)]
        assert terms[0] == pytest.approx(terms[1], rel=1e-6)
        parts = small_model(
            objective=objectives.get("supcon", relevance=relevance),
            target_objective="multi_similarity",
            micro_batch_size=4,
        )
        parts.set_weights(model.get_weights())
        assert float(parts.compute_losses(self.images, labels)["loss"]) == pytest.approx(terms[0], rel=1e-5)
        for call in (model.fit, model.evaluate):
            # Of unknown rank, if Keras has traced the step for other shapes before.
            errors = (ValueError, tf.errors.InvalidArgumentError)
            with pytest.raises(errors, match=r"labels: expected integers \(batch, (2|labels)\)"):
                call(self.images, labels[:, 0], verbose=0)

    def test_objectives_without_relevance_refuse_graded_labels_before_a_step(self, small_model):
        model = small_model(objective="triplet")
        model.compile(optimizer="sgd")
        with pytest.raises(ValueError, match=r"labels: expected .*several labels need an objective with a relevance"):
            model.fit(self.images, LEVELS, verbose=0)
        assert int(tf.convert_to_tensor(model.s2sd_loss.step)) == 0

    def test_as_keras_loss(self, unit_rows):
        rows = unit_rows(9, 5).astype(np.float32)
        loss = objectives.as_keras_loss("supcon", relevance=GRADES)
        assert float(loss(LEVELS, rows)) == float(objectives.get("supcon", relevance=GRADES)(rows, LEVELS))
        model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(4)])
        model.compile("sgd", loss=loss)
        assert np.isfinite(model.fit(self.images, LEVELS, batch_size=9, verbose=0).history["loss"]).all()


class TestData:
    def test_levels(self):
        images = data.ImageSet(np.zeros((4, 2, 2, 1), np.uint8), [2, 0, 1, 2], ("a", "b", "c"), ("y", "x", "y"))
        np.testing.assert_array_equal(images.levels(), [[1, 2], [1, 0], [0, 1], [1, 2]])
        with pytest.raises(ValueError, match="super_classes: expected one for each class"):
            data.ImageSet(np.zeros((1, 2, 2, 1), np.uint8), [0]).levels()

    def test_sop_has_two_levels(self, tmp_path):
        write_sop(tmp_path)
        levels = data.load_sop(str(tmp_path)).train.levels()
        assert len(np.unique(levels[:, 0])) < len(np.unique(levels[:, 1]))

    @pytest.mark.parametrize("cache", [True, False])
    def test_batches_with_levels(self, cache):
        pixels = np.arange(24, dtype=np.uint8)[:, None, None, None].repeat(2, axis=1).repeat(2, axis=2)
        images = data.ImageSet(pixels, np.arange(24) % 6, tuple("abcdef"), ("x", "y") * 3)
        settings = {"steps_per_epoch": 2, "seed": 3, "cache": cache}
        preprocessing = data.Preprocessing(2, 2, channels=1)
        plain = data.class_balanced_batches(images, preprocessing, 3, 2, **settings)
        graded = data.class_balanced_batches(images, preprocessing, 3, 2, labels=images.levels(), **settings)
        assert graded.element_spec[1].shape == (6, 2)
        for (found, levels), (expected, labels) in zip(graded, plain):
            np.testing.assert_array_equal(found, expected)
            np.testing.assert_array_equal(levels[:, 1], labels)
            np.testing.assert_array_equal(levels[:, 0], labels % 2)

    def test_labels_that_do_not_fit(self):
        train, _, preprocessing = data.load_digits()
        for labels in (train.labels[:5], np.full(len(train), 0.5), np.zeros((len(train), 2, 2), int)):
            with pytest.raises(ValueError, match=r"labels: expected integers \(batch"):
                data.class_balanced_batches(train, preprocessing, 3, 2, labels=labels)


class TestEvaluation:
    def by_definition(self, rows, labels, gallery, gallery_labels, grades):
        """nDCG, H-AP and the AP and recall@1 of each level, one query at a time."""
        alone = gallery is None
        gallery, gallery_labels = (rows, labels) if alone else (gallery, gallery_labels)
        found = {"ndcg": [], "ndcg@3": [], "h_ap": []}
        for query, (row, label) in enumerate(zip(rows, labels.tolist())):
            others = [j for j in range(len(gallery)) if not alone or j != query]
            scores = gallery[others] @ row
            pairs = [grades_between([label, gallery_labels[j].tolist()], grades)[0, 1] for j in others]
            relevance = np.array(pairs)
            for level in range(1, len(grades) + 1):
                shared = np.array([label[:level] == gallery_labels[j, :level].tolist() for j in others])
                if shared.any():
                    values = found.setdefault(f"level{level}_ap", [])
                    values.append(average_precision_score(shared, scores))
                    found.setdefault(f"level{level}_recall@1", []).append(shared[scores.argmax()])
            if not relevance.any():
                continue
            found["ndcg"].append(ndcg_score([relevance], [scores]))
            found["ndcg@3"].append(ndcg_score([relevance], [scores], k=3))
            ranked = relevance[np.argsort(-scores)]
            at_ranks = [
                sum(min(ranked[k], ranked[j]) for j in range(k + 1)) / (k + 1) for k in range(len(ranked)) if ranked[k]
            ]
            found["h_ap"].append(sum(at_ranks) / relevance.sum())
        return {name: np.mean(values) for name, values in found.items()}

    @pytest.mark.parametrize("grades", [(0.3, 1.0), (0.0, 1.0), (1 / 3, 1.0)])
    @pytest.mark.parametrize("alone", [True, False])
    def test_by_definition(self, unit_rows, grades, alone):
        generator = np.random.default_rng(3)
        # Some queries have no relevant item, and classes are numbered from 0 in each super-class.
        labels = np.stack([generator.integers(0, 5, 24), generator.integers(0, 3, 24)], axis=1)
        labels[0] = (9, 9)
        rows = unit_rows(24, 4)
        others = (None, None) if alone else (unit_rows(17, 4, seed=5), labels[generator.integers(1, 24, 17)])
        settings = {} if grades == (1 / 3, 1.0) else {"relevance": grades}
        found = evaluation.hierarchical_metrics(rows, labels, *others, ks=(1,), ndcg_ks=(3,), **settings)
        expected = self.by_definition(rows, labels, *others, grades)
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-9)
        assert found["queries"] == 24
        assert found["queries_without_relevant"] >= 1

    def test_three_levels_and_the_finest_as_evaluate_retrieval(self, unit_rows):
        labels = np.array([[0, 0, 0]] * 3 + [[0, 0, 1]] * 2 + [[0, 1, 0]] * 3 + [[1, 0, 0]] * 3 + [[2, 0, 0]])
        rows = unit_rows(12, 4)
        found = evaluation.hierarchical_metrics(rows, labels, ks=(1, 4), ndcg_ks=(3,))
        expected = self.by_definition(rows, labels, None, None, (1 / 7, 3 / 7, 1.0))
        assert {name: found[name] for name in expected} == pytest.approx(
            {**expected, **{name: found[name] for name in expected if "recall" in name}}, rel=1e-9
        )
        classes = np.unique(labels, axis=0, return_inverse=True)[1].reshape(-1)
        plain = evaluation.retrieval_metrics(rows, classes, ks=(1, 4), map_ks=(12,))
        for name, same in (("recall@4", "recall@4"), ("map@r", "map@r"), ("ap", "map@12")):
            assert found[f"level3_{name}"] == plain[same]

    def test_perfect_and_degenerate(self):
        rows = np.array([[1, 0], [1, 0.01], [0.6, 0.8], [0.6, 0.81], [-1, 0]])
        labels = np.array([[0, 0], [0, 0], [0, 1], [0, 1], [1, 0]])
        found = evaluation.hierarchical_metrics(rows, labels)
        assert found["ndcg"] == found["h_ap"] == found["level1_ap"] == found["level2_recall@1"] == 1.0
        # Nothing shares the finest level.
        found = evaluation.hierarchical_metrics(rows, np.stack([labels[:, 0], np.arange(5)], axis=1))
        assert found["ndcg"] == 1.0
        assert math.isnan(found["level2_ap"])
        for wrong, message in (
            ((labels[:, 0],), r"query_labels: expected integers \(batch, labels\)"),
            ((labels[:, :1],), "labels: expected .* at least two"),
            ((np.arange(10).reshape(5, 2),), "expected at least one query to have a relevant item"),
            ((labels, rows, np.zeros((5, 3), int)), "with the same levels"),
        ):
            with pytest.raises(ValueError, match=message):
                evaluation.hierarchical_metrics(rows, *wrong)
        for relevance in ((0.2, 0.5, 1.0), "jaccard"):
            with pytest.raises(ValueError, match="relevance: expected a number for each of 2 levels"):
                evaluation.hierarchical_metrics(rows, labels, relevance=relevance)


class TestMultiLabelEvaluation:
    @pytest.mark.parametrize("alone", [True, False])
    def test_by_definition(self, unit_rows, alone):
        generator = np.random.default_rng(4)
        rows, labels = unit_rows(20, 4), (generator.random((20, 5)) < 0.3).astype(int)
        labels[0] = 0  # no label, so nothing is relevant
        others = (None, None) if alone else (unit_rows(9, 4, seed=5), labels[2:11])
        expected = {"ndcg@3": [], "ndcg@50": []}
        for query in range(20):
            gallery, gallery_labels = (rows, labels) if alone else others
            kept = [j for j in range(len(gallery)) if not alone or j != query]
            every = [labels[query].tolist(), *gallery_labels[kept].tolist()]
            relevance, scores = grades_between(every, "jaccard")[0, 1:], gallery[kept] @ rows[query]
            if relevance.any():
                for k in (3, 50):
                    expected[f"ndcg@{k}"].append(ndcg_score([relevance], [scores], k=k))
        for memory in (1, 512):
            found = evaluation.multi_label_metrics(rows, labels, *others, ks=(3, 50), memory_mib=memory)
            assert {name: found[name] for name in expected} == pytest.approx(
                {name: np.mean(values) for name, values in expected.items()}, rel=1e-9
            )
            assert found["queries_without_relevant"] == 20 - len(expected["ndcg@3"]) >= 1

    def test_what_is_refused(self, unit_rows):
        rows, labels = unit_rows(4, 3), np.eye(4, dtype=bool)
        for arguments, settings, message in (
            ((labels,), {}, "expected at least one query to share a label"),
            ((labels * 2,), {}, r"query_labels: expected 0 or 1, \(n, 4\). Received: 0 to 2"),
            ((labels, rows, np.ones((4, 3), int)), {}, r"gallery_labels: expected 0 or 1, \(n, 4\)"),
            ((labels[0],), {}, r"query_labels: expected integers \(batch, labels\)"),
            ((labels,), {"ks": ()}, "ks: expected at least one"),
            ((labels, rows[:0], labels[:0]), {}, "gallery: expected at least one item"),
        ):
            with pytest.raises(ValueError, match=message):
                evaluation.multi_label_metrics(rows, *arguments, **settings)


class TestTrainingProgram:
    def settings(self, root, **changes):
        return small_config(**{
            "data.name": "sop", "data.root": str(root), "objective.name": "supcon", "train.epochs": 1,
            "train.steps_per_epoch": 2, "s2sd.target_dims": (8,), **changes,
        })  # fmt: skip

    def test_super_classes_reach_the_loss(self, tmp_path):
        write_sop(tmp_path, classes=8, images_per_class=3)
        changes = {"objective.supcon.relevance": GRADES, "data.image_size": 8, "model.filters": (4,), "model.pools": 1}
        config = resolve(self.settings(tmp_path, **changes))
        parts = load_data(config)
        model, sampler = build_model(config, parts), build_sampler(config, parts.train)
        loss = model.s2sd_loss
        assert loss.objective.relevance == loss.target_objectives[0].relevance == GRADES
        images, labels = next(iter(build_batches(config, parts, sampler)(0)))
        super_classes = [parts.train.super_classes[label] for label in labels[:, 1]]
        assert [sorted(set(parts.train.super_classes))[level] for level in labels[:, 0]] == super_classes
        assert np.isfinite(model.compute_losses(images, labels)["loss"])

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"objective.supcon.relevance": (0.2, 0.5, 1.0)}, "config.objective.supcon.relevance: expected .* two"),
            (
                {"objective.supcon.relevance": GRADES, "data.name": "digits", "data.root": ""},
                r"config.objective.supcon.relevance: expected \(\) .*'digits'. Received: \(0.3, 1.0\)",
            ),
            (
                {"objective.supcon.relevance": GRADES, "s2sd.target_objective": "triplet"},
                r"target_objective: expected .*\(0.3, 1.0\).*Received: 'triplet'",
            ),
            ({"objective.triplet.relevance": GRADES}, "relevance"),
        ],
    )
    def test_what_is_refused_before_training(self, tmp_path, changes, message):
        write_sop(tmp_path / "sop", classes=8, images_per_class=3)
        with pytest.raises((ValueError, KeyError), match=message):
            train(self.settings(tmp_path / "sop", **changes), tmp_path / "run")
        assert not (tmp_path / "run" / "config.json").exists()
