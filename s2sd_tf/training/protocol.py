"""The published protocol of S2SD: its hyperparameters for all data sets and backbones."""

from typing import Any

from ml_collections import config_dict

from s2sd_tf.training.config import default_config, preset_config

VARIANTS = ("plain", "dsd", "msd", "msda", "msdf", "msdfa")
OBJECTIVES = ("multi_similarity", "margin", "r_margin")
# Per data set: variant and objective of the published runs, weight of the feature distillation, and the k of recall@k.
# The paper does not use In-Shop; its settings are those of SOP.
_DATA: dict[str, dict[str, Any]] = {
    "cub200": {"variant": "msdfa", "objective": "multi_similarity", "feature_weight": 50.0, "ks": (1, 2, 4, 8)},
    "cars196": {"variant": "msdfa", "objective": "multi_similarity", "feature_weight": 50.0, "ks": (1, 2, 4, 8)},
    "sop": {"variant": "msdf", "objective": "margin", "feature_weight": 5.0, "ks": (1, 10, 100, 1000)},
    "inshop": {"variant": "msdf", "objective": "margin", "feature_weight": 5.0, "ks": (1, 10, 20, 30, 40, 50)},
}
# Per backbone: the frozen part of BatchNorm, and the published dimensions (the first is the default).
_BACKBONES: dict[str, dict[str, Any]] = {
    "resnet50_v1_5": {"frozen_bn": "statistics", "dims": (128, 512)},
    "bn_inception": {"frozen_bn": "", "dims": (512,)},
}
# A later recipe by the same author: weight of the feature distillation by data set and dimension.
_LATER = {("cub200", 128): 125.0, ("cub200", 512): 60.0, ("cars196", 128): 50.0, ("cars196", 512): 40.0}


def published_settings() -> list[str]:
    """All combinations of data set, backbone and dimension in the protocol, as options for `published_config`."""
    return [f"{data},{name},{dim}" for data in _DATA for name, about in _BACKBONES.items() for dim in about["dims"]]


def published_config(options: str) -> config_dict.ConfigDict:
    """Returns a config of the published protocol (Roth et al., ICML 2021, section 4, and the published runs).

    Example:
        >>> s2sd_tf.training.published_config("cub200,resnet50_v1_5,128,msdf,r_margin")

    Args:
        options: words separated by commas, in any order, at most one of each kind:

            - data set: "cub200", "cars196", "sop" or "inshop"; required;
            - backbone: "resnet50_v1_5" (the default; BatchNorm's statistics are frozen) or "bn_inception" (BatchNorm
              trains);
            - dimension of the base embedding, an int >= 1; by default 128, or 512 with "bn_inception";
            - variant: "plain", "dsd", "msd", "msda", "msdf" or "msdfa"; by default "msdfa", or "msdf" for "sop" and
              "inshop";
            - objective: "multi_similarity", "margin" (beta 1.2, distance-weighted) or "r_margin" (beta 0.6,
              rho-regularised); by default "multi_similarity", or "margin" for "sop" and "inshop";
            - "frozen": freeze BatchNorm's statistics for any backbone;
            - "later": a later recipe by the same author for CUB200 and CARS196, without the delay, with batches of 108
              and with other weights of the feature distillation.

    Raises:
        ValueError: no data set, an unknown word, or words that exclude each other.
    """
    words = [word.strip() for word in options.split(",") if word.strip()]
    dims = [word for word in words if word.isdecimal()]
    unknown = sorted(set(words) - {*_DATA, *_BACKBONES, *dims, *VARIANTS, *OBJECTIVES, "frozen", "later"})
    if unknown:
        raise ValueError(
            f"options: expected a data set ({', '.join(_DATA)}), a backbone ({', '.join(_BACKBONES)}), a dimension, a "
            f"variant ({', '.join(VARIANTS)}), an objective ({', '.join(OBJECTIVES)}), frozen, later. Received: "
            f"{options!r}, with {', '.join(unknown)}"
        )

    def chosen(kind, known, default):
        found = [word for word in words if word in known]
        if len(found) > 1 or not (found or default):
            number = "at most one" if default else "a"
            raise ValueError(f"options: expected {number} {kind} ({', '.join(known)}). Received: {options!r}")
        return found[0] if found else default

    data = chosen("data set", _DATA, None)
    published = _DATA[data]
    backbone = chosen("backbone", _BACKBONES, "resnet50_v1_5")
    embedding_dim = int(chosen("dimension", dims, _BACKBONES[backbone]["dims"][0]))
    variant = chosen("variant", VARIANTS, published["variant"])
    objective = chosen("objective", OBJECTIVES, published["objective"])
    if "later" in words and (data, embedding_dim) not in _LATER:
        raise ValueError(f"options: expected 'later' with one of {sorted(_LATER)}. Received: {(data, embedding_dim)}")

    config = default_config()
    config.data.name = data
    config.data.image_size = 224
    config.data.resize_size = 256
    config.data.augmentation = "base"
    config.data.classes_per_batch = 56
    config.data.samples_per_class = 2
    config.sampler.class_balanced.replacement = True
    config.model.backbone = backbone
    config.model.weights = "imagenet"
    config.model.frozen_bn = "statistics" if "frozen" in words else _BACKBONES[backbone]["frozen_bn"]
    config.model.embedding_dim = embedding_dim
    _set_objective(config, objective)
    config.s2sd.target_objective = ""
    config.s2sd.target_dims = (512, 1024, 1536, 2048)
    config.s2sd.temperature = 1.0
    config.s2sd.distill_weight = 50.0
    config.s2sd.feature_distill_weight = published["feature_weight"]
    config.s2sd.feature_distill_delay = 1000
    config.optimizer.name = "TorchAdam"
    config.optimizer.learning_rate = 1e-5
    # PyTorch's default.
    config.optimizer.settings.epsilon = 1e-8
    config.model.l2 = 4e-4
    config.model.l2_on_targets = False
    config.model.uniform_biases = True
    config.train.epochs = 150
    config.eval.every = 10
    config.eval.ks = published["ks"]
    preset_config(config, variant)
    if "later" in words:
        config.data.classes_per_batch = 54
        config.s2sd.feature_distill_weight = _LATER[data, embedding_dim]
        config.s2sd.feature_distill_delay = 0
    return config


def _set_objective(config, name):
    config.objective.name = "margin" if name == "r_margin" else name
    if name == "multi_similarity":
        settings: dict[str, Any] = {"alpha": 2.0, "beta": 40.0, "lambda_": 0.5, "epsilon": 0.1}
    else:
        settings = {
            "margin": 0.2,
            "beta": 0.6 if name == "r_margin" else 1.2,
            "nu": 0.0,
            "divisor": "triplets",
            "miner": "rho_distance" if name == "r_margin" else "distance_weighted",
            # beta trains at 5e-4, the other weights at 1e-5.
            "learning_rate_multiplier": 50.0,
        }
        # The published code ignores its upper cutoff; no distance is above 2.
        config.miner.distance_weighted.update({"upper_cutoff": 3.0, "one_per_anchor": True})
        config.miner.rho_distance.update({"upper_cutoff": 3.0, "one_per_anchor": True, "anchor_as_positive": True})
    config.objective[config.objective.name].update(settings)
