"""The published protocol: every hyperparameter of every config against a table."""

import importlib.util
import itertools

import pytest
from conftest import REPOSITORY

from s2sd_tf.training import published_config, resolve

DATA = ("cub200", "cars196", "sop", "inshop")
BACKBONES = {"r50_128": ("resnet50_v1_5", 128), "r50_512": ("resnet50_v1_5", 512), "ibn_512": ("bn_inception", 512)}

# What all runs share.
SHARED = {
    "data.augmentation": "base",
    "data.image_size": 224,
    "data.resize_size": 256,
    "data.channels": 3,
    "data.classes_per_batch": 56,
    "data.samples_per_class": 2,
    "data.validation_classes": 0,
    "data.validation_fraction": 0.0,
    "sampler.name": "class_balanced",
    "model.weights": "imagenet",
    "model.pooling": "avg",
    "s2sd.target_objective": "",
    "s2sd.temperature": 1.0,
    "s2sd.distill_weight": 50.0,
    "s2sd.distill_warmup_steps": 0,
    "s2sd.feature_distill_delay": 1000,
    "s2sd.feature_distill_warmup_steps": 0,
    "optimizer.name": "adam",
    "optimizer.learning_rate": 1e-5,
    "optimizer.l2": 4e-4,
    "optimizer.backbone_multiplier": 1.0,
    "optimizer.heads_multiplier": 1.0,
    "optimizer.objectives_multiplier": 1.0,
    "optimizer.schedule.name": "constant",
    "optimizer.schedule.warmup_epochs": 0.0,
    "train.epochs": 150,
    "train.steps_per_epoch": 0,
}
# By data set: objective, variant, weight of the feature distillation, what is measured.
PUBLISHED = {
    "cub200": ("multi_similarity", "msdfa", 50.0, (1, 2, 4, 8)),
    "cars196": ("multi_similarity", "msdfa", 50.0, (1, 2, 4, 8)),
    "sop": ("margin", "msdf", 5.0, (1, 10, 100, 1000)),
    "inshop": ("margin", "msdf", 5.0, (1, 10, 20, 30, 40, 50)),
}
# By variant: enabled, dimensions of the targets, their pooling, feature distillation.
ALL_TARGETS = (512, 1024, 1536, 2048)
VARIANTS = {
    "plain": (False, ALL_TARGETS, "avg", False),
    "dsd": (True, (2048,), "avg", False),
    "msd": (True, ALL_TARGETS, "avg", False),
    "msda": (True, ALL_TARGETS, "avg+max", False),
    "msdf": (True, ALL_TARGETS, "avg", True),
    "msdfa": (True, ALL_TARGETS, "avg+max", True),
}
OBJECTIVES = {
    "multi_similarity": ("multi_similarity", {"alpha": 2.0, "beta": 40.0, "lambda_": 0.5, "epsilon": 0.1}),
    "margin": (
        "margin",
        {"margin": 0.2, "beta": 1.2, "nu": 0.0, "miner": "distance_weighted", "learning_rate_multiplier": 50.0},
    ),
    "r_margin": (
        "margin",
        {"margin": 0.2, "beta": 0.6, "nu": 0.0, "miner": "rho_distance", "learning_rate_multiplier": 50.0},
    ),
}


def load(name, options=""):
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return resolve(module.get_config(options)), module.__doc__


def value(config, key):
    for name in key.split("."):
        config = config[name]
    return config


def assert_is(config, data, backbone, dim, objective, variant, feature_weight, ks):
    for key, expected in SHARED.items():
        assert value(config, key) == expected, key
    assert config.data.name == data
    assert (config.model.backbone, config.model.embedding_dim) == (backbone, dim)
    assert tuple(config.eval.ks) == ks
    enabled, targets, pooling, features = VARIANTS[variant]
    assert config.s2sd.enabled == enabled
    assert tuple(config.s2sd.target_dims) == targets
    assert config.s2sd.target_pooling == pooling
    assert config.s2sd.feature_distill == features
    assert config.s2sd.feature_distill_weight == feature_weight
    name, settings = OBJECTIVES[objective]
    assert config.objective.name == name
    assert {key: config.objective[name][key] for key in settings} == settings


@pytest.mark.parametrize(("data", "suffix"), itertools.product(DATA, BACKBONES))
def test_every_config_is_the_published_run(data, suffix):
    config, doc = load(f"{data}_{suffix}")
    backbone, dim = BACKBONES[suffix]
    assert_is(config, data, backbone, dim, *PUBLISHED[data])
    assert config.model.frozen_bn == ("statistics" if backbone == "resnet50_v1_5" else "")
    assert config.optimizer.settings.to_dict() == {"epsilon": 1e-8}
    for part in (f"--config=configs/{data}_{suffix}.py", "Published", "Expected time", "--workdir"):
        assert part in doc


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_variants_are_options(variant, objective):
    config, _ = load("cub200_r50_128", f"{objective},{variant}")
    assert_is(config, "cub200", "resnet50_v1_5", 128, objective, variant, 50.0, (1, 2, 4, 8))


def test_frozen_and_later():
    assert load("sop_ibn_512", "frozen")[0].model.frozen_bn == "statistics"
    for (data, dim), weight in {
        ("cub200", 128): 125.0,
        ("cub200", 512): 60.0,
        ("cars196", 128): 50.0,
        ("cars196", 512): 40.0,
    }.items():
        config, _ = load(f"{data}_r50_{dim}", "later")
        assert config.s2sd.feature_distill_weight == weight
        assert config.s2sd.feature_distill_delay == 0
        assert config.data.classes_per_batch * config.data.samples_per_class == 108


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cub", "bn_inception", 8), r"data: expected one of .*Received: 'cub'"),
        (("sop", "resnet18", 8), r"backbone: expected one of .*Received: 'resnet18'"),
        (("sop", "bn_inception", 8, "msd,plain"), r"options: expected at most one variant .*Received: 'msd,plain'"),
        (("sop", "bn_inception", 8, "margin,r_margin"), r"options: .*Received: 'margin,r_margin'"),
        (("sop", "bn_inception", 8, "best"), r"options: .*Received: 'best'"),
        (("sop", "bn_inception", 512, "later"), r"options: expected 'later' with one of .*Received: \('sop', 512\)"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        published_config(*arguments)
