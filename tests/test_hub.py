"""Image models of keras-hub as backbones, from preset folders with random weights: features, saving, training, errors.

What keras-hub itself downloads is not tested.
"""

import json
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from conftest import small_config
from dataset_layouts import write_image

import s2sd_tf
from s2sd_tf import data, export
from s2sd_tf.keras_compat import keras
from s2sd_tf.models import backbones
from s2sd_tf.training import resolve
from s2sd_tf.training.build import build_model
from s2sd_tf.training.datasets import load_data

keras_hub = pytest.importorskip("keras_hub", reason="needs .[hub], which the classic stack cannot have")

SHAPE = (32, 32, 3)
SMALL = {"num_layers": 1, "num_heads": 2, "hidden_dim": 8}


def siglip():
    vision = keras_hub.models.SigLIPVisionEncoder(patch_size=16, intermediate_dim=8, image_shape=SHAPE, **SMALL)
    text = keras_hub.models.SigLIPTextEncoder(vocabulary_size=4, embedding_dim=8, intermediate_dim=8, **SMALL)
    return keras_hub.models.SigLIPBackbone(vision, text)


def resnet():
    return keras_hub.models.ResNetBackbone([64], [3], [64], [1], [1], "basic_block")


# How to make a backbone, what its features of `SHAPE` have for a shape, and its class token's size (0: none).
MODELS = {
    "dinov2": (
        lambda: keras_hub.models.DINOV2Backbone(
            patch_size=8, intermediate_dim=8, num_register_tokens=2, image_shape=SHAPE,
            position_embedding_shape=(48, 48, 3), **SMALL,
        ),
        (4, 4, 8),
        8,
    ),
    "dinov3": (
        lambda: keras_hub.models.DINOV3Backbone(
            patch_size=8, intermediate_dim=8, num_register_tokens=2, image_shape=SHAPE, **SMALL
        ),
        (4, 4, 8),
        8,
    ),
    "siglip": (siglip, (2, 2, 8), 8),
    "vit": (
        lambda: keras_hub.models.ViTBackbone(image_shape=SHAPE, patch_size=16, mlp_dim=8, **SMALL), (2, 2, 8), 8
    ),
    "resnet": (resnet, (8, 8, 64), 0),
}  # fmt: skip


@pytest.fixture(scope="module")
def presets(tmp_path_factory):
    """Folders of presets by name; each has an `ImageConverter`."""
    folder = tmp_path_factory.mktemp("presets")
    keras.utils.set_random_seed(0)
    for name, (make, _, _) in MODELS.items():
        make().save_to_preset(str(folder / name))
        keras_hub.layers.ImageConverter(scale=[1 / 51, 1 / 102, 1 / 255], offset=[-1.0, 0.5, 0.0]).save_to_preset(
            str(folder / name)
        )
    return {name: f"hub:{folder / name}" for name in MODELS}


@pytest.fixture
def images():
    return np.random.default_rng(0).normal(size=(4, *SHAPE)).astype(np.float32)


def original(name, images):
    """What a preset's own model computes of images: the tokens or maps."""
    encoder = keras_hub.models.Backbone.from_preset(name.removeprefix("hub:"))
    encoder = getattr(encoder, "vision_encoder", encoder)
    given = dict.fromkeys(encoder.input, images) if isinstance(encoder.input, dict) else images
    pooled = np.asarray(encoder(given))
    if pooled.ndim != 2:
        return pooled, pooled
    features = encoder.embedding(images)
    for layer in encoder.encoder_layers:
        features = layer(features)
    return np.asarray(encoder.post_layer_norm(features)), pooled


class TestFeatures:
    @pytest.mark.parametrize("name", MODELS)
    def test_the_grid_holds_the_patches_in_their_places(self, name, presets, images):
        model = backbones.get(presets[name], SHAPE, "preset")
        found, (expected, _) = np.asarray(model(images)), original(presets[name], images)
        rows, columns, dim = MODELS[name][1]
        assert model.output_shape[1:] == found.shape[1:] == MODELS[name][1]
        if expected.ndim == 3:
            expected = expected[:, expected.shape[1] - rows * columns :].reshape(-1, rows, columns, dim)
        np.testing.assert_allclose(found, expected, atol=1e-5)

    @pytest.mark.parametrize("name", ["dinov2", "siglip"])
    def test_the_class_token(self, name, presets, images):
        model = backbones.get(presets[name], SHAPE, "preset", tokens="class")
        _, pooled = original(presets[name], images)
        np.testing.assert_allclose(model(images), pooled[:, 0] if pooled.ndim == 3 else pooled, atol=1e-5)

    def test_random_weights_and_other_sizes(self, presets):
        for name, side, shape in [("dinov2", 48, (6, 6, 8)), ("siglip", 48, (3, 3, 8)), ("resnet", 16, (4, 4, 64))]:
            assert backbones.get(presets[name], (side, side, 3)).output_shape[1:] == shape
        images = np.random.default_rng(0).normal(size=(2, 48, 48, 3)).astype(np.float32)
        larger = keras_hub.models.Backbone.from_preset(presets["dinov2"].removeprefix("hub:"), image_shape=(48, 48, 3))
        expected = np.asarray(larger({"images": images}))[:, -36:].reshape(2, 6, 6, 8)
        found, random = (backbones.get(presets["dinov2"], (48, 48, 3), weights) for weights in ("preset", None))
        np.testing.assert_allclose(found(images), expected, atol=1e-5)
        assert np.abs(random(images) - expected).max() > 0.1

    def test_normalization_equals_the_converter(self, presets):
        settings = backbones.normalization(presets["vit"], "preset")
        pixels = np.random.default_rng(0).integers(0, 256, (2, *SHAPE)).astype(np.uint8)
        converter = keras_hub.layers.ImageConverter.from_preset(presets["vit"].removeprefix("hub:"))
        found = data.Preprocessing(*SHAPE, **settings).from_pixels(pixels)
        np.testing.assert_allclose(found, converter(pixels.astype(np.float32)), atol=1e-5)

    @pytest.mark.parametrize("kind", ["statistics", "all"])
    def test_frozen_batch_norm(self, kind, presets, images):
        model = backbones.get(presets["resnet"], SHAPE, "preset", frozen_bn=kind)
        before = [np.array(weight) for weight in model.non_trainable_weights]
        model(images, training=True)
        for weight, old in zip(model.non_trainable_weights, before, strict=True):
            np.testing.assert_array_equal(weight, old)
        norms = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
        assert norms
        assert all(bool(layer.trainable_weights) == (kind == "statistics") for layer in norms)


class TestModels:
    @pytest.mark.parametrize("name", MODELS)
    def test_a_step_of_training_and_a_saved_model(self, name, presets, images, tmp_path):
        backbone = backbones.get(presets[name], SHAPE, "preset")
        model = s2sd_tf.S2SDModel(backbone, 4, target_dims=(6,), target_objective=None)
        model.compile(optimizer="adam", run_eagerly=True)
        before = [np.array(weight) for weight in backbone.trainable_weights]
        logs = model.train_on_batch(images, np.array([0, 0, 1, 1]), return_dict=True)
        assert np.isfinite(list(logs.values())).all()
        assert any(np.any(np.asarray(weight) != old) for weight, old in zip(backbone.trainable_weights, before))
        model.save(tmp_path / "model.keras")
        loaded = export.load_model(tmp_path / "model.keras")
        np.testing.assert_allclose(loaded(images), model(images), atol=1e-6)

    def test_another_process_needs_only_this_package_and_an_exported_encoder_not_even_it(
        self, presets, images, tmp_path
    ):
        backbone = backbones.get(presets["dinov2"], SHAPE, "preset")
        model = s2sd_tf.S2SDModel(backbone, 4, target_dims=(), feature_distill=False)
        model.compile(optimizer="adam")
        model.save(tmp_path / "model.keras")
        preprocessing = data.Preprocessing(*SHAPE, **backbones.normalization(presets["dinov2"]))
        export.export_encoder(model, preprocessing, tmp_path / "encoder")
        np.save(tmp_path / "images.npy", images)
        program = """
import sys, numpy as np, tensorflow as tf
sys.modules.update(s2sd_tf=None, keras_hub=None)
pixels = tf.constant(np.full((2, 40, 40, 3), 200, np.uint8))
encoder = tf.saved_model.load("encoder")
np.save("encoded.npy", encoder.signatures["pixels"](pixels=pixels)["embedding"])
del sys.modules["s2sd_tf"], sys.modules["keras_hub"]
from s2sd_tf import export
assert "keras_hub" not in sys.modules
np.save("loaded.npy", export.load_model("model.keras")(np.load("images.npy")))
"""
        subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, capture_output=True)
        np.testing.assert_allclose(np.load(tmp_path / "loaded.npy"), model(images), atol=1e-5)
        pixels = tf.fill((2, 40, 40, 3), tf.constant(200, tf.uint8))
        expected = model(preprocessing.from_pixels(pixels))
        np.testing.assert_allclose(np.load(tmp_path / "encoded.npy"), expected, atol=1e-5)

    def test_gradient_caching_takes_the_same_step(self, presets, images):
        start, weights = None, []
        for size in (0, 2):
            model = s2sd_tf.S2SDModel(
                backbones.get(presets["dinov2"], SHAPE, "preset"), 4, target_dims=(), feature_distill=False,
                micro_batch_size=size,
            )  # fmt: skip
            if start is not None:
                model.set_weights(start)
            start = model.get_weights()
            model.compile(optimizer=keras.optimizers.SGD(0.1), jit_compile=False)
            model.train_on_batch(images, np.array([0, 0, 1, 1]))
            weights.append(model.backbone.get_weights())
        for plain, cached in zip(*weights, strict=True):
            np.testing.assert_allclose(cached, plain, atol=1e-5)

    def test_multipliers_name_the_layers_inside(self, presets, images):
        backbone = backbones.get(presets["dinov2"], SHAPE, "preset")
        multipliers = {"backbone/*embeddings": 0.0, "backbone/layers_0": 0.5}
        model = s2sd_tf.S2SDModel(
            backbone, 4, target_dims=(), feature_distill=False, learning_rate_multipliers=multipliers
        )
        model.compile(optimizer=keras.optimizers.SGD(0.1), run_eagerly=True)
        before = {weight.path: np.array(weight) for weight in backbone.trainable_weights}
        model.train_on_batch(images, np.array([0, 0, 1, 1]))
        changed = {
            weight.path for weight in backbone.trainable_weights if np.any(np.asarray(weight) != before[weight.path])
        }
        assert changed
        assert not [path for path in changed if "embeddings" in path]

    def test_the_keys_of_a_config(self, presets, tmp_path):
        for name in ("a/1.png", "a/2.png", "b/1.png", "b/2.png", "c/1.png", "c/2.png", "d/1.png", "d/2.png"):
            write_image(tmp_path / name)
        keys = {"backbone": presets["siglip"], "weights": "preset", "tokens": "class", "target_pooling": "avg"}
        config = small_config(**{f"model.{key}": value for key, value in keys.items()})
        config.data.update(name="folder", root=str(tmp_path), image_size=SHAPE[0], channels=3)
        config = resolve(config)
        run_data = load_data(config)
        model = build_model(config, run_data)
        assert model.backbone.output_shape == (None, MODELS["siglip"][2])
        expected = data.Preprocessing(*SHAPE, **backbones.normalization(presets["siglip"], "preset"))
        image = tf.fill((1, *SHAPE), 0.3)
        np.testing.assert_allclose(run_data.preprocessing(image), expected(image))

    @pytest.mark.parametrize("name", ["siglip", "resnet"])
    def test_mixed_precision(self, name, presets, images):
        keras.mixed_precision.set_global_policy("mixed_bfloat16")
        try:
            model = backbones.get(presets[name], SHAPE, "preset")
        finally:
            keras.mixed_precision.set_global_policy("float32")
        assert {weight.dtype for weight in model.trainable_weights} == {"float32"}
        assert model(images).dtype == tf.bfloat16
        exact = np.asarray(backbones.get(presets[name], SHAPE, "preset")(images))
        found = np.asarray(tf.cast(model(images), tf.float32))
        np.testing.assert_allclose(found, exact, atol=0.05 * np.abs(exact).max())


class TestErrors:
    @pytest.mark.parametrize(
        ("name", "arguments", "words"),
        [
            (
                "hub:dinov2_smal",
                {},
                "backbone: expected hub:<preset>.*Received: 'hub:dinov2_smal'; did you mean dinov2",
            ),
            ("vit", {"weights": "imagenet"}, "weights: expected None or 'preset' for hub:"),
            ("vit", {"tokens": "all"}, "tokens: expected one of"),
            ("vit", {"depth": 3}, r"backbone: expected arguments of hub:.*\['depth'\]"),
            ("vit", {"frozen_bn": "all"}, "frozen_bn: expected None for vi"),
            (
                "resnet",
                {"tokens": "class"},
                "tokens: expected 'grid', or a model with a class token.*Received: 'class'",
            ),
            (
                "vit",
                {"weights": "preset", "input_shape": (48, 48, 3)},
                r"input_shape \(48, 48, 3\): expected input_shape \(32, 32, 3\)",
            ),
            ("dinov2", {"input_shape": (32, 48, 3)}, r"input_shape \(32, 48, 3\): expected input_shape \(32, 32, 3\)"),
            ("dinov2", {"input_shape": (32, 32)}, "input_shape: expected"),
        ],
    )
    def test_arguments(self, name, arguments, words, presets):
        with pytest.raises(ValueError, match=words) as caught:
            backbones.get(presets.get(name, name), **{"input_shape": SHAPE, **arguments})
        assert "\n" not in str(caught.value)

    def test_folders(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"backbone 'hub:.*': expected a preset.*config\.json"):
            backbones.get(f"hub:{tmp_path}", SHAPE)
        keras_hub.models.ViTBackbone(image_shape=SHAPE, patch_size=16, mlp_dim=8, **SMALL).save_to_preset(str(tmp_path))
        with pytest.raises(FileNotFoundError, match=r"expected a preset with an ImageConverter"):
            backbones.normalization(f"hub:{tmp_path}")
        (tmp_path / "model.weights.h5").write_bytes(b"broken")
        with pytest.raises(ValueError, match=r"backbone 'hub:.*: expected a preset.*open file"):
            backbones.get(f"hub:{tmp_path}", SHAPE, "preset")
        text = siglip().text_encoder
        text.save_to_preset(str(tmp_path / "text"))
        with pytest.raises(ValueError, match=r"expected a preset of an image model.*a SigLIPTextEncoder"):
            backbones.get(f"hub:{tmp_path / 'text'}", SHAPE)

    def test_a_failed_download_is_one_line(self, monkeypatch):
        def no_network(*args, **settings):
            raise ConnectionError("no route\nto host")

        monkeypatch.setattr(keras_hub.models.Backbone, "from_preset", no_network)
        with pytest.raises(ValueError, match=r"backbone 'hub:dinov2_small': expected a preset.*no route to host"):
            backbones.get("hub:dinov2_small", SHAPE, "preset")

    @pytest.mark.parametrize(
        ("module", "class_name"),
        [("keras.layers", "TFSMLayer"), ("subprocess", "Popen"), ("keras_hub.src.models.vit", "ViTTokenizer")],
    )
    def test_a_preset_with_other_objects_is_refused(self, module, class_name, tmp_path):
        keras_hub.models.ViTBackbone(image_shape=SHAPE, patch_size=16, mlp_dim=8, **SMALL).save_to_preset(str(tmp_path))
        config = json.loads((tmp_path / "config.json").read_text())
        config["config"]["dtype"] = {"module": module, "class_name": class_name, "config": {}, "registered_name": None}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=f"expected a preset.*{class_name}"):
            backbones.get(f"hub:{tmp_path}", SHAPE)

    def test_the_list_of_backbones_names_them(self):
        assert "hub:<preset>" in backbones.names()
        assert "s2sd_tf[hub]" in backbones.describe("hub:<preset>")
