"""One harness for every objective: golden values, re-derivations, degenerate batches, precision, graphs, saving."""

import re

import naive_objectives
import numpy as np
import pytest
import tensorflow as tf
from conftest import REPOSITORY, objective_names

import s2sd_tf
from s2sd_tf import mining, objectives
from s2sd_tf.keras_compat import keras
from s2sd_tf.objectives.quadruplet import fourth_images

CLASSES = 4
# Settings of the test cases besides classes and miner.
MORE_SETTINGS = {"margin": {"nu": 0.01}, "soft_triple": {"proxies_per_class": 3}}


def case(name):
    """The settings of an objective in the tests, where all pairs or triplets count."""
    settings = {"num_classes": CLASSES} if objectives.lookup(name).uses_classes else {}
    if "miner" in objectives.settings(name):
        settings["miner"] = "all"
    return {**settings, **MORE_SETTINGS.get(name, {})}


CASES = {name: case(name) for name in objective_names()}
VARIANTS = [
    *((name, {}) for name in CASES),
    ("angular", {"miner": "n_pair"}),
    ("contrastive", {"miner": "distance_weighted"}),
    ("margin", {"miner": "distance_weighted"}),
    ("n_pair", {"miner": "n_pair", "normalize": False}),
    ("proxy_nca", {"own_class_in_sum": True}),
    ("quadruplet", {"miner": "distance_weighted"}),
    ("snr", {"miner": "distance_weighted"}),
    ("triplet", {"miner": "distance_weighted"}),
    ("triplet", {"miner": "semi_hard"}),
]
# Settings under which the loss of well separated classes is 0.
INACTIVE = {
    "contrastive": {},
    "fast_ap": {},
    "histogram": {},
    "margin": {"nu": 0.0, "beta": 0.5},
    "multi_similarity": {},
    "quadruplet": {},
    "snr": {"regularization": 0.0},
    "triplet": {},
}
BATCHES = {
    "several positives": np.repeat(np.arange(4), 3),
    "one positive each": np.repeat(np.arange(4), 2),
    "uneven": np.array([0, 1, 1, 2, 2, 2, 2]),
    "no positives": np.arange(4),
    "no negatives": np.full(5, 2),
    "one image": np.array([1]),
}
PAIR_OBJECTIVES = [name for name in CASES if objectives.lookup(name).kind == "pair"]


def make(which, dim=6, dtype="float64", **settings):
    if objectives.lookup(which).uses_classes:  # its weights are initialised randomly
        keras.utils.set_random_seed(3)
    objective = objectives.get(which, dtype=dtype, **{**CASES[which], **settings})
    objective.build((None, dim))
    return objective


def value_and_gradient(objective, embeddings, labels, training=True):
    embeddings = tf.convert_to_tensor(embeddings)
    with tf.GradientTape() as tape:
        tape.watch(embeddings)
        loss = objective(embeddings, tf.constant(labels), training=training)
    wanted = [embeddings, *objective.trainable_variables]
    return loss, [tf.convert_to_tensor(g) for g in tape.gradient(loss, wanted, unconnected_gradients="zero")]


def all_finite(tensors):
    return all(np.isfinite(t.numpy().astype(np.float64)).all() for t in tensors)


def all_zero(tensors):
    return all(np.all(t.numpy().astype(np.float64) == 0) for t in tensors)


def test_every_objective_has_a_naive_version():
    missing = [name for name in CASES if not hasattr(naive_objectives, name)]
    assert not missing, f"tests/naive_objectives.py: expected a function of the name of each objective; lacks {missing}"


def test_every_objective_has_a_kind():
    kinds = ("pair", "tuple", "proxy", "addons")
    assert sorted(name for kind in kinds for name in objectives.names(kind)) == objectives.names()


@pytest.mark.parametrize("registry", [objectives, mining])
def test_files_are_named_like_what_they_register(registry):
    for name in registry.names():
        file = "addons" if name.startswith("addons/") else name
        assert registry.lookup(name).__module__ == f"{registry.__name__}.{file}"


@pytest.mark.parametrize("registry", [objectives, mining])
def test_classes_are_public_by_their_names(registry):
    for name in registry.names():
        cls = registry.lookup(name)
        assert getattr(registry, cls.__name__) is cls
        assert cls.__name__ in registry.__all__


@pytest.mark.parametrize(
    ("name", "key", "settings"),
    [
        ("arcface", "arcface", {"num_classes": 6}),
        ("contrastive", "contrastive_all_pairs_mean", {}),
        ("margin", "margin_all_nonzero", {"miner": "all", "num_classes": None, "learnable_beta": False, "nu": 0.0}),
        ("multi_similarity", "multi_similarity_all_pairs", {"beta": 50.0, "epsilon": -1.0}),
        ("normalized_softmax", "normalized_softmax", {"num_classes": 6}),
        ("proxy_anchor", "proxy_anchor", {"num_classes": 6}),
        ("proxy_nca", "proxy_nca", {"num_classes": 6, "scale": 9.0, "own_class_in_sum": True}),
        ("supcon", "supcon", {}),
        ("triplet", "triplet_all_mean", {"miner": "all"}),
    ],
)
def test_golden_values_and_gradients(golden, name, key, settings):
    values = golden("objectives_pml")
    objective = make(name, dim=values["embeddings"].shape[1], **settings)
    if f"{key}_grad_proxies" in values.files:
        objective.proxies.assign(values["proxies"])
    loss, gradients = value_and_gradient(objective, values["embeddings"], values["labels"])
    np.testing.assert_allclose(loss, values[f"{key}_loss"], atol=1e-6)
    np.testing.assert_allclose(gradients[0], values[f"{key}_grad"], atol=1e-6)
    if f"{key}_grad_proxies" in values.files:
        np.testing.assert_allclose(gradients[1], values[f"{key}_grad_proxies"], atol=1e-6)


def test_every_golden_is_tested(golden):
    tested = next(m for m in test_golden_values_and_gradients.pytestmark if m.name == "parametrize").args[1]
    stored = {key.removesuffix("_loss") for key in golden("objectives_pml").files if key.endswith("_loss")}
    assert {key for _, key, _ in tested} == stored


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("circle", {}),
        ("cosface", {"num_classes": 6}),
        ("fast_ap", {}),
        ("generalized_lifted", {}),
        ("histogram", {}),
        ("lifted_structure", {}),
        ("nt_xent", {}),
        ("snr", {"regularization": 0.0}),
        ("soft_triple", {"num_classes": 6, "proxies_per_class": 2, "regularization": 0.0}),
    ],
)
def test_values_against_another_library(golden, name, settings):
    values = golden("objectives_pml_more")
    objective = make(name, dim=10, **settings)
    if f"{name}_proxies" in values.files:
        objective.proxies.assign(values[f"{name}_proxies"])
    loss, gradients = value_and_gradient(objective, values["embeddings"], values["labels"])
    np.testing.assert_allclose(loss, values[f"{name}_loss"], atol=1e-6)
    np.testing.assert_allclose(gradients[0], values[f"{name}_grad"], atol=1e-6)


def test_the_angular_term_against_another_library(golden):
    values = golden("objectives_pml_more")
    (loss, gradients), (alone, of_alone) = (
        value_and_gradient(make("angular", dim=10, angular_weight=w), values["embeddings"], values["labels"])
        for w in (1.0, 0.0)
    )
    np.testing.assert_allclose(loss - alone, values["angular_alone_loss"], atol=1e-6)
    # Their library does not normalise the rows, which have unit length here. Our gradient is the part along the sphere.
    rows, gradient = values["embeddings"], values["angular_alone_grad"]
    gradient = gradient - np.sum(gradient * rows, axis=1, keepdims=True) * rows
    np.testing.assert_allclose(gradients[0] - of_alone[0], gradient, atol=1e-6)


def test_the_counterparts_in_the_documentation_are_tested():
    page = (REPOSITORY / "docs" / "from_other_libraries.md").read_text()
    rows = [line.split("|") for line in page.split("\n\n")[4].splitlines()[2:]]
    documented = {re.findall("`(.*?)`", row[2])[0] for row in rows}
    of = {
        test: test.pytestmark[0].args[1]
        for test in (test_golden_values_and_gradients, test_values_against_another_library)
    }
    # The angular term has a test of its own; N-pair is compared with tensorflow-addons.
    assert documented == {case[0] for cases in of.values() for case in cases} | {"angular", "n_pair"}


@pytest.mark.parametrize("pattern", BATCHES)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_naive_rederivation(unit_rows, name, dtype, pattern):
    labels = BATCHES[pattern]
    objective = make(name, dtype="float64" if dtype == "float64" else "float32")
    rows = np.array(tf.cast(tf.cast(3.0 * unit_rows(len(labels), 6), dtype), tf.float64))
    loss, gradients = value_and_gradient(objective, tf.cast(rows, dtype), labels)
    # In bfloat16 the input is rounded, so compare with the loss of the rounded input.
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    tolerance = 1e-10 if dtype == "float64" else 1e-6
    expected = getattr(naive_objectives, name)(unit, labels, objective)
    np.testing.assert_allclose(loss, expected, rtol=tolerance, atol=tolerance)
    assert all_finite(gradients)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("contrastive", {"squared": True, "positive_margin": 0.3}),
        ("margin", {"divisor": "triplets"}),
        ("margin", {"divisor": "triplets", "beta": 0.3}),
        ("multi_similarity", {"epsilon": -1.0}),
        ("proxy_nca", {"own_class_in_sum": True, "scale": 3.0}),
        ("recall_at_k_surrogate", {"ks": (1, 3), "rank_temperature": 0.1}),
        ("angular", {"alpha": 36.0, "temperature": 0.2}),
        ("soft_triple", {"proxies_per_class": 1}),
        ("histogram", {"bins": 7}),
        ("fast_ap", {"bins": 3}),
    ],
)
def test_settings(unit_rows, name, settings):
    objective, labels = make(name, **settings), BATCHES["uneven"]
    rows = unit_rows(len(labels), 6)
    expected = getattr(naive_objectives, name)(rows, labels, objective)
    np.testing.assert_allclose(objective(rows, labels), expected, rtol=1e-10)


@pytest.mark.parametrize("divisor", ["hinges", "triplets"])
def test_margin_over_mined_triplets(unit_rows, divisor):
    # The anchor may be its own positive, at distance 0.
    labels, rows = np.repeat(np.arange(CLASSES), 2), unit_rows(8, 6) + 1.0
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    miner = mining.get("rho_distance", rho=0.5, upper_cutoff=3.0, anchor_as_positive=True)
    objective = make("margin", miner=miner, margin=0.6, beta=0.6, nu=0.0, divisor=divisor, seed=5)
    distances = np.linalg.norm(rows[:, None] - rows[None], axis=-1)
    found = miner(tf.constant(distances), tf.constant(labels), dim=6, seed=tf.constant([5, 0]))
    beta = float(tf.convert_to_tensor(objective.betas)[0])
    total, hinges, triplets = 0.0, 0, 0
    for a, p, n, valid in zip(*(part.numpy() for part in found)):
        if valid:
            pull, push = max(0.0, 0.6 + distances[a, p] - beta), max(0.0, 0.6 - distances[a, n] + beta)
            total += pull + push
            hinges += sum(hinge > 0 for hinge in (pull, push))
            triplets += pull > 0 or push > 0
    assert np.any((found.anchor == found.positive) & found.valid)
    assert hinges > triplets > 0
    loss, gradients = value_and_gradient(objective, rows, labels)
    np.testing.assert_allclose(loss, total / (hinges if divisor == "hinges" else triplets), rtol=1e-10)
    assert all_finite(gradients)


@pytest.mark.parametrize("pattern", ["several positives", "one positive each", "uneven"])
@pytest.mark.parametrize("name", CASES)
def test_gradient_by_finite_differences(unit_rows, name, pattern):
    labels = BATCHES[pattern]
    # The paper's sigmoids are too steep for differences of 1e-6. The weights of circle do not depend on its input.
    objective = make(name, **({"rank_temperature": 0.1} if name == "recall_at_k_surrogate" else {}))
    if name == "circle":
        pytest.skip("its weights have no gradient; see test_circle_gradient")
    rows = tf.constant(unit_rows(len(labels), 6))
    with tf.GradientTape() as tape:
        tape.watch(rows)
        loss = objective(rows, labels)
    weights = objective.trainable_variables
    gradients = tape.gradient(loss, [rows, *weights], unconnected_gradients="zero")
    random = np.random.default_rng(1)

    def slope(loss_of, start, direction):
        return (loss_of(start + 1e-6 * direction) - loss_of(start - 1e-6 * direction)) / 2e-6

    # Along random directions a difference takes two losses, instead of two per element.
    for _ in range(3):
        direction = random.normal(size=rows.shape)
        expected = slope(lambda value: objective(value, labels), rows, direction)
        np.testing.assert_allclose(np.sum(gradients[0] * direction), expected, atol=1e-5)
    for variable, gradient in zip(weights, gradients[1:]):

        def loss_of(value, variable=variable):
            variable.assign(value)
            return objective(rows, labels)

        direction = random.normal(size=variable.shape)
        expected = slope(loss_of, tf.convert_to_tensor(variable), direction)
        np.testing.assert_allclose(np.sum(tf.convert_to_tensor(gradient) * direction), expected, atol=1e-5)


def test_circle_gradient(unit_rows):
    # Equation 10 of the paper: with constant weights, the loss depends only on the similarities.
    labels, x = BATCHES["uneven"], unit_rows(7, 6)
    objective = make("circle", gamma=20.0)
    _, (gradient,) = value_and_gradient(objective, x, labels)
    fixed = x @ x.T

    def loss(rows):
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        s, m, g, total = rows @ rows.T, objective.margin, objective.gamma, []
        for a, ps, ns in naive_objectives.anchors(labels):
            pull = [-g * max(0, 1 + m - fixed[a, p]) * (s[a, p] - 1 + m) for p in ps]
            push = [g * max(0, fixed[a, n] + m) * (s[a, n] - m) for n in ns]
            total.append(np.log1p(np.sum(np.exp(pull)) * np.sum(np.exp(push))))
        return np.mean(total)

    for i, j in [(0, 0), (2, 3), (6, 5)]:
        step = np.zeros_like(x)
        step[i, j] = 1e-6
        np.testing.assert_allclose(gradient[i, j], (loss(x + step) - loss(x - step)) / 2e-6, atol=1e-5)


@pytest.mark.parametrize(("name", "settings"), VARIANTS)
class TestDegenerateBatches:
    @pytest.mark.parametrize("pattern", ["no positives", "no negatives", "one image"])
    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    def test_zero_and_finite(self, unit_rows, name, settings, pattern, dtype):
        labels = BATCHES[pattern]
        objective = make(name, dtype="float32", **settings)
        loss, gradients = value_and_gradient(objective, tf.cast(unit_rows(len(labels), 6), dtype), labels)
        # Proxies are positives and negatives themselves, contrastive has a term for each kind, lengths are penalised.
        left = objective.kind == "proxy" or not settings.get("normalize", True)
        if not left and (name != "contrastive" or pattern == "one image"):
            assert float(loss) == 0.0
            assert all_zero(gradients)
        assert np.isfinite(float(loss))
        assert all_finite(gradients)

    def test_duplicates_and_zero_rows(self, name, settings):
        for rows in (np.ones((8, 6)), np.zeros((8, 6)), np.repeat(np.eye(6)[:4], 2, axis=0)):
            objective = make(name, dtype="float32", **settings)
            loss, gradients = value_and_gradient(objective, rows.astype(np.float32), BATCHES["one positive each"])
            assert np.isfinite(float(loss))
            assert all_finite(gradients)

    def test_non_finite_input_gives_nan(self, unit_rows, name, settings):
        rows, labels = unit_rows(8, 6).astype(np.float32), BATCHES["one positive each"]
        for value in (np.nan, np.inf):
            rows[3, 2] = value
            objective = make(name, dtype="float32", **settings)
            assert np.isnan(objective(rows, labels, training=True))

    def test_well_separated(self, name, settings):
        objective = make(name, dtype="float32", **{**settings, **INACTIVE.get(name, {})})
        rows = np.repeat(np.eye(6)[:4], 3, axis=0).astype(np.float32)
        if objective.kind == "proxy":
            centers = np.eye(6)[:4]
            objective.proxies.assign(np.broadcast_to(centers, objective.proxies.shape))
        loss, gradients = value_and_gradient(objective, rows, BATCHES["several positives"])
        assert all_finite(gradients)
        if name in INACTIVE:
            assert float(loss) == 0.0
            assert all_zero(gradients)
        else:
            worst = objective(rows, np.tile(np.arange(4), 3))
            assert float(loss) < 0.8 * float(worst)


@pytest.mark.parametrize(("name", "settings"), VARIANTS)
def test_compiled_equals_eager_without_retracing(unit_rows, name, settings):
    eager, compiled = make(name, dtype="float32", **settings), make(name, dtype="float32", **settings)

    @tf.function(jit_compile=True)
    def call(embeddings, labels):
        loss = compiled(embeddings, labels, training=True)
        return loss, tf.gradients(loss, embeddings)[0]

    for step, pattern in enumerate(["several positives", "several positives", "no positives", "no negatives"]):
        labels = np.resize(BATCHES[pattern], 12) if pattern != "no positives" else np.repeat(np.arange(4), 3)
        rows = unit_rows(12, 6, seed=step).astype(np.float32)
        loss, gradient = call(tf.constant(rows), tf.constant(labels))
        expected, gradients = value_and_gradient(eager, rows, labels)
        np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(gradient, gradients[0], rtol=1e-4, atol=2e-5)
    assert call.experimental_get_tracing_count() == 1


@pytest.mark.parametrize("name", CASES)
def test_order_of_the_batch_does_not_matter(unit_rows, name):
    if name == "quadruplet":
        pytest.skip("it draws randomly")
    labels, rows = BATCHES["uneven"], unit_rows(7, 6)
    order = np.random.default_rng(0).permutation(7)
    objective = make(name)
    np.testing.assert_allclose(objective(rows, labels), objective(rows[order], labels[order]), rtol=1e-10)


@pytest.mark.parametrize("name", PAIR_OBJECTIVES)
class TestMemory:
    """The cross-batch memory of every pair objective."""

    SETTINGS = {"memory_size": 10, "memory_weight": 0.5, "memory_start": 1}

    def test_adds_the_pairs_with_past_batches(self, unit_rows, name):
        labels, batches = BATCHES["uneven"], [unit_rows(7, 6, seed) for seed in range(4)]
        objective, plain = make(name, **self.SETTINGS), make(name)
        first = value_and_gradient(objective, batches[0], labels)
        np.testing.assert_allclose(first[0], plain(batches[0], labels), rtol=1e-12)
        remembered, remembered_labels = batches[0], labels
        for rows in batches[1:]:
            loss, (gradient,) = value_and_gradient(objective, rows, labels)
            same = labels[:, None] == remembered_labels[None, :]
            pairs = mining.Pairs(tf.constant(same), tf.constant(~same))
            with tf.GradientTape() as tape:
                x = tf.constant(rows)
                tape.watch(x)
                unit = tf.math.l2_normalize(x, axis=1)
                expected = plain(x, labels)
                expected += 0.5 * plain.compute_pairs(unit, tf.constant(remembered), pairs)
            np.testing.assert_allclose(loss, expected, rtol=1e-10)
            np.testing.assert_allclose(gradient, tape.gradient(expected, x), atol=1e-10)
            remembered = np.concatenate([rows, remembered])[:10]
            remembered_labels = np.concatenate([labels, remembered_labels])[:10]
        np.testing.assert_allclose(objective.memory, remembered, atol=1e-12)
        np.testing.assert_array_equal(objective.memory_labels, remembered_labels)

    def test_starts_later_and_does_not_change_in_testing(self, unit_rows, name):
        labels, rows = BATCHES["uneven"], unit_rows(7, 6)
        objective, plain = make(name, **{**self.SETTINGS, "memory_start": 3, "memory_size": 4}), make(name)
        for step in range(3):
            np.testing.assert_allclose(objective(rows, labels, training=True), plain(rows, labels), err_msg=str(step))
        before = [tf.convert_to_tensor(w).numpy() for w in objective.weights]
        # In testing, labels are not compared with those of training.
        np.testing.assert_allclose(objective(rows[::-1], labels), plain(rows[::-1], labels))
        for old, new in zip(before, objective.weights):
            np.testing.assert_array_equal(old, new)
        assert abs(float(objective(rows[::-1], labels, training=True)) - float(plain(rows[::-1], labels))) > 1e-9

    def test_compiled_and_degenerate(self, unit_rows, name):
        objective = make(name, dtype="float32", **self.SETTINGS)
        call = tf.function(lambda x, y: objective(x, y, training=True), jit_compile=True)
        for step in range(3):
            loss = call(tf.constant(unit_rows(5, 6, step), tf.float32), tf.constant(np.full(5, step % 2)))
            assert np.isfinite(loss)
        assert call.experimental_get_tracing_count() == 1


def test_memory_by_hand(unit_rows):
    objective = make("contrastive", memory_size=3, memory_start=0)
    old, new = unit_rows(3, 6, 0), unit_rows(2, 6, 1)
    objective(old, np.array([0, 1, 2]), training=True)
    d = np.linalg.norm(new[:, None] - old[None], axis=-1)
    pull = np.mean([d[0, 1], d[1, 2]])
    push = np.mean([max(0, 1 - d[i, j]) for i, j in [(0, 0), (0, 2), (1, 0), (1, 1)]])
    within = max(0, 1 - np.linalg.norm(new[0] - new[1]))
    np.testing.assert_allclose(objective(new, np.array([1, 2]), training=True), within + pull + push, rtol=1e-10)


def test_fourth_images_are_uniform_over_third_classes():
    labels = np.array([2, 0, 1, 0, 2, 1, 3, 3, 3, 0])
    found = mining.get("all")(None, tf.constant(labels, tf.int32), dim=None, seed=None)
    draw = tf.function(lambda seed: fourth_images(tf.constant(labels, tf.int32), found, seed)[0])
    anchor, negative, valid = (np.array(v) for v in (found.anchor, found.negative, found.valid))
    counts = {}
    for step in range(40):
        fourth = draw(tf.constant([1, step])).numpy()
        for a, n, m in zip(anchor[valid], negative[valid], fourth[valid]):
            assert labels[m] not in (labels[a], labels[n])
            classes = (labels[a], labels[n])
            counts.setdefault(classes, np.zeros(10))[m] += 1
    for classes, found_counts in counts.items():
        possible = ~np.isin(labels, classes)
        wanted = found_counts.sum() / possible.sum()
        assert np.sum((found_counts[possible] - wanted) ** 2 / wanted) < possible.sum() + 4 * np.sqrt(
            2 * possible.sum()
        )
    # The rho-regularised miner takes some negatives from the anchor's own class.
    within = mining.get("rho_distance", rho=1.0)
    distances = tf.constant(np.ones((10, 10)) - np.eye(10))
    seen = set()
    for step in range(20):
        found = within(distances, tf.constant(labels, tf.int32), dim=4, seed=tf.constant([1, step]))
        fourth = fourth_images(tf.constant(labels, tf.int32), found, tf.constant([1, step]))[0].numpy()
        valid = found.valid.numpy()
        assert np.all(labels[fourth[valid]] != labels[found.anchor.numpy()[valid]])
        seen |= set(fourth[valid])
    assert len(seen) == 10
    two = tf.constant([0, 0, 1, 1])
    found = mining.get("all")(None, two, dim=None, seed=None)
    assert not np.any(fourth_images(two, found, tf.constant([0, 0]))[1].numpy()[found.valid.numpy()])


@pytest.mark.parametrize("name", PAIR_OBJECTIVES)
def test_one_pair_per_class_gives_the_same_with_small_matrices_and_masks(unit_rows, name):
    for seed, labels in enumerate(BATCHES.values()):
        objective, rows = make(name, miner="n_pair", seed=seed), unit_rows(len(labels), 6)
        masks = mining.get("n_pair").pairs(None, tf.constant(labels, tf.int32), dim=6, seed=tf.constant([seed, 0]))
        expected = objective.compute_pairs(tf.constant(rows), tf.constant(rows), masks)
        np.testing.assert_allclose(objective(rows, labels), expected, rtol=1e-10, atol=1e-12)


def test_lengths_are_penalised_if_not_normalised(unit_rows):
    rows, labels = 3.0 * unit_rows(7, 6), BATCHES["uneven"]
    for name in ("n_pair", "lifted_structure", "generalized_lifted"):
        free = make(name, normalize=False, l2_weight=0.0)
        penalised = make(name, normalize=False, l2_weight=0.1)
        np.testing.assert_allclose(penalised(rows, labels) - free(rows, labels), 0.1 * 9.0, rtol=1e-9)
        np.testing.assert_allclose(free(rows, labels), getattr(naive_objectives, name)(rows, labels, free), rtol=1e-9)
        assert abs(float(make(name)(rows, labels)) - float(free(rows, labels))) > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_config_round_trip(name):
    settings = objectives.settings(name)
    # The objective's own settings come first.
    changed, default = next((k, v) for k, v in settings.items() if type(v) in (int, float) and v)
    value = default + 1 if isinstance(default, int) else 1.25 * default
    objective = make(name, **{changed: value}, name="mine")
    assert getattr(objective, changed) == value
    copy = type(objective).from_config(objective.get_config())
    assert copy.get_config() == objective.get_config()
    assert set(settings) <= set(objective.get_config())
    assert copy.name == "mine"


@pytest.mark.parametrize("name", CASES)
def test_inside_a_saved_model_as_base_and_as_target(small_model, tmp_path, unit_rows, name):
    settings = {"num_classes": CLASSES} if objectives.lookup(name).uses_classes else {}
    base = objectives.get(name, **settings)
    model = small_model(objective=base, target_objective=name, num_classes=CLASSES)
    model.save(str(tmp_path / "model.keras"))
    loaded = keras.models.load_model(str(tmp_path / "model.keras"))
    assert type(loaded.s2sd_loss.objective) is type(loaded.s2sd_loss.target_objectives[1]) is type(base)
    for one, other in zip(base.get_weights(), loaded.s2sd_loss.objective.get_weights()):
        np.testing.assert_array_equal(one, other)
    rows, labels = unit_rows(8, 4).astype(np.float32), BATCHES["one positive each"]
    np.testing.assert_allclose(loaded.s2sd_loss.objective(rows, labels), base(rows, labels), rtol=1e-6)


def test_draws_advance_in_training_and_not_in_testing(unit_rows):
    objective = make("triplet", miner="distance_weighted", margin=2.0)
    rows, labels = unit_rows(12, 6), BATCHES["several positives"]
    tested = [float(objective(rows, labels)) for _ in range(3)]
    assert len(set(tested)) == 1
    trained = [float(objective(rows, labels, training=True)) for _ in range(5)]
    assert len(set(trained)) > 1
    again = make("triplet", miner="distance_weighted", margin=2.0)
    assert trained == [float(again(rows, labels, training=True)) for _ in range(5)]
    other = make("triplet", miner="distance_weighted", margin=2.0, seed=1)
    assert trained != [float(other(rows, labels, training=True)) for _ in range(5)]


def test_labels_out_of_range(unit_rows):
    objective = make("proxy_anchor", dtype="float32")
    rows = unit_rows(3, 6).astype(np.float32)
    for labels in (np.array([0, 1, CLASSES]), np.array([-1, 0, 1])):
        with pytest.raises(tf.errors.InvalidArgumentError, match=r"labels: expected integers in \[0, 4\)"):
            objective(rows, labels)
    jitted = tf.function(objective, jit_compile=True)
    assert np.isnan(jitted(tf.constant(rows), tf.constant([0, 1, CLASSES])))


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("nonsense", {}, "objective: expected one of .*Received: 'nonsense'"),
        ("triplet", {"sharpness": 1.0}, "'triplet'.*Received: .*sharpness"),
        ("triplet", {"margin": -0.1}, "margin"),
        ("triplet", {"miner": "nonsense"}, "miner: expected one of"),
        ("margin", {"nu": -1.0}, "nu"),
        ("margin", {"divisor": "triplet"}, "divisor: expected one of .*'triplet'; did you mean triplets"),
        ("triplet", {"miner": "n_pair"}, "miner: expected one that chooses triplets, for triplet. Received: 'n_pair'"),
        ("supcon", {"miner": "rho_distance"}, "miner: expected one whose negatives are from other classes"),
        ("supcon", {"dtype": "float16"}, "dtype: expected 'float32' or 'float64'"),
        ("fast_ap", {"bins": 6.5}, "bins: expected an int >= 1. Received: 6.5"),
        ("multi_similarity", {"alpha": 0.0}, "alpha"),
        ("multi_similarity", {"memory_size": -1}, "memory_size: expected an int >= 0. Received: -1"),
        ("angular", {"alpha": 90.0}, r"alpha: expected degrees in \(0, 60\]. Received: 90.0"),
        ("arcface", {"num_classes": 3, "margin": 4.0}, "margin: expected radians"),
        ("histogram", {"bins": 1}, "bins"),
        ("recall_at_k_surrogate", {"ks": ()}, "ks"),
        ("soft_triple", {"num_classes": 3, "proxies_per_class": 0}, "proxies_per_class"),
        ("proxy_anchor", {}, "num_classes.*Received: None"),
        ("proxy_anchor", {"num_classes": 0}, "num_classes"),
        ("margin", {"learning_rate_multiplier": -1.0}, "learning_rate_multiplier"),
    ],
)
def test_errors_name_the_argument(name, settings, words):
    with pytest.raises(ValueError, match=words):
        objectives.get(name, **settings)


def test_get_takes_instances_and_refuses_additional_settings():
    objective = objectives.MultiSimilarity()
    assert objectives.get(objective) is objective
    with pytest.raises(ValueError, match="not with an instance"):
        objectives.get(objective, alpha=1.0)
    with pytest.raises(ValueError, match=r"expected one of .* or an instance of Objective\. Received: 3"):
        objectives.get(3)


def test_a_class_that_saved_models_would_mistake_is_refused():
    def define(name, **members):
        return objectives.register(f"test_{name}")(type(name, (objectives.Objective,), members))

    with pytest.raises(ValueError, match="the class name 'Triplet' is taken by 'triplet'"):
        define("Triplet")
    assert objectives.lookup("triplet") is objectives.Triplet

    def init(self, scale=1.0, **kwargs):
        objectives.Objective.__init__(self, **kwargs)

    with pytest.raises(ValueError, match=r"Scaled: expected a method get_config that returns its settings \['scale'\]"):
        define("Scaled", __init__=init)
    # As by running a cell of a notebook twice.
    first, second = define("Again"), define("Again")
    assert first is not second
    assert objectives.lookup("test_Again") is second
    objectives.base._registry._classes.pop("test_Again")


def test_a_custom_objective_can_be_registered():
    @objectives.register("test_sum")
    class Sum(objectives.Objective):
        def compute(self, embeddings, labels, training):
            return tf.reduce_sum(embeddings) * 0.0

    try:
        assert isinstance(objectives.get("test_sum"), Sum)
        with pytest.raises(ValueError, match="the name 'test_sum' is taken"):
            objectives.register("test_sum")(type("Other", (Sum,), {}))
    finally:
        objectives.base._registry._classes.pop("test_sum")
    assert "S2SDModel" in s2sd_tf.__all__


def test_the_gradient_of_lifted_structure_at_a_tie():
    """With a cross-batch memory, the sums of an anchor and of its positive can be equal: each has half the gradient."""
    objective = objectives.get("lifted_structure", dtype="float64")
    anchors, references = np.eye(2), np.array([[0.6, 0.8], [0.8, 0.6]])
    pairs = mining.Pairs(tf.constant([[True, False], [False, False]]), tf.constant([[False, True], [True, False]]))

    def loss(rows):
        return objective.compute_pairs(tf.constant(rows), tf.constant(references), pairs)

    variable = tf.Variable(anchors)
    with tf.GradientTape() as tape:
        value = objective.compute_pairs(variable, tf.constant(references), pairs)
    found = tape.gradient(value, variable).numpy()
    for place in np.ndindex(2, 2):
        step = np.zeros((2, 2))
        step[place] = 1e-5
        expected = float(loss(anchors + step) - loss(anchors - step)) / 2e-5
        assert found[place] == pytest.approx(expected, abs=1e-8)
