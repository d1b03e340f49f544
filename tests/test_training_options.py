"""Options of a run: schedules, averages, galleries, dry runs, and the logs."""

import json
import logging
import re
import sys
import time
import types

import conftest
import numpy as np
import pytest
import tensorflow as tf
from conftest import REPOSITORY
from dataset_layouts import write_cub200, write_inshop, write_sop

import s2sd_tf
from s2sd_tf import data, evaluation, serving
from s2sd_tf.cli.tables import sections_table
from s2sd_tf.files import write_json
from s2sd_tf.keras_compat import IS_KERAS_3, keras
from s2sd_tf.training import CollapseAlarm, load_run, optimizers, resolve, strategies, train
from s2sd_tf.training.averages import averaged_weights
from s2sd_tf.training.build import warn_of_short_run
from s2sd_tf.training.datasets import load_data
from s2sd_tf.training.dry_run import dry_run
from s2sd_tf.training.history import read_history
from s2sd_tf.training.step_timer import StepTimer


def small_config(**changes):
    settings = {"model.filters": (8, 8), "s2sd.target_dims": (16,), "train.epochs": 2, "train.steps_per_epoch": 3}
    return conftest.small_config(**{**settings, **changes})


class TestTorchAdam:
    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_its_update_is_pytorchs(self, dtype):
        random = np.random.default_rng(0)
        layer = keras.layers.Dense(3, use_bias=False, dtype=dtype)
        layer.build((None, 4))
        optimizer = optimizers.get("torchadam", 2.0**-7, {"epsilon": 1e-4})
        expected, m, v = tf.convert_to_tensor(layer.kernel).numpy().astype(np.float64), 0.0, 0.0
        step = tf.function(lambda gradient: optimizer.apply_gradients([(gradient, layer.kernel)]))
        for number in range(1, 31):
            # From far below epsilon to far above it.
            gradient = random.normal(size=(4, 3)) * 10.0 ** random.integers(-7, 2, (4, 3))
            step(tf.constant(gradient, dtype))
            m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            m_hat, v_hat = m / (1 - 0.9**number), v / (1 - 0.999**number)
            expected = expected - 2.0**-7 * m_hat / (np.sqrt(v_hat) + 1e-4)
        np.testing.assert_allclose(layer.kernel, expected, atol=1e-12 if dtype == "float64" else 2e-6)
        assert (optimizer.beta_1, optimizer.beta_2, optimizer.epsilon) == (0.9, 0.999, 1e-4)
        copy = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
        assert type(copy) is optimizers.TorchAdam
        assert copy.epsilon == 1e-4


class TestSchedules:
    arguments = {"steps_per_epoch": 10, "epochs": 5}

    def test_constant(self):
        assert optimizers.schedule(0.1, "constant", **self.arguments) == 0.1

    def test_multi_step(self):
        rate = optimizers.schedule(0.1, "multi_step", milestones=(1, 3.5), gamma=0.3, **self.arguments)
        expected = [0.1] * 10 + [0.03] * 25 + [0.009] * 15
        np.testing.assert_allclose([float(rate(step)) for step in range(50)], expected, rtol=1e-6)

    def test_cosine(self):
        rate = optimizers.schedule(0.1, "cosine", final_fraction=0.2, **self.arguments)
        steps = np.arange(51)
        expected = 0.1 * (0.2 + 0.8 * 0.5 * (1 + np.cos(np.pi * steps / 50)))
        np.testing.assert_allclose([float(rate(step)) for step in steps], expected, rtol=1e-5)

    @pytest.mark.parametrize("name", ["constant", "multi_step", "cosine"])
    def test_warmup(self, name):
        milestones = (3,) if name == "multi_step" else ()
        rate = optimizers.schedule(0.1, name, warmup_epochs=1.5, milestones=milestones, **self.arguments)
        values = np.array([float(rate(step)) for step in range(51)])
        np.testing.assert_allclose(values[:15], 0.1 * np.arange(1, 16) / 15, rtol=1e-6)
        after = {
            "constant": np.full(36, 0.1),
            "multi_step": np.where(np.arange(15, 51) < 30, 0.1, 0.03),
            "cosine": 0.1 * 0.5 * (1 + np.cos(np.pi * np.arange(36) / 35)),
        }[name]
        np.testing.assert_allclose(values[15:], after, rtol=1e-5, atol=1e-9)

    @pytest.mark.parametrize("name", ["constant", "multi_step", "cosine"])
    def test_is_saved_with_the_model(self, name, tmp_path):
        milestones = (3,) if name == "multi_step" else ()
        rate = optimizers.schedule(0.1, name, warmup_epochs=1, milestones=milestones, **self.arguments)
        backbone = s2sd_tf.models.backbones.conv_blocks((8, 8, 1), filters=(4,))
        model = s2sd_tf.S2SDModel(backbone, 4, target_dims=(), feature_distill=False)
        model.compile(optimizers.get("adam", rate))
        batch = np.random.default_rng(0).random((4, 8, 8, 1), np.float32), np.array([0, 0, 1, 1])
        model.train_on_batch(*batch)
        model.save(tmp_path / "model.keras")
        again = keras.models.load_model(tmp_path / "model.keras")
        assert int(tf.convert_to_tensor(again.optimizer.iterations)) == 1
        model.train_on_batch(*batch)
        again.train_on_batch(*batch)
        # Keras 3 reports the rate of the next step, Keras 2 that of the last one.
        np.testing.assert_allclose(
            tf.convert_to_tensor(again.optimizer.learning_rate), float(rate(1 + IS_KERAS_3)), rtol=1e-6
        )
        for one, other in zip(model.get_weights(), again.get_weights()):
            np.testing.assert_allclose(one, other, atol=1e-6)

    @pytest.mark.parametrize(
        ("changes", "key"),
        [
            ({"learning_rate": 0.0}, "config.optimizer.learning_rate"),
            ({"gamma": 0.0}, "gamma"),
            ({"final_fraction": 2.0}, "final_fraction"),
            ({"warmup_epochs": 5}, "warmup_epochs"),
            ({"name": "multi_step", "milestones": (3, 2)}, "milestones"),
            ({"milestones": (3,)}, "milestones"),
        ],
    )
    def test_errors(self, changes, key):
        with pytest.raises(ValueError, match=rf"{key}: expected .*Received: "):
            optimizers.schedule(**{"learning_rate": 0.1, "name": "constant", **self.arguments, **changes})


class TestAverages:
    def test_are_the_averages_of_the_steps(self):
        backbone = s2sd_tf.models.backbones.conv_blocks((8, 8, 1), filters=(4,))
        model = s2sd_tf.S2SDModel(backbone, 4, target_dims=(), feature_distill=False)
        model.compile(optimizers.get("sgd", 0.5, {"use_ema": True, "ema_momentum": 0.9}))
        images = np.random.default_rng(0).random((8, 8, 8, 1), np.float32)
        labels = np.repeat(np.arange(4), 2)
        averages = [variable.numpy() for variable in model.trainable_variables]
        for step in range(5):
            model.train_on_batch(images, labels)
            # Keras 3 starts from the weights after the first step, Keras 2 from those before it.
            keep = 0.0 if step == 0 and IS_KERAS_3 else 0.9
            averages = [keep * a + (1 - keep) * v.numpy() for a, v in zip(averages, model.trainable_variables)]
        own = [variable.numpy() for variable in model.trainable_variables]
        with averaged_weights(model):
            for variable, average in zip(model.trainable_variables, averages):
                np.testing.assert_allclose(variable.numpy(), average, atol=1e-6)
            assert any(np.abs(v.numpy() - raw).max() > 1e-4 for v, raw in zip(model.trainable_variables, own))
        for variable, raw in zip(model.trainable_variables, own):
            np.testing.assert_array_equal(variable.numpy(), raw)

    def test_frozen_layers_keep_their_weights(self):
        backbone = s2sd_tf.models.backbones.conv_blocks((8, 8, 1), filters=(4,))
        model = s2sd_tf.S2SDModel(
            backbone, 4, target_dims=(), feature_distill=False, learning_rate_multipliers={"backbone": 0.0}
        )
        model.compile(optimizers.get("adam", 1e-2, {"use_ema": True, "ema_momentum": 0.5}))
        before = [variable.numpy() for variable in backbone.trainable_variables]
        images = np.random.default_rng(0).random((8, 8, 8, 1), np.float32)
        for _ in range(3):
            model.train_on_batch(images, np.repeat(np.arange(4), 2))
        with averaged_weights(model):
            for variable, value in zip(backbone.trainable_variables, before):
                np.testing.assert_array_equal(variable.numpy(), value)

    def test_without_averages_the_weights_stay(self):
        backbone = s2sd_tf.models.backbones.conv_blocks((8, 8, 1), filters=(4,))
        model = s2sd_tf.S2SDModel(backbone, 4, target_dims=(), feature_distill=False)
        model.compile("sgd")
        before = model.get_weights()
        with averaged_weights(model):
            for one, other in zip(before, model.get_weights()):
                np.testing.assert_array_equal(one, other)


class TestBenchmarkSets:
    def test_a_run_with_queries_and_gallery(self, tmp_path):
        write_inshop(tmp_path / "data", classes=8, images_per_class=4)
        config = small_config(**{
            "data.name": "inshop", "data.root": str(tmp_path / "data"), "data.image_size": 16,
            "data.resize_size": 20, "data.augmentation": "adv", "optimizer.settings": {"use_ema": True},
        })  # fmt: skip
        results = train(config, str(tmp_path / "run"))
        split = data.load_inshop(str(tmp_path / "data"))
        assert results["counts"]["gallery"] == {"classes": split.gallery.num_classes, "images": len(split.gallery)}
        assert results["test"]["exact"]["queries"] == len(split.test)
        model = keras.models.load_model(tmp_path / "run" / "best.keras")
        assert (tmp_path / "run" / "gallery.png").exists()
        assert int(tf.convert_to_tensor(model.s2sd_loss.step)) == 6

    def test_validation_by_image(self, tmp_path):
        write_sop(tmp_path, classes=8, images_per_class=6)
        config = small_config(**{
            "data.name": "sop", "data.root": str(tmp_path), "data.validation_fraction": 0.4,
        })  # fmt: skip
        parts = load_data(config)
        assert parts.train.class_names == parts.validation.class_names
        assert (parts.train.class_counts() == 4).all()
        assert (parts.validation.class_counts() == 2).all()
        assert parts.train.super_classes

    def test_sizes_and_normalisation_follow_preset_and_backbone(self, tmp_path):
        write_cub200(tmp_path, classes=4)
        changes = {"data.name": "cub200", "data.root": str(tmp_path), "data.resize_size": 256}
        parts = load_data(small_config(**changes, **{"data.augmentation": "big", "model.backbone": "bn_inception"}))
        assert parts.preprocessing.output_shape == (256, 256, 3)
        assert parts.preprocessing.channel_order == "bgr"
        config = small_config(**changes, **{"data.augmentation": "red", "data.image_size": 224})
        parts = load_data(config)
        assert parts.preprocessing.output_shape == (224, 224, 3)
        assert parts.preprocessing.channel_order == "rgb"
        assert parts.augmentation.crop == "random"

    def test_lists(self, tmp_path):
        write_cub200(tmp_path, classes=4)
        folder = tmp_path / "CUB_200_2011" / "images"
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        half = sorted({name.split("/")[0] for name in names})[:2]
        for part, wanted in (("train", True), ("test", False)):
            lines = [name for name in names if (name.split("/")[0] in half) == wanted]
            (tmp_path / f"{part}.txt").write_text("\n".join(lines))
        config = small_config(**{
            "data.name": "lists", "data.root": str(folder), "data.lists.train_list": str(tmp_path / "train.txt"),
            "data.lists.test_list": str(tmp_path / "test.txt"), "data.lists.check": "none",
        })  # fmt: skip
        parts = load_data(config)
        assert (parts.train.num_classes, parts.test.num_classes) == (2, 2)

    def test_shards_of_folders_and_of_other_data(self, tmp_path):
        write_cub200(tmp_path, classes=4)
        split = data.load_cub200(str(tmp_path))
        data.write_shards(split, str(tmp_path / "shards"), name="folder")
        changes = {"data.root": str(tmp_path / "shards")}
        parts = load_data(small_config(**changes, **{"data.name": "folder"}))
        assert parts.train.kind == "slices"
        assert len(parts.test) == len(split.test)
        with pytest.raises(ValueError, match=r"expected shards of 'sop'. Received: of 'folder'"):
            load_data(small_config(**changes, **{"data.name": "sop"}))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"data.augmentation": "adv"}, r"config.data.augmentation: expected one without colours for grayscale"),
            ({"data.augmentation": "red"}, r"config.data.resize_size: expected the side .*'red'"),
            (
                {"data.name": "folder", "data.root": ".", "data.folder.source": "tfds"},
                r"source: expected .* for 'folder'",
            ),
        ],
    )
    def test_errors(self, changes, message):
        with pytest.raises(ValueError, match=message):
            load_data(small_config(**changes))


class TestSmallFolders:
    """Class folders that are too small are refused before a run writes anything; the message names key and class."""

    @pytest.fixture
    def config(self, tmp_path):
        def make(counts, **changes):
            pixels = tf.io.encode_png(np.zeros((8, 8, 3), np.uint8)).numpy()
            for name, count in counts.items():
                (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
                for number in range(count):
                    (tmp_path / "data" / name / f"{number}.png").write_bytes(pixels)
            return small_config(**{"data.name": "folder", "data.root": str(tmp_path / "data"), **changes})

        return make

    @pytest.mark.parametrize(
        ("counts", "changes", "message"),
        [
            ({"a": 1, "b": 2, "c": 1, "d": 1}, {}, "config.data, the test classes: expected at least one class with "
             "two images, or nothing can be evaluated. Received: 2 queries of 2 classes, all without"),
            ({"a": 3, "b": 3, "c": 3, "d": 3}, {"data.validation_classes": 4},
             "config.data.validation_classes: expected 0, as there are 2 classes that do not test, and 2 must train. "
             "Received: 4. With few classes, hold out images instead: config.data.validation_classes=0 and "
             "config.data.validation_fraction=0.2"),
            ({name: 1 + (name > "e") for name in "abcdefgh"}, {"data.validation_classes": 2},
             "config.data.validation_classes, the held-out classes: expected at least one class with two images, or "
             "nothing can be evaluated. Received: 2 queries of 2 classes, all without"),
            ({"a": 1, "b": 1, "c": 2, "d": 2}, {"data.validation_fraction": 0.2},
             "config.data.validation_fraction: expected 0, as no training class has more than one image. Received: "
             "0.2"),
            ({"a": 3, "b": 3, "c": 2}, {"data.folder.test_classes": "c", "data.validation_fraction": 0.2},
             "config.data.validation_fraction, the held-out images: expected at least one class with two images, or "
             "nothing can be evaluated. Received: 2 queries of 2 classes, all without"),
            ({"a": 3, "b": 1, "c": 5, "d": 2, "e": 2, "f": 2}, {"data.samples_per_class": 4},
             "config.data.samples_per_class: expected at least 4 images in every class that trains. Received: 'a' "
             "with 3, 'b' with 1. Set it to 1 or less, or config.sampler.class_balanced.short_classes to "
             "'repeat' or 'skip'"),
            ({"a": 3, "b": 1, "c": 5, "d": 2, "e": 2, "f": 2}, {"sampler.class_balanced.short_classes": "skip"},
             "config.data.classes_per_batch: expected at most 2, the number of classes that train; config.sampler."
             "class_balanced.short_classes skips 1 with fewer images than config.data.samples_per_class. Received: 3"),
            (dict.fromkeys("abcdefgh", 2), {"data.validation_classes": 2},
             "config.data.classes_per_batch: expected at most 2, the number of classes that train; "
             "config.data.validation_classes holds out 2. Received: 3"),
            ({"a": 3}, {}, "root: expected at least 2 classes, one to train on and one to test on, or a test_root. "
             "Received: '{root}' with 1, 'a'"),
        ],
    )  # fmt: skip
    def test_are_refused(self, counts, changes, message, tmp_path, config):
        for begin in (lambda config: train(config, str(tmp_path / "run")), dry_run):
            with pytest.raises(ValueError, match=f"^{re.escape(message.format(root=tmp_path / 'data'))}$"):
                begin(config(counts, **changes))
        assert not (tmp_path / "run").exists()

    def test_a_comparison_is_refused_before_its_runs(self, tmp_path, config, call):
        config({"a": 4, "b": 4, "c": 4, "d": 4, "e": 1, "f": 1, "g": 1, "h": 1})
        done = call("compare", f"--config={REPOSITORY / 'configs' / 'folder.py'}", f"--workdir={tmp_path / 'compared'}",
                    f"--config.data.root={tmp_path / 'data'}", status=2)  # fmt: skip
        assert "error: config.data, the test classes: expected at least one class with two images" in done.stderr
        assert not (tmp_path / "compared").exists()

    def test_in_fit(self, small_model):
        images = np.zeros((4, 8, 8, 1), np.float32)
        model = small_model()
        model.compile()
        for labels, gallery, message in (
            (np.arange(4), {}, "labels: expected at least one class with two images, or nothing can be evaluated."),
            (np.zeros(4, int), {"gallery_images": images, "gallery_labels": np.ones(4, int)},
             "labels: expected at least one class with a query and an image in the gallery"),
            (np.zeros(3, int), {}, "labels: expected one for each of 4 images. Received: 3"),
        ):  # fmt: skip

            def fit(labels=labels, gallery=gallery):
                callback = s2sd_tf.evaluation.RetrievalEvaluation(images, labels, **gallery)
                model.fit(images, np.zeros(4, np.int32), callbacks=[callback], verbose=0)

            with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
                fit()
        assert not int(tf.convert_to_tensor(model.s2sd_loss.step))


class TestShortRuns:
    """Distillation terms that a run of 6 steps does not reach are reported."""

    @pytest.mark.parametrize(
        ("s2sd", "expected"),
        [
            ({"feature_distill": False}, ""),
            ({"feature_distill": False, "distill_warmup_steps": 6}, ""),
            ({"feature_distill_delay": 5}, ""),
            ({"feature_distill_delay": 6, "feature_distill_weight": 0.0}, ""),
            ({"feature_distill_delay": 6}, "the feature distillation never acts (config.s2sd.feature_distill_delay is "
             "6). Train for 7 steps or more (config.train.epochs), or lower these keys."),
            ({"distill_warmup_steps": 24, "feature_distill_delay": 3, "feature_distill_warmup_steps": 12},
             "the distillation reaches only 25% of its weight (config.s2sd.distill_warmup_steps is 24) and the feature "
             "distillation reaches only 25% of its weight (config.s2sd.feature_distill_warmup_steps is 12). Train for "
             "24 steps or more (config.train.epochs), or lower these keys."),
        ],
    )  # fmt: skip
    def test_are_reported(self, s2sd, expected, log):
        config = small_config(**{f"s2sd.{key}": value for key, value in s2sd.items()})
        warn_of_short_run(resolve(config), load_data(config))
        assert log() == ([f"In the 6 steps of this run, {expected}"] if expected else [])


@conftest.needs_scann
def test_without_scann_search_is_exact_unless_scann_is_asked_for(tmp_path, monkeypatch, log):
    monkeypatch.setitem(sys.modules, "scann", None)
    items, encoder = [serving.Item("a", "a.png", "")], types.SimpleNamespace(dim=3)
    for begin in (
        lambda: evaluation.RetrievalEvaluation(np.zeros((4, 8, 8, 1)), [0, 0, 1, 1], method="scann"),
        lambda: evaluation.build_index(np.eye(3), method="scann"),
        lambda: serving.embed_images(items, encoder, tmp_path / "embeddings", index={"method": "scann"}),
    ):
        with pytest.raises(ImportError, match="needs ScaNN"):
            begin()
    assert not any(tmp_path.iterdir())
    assert evaluation.build_index(np.eye(3)).method == "exact"
    assert set(train(small_config(**{"train.epochs": 1}), tmp_path / "run")["test"]) == {"exact"}
    assert len([line for line in log() if "Search is exact only" in line and "pip install scann" in line]) == 1


WITHOUT_AUTOGRAPH = """
import json, sys
import tensorflow as tf
tf.autograph.set_verbosity(1, alsologtostdout=True)
from s2sd_tf.training import default_config
from s2sd_tf.training.dry_run import dry_run

config = default_config()
config.data.name, config.data.root, config.data.validation_classes = "cub200", sys.argv[1], 0
config.data.image_size, config.data.augmentation = 16, "adv"
config.data.classes_per_batch, config.data.samples_per_class = 3, 2
config.model.filters = (8, 8)
dry_run(config)
print("by AutoGraph:")
tf.function(json.loads)("1")
"""


class TestDryRun:
    def test_an_epoch_of_one_step(self, log):
        sections = dry_run(small_config(**{"train.steps_per_epoch": 1, "s2sd.distill_warmup_steps": 4}))
        assert [line for line in log() if "reaches only 50% of its weight" in line]
        assert "2 steps, 2 epochs of 1" in dict(sections["steps"])["in all"]

    def test_replicas_have_to_share_the_batch(self, call):
        config = small_config(**{"data.classes_per_batch": 3, "data.samples_per_class": 3})
        with pytest.raises(ValueError, match=r"the 2 replicas share equally\. Received: 3 x 3 = 9 images"):
            dry_run(config, 2)
        given = (f"--config={REPOSITORY / 'configs' / 'digits.py'}", "--config.data.samples_per_class=9")
        error = call("train", *given, "--config.data.classes_per_batch=3", "--config.train.threads=1", "--dry_run",
                     "--strategy=mirrored", "--devices=CPU:0,CPU:1", status=2).stderr  # fmt: skip
        assert "expected a batch that the 2 replicas share equally" in error

    def test_replicas(self, monkeypatch):
        monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["device"] * (3 if kind == "GPU" else 1))
        monkeypatch.delenv("TF_CONFIG", raising=False)
        assert strategies.replicas("none") == 1
        with pytest.raises(ValueError, match="devices: expected none without a strategy"):
            strategies.replicas("none", ["GPU:0"])
        assert strategies.replicas("mirrored") == 3
        assert strategies.replicas("mirrored", ["GPU:0", "GPU:2"]) == 2
        with pytest.raises(ValueError, match="TF_CONFIG"):
            strategies.replicas("multiworker")
        # It does not wait for the others.
        monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": {"chief": ["a:1"], "worker": ["b:1"]}}))
        assert strategies.replicas("multiworker") == 6

    @pytest.mark.parametrize(("classes", "samples"), [(3, 400), (40, 1)])
    def test_a_sampler_with_a_storage_may_repeat_images_or_ignore_classes(self, classes, samples):
        sections = dry_run(small_config(**{
            "sampler.name": "greedy_coreset", "sampler.greedy_coreset.short_classes": "repeat",
            "data.classes_per_batch": classes, "data.samples_per_class": samples,
        }))  # fmt: skip
        assert dict(sections["data"])["batch"].startswith(f"{classes * samples} = {classes} classes x {samples}")

    def test_reports_everything_and_writes_nothing(self, tmp_path, monkeypatch):
        write_inshop(tmp_path / "data", classes=8, images_per_class=4)
        before = sorted(tmp_path.rglob("*"))
        monkeypatch.chdir(tmp_path)
        config = small_config(**{
            "data.name": "inshop", "data.root": str(tmp_path / "data"), "data.image_size": 16,
            "data.augmentation": "rand", "model.learning_rate_multipliers.backbone/conv0": 0.1,
            "optimizer.schedule.name": "cosine", "sampler.name": "greedy_coreset",
        })  # fmt: skip
        sections = dry_run(config)
        assert sorted(tmp_path.rglob("*")) == before
        text = sections_table(sections)
        split = data.load_inshop(str(tmp_path / "data"))
        for part, images in split.parts().items():
            assert f"{images.num_classes:,} classes, {len(images):,} images (paths)" in dict(sections["data"])[part]
        assert "greedy_coreset" in text
        backbone = s2sd_tf.models.backbones.conv_blocks((16, 16, 3), filters=(8, 8))
        trained = sum(int(np.prod(v.shape)) for v in backbone.trainable_variables)
        stem = sum(int(np.prod(v.shape)) for v in backbone.get_layer("conv0").trainable_variables)
        rates = dict(sections["learning rates"])
        assert rates["backbone/conv0"] == f"x 0.1, {stem:,} parameters"
        assert rates["backbone"] == f"x 1, {trained - stem:,} parameters"
        assert "6 steps, 2 epochs of 3" in dict(sections["steps"])["in all"]
        assert "recall@1" in dict(sections["evaluation"])

    def test_the_program_with_all_colours_in_deterministic_mode(self, tmp_path, call):
        write_cub200(tmp_path, classes=8, images_per_class=4)
        done = call(
            "train", f"--config={REPOSITORY / 'configs' / 'folder.py'}", "--dry_run",
            "--config.data.name=cub200", f"--config.data.root={tmp_path}", "--config.data.validation_classes=0",
            "--config.data.classes_per_batch=3", "--config.data.samples_per_class=2", "--config.data.image_size=16",
            "--config.data.resize_size=18", "--config.data.augmentation=adv",
            "--config.data.augmentation_settings.rand_augment=1", "--config.model.filters=(8,8)",
        )  # fmt: skip
        assert "4 classes, 16 images (paths)" in done.stdout
        assert "augmentation         adv" in done.stdout

    @pytest.mark.skipif(not IS_KERAS_3, reason="Keras 2 itself passes layers through AutoGraph")
    def test_autograph_is_not_used(self, tmp_path, run_python):
        """It reads and rewrites the source of all that is traced, which takes longer than the tracing."""
        write_cub200(tmp_path, classes=8, images_per_class=4)
        ours, other = run_python("-c", WITHOUT_AUTOGRAPH, str(tmp_path)).stdout.split("by AutoGraph:")
        assert "is not cached for subkey" not in ours
        assert "is not cached for subkey" in other

    def test_bad_data_is_reported(self, tmp_path):
        config = small_config(**{"data.name": "sop", "data.root": str(tmp_path)})
        with pytest.raises(FileNotFoundError, match="Ebay_train"):
            dry_run(config)


@pytest.fixture
def log(caplog):
    """Returns a function that returns the distinct logged messages."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.addHandler(caplog.handler)
    logger.setLevel(logging.INFO)
    yield lambda: list(dict.fromkeys(record.getMessage() for record in caplog.records))
    logger.removeHandler(caplog.handler)
    logger.setLevel(level)


@pytest.mark.parametrize(("slow", "steps"), [(True, 20), (False, 20), (True, 5)])
def test_the_logs_say_where_the_time_went(slow, steps, log):
    timer, rows = StepTimer(), []
    begin = time.monotonic()
    for epoch in range(2):
        timer.begin_steps()
        for _ in range(steps):
            with timer.waiting():
                time.sleep(0.25 / steps if slow else 0.0)
            time.sleep(0.0 if slow else 0.1 / steps)
            timer.end_step(4)
        with timer.measure("evaluation_seconds"):
            time.sleep(0.1)
        rows.append(timer.logs())
        with timer.measure("checkpoint_seconds"):
            time.sleep(0.05)
        timer.report(epoch)
    whole = time.monotonic() - begin
    for row in rows:
        assert row["evaluation_seconds"] >= 0.1
        seconds = row["input_seconds"] + row["compute_seconds"]
        assert row["images_per_second"] == pytest.approx(4 * steps / seconds)
        assert row["input_seconds" if slow else "compute_seconds"] >= (0.25 if slow else 0.1)
    # Time spent saving after the logs are written is in the next row.
    assert rows[0]["checkpoint_seconds"] == 0.0
    assert rows[1]["checkpoint_seconds"] >= 0.05
    times = ("input_seconds", "compute_seconds", "evaluation_seconds", "checkpoint_seconds")
    assert sum(row[name] for row in rows for name in times) < whole
    lines = [line for line in log() if line.startswith("epoch ")]
    assert [line.split(":")[0] for line in lines] == ["epoch 1", "epoch 2"]
    assert lines[1].endswith("; input-bound" if slow else "; compute-bound")
    assert all(re.search(r" s compute, .* s input, .* s evaluation, .* s checkpoint; ", line) for line in lines)
    # The start of the input pipeline is no reason for a warning.
    assert any("waiting for images" in line for line in log()) == (slow and steps >= 20)


class TestCollapseAlarm:
    def warnings(self, log, model, rows):
        """The warnings of the alarm, as `(epoch from 0, message)`."""
        alarm, found = CollapseAlarm(after_steps=0), []
        alarm.set_model(model)
        for epoch, row in enumerate(rows):
            before = len(log())
            alarm.on_epoch_end(epoch, row)
            found += [(epoch, message) for message in log()[before:]]
        return found

    def test_warns_once_for_every_collapse(self, small_model, log):
        found = self.warnings(
            log,
            small_model(),
            [{"mean_similarity": s, "embedding_rank": 3.0} for s in (0.5, 0.95, 0.97, 0.8, 0.99)],
        )
        assert [epoch for epoch, _ in found] == [1, 4]
        assert "Epoch 2: the embeddings have collapsed: mean similarity 0.95, rank 3.0 of 4; " in found[0][1]
        assert "config.optimizer.learning_rate" in found[0][1]

    def test_the_first_steps_do_not_count(self, small_model, log):
        model = small_model()
        alarm = CollapseAlarm()
        for step, expected in ((99, 0), (100, 1)):
            model.s2sd_loss.step.assign(step)
            alarm.check(model, 0, {"mean_similarity": 0.99})
            assert len(log()) == expected

    def test_reports_the_rank_and_the_targets(self, small_model, log):
        row = {
            "mean_similarity": 0.1, "embedding_rank": 1.5, "target_mean_similarity": 0.99, "target_embedding_rank": 1.1,
        }  # fmt: skip
        (_, base), (_, targets) = self.warnings(log, small_model(), [row])
        assert "the embeddings have collapsed: mean similarity 0.10, rank 1.5 of 4" in base
        assert "the targets' embeddings have collapsed: mean similarity 0.99, rank 1.1 of 8 to 12" in targets
        assert "config.s2sd.target_objective" in targets

    def test_two_dimensions_do_not_trigger_it(self, small_model, log):
        row = {"mean_similarity": 0.1, "embedding_rank": 1.5}
        assert not self.warnings(log, small_model(embedding_dim=2), [row])

    def test_without_diagnostics_it_is_silent(self, small_model, log):
        assert not self.warnings(log, small_model(), [{"loss": 1.0}, None])


class TestWhatARunLogs:
    def test_diagnostics_profile_and_micro_batches(self, tmp_path):
        changes = {"train.profile": (2, 3), "model.micro_batch_size": 2, "train.checkpoints_kept": 1, "eval.every": 2}
        train(small_config(**changes), str(tmp_path))
        rows = read_history(str(tmp_path))
        for row in rows:
            assert row["gradient_norm"] > 0
            assert -1 <= row["mean_similarity"] <= 1
            assert 1 <= row["embedding_rank"] <= 8
            assert 1 <= row["target_embedding_rank"] <= 16
            assert {"input_seconds", "compute_seconds", "evaluation_seconds", "checkpoint_seconds"} <= set(row)
        assert rows[1]["evaluation_seconds"] > rows[0]["evaluation_seconds"]
        assert list((tmp_path / "tensorboard").rglob("*.xplane.pb"))
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["epoch_000002"]
        assert load_run(str(tmp_path))[0].micro_batch_size == 2

    @pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
    def test_precision_is_restored(self, tmp_path, precision):
        before = keras.mixed_precision.global_policy().name
        changes = {"train.precision": precision, "train.epochs": 1, "eval.every": 0, "s2sd.diagnostics": False}
        results = train(small_config(**changes), str(tmp_path))
        assert keras.mixed_precision.global_policy().name == before
        model = load_run(str(tmp_path))[0]
        assert model.dtype_policy.name == precision
        assert {str(tf.as_dtype(variable.dtype).name) for variable in model.trainable_variables} == {"float32"}
        assert results["test"]["exact"]["recall@1"] > 0
        assert "gradient_norm" not in read_history(str(tmp_path))[0]
        with pytest.raises(ValueError, match="embedding_dim"):
            train(small_config(**changes, **{"model.embedding_dim": 0}), str(tmp_path / "never"))
        assert keras.mixed_precision.global_policy().name == before

    def test_a_run_of_an_older_version_resumes(self, tmp_path):
        config, results = small_config().to_dict(), {"steps": 6, "epochs": 2}
        for section, keys in (
            ("train", ("checkpoints_kept", "profile", "precision", "jit_compile")),
            ("s2sd", ("gather_replicas", "diagnostics")),
            ("model", ("micro_batch_size",)),
        ):
            for key in keys:
                del config[section][key]
        write_json(tmp_path / "config.json", config)
        write_json(tmp_path / "results.json", results)
        assert train(small_config(), str(tmp_path)) == results
