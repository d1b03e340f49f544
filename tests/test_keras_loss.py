"""Objectives as losses of plain Keras models: training, values, precision, replicas, saving and refusals."""

import re

import numpy as np
import pytest
import tensorflow as tf
from conftest import REPOSITORY

from s2sd_tf import objectives
from s2sd_tf.evaluation import retrieval_metrics
from s2sd_tf.keras_compat import keras

CLASSES = 8
BATCH = 32


def images(seed=0, count=8 * BATCH):
    """`(rows, labels)`: in each row 8 numbers depend on the class, and 8 are noise with a larger variance."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    rows = rng.normal(size=(count, 16)) * np.repeat([0.5, 3.0], 8)
    rows[:, :8] += 3.0 * np.eye(CLASSES)[labels]
    return rows.astype(np.float32), labels


def make_model(*last):
    keras.utils.set_random_seed(1)
    dense = [keras.layers.Dense(32, activation="relu"), keras.layers.Dense(6)]
    return keras.Sequential([keras.Input((16,)), *dense, *last])


def held(name, **settings):
    """`(model, loss, objective)`, where the model holds the objective."""
    objective = objectives.get(name, **settings)
    return make_model(objectives.ObjectiveHolder(objective)), objectives.as_keras_loss(objective), objective


def fit(model, epochs=1, **settings):
    rows, labels = images()
    return model.fit(rows, labels, batch_size=BATCH, epochs=epochs, shuffle=False, verbose=0, **settings)


def weights(model):
    return [np.array(w) for w in model.get_weights()]


def reloaded(model, tmp_path):
    model.save(str(tmp_path / "model.keras"))
    return keras.models.load_model(str(tmp_path / "model.keras"))


@pytest.mark.parametrize("name", ["multi_similarity", "triplet", "proxy_anchor", "margin"])
def test_a_plain_model_trains(name):
    if objectives.lookup(name).uses_classes:
        model, loss, objective = held(name, num_classes=CLASSES)
        start = objective.get_weights()[0]
    else:
        model, loss, objective = make_model(), objectives.as_keras_loss(name), None
    model.compile(keras.optimizers.Adam(0.01), loss=loss)
    rows, labels = images(seed=1)

    def recall():
        return retrieval_metrics(model.predict(rows, verbose=0), labels)["recall@1"]

    before = recall()
    history = fit(model, epochs=8).history["loss"]
    assert history[-1] < 0.9 * history[0]
    assert recall() > before + 0.15
    if objective is not None:
        assert np.abs(objective.get_weights()[0] - start).max() > 0.01


def test_the_examples_in_the_documentation_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (REPOSITORY / "docs" / "objectives.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    monkeypatch.setattr(objectives.base._registry, "_classes", dict(objectives.base._registry._classes))
    for example in examples:
        exec(example.replace("epochs=5", "epochs=1, verbose=0"), names)
    assert "soft_margin_triplet" in objectives.names()
    assert len(examples) == 3
    assert (tmp_path / "digits.keras").exists()


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("multi_similarity", {"run_eagerly": True}),
        ("multi_similarity", {"jit_compile": False}),
        ("n_pair", {"jit_compile": False}),
        ("triplet", {"run_eagerly": True}),
        ("triplet", {"jit_compile": False}),
        ("triplet", {"jit_compile": True}),
    ],
)
def test_a_step_has_the_value_and_gradient_of_the_objective(name, how):
    model, objective = make_model(), objectives.get(name)
    model.compile(keras.optimizers.SGD(0.1), loss=objectives.as_keras_loss(name), **how)
    # The second batch is smaller.
    for x, y in zip(*(np.split(part[:48], [BATCH]) for part in images())):
        with tf.GradientTape() as tape:
            expected = objective(model(x), y, training=True)
        gradients = tape.gradient(expected, model.trainable_variables)
        wanted = [w - 0.1 * g for w, g in zip(weights(model), gradients)]
        assert float(model.train_on_batch(x, y)) == pytest.approx(float(expected), rel=1e-4)
        for weight, value in zip(weights(model), wanted):
            np.testing.assert_allclose(weight, value, atol=1e-5)
        # Keras 3 reports the mean of all batches since the last reset.
        model.reset_metrics()


def test_evaluation_computes_the_objective():
    model, objective = make_model(), objectives.get("supcon")
    model.compile(loss=objectives.as_keras_loss("supcon"))
    rows, labels = (part[:BATCH] for part in images())
    expected = float(objective(model.predict(rows, verbose=0), labels))
    assert model.evaluate(rows, labels, batch_size=BATCH, verbose=0) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8", "float32", "float64"])
def test_labels(dtype):
    loss, rows = objectives.as_keras_loss("contrastive", miner="all"), tf.random.normal((4, 6))
    labels = np.array([3, 0, 3, 200], dtype)
    expected = float(objectives.get("contrastive", miner="all")(rows, labels.astype(np.int64)))
    assert expected > 0
    for y_true in (labels, labels[:, None], tf.constant(labels)):
        assert float(loss(y_true, rows)) == pytest.approx(expected)


def test_large_labels_stay_distinct():
    # In float32 they would be only two classes.
    labels = 2**24 + np.arange(4)
    assert len(np.unique(labels.astype(np.float32))) < 4
    loss, model, rows = objectives.as_keras_loss("contrastive", miner="all"), make_model(), images()[0][:4]
    model.compile(loss=loss)
    expected = float(objectives.get("contrastive", miner="all")(model.predict(rows, verbose=0), np.arange(4)))
    assert float(loss(labels, model.predict(rows, verbose=0))) == pytest.approx(expected)
    for y in (labels, labels[:, None], labels.astype(np.int32)):
        assert model.evaluate(rows, y, verbose=0) == pytest.approx(expected)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy):
    keras.mixed_precision.set_global_policy(policy)
    try:
        model, loss, objective = held("proxy_anchor", num_classes=CLASSES)
        # With Keras's initial loss scale the first steps overflow and are skipped.
        model.compile(keras.optimizers.Adam(0.01), loss=loss)
        history = fit(model, epochs=6).history["loss"]
    finally:
        keras.mixed_precision.set_global_policy("float32")
    assert np.isfinite(history).all()
    assert history[-1] < history[0]
    assert objective.get_weights()[0].dtype == np.float32
    assert loss(np.arange(4), tf.ones((4, 6), tf.float16)).dtype == tf.float32


STRATEGY = """
import sys
import numpy as np, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
sys.path.insert(0, sys.argv[1])
from s2sd_tf import objectives
from s2sd_tf.keras_compat import keras
from test_keras_loss import BATCH, CLASSES, held, images, make_model

rows, labels = (part[:BATCH] for part in images())
dataset = tf.data.Dataset.from_tensor_slices((rows, labels)).batch(BATCH)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
for name in ("triplet", "proxy_nca"):
    with strategy.scope():
        if name == "proxy_nca":
            model, loss, objective = held(name, num_classes=CLASSES)
        else:
            model, loss, objective = make_model(), objectives.as_keras_loss(name), objectives.get(name)
        model.compile(keras.optimizers.SGD(0.1), loss=loss)
    with tf.GradientTape() as tape:
        # Each replica has a half and draws for it by itself.
        halves = [objective(model(rows[k]), labels[k]) for k in (slice(0, 16), slice(16, 32))]
        expected = sum(halves) / 2
    gradients = tape.gradient(expected, model.trainable_variables)
    wanted = [np.array(w) - 0.1 * np.array(tf.convert_to_tensor(g)) for w, g in zip(model.get_weights(), gradients)]
    found = model.fit(dataset, verbose=0).history["loss"][0]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for weight, value in zip(model.get_weights(), wanted):
        np.testing.assert_allclose(weight, value, atol=1e-5)
print("equal")
"""


def test_the_loss_is_the_mean_over_replicas(tmp_path, run_python):
    (tmp_path / "script.py").write_text(STRATEGY)
    assert "equal" in run_python("script.py", __file__.rsplit("/", 1)[0], cwd=tmp_path).stdout


class TestSaving:
    def test_settings_are_restored(self, tmp_path):
        model = make_model()
        loss = objectives.as_keras_loss("multi_similarity", alpha=3.0, miner="distance_weighted", name="mine")
        model.compile("adam", loss=loss)
        fit(model)
        loaded = reloaded(model, tmp_path)
        assert loaded.loss.get_config()["objective"]["config"] == loss.get_config()["objective"]["config"]
        assert loaded.loss.name == "mine"
        copy = type(loss).from_config(loss.get_config())
        rows, labels = (part[:BATCH] for part in images())
        assert float(copy(labels, rows)) == float(
            objectives.get("multi_similarity", alpha=3.0, miner="distance_weighted")(rows, labels)
        )
        fit(loaded)

    @pytest.mark.parametrize("name", ["proxy_anchor", "margin"])
    def test_a_held_objective_resumes(self, tmp_path, name):
        model, loss, objective = held(name, num_classes=CLASSES)
        model.compile(keras.optimizers.Adam(0.01), loss=loss)
        fit(model)
        loaded = reloaded(model, tmp_path)
        for weight, value in zip(weights(loaded), weights(model)):
            np.testing.assert_array_equal(weight, value)
        start = loaded.layers[-1].objective.get_weights()[0]
        fit(model, epochs=2)
        fit(loaded, epochs=2)
        for weight, value in zip(weights(loaded), weights(model)):
            np.testing.assert_array_equal(weight, value)
        # The weights include the draws of a miner.
        assert len(weights(model)) == 4 + len(objective.weights)
        assert np.abs(loaded.layers[-1].objective.get_weights()[0] - start).max() > 1e-3

    def test_two_loaded_models_have_separate_objectives(self, tmp_path):
        model, loss, _ = held("proxy_anchor", num_classes=CLASSES)
        model.compile("adam", loss=loss)
        fit(model)
        one, other = (reloaded(model, tmp_path) for _ in range(2))
        before = other.layers[-1].objective.get_weights()[0]
        fit(one)
        np.testing.assert_array_equal(other.layers[-1].objective.get_weights()[0], before)
        assert np.abs(one.layers[-1].objective.get_weights()[0] - before).max() > 1e-4

    def test_without_a_holder_draws_restart(self, tmp_path):
        rows, labels = (part[:BATCH] for part in images())
        embeddings = make_model().predict(rows, verbose=0)
        model, loss = make_model(), objectives.as_keras_loss("triplet", margin=2.0)
        model.compile("sgd", loss=loss)
        first = [float(loss(labels, embeddings)) for _ in range(3)]
        assert len(set(first)) == 3
        assert [float(reloaded(model, tmp_path).loss(labels, embeddings))] == first[:1]

    def test_the_weights_load_without_the_loss(self, tmp_path):
        model, loss, objective = held("proxy_anchor", num_classes=CLASSES)
        model.compile("adam", loss=loss)
        fit(model)
        model.save(str(tmp_path / "model.keras"))
        loaded = keras.models.load_model(str(tmp_path / "model.keras"), compile=False)
        np.testing.assert_array_equal(loaded.layers[-1].objective.get_weights()[0], objective.get_weights()[0])


class TestRefusals:
    rows, labels = tf.ones((4, 6)), np.array([0, 0, 1, 1])

    def test_objectives_that_cannot_be_a_loss(self):
        with pytest.raises(ValueError, match="'proxy_anchor', which has weights"):
            objectives.as_keras_loss("proxy_anchor", num_classes=4)
        with pytest.raises(ValueError, match=r"memory_size: expected 0, .*Received: 64"):
            objectives.as_keras_loss("supcon", memory_size=64)
        with pytest.raises(ValueError, match="objective: expected one of"):
            objectives.as_keras_loss("nonsense")
        # Without learned boundaries it has no weights.
        objectives.as_keras_loss("margin", learnable_beta=False)(self.labels, self.rows)

    def test_an_objective_with_weights_needs_a_holder(self):
        loss = objectives.as_keras_loss(objectives.get("proxy_anchor", num_classes=4))
        with pytest.raises(ValueError, match="objective: expected one without weights, or an instance that is in"):
            loss(self.labels, self.rows)
        model = make_model()
        model.compile("sgd", loss=loss)
        with pytest.raises(ValueError, match="in an ObjectiveHolder of the model; or use S2SDModel"):
            fit(model)

    def test_a_loss_without_its_holder(self):
        _, loss, objective = held("proxy_anchor", num_classes=4)
        config = loss.get_config()
        assert config["objective"] == objective.holder_key
        with pytest.raises(ValueError, match="objective: expected its ObjectiveHolder"):
            type(loss).from_config({**config, "objective": "another"})

    def test_sample_weights(self):
        loss = objectives.as_keras_loss("supcon")
        with pytest.raises(ValueError, match="sample_weight: expected none"):
            loss(self.labels, self.rows, sample_weight=np.ones(4))
        model = make_model()
        model.compile("sgd", loss=loss)
        with pytest.raises(ValueError, match="sample_weight: expected none"):
            fit(model, class_weight=dict.fromkeys(range(CLASSES), 1.0))

    def test_shapes(self):
        loss = objectives.as_keras_loss("supcon")
        with pytest.raises(ValueError, match=r"y_true: expected integers .*of shape \(4, 3\)"):
            loss(np.eye(3, dtype=int)[[0, 0, 1, 1]], self.rows)
        with pytest.raises(ValueError, match=r"y_pred: expected embeddings .*Received: shape \(4, 2, 3\)"):
            loss(self.labels, tf.ones((4, 2, 3)))

    @pytest.mark.parametrize("labels", [[0.5, 1.0, 0.0, 1.0], [0.0, 0.0, 1.0, 2.0**24]])
    def test_labels_that_are_not_integers(self, labels):
        loss = objectives.as_keras_loss("supcon")
        with pytest.raises(ValueError, match=r"y_true: expected integers .*whole numbers below"):
            loss(np.float32(labels), self.rows)
        with pytest.raises(tf.errors.InvalidArgumentError, match="y_true: expected integers; or whole numbers below"):
            tf.function(loss)(tf.constant(labels), self.rows)
        assert np.isnan(tf.function(loss, jit_compile=True)(tf.constant(labels), self.rows))
