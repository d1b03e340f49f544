"""Nested embeddings: every prefix against its own loss, saving, errors, `truncate`, export and the programs."""

import json

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import s2sd_tf
from s2sd_tf import data, evaluation, export, serving
from s2sd_tf.cli import evaluated
from s2sd_tf.files import read_json, write_json
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


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with images (4 classes of 4) and a nested model, as encoder and as `.keras`; and the model."""
    root = tmp_path_factory.mktemp("nested")
    generator = np.random.default_rng(0)
    for label, pattern in enumerate(generator.integers(0, 200, (4, 9, 9, 3))):
        (root / "images" / f"c{label}").mkdir(parents=True)
        for i in range(4):
            pixels = (pattern + generator.integers(0, 56, (9, 9, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(root / "images" / f"c{label}" / f"{i}.png")
    keras.utils.set_random_seed(0)
    backbone = s2sd_tf.models.backbones.conv_blocks((8, 8, 3), filters=(6, 8), pools=1)
    model = s2sd_tf.S2SDModel(backbone, 6, target_dims=(8,), nested_dims=DIMS)
    preprocessing = data.Preprocessing(8, 8, 3)
    export.export_encoder(model, preprocessing, root / "encoder")
    model.save(root / "model.keras")
    write_json(root / "preprocessing.json", preprocessing.get_config())
    return root, model


LOADER = """
import sys, json, pathlib
sys.modules.update(s2sd_tf=None, keras_cv=None)
import tensorflow as tf
signatures = tf.saved_model.load(sys.argv[1]).signatures
contents = [path.read_bytes() for path in sorted(pathlib.Path(sys.argv[2]).glob("*/*.png"))]
images = tf.stack([tf.io.decode_png(content) for content in contents])
given = {"encoded_images": tf.constant(contents), "pixels": images, "images": tf.cast(images, tf.float32) / 255}
found = {}
for name, signature in signatures.items():
    kind = "images" if name == "serving_default" else name.rstrip("_0123456789")
    found[name] = signature(**{kind: given[kind]})["embedding"].numpy().tolist()
    assert signature(**{kind: given[kind][:0]})["embedding"].shape[0] == 0
print(json.dumps(found))
"""


class TestExport:
    def test_every_dimension_without_the_package(self, made, tmp_path, run_python):
        root, _ = made
        (tmp_path / "loader.py").write_text(LOADER)
        found = json.loads(run_python(tmp_path / "loader.py", root / "encoder", root / "images", cwd=tmp_path).stdout)
        whole = ("serving_default", "pixels", "encoded_images")
        prefixes = {f"{kind}_{dim}": dim for kind in ("images", *whole[1:]) for dim in DIMS[:-1]}
        assert set(found) == {*whole, *prefixes}
        paths = sorted((root / "images").glob("*/*.png"))
        expected = serving.Encoder(root / "encoder")([path.read_bytes() for path in paths])
        for name, rows in found.items():
            np.testing.assert_allclose(rows, s2sd_tf.truncate(expected, prefixes.get(name, 6)), atol=1e-5)

    def test_the_loader(self, made):
        encoder = serving.Encoder(made[0] / "encoder", 3)
        assert (encoder.dim, encoder.dims) == (3, DIMS)
        assert encoder([]).shape == (0, 3)
        for dim in (4, True):
            with pytest.raises(ValueError, match=rf"^dim: expected one of \[2, 3, 6\], .*nested_dims.* {dim}$"):
                serving.Encoder(made[0] / "encoder", dim)

    def test_an_index_of_a_prefix(self, made, tmp_path):
        root, model = made
        images = np.random.default_rng(0).random((4, 8, 8, 3), np.float32)
        rows = s2sd_tf.truncate(model(images, training=False).numpy(), 2)
        export.export_retrieval(root / "encoder", evaluation.build_index(rows), tmp_path / "retrieval", k=1)
        found = export.load_retrieval(tmp_path / "retrieval").signatures["serving_default"](images=tf.constant(images))
        assert found["ids"].numpy().ravel().tolist() == [b"0", b"1", b"2", b"3"]


class TestPrograms:
    def test_embed(self, call, made, tmp_path):
        root, _ = made
        given = (f"--encoder={root / 'encoder'}", f"--images={root / 'images'}")
        assert "16 images, 3 dimensions" in call("embed", *given, "--dim=3", f"--output={tmp_path / 'emb'}").stdout
        whole = serving.Encoder(root / "encoder")
        found, ids, _ = evaluation.read_embeddings(tmp_path / "emb")
        expected = whole([(root / "images" / name).read_bytes() for name in ids])
        np.testing.assert_allclose(found[:], s2sd_tf.truncate(expected, 3), atol=1e-6)
        items = serving.list_images(root / "images")
        with pytest.raises(ValueError, match=r"folder: expected .*differs in dim$"):
            serving.embed_images(items, whole, tmp_path / "emb", progress=False)

    def test_beam(self, made, tmp_path):
        from s2sd_tf.serving import beam

        root, _ = made
        items = serving.list_images(root / "images")[:3]
        summary = beam.run(items, root / "encoder", tmp_path / "out", shards=1, dim=2)
        assert (summary["embedded"], summary["dim"]) == (3, 2)
        assert evaluation.read_embeddings(tmp_path / "out").rows.shape == (3, 2)

    def test_evaluate(self, call, made, tmp_path):
        root, _ = made
        files = {name: tmp_path / name for name in ("out.json", "plot.png", "report.html")}
        given = (f"--images={root / 'images'}", "--methods=exact", "--noclustering", "--metrics=cosine")
        output = call(
            "evaluate", f"--model={root / 'encoder'}", *given, "--dims=2,6", f"--output={files['out.json']}",
            f"--dims_plot={files['plot.png']}", f"--report={files['report.html']}",
        ).stdout  # fmt: skip
        results = read_json(files["out.json"])
        assert list(results["dims"]) == ["2", "6"]
        assert [results["dims"][dim]["bytes"] for dim in ("2", "6")] == [8, 24]
        assert all(found["queries_per_second"] > 0 for found in results["dims"].values())
        assert results["exact"].items() <= results["dims"]["6"].items()
        assert results["dims"]["2"]["recall@1"] != results["dims"]["6"]["recall@1"]
        table = [line.split() for line in output.splitlines() if line.split()[:1] in (["2"], ["6"], ["dimension"])]
        assert table[0][-2:] == ["bytes", "queries/s"]
        assert [line[-2] for line in table] == ["bytes", "8", "24"]
        assert Image.open(files["plot.png"]).size[0] > 500
        page = files["report.html"].read_text()
        assert "<h2>Dimensions</h2>" in page
        assert "metrics over dimension" in page

    def test_what_evaluate_refuses(self, call, made, tmp_path):
        root, _ = made
        np.savez(tmp_path / "rows.npz", embeddings=np.ones((4, 3)), labels=np.arange(4) // 2)
        for name in ("encoder", "model.keras"):
            with pytest.raises(ValueError, match=r"^--dims: expected one of \[2, 3, 6\], .* Received: 4$"):
                evaluated.model(str(root / name), str(root / "images"), None, dims=(2, 4))
        with pytest.raises(ValueError, match=r"^--dims: expected at most 3, .*rows.npz.* Received: 4$"):
            evaluated.embeddings((str(tmp_path / "rows.npz"), None, None), None, dims=(2, 4))
        error = call("evaluate", f"--embeddings={tmp_path / 'rows.npz'}", "--dims_plot=a.png", status=2).stderr
        assert "--dims_plot: expected --dims too" in error


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_metrics_by_dim(metric):
    rows, labels = np.random.default_rng(0).normal(size=(30, 5)), np.arange(30) % 5
    found = evaluation.metrics_by_dim(rows, labels, dims=(2, 5), ks=(1, 3))
    gallery = evaluation.metrics_by_dim(rows[:10], labels[:10], rows[10:], labels[10:], dims=(3,), metric=metric)
    for dim, expected in (
        (2, evaluation.retrieval_metrics(rows[:, :2], labels, ks=(1, 3))),
        (5, evaluation.retrieval_metrics(rows, labels, ks=(1, 3))),
        (3, evaluation.retrieval_metrics(rows[:10, :3], labels[:10], rows[10:, :3], labels[10:])),
    ):
        one = {**found, **gallery}[dim]
        assert {name: one[name] for name in expected} == pytest.approx(expected)
    for dims, words in (((2, 6), "dims: expected at most 5.*6"), ((0,), "dims"), (3, "dims: expected a sequence")):
        with pytest.raises(ValueError, match=words):
            evaluation.metrics_by_dim(rows, labels, dims=dims)
    with pytest.raises(ValueError, match="neighbors: expected none"):
        evaluation.metrics_by_dim(rows, labels, dims=(2,), neighbors=evaluation.find_neighbors(rows, rows, 3))
