"""The encoder SavedModel, loaded in a process that cannot import this package."""

import io
import json
import sys

import numpy as np
import onnxruntime
import pytest
import tensorflow as tf
from conftest import needs_scann
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_fuzz import examples

import s2sd_tf
from s2sd_tf import data, evaluation, export, serving
from s2sd_tf.files import check_replaceable, replacing
from s2sd_tf.keras_compat import IS_KERAS_3, keras
from s2sd_tf.training.embedding import embed
from s2sd_tf.training.steps import make_train_step

LOADER = """
import sys, json
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("s2sd_tf", "keras_cv", "tensorflow_addons"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import numpy as np, tensorflow as tf
try:
    import s2sd_tf
    sys.exit("s2sd_tf could be imported")
except ImportError:
    pass
loaded = tf.saved_model.load(sys.argv[1])
inputs = np.load(sys.argv[2], allow_pickle=True).item()
floats = loaded.signatures["serving_default"](images=tf.constant(inputs["images"]))["embedding"]
encoded = {
    kind: loaded.signatures["encoded_images"](encoded_images=tf.constant(inputs[kind]))["embedding"].numpy().tolist()
    for kind in ("png", "jpeg", "mixed")
}
print(json.dumps({"floats": floats.numpy().tolist(), **encoded}))
"""


def encode(pixels, kind):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return buffer.getvalue()


@pytest.mark.skipif(IS_KERAS_3, reason="Keras 3 does not use AutoGraph")
def test_layers_may_branch_on_tensors(tmp_path):
    """By Python's `if`: Keras 2 passes layers through AutoGraph in `fit`, and so does all else that calls them."""

    class Backbone(keras.Model):
        def call(self, images):
            if tf.reduce_sum(images) > 0.0:
                images = 2.0 * images
            return images[:, :4, :4]

    train, test, preprocessing = data.load_digits()
    backbone = Backbone()
    backbone(tf.zeros([1, *preprocessing.output_shape]))
    model = s2sd_tf.S2SDModel(backbone, 4, target_dims=(8,), feature_distill_delay=0)
    model.compile(optimizer="adam")
    sampler = data.samplers.get("class_balanced", classes_per_batch=3, samples_per_class=2)
    batches = data.training_batches(train, preprocessing, sampler, 2)
    model.fit(batches, verbose=0)
    make_train_step(model, tf.distribute.get_strategy())(next(iter(batches)))
    images = data.evaluation_batches(test, preprocessing)
    expected = np.concatenate([model(batch, training=False) for batch in images])
    np.testing.assert_allclose(embed(model, test, preprocessing), expected, atol=1e-6)
    export.export_encoder(model, preprocessing, tmp_path / "encoder")
    encoder = tf.saved_model.load(str(tmp_path / "encoder")).signatures["pixels"]
    found = encoder(pixels=tf.constant(test.images))["embedding"]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_float_images_and_bytes_give_the_models_embeddings(small_model, tmp_path, run_python):
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (5, 20, 15, 3), dtype=np.uint8)
    preprocessing = data.Preprocessing(8, 8, 1, invert=True, mean=0.2, std=0.7)
    model = small_model(embedding_dim=6, target_pooling="avg+max")
    model.compile(optimizer="adam")
    model.fit(generator.normal(size=(8, 8, 8, 1)).astype(np.float32), np.arange(8) % 2, batch_size=8, verbose=0)
    export.export_encoder(model, preprocessing, str(tmp_path / "encoder"))

    png = [encode(image, "PNG") for image in pixels]
    jpeg = [encode(image, "JPEG") for image in pixels]
    other_size = encode(generator.integers(0, 256, (31, 12, 3), dtype=np.uint8), "PNG")
    grays = data.preprocessing.with_channels(tf.constant(pixels / 255.0, tf.float32), 1).numpy()
    inputs = {"images": grays, "png": png, "jpeg": jpeg, "mixed": [png[0], other_size, jpeg[1]]}
    np.save(tmp_path / "inputs.npy", inputs, allow_pickle=True)
    (tmp_path / "loader.py").write_text(LOADER)
    arguments = (tmp_path / "loader.py", tmp_path / "encoder", tmp_path / "inputs.npy")
    found = json.loads(run_python(*arguments, cwd=tmp_path).stdout)

    expected = model(preprocessing(grays), training=False).numpy()
    np.testing.assert_allclose(found["floats"], expected, atol=1e-5)
    np.testing.assert_allclose(found["png"], expected, atol=1e-5)
    from_jpeg = model(np.stack([preprocessing.from_bytes(image) for image in jpeg]), training=False).numpy()
    np.testing.assert_allclose(found["jpeg"], from_jpeg, atol=1e-5)
    np.testing.assert_allclose(np.array(found["mixed"])[[0, 2]], [expected[0], from_jpeg[1]], atol=1e-5)


def test_it_contains_only_the_encoder(small_model, tmp_path):
    model = small_model(embedding_dim=6, target_dims=(512,))
    export.export_encoder(model, data.Preprocessing(8, 8, 1), str(tmp_path / "encoder"))
    stored = tf.train.list_variables(str(tmp_path / "encoder" / "variables" / "variables"))
    assert not any(512 in shape for _, shape in stored)


def test_it_contains_a_learned_pooling(small_model, tmp_path):
    model = small_model(pooling="gem", target_pooling="avg")
    model.gem.p.assign(2.5)
    export.export_encoder(model, data.Preprocessing(8, 8, 1), str(tmp_path / "encoder"))
    images = np.random.default_rng(0).random((3, 8, 8, 1), np.float32)
    found = tf.saved_model.load(str(tmp_path / "encoder")).signatures["serving_default"](images=tf.constant(images))
    np.testing.assert_allclose(found["embedding"], model.predict(images, verbose=0), atol=1e-5)


def run_onnx(path, images):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["images"]
    assert session.get_inputs()[0].shape[:3] == ["batch", "height", "width"]
    return dict(zip([value.name for value in session.get_outputs()], session.run(None, {"images": images})))


def run_litert(path, images):
    interpreter = tf.lite.Interpreter(str(path))
    assert list(interpreter.get_signature_list()) == ["serving_default"]
    interpreter.resize_tensor_input(interpreter.get_input_details()[0]["index"], images.shape)
    return interpreter.get_signature_runner()(images=images)


@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")
@pytest.mark.parametrize(("format", "run"), [("onnx", run_onnx), ("litert", run_litert)])
def test_other_formats_give_the_models_embeddings(small_model, tmp_path, format, run):
    model, path = small_model(nested_dims=(2, 4), pooling="gem"), tmp_path / f"encoder.{format}"
    preprocessing = data.Preprocessing(8, 8, 1, resize_size=10, invert=True, mean=0.2, std=0.7)
    path.write_text("an earlier file")
    export.export_encoder(model, preprocessing, path, format)
    for size in ((8, 8), (3, 40), (31, 17)):
        images = np.random.default_rng(0).random((3, *size, 1), np.float32)
        found, expected = run(path, images), model(preprocessing(images), training=False)
        assert set(found) == {"embedding", "embedding_2"}
        np.testing.assert_allclose(found["embedding"], expected, atol=1e-5)
        np.testing.assert_allclose(found["embedding_2"], s2sd_tf.truncate(expected, 2), atol=1e-5)
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


@examples(50)
@given(sides=st.tuples(st.integers(1, 60), st.integers(1, 60)), resize_size=st.sampled_from([None, 12, 17]))
def test_portable_preprocessing_equals_the_ordinary_one(sides, resize_size):
    preprocessing = data.Preprocessing(12, 9, 3, resize_size, mean=(0.1, 0.2, 0.3), std=0.5, channel_order="bgr")
    images = np.random.default_rng(0).random((2, *sides, 3), np.float32)
    np.testing.assert_allclose(preprocessing.portable(images), preprocessing(images), atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")
@pytest.mark.parametrize("format", ["savedmodel", "litert"])
def test_a_whitened_encoder(small_model, tmp_path, format):
    model, preprocessing = small_model(embedding_dim=5, nested_dims=(2, 5)), data.Preprocessing(8, 8, 1)
    images = np.random.default_rng(0).random((20, 8, 8, 1), np.float32)
    rows = model(preprocessing(images), training=False).numpy()
    whitening = evaluation.Whitening.fit(rows, 3)
    export.export_encoder(model, preprocessing, tmp_path / "encoder", format, whitening)
    if format == "savedmodel":
        loaded = tf.saved_model.load(str(tmp_path / "encoder"))
        assert len(loaded.signatures) == 3
        found = loaded.signatures["serving_default"](images=tf.constant(images))
    else:
        found = run_litert(tmp_path / "encoder", images)
    assert list(found) == ["embedding"]
    np.testing.assert_allclose(found["embedding"], whitening(rows), atol=1e-4)


def test_errors_of_other_formats_name_the_argument(small_model, tmp_path, monkeypatch):
    preprocessing = data.Preprocessing(8, 8, 1)
    with pytest.raises(ValueError, match=r"format: expected one of .*; did you mean litert"):
        export.export_encoder(small_model(), preprocessing, tmp_path / "encoder", "tflite")
    with pytest.raises(ValueError, match="path: expected a file to write"):
        export.export_encoder(small_model(), preprocessing, tmp_path, "litert")
    for whitening, message in (
        (3, "whitening: expected a Whitening or None. Received: int"),
        (evaluation.Whitening.fit(np.eye(7)), "whitening: expected one of 4 dimensions. Received: 7"),
    ):
        with pytest.raises(ValueError, match=message):
            export.export_encoder(small_model(), preprocessing, tmp_path / "encoder", whitening=whitening)
    monkeypatch.setitem(sys.modules, "tf2onnx", None)
    with pytest.raises(ImportError, match=r"pip install 's2sd_tf\[onnx\]'"):
        export.export_encoder(small_model(), preprocessing, tmp_path / "encoder", "onnx")
    assert not list(tmp_path.iterdir())


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    target = tmp_path / "folder"
    for content in ("old", "new"):
        with replacing(str(target)) as path:
            (tmp_path / path).mkdir()
            (tmp_path / path / "file").write_text(content)
        assert (target / "file").read_text() == content
    with pytest.raises(RuntimeError), replacing(str(target)) as path:  # noqa: PT012
        (tmp_path / path).mkdir()
        raise RuntimeError
    assert (target / "file").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


COLOUR = data.Preprocessing(8, 8, 3, mean=(0.1, 0.2, 0.3), std=0.5, channel_order="bgr")


@pytest.fixture(scope="module")
def colour_model():
    tf.keras.utils.set_random_seed(0)
    backbone = s2sd_tf.models.backbones.conv_blocks((8, 8, 3), filters=(6,), pools=1)
    return s2sd_tf.S2SDModel(backbone, 4, target_dims=(8,))


@pytest.fixture(scope="module")
def saved(colour_model, tmp_path_factory):
    """A folder with the SavedModels "encoder" and "retrieval", which has five items."""
    folder = tmp_path_factory.mktemp("saved")
    export.export_encoder(colour_model, COLOUR, folder / "encoder")
    rows = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    export.export_retrieval(folder / "encoder", evaluation.build_index(rows, list("abcde")), folder / "retrieval", k=3)
    return folder


@pytest.fixture(scope="module")
def encoder(saved):
    return tf.saved_model.load(str(saved / "encoder"))


@pytest.fixture(scope="module")
def retrieval(saved):
    return export.load_retrieval(saved / "retrieval")


SOME = np.random.default_rng(1).random((2, 9, 7, 3), np.float32)
NO_INPUT = {
    "serving_default": np.zeros((0, 9, 7, 3), np.float32),
    "pixels": np.zeros((0, 0, 0, 3), np.uint8),
    "encoded_images": tf.zeros([0], tf.string),
    "embeddings": np.zeros((0, 4), np.float32),
}


def with_value(value):
    images = SOME.copy()
    images[1, 3, 2, 0] = value
    return images


@needs_scann
class TestSignatures:
    @pytest.mark.parametrize("name", NO_INPUT)
    def test_an_empty_batch_gives_no_rows(self, encoder, retrieval, name):
        if name != "embeddings":
            assert encoder.signatures[name](tf.constant(NO_INPUT[name]))["embedding"].shape == (0, 4)
        found = retrieval.signatures[name](tf.constant(NO_INPUT[name]))
        assert {key: value.shape for key, value in found.items()} == dict.fromkeys(("ids", "labels", "scores"), (0, 3))

    def test_pixels_are_the_same_images_as_floats(self, encoder, retrieval, colour_model):
        pixels = (SOME * 255).astype(np.uint8)
        expected = colour_model(COLOUR.from_pixels(pixels), training=False)
        found = encoder.signatures["pixels"](pixels=tf.constant(pixels))["embedding"]
        np.testing.assert_allclose(found, expected, atol=1e-5)
        floats = encoder.signatures["serving_default"](images=tf.constant(pixels.astype(np.float32) / 255))
        np.testing.assert_allclose(floats["embedding"], expected, atol=1e-5)
        by_pixels = retrieval.signatures["pixels"](pixels=tf.constant(pixels))
        by_embeddings = retrieval.signatures["embeddings"](embeddings=found)
        np.testing.assert_allclose(by_pixels["scores"], by_embeddings["scores"], atol=1e-5)
        assert by_pixels["ids"].numpy().tolist() == by_embeddings["ids"].numpy().tolist()

    @pytest.mark.parametrize(
        ("name", "value", "reason"),
        [
            ("serving_default", with_value(np.nan), "images: expected numbers in .*, and 1 that are not finite"),
            ("serving_default", with_value(-np.inf), "images: expected numbers in .*, and 1 that are not finite"),
            ("serving_default", with_value(1.75), r"images: expected numbers in .*pixels.* to 1\.75"),
            ("serving_default", with_value(-0.75), r"images: expected numbers in .*pixels.* from -0\.75"),
            ("serving_default", SOME[..., :1], r"images: .*\(batch, height, width, 3\)\. Received: shape \[2 9 7 1\]"),
            ("serving_default", SOME[0], r"images: expected shape .* Received: shape \[9 7 3\]"),
            ("serving_default", SOME[..., :0], r"images: expected shape .* Received: shape \[2 9 7 0\]"),
            ("serving_default", SOME[:, :0], r"images: expected shape .* Received: shape \[2 0 7 3\]"),
            ("pixels", np.zeros((1, 9, 7, 4), np.uint8), r"pixels: expected shape .* Received: shape \[1 9 7 4\]"),
            ("encoded_images", tf.constant(b""), r"encoded_images: expected strings .* Received: shape \[\]"),
        ],
    )
    def test_other_images_are_refused(self, encoder, retrieval, name, value, reason):
        for model in (encoder, retrieval):
            with pytest.raises(tf.errors.InvalidArgumentError, match=reason):
                model.signatures[name](tf.constant(value))

    def test_overshoot_of_resizing_is_accepted(self, encoder):
        wide = np.kron(np.eye(3)[None, :, :, None] * np.ones(3), np.ones((1, 3, 3, 1))).astype(np.float32)
        for method in ("bicubic", "lanczos3", "lanczos5"):
            images = tf.image.resize(wide, (20, 20), method)
            assert np.max(images) > 1.05
            assert encoder.signatures["serving_default"](images=images)["embedding"].shape == (1, 4)

    def test_embeddings_that_cannot_be_searched_are_refused(self, retrieval):
        search = retrieval.signatures["embeddings"]
        for value, reason in (
            (np.full((1, 4), np.nan), "embeddings: expected finite numbers"),
            (np.zeros((1, 5)), r"embeddings: expected shape \(batch, 4\)\. Received: shape \[1 5\]"),
            (np.zeros(4), r"embeddings: expected shape \(batch, 4\)\. Received: shape \[4\]"),
        ):
            with pytest.raises(tf.errors.InvalidArgumentError, match=reason):
                search(tf.constant(value, tf.float32))

    def test_the_length_of_an_embedding_does_not_matter_for_cosine(self, retrieval):
        row = np.array([[1, -2, 3, 0.5]], np.float32)
        expected = retrieval.signatures["embeddings"](tf.constant(row))["scores"]
        for factor in (1e-9, 1e30):
            found = retrieval.signatures["embeddings"](tf.constant(row * np.float32(factor)))["scores"]
            np.testing.assert_allclose(found, expected, atol=1e-6)

    @examples(30)
    @given(st.data())
    def test_any_images_give_the_models_embeddings_or_one_line(self, encoder, colour_model, draw):
        batch, height, width = (draw.draw(st.sampled_from(sizes)) for sizes in ((0, 1, 3), (8, 8, 1, 5, 0), (8, 8, 11)))
        channels = draw.draw(st.sampled_from((3, 3, 3, 1, 4, 0)))
        shape = draw.draw(
            st.sampled_from([(batch, height, width, channels)] * 4 + [(height, width, 3), (1, 1, 8, 8, 3)])
        )
        images = np.random.default_rng(0).random(shape).astype(np.float32)
        value = draw.draw(st.sampled_from((0, 0, -0.5, 1.5, 255, -1, np.nan, np.inf)))
        images[..., -1:, :] = value
        name = draw.draw(st.sampled_from(("serving_default", "pixels")))
        is_float = draw.draw(st.sampled_from((name == "serving_default",) * 4 + (name == "pixels",)))
        fits = len(shape) == 4 and channels == 3 and (batch == 0 or height > 0)
        if is_float:
            fits &= name == "serving_default" and (images.size == 0 or -0.5 <= value <= 1.5)
        else:
            images = (np.clip(np.nan_to_num(images), 0, 1) * 255).astype(np.uint8)
            fits &= name == "pixels"
        call = encoder.signatures[name]
        if not fits:
            with pytest.raises(
                tf.errors.InvalidArgumentError, match=r"(images|pixels): expected .*Received: |expected to be a"
            ):
                call(tf.constant(images))
            return
        floats = images if is_float else images.astype(np.float32) / np.float32(255)
        expected = [colour_model(COLOUR(image)[None], training=False)[0] for image in floats]
        found = call(tf.constant(images))["embedding"]
        np.testing.assert_allclose(found, np.reshape(expected, (batch, 4)), atol=1e-5)


@needs_scann
class TestPythonDoors:
    def test_encoder(self, saved):
        encoder = serving.Encoder(saved / "encoder")
        png = encode((SOME[0] * 255).astype(np.uint8), "PNG")
        assert encoder([]).shape == (0, 4)
        assert encoder.embed([])[0].shape == (0, 4)
        np.testing.assert_array_equal(encoder(tf.constant([png])), encoder([png]))
        for value, found in ((png, "bytes"), (None, "NoneType"), (["a.png"], "str at position 0"),
                             ([png, None], "NoneType at position 1"), (SOME, "ndarray at position 0")):  # fmt: skip
            for door in (encoder, encoder.embed):
                with pytest.raises(ValueError, match=f"encoded: expected a list of bytes.* Received: {found}$"):
                    door(value)

    def test_one_saved_model_in_place_of_the_other(self, saved, tmp_path):
        with pytest.raises(ValueError, match=r"encoder: expected a SavedModel of export_encoder.*returns .'ids'"):
            serving.Encoder(saved / "retrieval")
        index = evaluation.build_index(np.eye(4, dtype=np.float32))
        with pytest.raises(ValueError, match="encoder: expected a SavedModel of export_encoder"):
            export.export_retrieval(saved / "retrieval", index, tmp_path / "out")
        with pytest.raises(ValueError, match=r"index: expected an index .*Received: ndarray"):
            export.export_retrieval(saved / "encoder", np.eye(4), tmp_path / "out")
        with pytest.raises(ValueError, match="path: expected a SavedModel of export_retrieval"):
            export.load_retrieval(saved / "encoder")
        assert not list(tmp_path.iterdir())


class TestExportEncoder:
    @pytest.mark.parametrize(
        ("size", "received"), [((9, 9, 1), r"\(9, 9, 1\)"), ((8, 8, 3), r"\(8, 8, 3\)"), (None, "None")]
    )
    def test_preprocessing_that_does_not_fit(self, small_model, tmp_path, size, received):
        preprocessing = size and data.Preprocessing(*size)
        with pytest.raises(ValueError, match=f"preprocessing: expected .*Received: .*{received}$"):
            export.export_encoder(small_model(), preprocessing, tmp_path / "out")
        assert not list(tmp_path.iterdir())

    def test_models_that_cannot_be_exported(self, small_model, tmp_path):
        unbuilt = s2sd_tf.S2SDModel(keras.Sequential([keras.layers.Conv2D(3, 3)]), 4, target_dims=(8,))
        for model, reason in (
            (unbuilt, "model: expected a built Keras model; .*Received: S2SDModel, which is not built"),
            (None, "model: expected a built Keras model; .*Received: NoneType"),
            (small_model().backbone, r"model: expected one output, .*Received: float32 \(None, 4, 4, 8\)"),
        ):
            with pytest.raises(ValueError, match=reason):
                export.export_encoder(model, data.Preprocessing(8, 8, 1), tmp_path / "out")
        assert not list(tmp_path.iterdir())

    def test_another_keras_model(self, tmp_path):
        layers = [keras.layers.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(3)]
        model, images = keras.Sequential(layers), np.random.default_rng(0).random((2, 8, 8, 1), np.float32)
        export.export_encoder(model, data.Preprocessing(8, 8, 1), tmp_path / "out")
        found = tf.saved_model.load(str(tmp_path / "out")).signatures["serving_default"](images=tf.constant(images))
        np.testing.assert_allclose(found["embedding"], model(images), atol=1e-6)

    def test_places_that_cannot_be_written(self, small_model, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("mine")
        monkeypatch.chdir(tmp_path)
        for path in ("file", "file/out", "file/new/out", ""):
            with pytest.raises(ValueError, match=r"path: expected a (new folder|path)"):
                export.export_encoder(small_model(), data.Preprocessing(8, 8, 1), path)
        check_replaceable("path", "new/folder", "saved_model.pb")
        assert [file.read_text() for file in tmp_path.iterdir()] == ["mine"]
