"""Teachers from outside: embeddings that come with the images."""

import dataclasses

import conftest
import numpy as np
import pytest
import tensorflow as tf

import s2sd_tf
from s2sd_tf import data
from s2sd_tf.training import load_run, train
from s2sd_tf.training.datasets import load_split
from s2sd_tf.training.record import fingerprint

LABELS = np.arange(12) % 4


def naive_kl(student, teacher, temperature=1.0):
    def softmax(rows):
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        exponents = np.exp(rows @ rows.T / temperature)
        return exponents / exponents.sum(axis=1, keepdims=True)

    p, q = softmax(teacher), softmax(student)
    return temperature**2 * np.mean(np.sum(p * np.log(p / q), axis=1))


def make(**settings):
    given = {"target_dims": (8,), "feature_distill_delay": 0, "dtype": "float64", **settings}
    return s2sd_tf.S2SDLoss(**given)


@pytest.fixture
def batch(unit_rows):
    embedding, target, features = (tf.constant(unit_rows(12, dim, dim)) for dim in (4, 8, 10))
    return embedding, [target], features, LABELS


@pytest.fixture
def teachers():
    generator = np.random.default_rng(3)
    # Not of length 1, and of two precisions.
    return [3.0 * generator.normal(size=(12, 5)), generator.normal(size=(12, 7)).astype(np.float32)]


@pytest.mark.parametrize("others", [{}, {"target_dims": (), "feature_distill": False}])
def test_they_add_their_weighted_mean_divergence(batch, teachers, others):
    embedding, targets, features, labels = batch
    targets = targets if "target_dims" not in others else []
    settings = {"temperature": 0.7, **others}
    without, loss = make(**settings), make(external_teachers=2, external_distill_weight=30.0, **settings)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch([embedding, *targets])
        expected = without(embedding, targets, features, labels)
        found = loss(embedding, targets, features, labels, teachers=teachers)
        unit = [tf.linalg.l2_normalize(tf.cast(rows, tf.float64), axis=1) for rows in (embedding, *teachers)]
        alone = s2sd_tf.similarity_kl(unit[0], unit[1:], 0.7, implementation="composed")[0]
        total = expected["loss"] + 30.0 * alone
    kls = [naive_kl(embedding.numpy(), teacher, 0.7) for teacher in teachers]
    np.testing.assert_allclose(found["external_kls"], kls, rtol=1e-6)
    np.testing.assert_allclose(found["loss"], expected["loss"] + 30.0 * np.mean(kls), rtol=1e-6)
    for name in expected.keys() - {"loss"}:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-12)
    for value in (embedding, *targets):
        np.testing.assert_allclose(tape.gradient(found["loss"], value), tape.gradient(total, value), atol=1e-6)


def test_their_schedule(batch, teachers):
    loss = make(external_teachers=2, external_distill_delay=1, external_distill_warmup_steps=2, feature_distill=False)
    # The default weight is 5.
    found = [loss(*batch, training=True, teachers=teachers) for _ in range(4)]
    rest = found[0]["loss"]
    extra = [float((terms["loss"] - rest) / tf.reduce_mean(terms["external_kls"])) for terms in found]
    np.testing.assert_allclose(extra, [0.0, 2.5, 5.0, 5.0], rtol=1e-9)


def test_they_teach_every_prefix(batch, teachers):
    found = make(external_teachers=2, nested_dims=(2, 4))(*batch, teachers=teachers)
    assert found["nested_kls"].shape == (2, 4)
    np.testing.assert_allclose(found["nested_kls"][:, 1:3], [
        [naive_kl(batch[0][:, :dim].numpy(), teacher) for teacher in teachers] for dim in (2, 4)
    ], rtol=1e-6)  # fmt: skip
    np.testing.assert_allclose(found["external_kls"], tf.reduce_mean(found["nested_kls"][:, 1:3], axis=0))


@pytest.mark.parametrize(
    "given", [[], [np.ones((12, 3))], [np.ones((11, 3))] * 2, [np.ones(12)] * 2, [np.ones((12, 0))] * 2]
)
def test_a_batch_that_does_not_fit_is_refused(batch, given):
    with pytest.raises(ValueError, match=r"teachers: expected external_teachers=2 matrices \(12, dimension\)"):
        make(external_teachers=2)(*batch, teachers=given)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"external_teachers": -1}, "external_teachers"),
        ({"external_distill_weight": -1.0}, "external_distill_weight"),
        ({"external_distill_delay": 0.5}, "external_distill_delay"),
        ({"external_distill_warmup_steps": -1}, "external_distill_warmup_steps"),
    ],
)
def test_errors_name_the_argument(settings, name):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        make(**settings)


class TestImages:
    pixels = np.zeros((6, 4, 4, 1), np.uint8)
    labels = np.array([0, 1, 2, 0, 1, 2])
    by_image, by_class = np.arange(12.0).reshape(6, 2), np.arange(9.0).reshape(3, 3)

    def test_rows_follow_their_images(self):
        images = data.ImageSet(self.pixels, self.labels, teachers=[self.by_image, self.by_class])
        assert [teacher.dtype for teacher in images.teachers] == [np.float32] * 2
        np.testing.assert_array_equal(images.teachers[1], self.by_class[self.labels])
        some = images.select_images([4, 2])
        np.testing.assert_array_equal(some.teachers[0], self.by_image[[4, 2]])
        np.testing.assert_array_equal(some.teachers[1], self.by_class[[1, 2]])
        some = images.select_classes([2, 0])
        np.testing.assert_array_equal(some.teachers[0], self.by_image[[0, 2, 3, 5]])
        np.testing.assert_array_equal(some.teachers[1], self.by_class[[0, 2, 0, 2]])
        train, held_out = data.split_samples(images, 0.5)
        for part in (train, held_out):
            np.testing.assert_array_equal(part.teachers[1], self.by_class[part.labels])

    @pytest.mark.parametrize(
        "teacher",
        [np.ones((5, 2)), np.ones(6), np.ones((6, 0)), np.ones((6, 2), int), np.full((3, 2), np.nan), "abc"],
    )
    def test_what_is_refused(self, teacher):
        with pytest.raises(ValueError, match=r"^teachers: expected"):
            data.ImageSet(self.pixels, self.labels, teachers=[teacher])

    @pytest.mark.parametrize("cache", [True, False])
    def test_batches_have_the_rows_of_their_images(self, cache):
        # Every image shows its position.
        pixels = np.broadcast_to(np.arange(6, dtype=np.uint8)[:, None, None, None], (6, 4, 4, 1))
        images = data.ImageSet(pixels, self.labels, teachers=[self.by_image, self.by_class])
        sampler = data.samplers.get("class_balanced", classes_per_batch=2, samples_per_class=2)
        batches = data.training_batches(images, data.Preprocessing(4, 4, 1), sampler, steps_per_epoch=3, cache=cache)
        for inputs, given in batches:
            at = np.rint(255 * inputs.numpy()[:, 0, 0, 0]).astype(int)
            np.testing.assert_array_equal(given["labels"], self.labels[at])
            np.testing.assert_array_equal(given["teachers"][0], self.by_image[at])
            np.testing.assert_array_equal(given["teachers"][1], self.by_class[self.labels[at]])

    def test_the_fingerprint_changes_with_them(self):
        images = data.ImageSet(self.pixels, self.labels)
        taught = dataclasses.replace(images, teachers=[self.by_class])
        other = dataclasses.replace(images, teachers=[self.by_class + 1])
        assert len({fingerprint(found) for found in (images, taught, other)}) == 3


class TestModel:
    def test_training_and_saving(self, small_model, tmp_path):
        model = small_model(external_teachers=1, external_distill_weight=7.0, log_per_target=True)
        model.compile("sgd")
        generator = np.random.default_rng(0)
        images = generator.normal(size=(12, *model.backbone.input_shape[1:])).astype(np.float32)
        given = {"labels": LABELS, "teachers": generator.normal(size=(12, 6)).astype(np.float32)}
        logs = model.fit(images, given, batch_size=6, epochs=1, verbose=0).history
        assert logs["external_kl"][0] > 0
        model.save(tmp_path / "model.keras")
        loaded = tf.keras.models.load_model(tmp_path / "model.keras")
        assert loaded.s2sd_loss.external_distill_weight == 7.0
        expected = model.evaluate(images, given, batch_size=6, verbose=0, return_dict=True)
        found = loaded.evaluate(images, given, batch_size=6, verbose=0, return_dict=True)
        assert found == pytest.approx(expected, rel=1e-5)
        with pytest.raises(ValueError, match="teachers: expected external_teachers=1"):
            model.fit(images, LABELS, batch_size=6, verbose=0)
        with pytest.raises(ValueError, match=r"data: expected batches .* Received: a dict of \['label'\]"):
            model.fit(images, {"label": LABELS}, batch_size=6, verbose=0)


class TestRuns:
    settings = {"model.filters": (8, 8), "s2sd.target_dims": (16,), "train.epochs": 1, "train.steps_per_epoch": 3}

    def config(self, *paths, **changes):
        given = {"data.teachers": tuple(map(str, paths)), "data.validation_fraction": 0.2}
        return conftest.small_config(**self.settings, **given, **changes)

    def test_a_run(self, tmp_path):
        split = load_split(self.config())
        generator = np.random.default_rng(0)
        for name, rows in (("images", len(split.train)), ("classes", split.train.num_classes)):
            np.save(tmp_path / f"{name}.npy", generator.normal(size=(rows, 6)))
        config = self.config(tmp_path / "images.npy", tmp_path / "classes.npy")
        results = train(config, str(tmp_path / "run"))
        assert results["steps"] == 3
        assert "external_kl" in (tmp_path / "run" / "history.csv").read_text().splitlines()[0]
        # The run stays usable without the files.
        for name in ("images", "classes"):
            (tmp_path / f"{name}.npy").unlink()
        model, _, _ = load_run(tmp_path / "run")
        assert model.s2sd_loss.external_teachers == 2

    @pytest.mark.parametrize(
        ("content", "error", "words"),
        [
            (None, FileNotFoundError, r"expected \.npy files"),
            (b"no array", ValueError, r"expected \.npy files"),
            (np.ones((3, 2)), ValueError, "expected float matrices with 901 rows, one an image, or 5, one a class"),
            (np.array([{}]), ValueError, r"expected \.npy files"),
        ],
    )
    def test_bad_files_are_refused(self, tmp_path, content, error, words):
        path = tmp_path / "teacher.npy"
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            np.save(path, content, allow_pickle=True)
        with pytest.raises(error, match=f"config.data.teachers.*{words}"):
            load_split(self.config(path))
