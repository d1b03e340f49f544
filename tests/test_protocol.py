"""The published protocol: every hyperparameter of every config against a table."""

import re

import pytest
from conftest import REPOSITORY

from s2sd_tf.data import datasets
from s2sd_tf.training import published_config, resolve
from s2sd_tf.training.protocol import published_settings

SIZES = [("resnet50_v1_5", 128), ("resnet50_v1_5", 512), ("bn_inception", 512)]

# Settings shared by all runs.
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
    "sampler.class_balanced.replacement": True,
    "model.weights": "imagenet",
    "model.pooling": "avg",
    "s2sd.target_objective": "",
    "s2sd.temperature": 1.0,
    "s2sd.distill_weight": 50.0,
    "s2sd.distill_warmup_steps": 0,
    "s2sd.feature_distill_delay": 1000,
    "s2sd.feature_distill_warmup_steps": 0,
    "optimizer.name": "TorchAdam",
    "optimizer.learning_rate": 1e-5,
    "model.l2": 4e-4,
    "model.l2_on_targets": False,
    "model.uniform_biases": True,
    "model.learning_rate_multipliers.backbone": 1.0,
    "model.learning_rate_multipliers.heads": 1.0,
    "model.learning_rate_multipliers.embedding_head": 1.0,
    "model.learning_rate_multipliers.objectives": 1.0,
    "optimizer.schedule.name": "constant",
    "optimizer.schedule.warmup_epochs": 0.0,
    "train.epochs": 150,
    "train.steps_per_epoch": 0,
}
# By data set: objective, variant, weight of the feature distillation, k of the metrics.
PUBLISHED = {
    "cub200": ("multi_similarity", "msdfa", 50.0, (1, 2, 4, 8)),
    "cars196": ("multi_similarity", "msdfa", 50.0, (1, 2, 4, 8)),
    "sop": ("margin", "msdf", 5.0, (1, 10, 100, 1000)),
    "inshop": ("margin", "msdf", 5.0, (1, 10, 20, 30, 40, 50)),
}
# By variant: target dimensions, target pooling, feature distillation.
ALL_TARGETS = (512, 1024, 1536, 2048)
VARIANTS = {
    "plain": ((), "avg", False),
    "dsd": ((2048,), "avg", False),
    "msd": (ALL_TARGETS, "avg", False),
    "msda": (ALL_TARGETS, "avg+max", False),
    "msdf": (ALL_TARGETS, "avg", True),
    "msdfa": (ALL_TARGETS, "avg+max", True),
}
OBJECTIVES = {
    "multi_similarity": ("multi_similarity", {"alpha": 2.0, "beta": 40.0, "lambda_": 0.5, "epsilon": 0.1}),
    "margin": (
        "margin",
        {
            "margin": 0.2,
            "beta": 1.2,
            "nu": 0.0,
            "divisor": "triplets",
            "miner": "distance_weighted",
            "learning_rate_multiplier": 50.0,
        },
    ),
    "r_margin": (
        "margin",
        {
            "margin": 0.2,
            "beta": 0.6,
            "nu": 0.0,
            "divisor": "triplets",
            "miner": "rho_distance",
            "learning_rate_multiplier": 50.0,
        },
    ),
}
MINER = {"lower_cutoff": 0.5, "upper_cutoff": 3.0, "one_per_anchor": True}


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
    targets, pooling, features = VARIANTS[variant]
    assert tuple(config.s2sd.target_dims) == targets
    assert config.model.target_pooling == pooling
    assert config.s2sd.feature_distill == features
    assert config.s2sd.feature_distill_weight == feature_weight
    name, settings = OBJECTIVES[objective]
    assert config.objective.name == name
    assert {key: config.objective[name][key] for key in settings} == settings
    if name == "margin":
        miners = {**MINER, "rho": 0.2, "anchor_as_positive": True}
        assert config.miner.rho_distance.to_dict() == miners
        assert config.miner.distance_weighted.to_dict() == MINER


def test_settings():
    assert published_settings() == [f"{data},{backbone},{dim}" for data in PUBLISHED for backbone, dim in SIZES]


@pytest.mark.parametrize("options", published_settings())
def test_every_setting_matches_the_published_run(options):
    config = resolve(published_config(options))
    data, backbone, dim = options.split(",")
    assert_is(config, data, backbone, int(dim), *PUBLISHED[data])
    assert config.model.frozen_bn == ("statistics" if backbone == "resnet50_v1_5" else "")
    assert config.optimizer.settings.to_dict() == {"epsilon": 1e-8}
    assert config.data[data].check == "files"


def test_every_setting_has_a_row_with_its_steps():
    text = (REPOSITORY / "docs" / "published.md").read_text()
    for options in published_settings():
        (row,) = re.findall(rf"^\| `{options}` \|.*$", text, re.MULTILINE)
        data = options.split(",")[0]
        images = datasets.counts(data)["train"][0]
        assert f"{images // 112 * 150:,} (150 x {images // 112})" in row


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_variants_are_options(variant, objective):
    config = resolve(published_config(f"{objective},128,{variant},cub200"))
    assert_is(config, "cub200", "resnet50_v1_5", 128, objective, variant, 50.0, (1, 2, 4, 8))


def test_defaults():
    for options, whole in [
        ("sop", "sop,resnet50_v1_5,128,msdf,margin"),
        (" bn_inception , cars196", "cars196,bn_inception,512,msdfa,multi_similarity"),
        ("64,inshop", "inshop,resnet50_v1_5,64"),
    ]:
        assert published_config(options).to_dict() == published_config(whole).to_dict()


def test_frozen_and_later():
    assert published_config("sop,bn_inception,frozen").model.frozen_bn == "statistics"
    for (data, dim), weight in {
        ("cub200", 128): 125.0,
        ("cub200", 512): 60.0,
        ("cars196", 128): 50.0,
        ("cars196", 512): 40.0,
    }.items():
        config = published_config(f"{data},{dim},later")
        assert config.s2sd.feature_distill_weight == weight
        assert config.s2sd.feature_distill_delay == 0
        assert config.data.classes_per_batch * config.data.samples_per_class == 108


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", r"options: expected a data set \(cub200, cars196, sop, inshop\). Received: ''"),
        ("cub,bn_inception", r"options: expected a data set \(cub200, .*, frozen, later. Received: .*, with cub$"),
        ("sop,resnet18", r"options: .*Received: 'sop,resnet18', with resnet18"),
        ("sop,-8", r"options: .*with -8"),
        ("sop,cub200", r"options: expected a data set \(.*\). Received: 'sop,cub200'"),
        ("sop,8,16", r"options: expected at most one dimension .*Received: 'sop,8,16'"),
        ("sop,bn_inception,resnet50_v1_5", "options: expected at most one backbone"),
        ("sop,msd,plain", r"options: expected at most one variant .*Received: 'sop,msd,plain'"),
        ("sop,margin,r_margin", "options: expected at most one objective"),
        ("sop,512,later", r"options: expected 'later' with one of .*Received: \('sop', 512\)"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        published_config(options)


def test_the_config_file(call):
    config = f"--config={REPOSITORY / 'configs' / 'published.py'}"
    failed = call("train", f"{config}:cub200,128,256", "--dry_run", status=2)
    (line,) = failed.stderr.strip().splitlines()[-1:]
    assert "error: config: options: expected at most one dimension (128, 256). Received: 'cub200" in line
    failed = call("train", f"{config}:cub200,512", "--config.data.root=nowhere", "--dry_run", status=2)
    assert "root: expected CUB200-2011" in failed.stderr
