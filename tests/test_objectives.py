"""One harness for every objective: golden values, re-derivations, degenerate batches, precision, graphs, saving."""

import itertools

import numpy as np
import pytest
import tensorflow as tf

import s2sd_tf
from s2sd_tf import objectives
from s2sd_tf.keras_compat import keras

CLASSES = 4
# Every objective, with the settings under which it is deterministic.
CASES = {
    "margin": {"num_classes": CLASSES, "miner": "all", "nu": 0.01},
    "multi_similarity": {},
    "proxy_anchor": {"num_classes": CLASSES},
    "triplet": {"miner": "all"},
}
STOCHASTIC = [("triplet", {"miner": "distance_weighted"}), ("margin", {"miner": "distance_weighted"})]
BATCHES = {
    "several positives": np.repeat(np.arange(4), 3),
    "one positive each": np.repeat(np.arange(4), 2),
    "uneven": np.array([0, 1, 1, 2, 2, 2, 2]),
    "no positives": np.arange(4),
    "no negatives": np.full(5, 2),
    "one image": np.array([1]),
}


def make(which, dim=6, dtype="float64", **settings):
    keras.utils.set_random_seed(3)
    objective = objectives.get(which, dtype=dtype, **{**CASES[which], **settings})
    objective.build((None, dim))
    return objective


def value_and_gradient(objective, embeddings, labels):
    embeddings = tf.convert_to_tensor(embeddings)
    with tf.GradientTape() as tape:
        tape.watch(embeddings)
        loss = objective(embeddings, tf.constant(labels), training=True)
    wanted = [embeddings, *objective.trainable_variables]
    return loss, [tf.convert_to_tensor(g) for g in tape.gradient(loss, wanted, unconnected_gradients="zero")]


def hinge(value):
    return max(0.0, value)


def naive_triplets(labels):
    n = range(len(labels))
    return [
        (a, p, q) for a, p, q in itertools.product(n, n, n)
        if a != p and labels[a] == labels[p] and labels[a] != labels[q]
    ]  # fmt: skip


def naive_triplet(x, labels, objective):
    losses = [
        hinge(np.sum((x[a] - x[p]) ** 2) - np.sum((x[a] - x[n]) ** 2) + objective.margin)
        for a, p, n in naive_triplets(labels)
    ]
    return np.mean(losses) if losses else 0.0


def naive_margin(x, labels, objective):
    betas, total, active = tf.convert_to_tensor(objective.betas).numpy(), 0.0, 0
    for a, p, n in naive_triplets(labels):
        beta = betas[labels[a]]
        hinges = [
            hinge(objective.margin + np.linalg.norm(x[a] - x[p]) - beta),
            hinge(objective.margin - np.linalg.norm(x[a] - x[n]) + beta),
        ]
        total += sum(hinges) + objective.nu * beta
        active += sum(h > 0 for h in hinges)
    return total / active if active else 0.0


def naive_multi_similarity(x, labels, objective):
    n, losses = range(len(labels)), []
    for i in n:
        positives = [x[i] @ x[j] for j in n if j != i and labels[j] == labels[i]]
        negatives = [x[i] @ x[j] for j in n if labels[j] != labels[i]]
        if objective.epsilon >= 0:
            if not positives or not negatives:
                continue
            kept = [s for s in positives if s - objective.epsilon < max(negatives)]
            negatives = [s for s in negatives if s + objective.epsilon > min(positives)]
            positives = kept
            if not positives or not negatives:
                continue
        pull = np.log(1 + sum(np.exp(-objective.alpha * (s - objective.lambda_)) for s in positives)) / objective.alpha
        push = np.log(1 + sum(np.exp(objective.beta * (s - objective.lambda_)) for s in negatives)) / objective.beta
        losses.append(pull + push)
    return np.mean(losses) if losses else 0.0


def naive_proxy_anchor(x, labels, objective):
    proxies = tf.convert_to_tensor(objective.proxies).numpy()
    proxies = proxies / np.linalg.norm(proxies, axis=1, keepdims=True)
    pull, push = [], []
    for c, proxy in enumerate(proxies):
        own = [proxy @ v for v, label in zip(x, labels) if label == c]
        others = [proxy @ v for v, label in zip(x, labels) if label != c]
        if own:
            pull.append(np.log(1 + sum(np.exp(-objective.alpha * (s - objective.margin)) for s in own)))
        push.append(np.log(1 + sum(np.exp(objective.alpha * (s + objective.margin)) for s in others)))
    return np.mean(pull) + np.mean(push)


NAIVE = {
    "triplet": naive_triplet,
    "margin": naive_margin,
    "multi_similarity": naive_multi_similarity,
    "proxy_anchor": naive_proxy_anchor,
}


def test_every_objective_is_covered():
    assert set(CASES) == set(NAIVE) == set(objectives.names())


@pytest.mark.parametrize(
    ("name", "key", "settings"),
    [
        ("proxy_anchor", "proxy_anchor", {"num_classes": 6}),
        ("multi_similarity", "multi_similarity_all_pairs", {"beta": 50.0, "epsilon": -1.0}),
        ("triplet", "triplet_all_mean", {"miner": "all"}),
        ("margin", "margin_all_nonzero", {"miner": "all", "num_classes": None, "learnable_beta": False, "nu": 0.0}),
    ],
)
def test_golden_values_and_gradients(golden, name, key, settings):
    values = golden("objectives_pml")
    objective = make(name, dim=values["embeddings"].shape[1], **settings)
    if name == "proxy_anchor":
        objective.proxies.assign(values["proxies"])
    loss, gradients = value_and_gradient(objective, values["embeddings"], values["labels"])
    np.testing.assert_allclose(loss, values[f"{key}_loss"], atol=1e-6)
    np.testing.assert_allclose(gradients[0], values[f"{key}_grad"], atol=1e-6)
    if f"{key}_grad_proxies" in values.files:
        np.testing.assert_allclose(gradients[1], values[f"{key}_grad_proxies"], atol=1e-6)


@pytest.mark.parametrize("pattern", BATCHES)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_naive_rederivation(unit_rows, name, dtype, pattern):
    labels = BATCHES[pattern]
    objective = make(name, dtype="float64" if dtype == "float64" else "float32")
    rows = np.array(tf.cast(tf.cast(3.0 * unit_rows(len(labels), 6), dtype), tf.float64))
    loss, gradients = value_and_gradient(objective, tf.cast(rows, dtype), labels)
    # In bfloat16 the input is rounded, and the loss is that of the rounded input.
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    tolerance = 1e-10 if dtype == "float64" else 1e-5
    np.testing.assert_allclose(loss, NAIVE[name](unit, labels, objective), rtol=tolerance, atol=tolerance)
    assert all(np.isfinite(g.numpy().astype(np.float64)).all() for g in gradients)


def test_multi_similarity_without_mining(unit_rows):
    objective, labels = make("multi_similarity", epsilon=-1.0), BATCHES["uneven"]
    rows = unit_rows(len(labels), 6)
    np.testing.assert_allclose(objective(rows, labels), naive_multi_similarity(rows, labels, objective), rtol=1e-10)


@pytest.mark.parametrize("pattern", ["several positives", "one positive each", "uneven"])
@pytest.mark.parametrize("name", CASES)
def test_gradient_by_finite_differences(unit_rows, name, pattern):
    labels, objective = BATCHES[pattern], make(name)
    theoretical, numerical = tf.test.compute_gradient(
        lambda x: objective(x, labels), [tf.constant(unit_rows(len(labels), 6))], delta=1e-6
    )
    np.testing.assert_allclose(theoretical[0], numerical[0], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings"), [*((n, {}) for n in CASES), *STOCHASTIC, ("triplet", {"miner": "semi_hard"})]
)
class TestDegenerateBatches:
    @pytest.mark.parametrize("pattern", ["no positives", "no negatives", "one image"])
    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    def test_zero_and_finite(self, unit_rows, name, settings, pattern, dtype):
        labels = BATCHES[pattern]
        objective = make(name, dtype="float32", **settings)
        loss, gradients = value_and_gradient(objective, tf.cast(unit_rows(len(labels), 6), dtype), labels)
        if name != "proxy_anchor":  # whose proxies are positives and negatives of their own
            assert float(loss) == 0.0
            assert all(np.all(g.numpy().astype(np.float64) == 0) for g in gradients)
        assert np.isfinite(float(loss))
        assert all(np.isfinite(g.numpy().astype(np.float64)).all() for g in gradients)

    def test_duplicates_and_zero_rows(self, name, settings):
        for rows in (np.ones((8, 6)), np.zeros((8, 6)), np.repeat(np.eye(6)[:4], 2, axis=0)):
            objective = make(name, dtype="float32", **settings)
            loss, gradients = value_and_gradient(objective, rows.astype(np.float32), BATCHES["one positive each"])
            assert np.isfinite(float(loss))
            assert all(np.isfinite(g.numpy()).all() for g in gradients)

    def test_well_separated_is_inactive(self, name, settings):
        if name == "proxy_anchor":
            pytest.skip("its loss never reaches 0")
        objective = make(name, dtype="float32", **{**settings, **({"nu": 0.0} if name == "margin" else {})})
        if name == "margin":
            objective.betas.assign(np.full(CLASSES, 0.5))
        rows = np.repeat(np.eye(6)[:4], 3, axis=0).astype(np.float32)
        loss, gradients = value_and_gradient(objective, rows, BATCHES["several positives"])
        assert float(loss) == 0.0
        assert all(np.all(g.numpy() == 0) for g in gradients)


@pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize(
    ("name", "settings"), [*((n, {}) for n in CASES), *STOCHASTIC, ("triplet", {"miner": "semi_hard"})]
)
def test_compiled_equals_eager_without_retracing(unit_rows, name, settings, jit):
    eager, compiled = make(name, dtype="float32", **settings), make(name, dtype="float32", **settings)

    @tf.function(jit_compile=jit)
    def call(embeddings, labels):
        loss = compiled(embeddings, labels, training=True)
        return loss, tf.gradients(loss, embeddings)[0]

    for step, pattern in enumerate(["several positives", "several positives", "no positives", "no negatives"]):
        labels = np.resize(BATCHES[pattern], 12) if pattern != "no positives" else np.repeat(np.arange(4), 3)
        rows = unit_rows(12, 6, seed=step).astype(np.float32)
        loss, gradient = call(tf.constant(rows), tf.constant(labels))
        expected, gradients = value_and_gradient(eager, rows, labels)
        np.testing.assert_allclose(loss, expected, atol=1e-5)
        np.testing.assert_allclose(gradient, gradients[0], atol=1e-5)
    assert call.experimental_get_tracing_count() == 1


@pytest.mark.parametrize("name", CASES)
def test_config_round_trip(name):
    objective = make(name, **({"margin": 0.3} if name != "multi_similarity" else {"alpha": 3.0}), name="mine")
    copy = type(objective).from_config(objective.get_config())
    assert copy.get_config() == objective.get_config()
    assert copy.name == "mine"


@pytest.mark.parametrize("name", CASES)
def test_inside_a_saved_model_as_base_and_as_target(small_model, tmp_path, unit_rows, name):
    settings = {"num_classes": CLASSES} if objectives.lookup(name).uses_classes else {}
    base = objectives.get(name, **settings)
    model = small_model(objective=base, target_objective=name, num_classes=CLASSES)
    model.save(str(tmp_path / "model.keras"))
    loaded = keras.models.load_model(str(tmp_path / "model.keras"))
    assert type(loaded.objective) is type(loaded.target_objectives[1]) is type(base)
    for one, other in zip(base.get_weights(), loaded.objective.get_weights()):
        np.testing.assert_array_equal(one, other)
    rows, labels = unit_rows(8, 4).astype(np.float32), BATCHES["one positive each"]
    np.testing.assert_allclose(loaded.objective(rows, labels), base(rows, labels), rtol=1e-6)


def test_draws_go_on_in_training_and_stand_still_in_testing(unit_rows):
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
        ("multi_similarity", {"alpha": 0.0}, "alpha"),
        ("proxy_anchor", {}, "num_classes.*Received: None"),
        ("proxy_anchor", {"num_classes": 0}, "num_classes"),
        ("margin", {"learning_rate_multiplier": -1.0}, "learning_rate_multiplier"),
    ],
)
def test_errors_name_the_argument(name, settings, words):
    with pytest.raises(ValueError, match=words):
        objectives.get(name, **settings)


def test_get_takes_instances_and_refuses_settings_beside_them():
    objective = objectives.MultiSimilarity()
    assert objectives.get(objective) is objective
    with pytest.raises(ValueError, match="not with an instance"):
        objectives.get(objective, alpha=1.0)
    with pytest.raises(ValueError, match="expected a name"):
        objectives.get(3)


def test_a_users_objective_can_be_registered():
    @objectives.register("test_sum")
    class Sum(objectives.Objective):
        def compute(self, embeddings, labels, training):
            return tf.reduce_sum(embeddings) * 0.0

    try:
        assert isinstance(objectives.get("test_sum"), Sum)
        with pytest.raises(ValueError, match="taken"):
            objectives.register("test_sum")(Sum)
    finally:
        objectives.base._registry._classes.pop("test_sum")
    assert "S2SDModel" in s2sd_tf.__all__
