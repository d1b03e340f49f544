"""Nested embeddings: every prefix against its own loss, saving, errors, and `truncate`."""

import numpy as np
import pytest
import tensorflow as tf

import s2sd_tf
from s2sd_tf.keras_compat import keras

DIMS = (2, 3, 6)
LABELS = np.arange(12) % 4


@pytest.fixture
def batch(unit_rows):
    embedding, features, *targets = (tf.constant(unit_rows(12, dim, dim)) for dim in (6, 10, 8, 9))
    return embedding, targets, features, LABELS


def make(**settings):
    given = {"target_dims": (8, 9), "feature_distill_delay": 0, "dtype": "float64", **settings}
    return s2sd_tf.S2SDLoss(**given)


@pytest.mark.parametrize("weights", [(), (1, 0, 3)])
@pytest.mark.parametrize("objective", ["multi_similarity", "supcon"])
def test_terms_and_gradients_are_means_over_the_prefixes(batch, objective, weights):
    embedding, targets, features, labels = batch
    shares = np.array(weights or (1, 1, 1)) / np.sum(weights or (1, 1, 1))
    single, nested = make(objective=objective), make(objective=objective, nested_dims=DIMS, nested_weights=weights)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch([embedding, *targets])
        alone = [single(embedding[:, :dim], targets, features, labels) for dim in DIMS]
        expected = sum(share * terms["loss"] for share, terms in zip(shares, alone))
        found = nested(embedding, targets, features, labels)
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-10)
    for name in ("objective", "distill_kls", "feature_kl"):
        np.testing.assert_allclose(found[name], sum(s * t[name] for s, t in zip(shares, alone)), rtol=1e-10)
    np.testing.assert_allclose(found["nested_objectives"], [terms["objective"] for terms in alone], rtol=1e-10)
    kls = [[*terms["distill_kls"], terms["feature_kl"]] for terms in alone]
    np.testing.assert_allclose(found["nested_kls"], kls, rtol=1e-10)
    for value in (embedding, *targets):
        np.testing.assert_allclose(tape.gradient(found["loss"], value), tape.gradient(expected, value), atol=1e-10)


def test_one_prefix_is_the_loss_without_prefixes(batch):
    plain, nested = make()(*batch), make(nested_dims=(6,))(*batch)
    assert plain.keys() == nested.keys()
    for name, value in plain.items():
        np.testing.assert_array_equal(nested[name], value)


def test_without_teachers(batch):
    embedding, _, _, labels = batch
    loss = make(objective="triplet", target_dims=(), feature_distill=False, nested_dims=DIMS)
    terms = loss(embedding, [], None, labels)
    assert set(terms) == {"loss", "objective", "nested_objectives"}
    np.testing.assert_allclose(terms["loss"], np.mean(terms["nested_objectives"]), rtol=1e-12)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"nested_dims": (4, 2)}, r"nested_dims: expected strictly increasing.*Received: \(4, 2\)"),
        ({"nested_dims": (2, 2)}, "nested_dims"),
        ({"nested_dims": 6}, "nested_dims.*Received: 6"),
        ({"nested_dims": (0, 6)}, "nested_dims.*Received: 0"),
        ({"nested_dims": DIMS, "nested_weights": (1, 2)}, r"nested_weights: expected 3.*Received: \(1, 2\)"),
        ({"nested_dims": DIMS, "nested_weights": (0, 0, 0)}, "nested_weights.*not all 0"),
        ({"nested_dims": DIMS, "nested_weights": (1, -1, 1)}, "nested_weights.*-1"),
        ({"nested_weights": (1,)}, "nested_weights"),
    ],
)
def test_errors_name_the_argument(settings, words):
    with pytest.raises(ValueError, match=words):
        make(**settings)


def test_the_last_prefix_is_the_embedding(small_model):
    with pytest.raises(ValueError, match=r"nested_dims: expected the dimension of the base embedding, 4.*\(2, 3\)"):
        small_model(nested_dims=(2, 3))


@pytest.mark.parametrize("micro_batch_size", [0, 5])
def test_training_saving_and_logs(small_model, tmp_path, micro_batch_size):
    images = np.random.default_rng(0).uniform(size=(12, 8, 8, 1)).astype(np.float32)
    model = small_model(
        objective="proxy_anchor", num_classes=4, nested_dims=(2, 4), log_per_target=True, feature_distill_delay=0,
        micro_batch_size=micro_batch_size,
    )  # fmt: skip
    assert [objective.proxies.shape[1] for objective in model.s2sd_loss.nested_objectives] == [2]
    before = model.s2sd_loss.nested_objectives[0].proxies.numpy()
    model.compile(optimizer="adam")
    model.fit(images, LABELS, batch_size=12, shuffle=False, verbose=0)
    assert np.abs(model.s2sd_loss.nested_objectives[0].proxies.numpy() - before).max() > 0
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    logs = [one.train_on_batch(images, LABELS, return_dict=True) for one in (model, loaded)]
    assert {"nested2_objective", "nested4_objective", "nested2_kl", "nested4_kl"} <= set(logs[0])
    assert logs[0] == pytest.approx(logs[1], abs=1e-5)
    for one, other in zip(model.get_weights(), loaded.get_weights()):
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_truncate(dtype, scale):
    rows = (np.random.default_rng(0).normal(size=(2, 5, 6)) * scale).astype(dtype)
    rows[0, 0, :3] = 0
    found, tensor = s2sd_tf.truncate(rows, 3), s2sd_tf.truncate(tf.constant(rows), 3)
    assert isinstance(found, np.ndarray)
    assert tf.is_tensor(tensor)
    assert found.dtype == tensor.dtype == np.dtype(dtype)
    assert found.shape == tensor.shape == (2, 5, 3)
    np.testing.assert_allclose(found, tensor, rtol=1e-3 if dtype == "float16" else 1e-6)
    norms = np.linalg.norm(found.astype(np.float64), axis=-1).ravel()
    assert norms[0] == 0
    np.testing.assert_allclose(norms[1:], 1, rtol=2e-3)
    np.testing.assert_array_equal(s2sd_tf.truncate(rows[:, :0], 2), np.zeros((2, 0, 2)))


@pytest.mark.parametrize(
    ("rows", "dim", "words"),
    [
        (np.zeros((2, 3)), 4, "dim: expected at most 3.*Received: 4"),
        (np.zeros((2, 3)), 0, "dim: expected an int >= 1"),
        (np.zeros((2, 3)), 1.5, "dim"),
        (np.zeros((2, 3), np.int32), 2, "embeddings: expected floats"),
        (1.0, 1, "embeddings: expected floats"),
        (["a"], 1, "embeddings: expected floats"),
    ],
)
def test_what_truncate_refuses(rows, dim, words):
    with pytest.raises(ValueError, match=words):
        s2sd_tf.truncate(rows, dim)
