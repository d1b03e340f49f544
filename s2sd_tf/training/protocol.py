"""The published protocol of S2SD: its hyperparameters, once for all data sets and backbones."""

from s2sd_tf.training.config import default_config, preset_config

VARIANTS = ("plain", "dsd", "msd", "msda", "msdf", "msdfa")
OBJECTIVES = ("multi_similarity", "margin", "r_margin")
# Per data set: variant and objective of the published runs, weight of the feature distillation, and what retrieval is
# measured at there. The paper has no In-Shop: that is run as SOP is.
_DATA = {
    "cub200": {"variant": "msdfa", "objective": "multi_similarity", "feature_weight": 50.0, "ks": (1, 2, 4, 8)},
    "cars196": {"variant": "msdfa", "objective": "multi_similarity", "feature_weight": 50.0, "ks": (1, 2, 4, 8)},
    "sop": {"variant": "msdf", "objective": "margin", "feature_weight": 5.0, "ks": (1, 10, 100, 1000)},
    "inshop": {"variant": "msdf", "objective": "margin", "feature_weight": 5.0, "ks": (1, 10, 20, 30, 40, 50)},
}
# Per backbone: what of BatchNorm is frozen, and the published dimensions, of which the first is the default.
_BACKBONES = {
    "resnet50_v1_5": {"frozen_bn": "statistics", "dims": (128, 512)},
    "bn_inception": {"frozen_bn": "", "dims": (512,)},
}
# The same author's later recipe: weight of the feature distillation by data set and dimension.
_LATER = {("cub200", 128): 125.0, ("cub200", 512): 60.0, ("cars196", 128): 50.0, ("cars196", 512): 40.0}


def published_settings():
    """The data sets, backbones and dimensions of the protocol: list of str, as `published_config` takes them."""
    return [f"{data},{name},{dim}" for data in _DATA for name, about in _BACKBONES.items() for dim in about["dims"]]


def published_config(options):
    """A config of the published protocol (Roth et al., ICML 2021, section 4, and the published runs).

    Example:
        >>> s2sd_tf.training.published_config("cub200,resnet50_v1_5,128,msdf,r_margin")

    Args:
        options: str, words separated by commas, in any order, at most one of a kind:

            - data set: "cub200", "cars196", "sop" or "inshop"; the only word that has to be there;
            - backbone: "resnet50_v1_5" (the default; BatchNorm's statistics are frozen) or "bn_inception" (BatchNorm
              trains);
            - dimension of the base embedding, an int >= 1; by default 128, with "bn_inception" 512;
            - variant: "plain", "dsd", "msd", "msda", "msdf" or "msdfa"; by default "msdfa", for "sop" and "inshop"
              "msdf";
            - objective: "multi_similarity", "margin" (beta 1.2, distance-weighted) or "r_margin" (beta 0.6,
              rho-regularised); by default "multi_similarity", for "sop" and "inshop" "margin";
            - "frozen" freezes BatchNorm's statistics whatever the backbone;
            - "later" is the same author's later recipe for CUB200 and CARS196: no delay, batches of 108, other weights
              of the feature distillation.

    Returns:
        `ConfigDict`.

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
    config.model.backbone = backbone
    config.model.weights = "imagenet"
    config.model.frozen_bn = "statistics" if "frozen" in words else _BACKBONES[backbone]["frozen_bn"]
    config.model.embedding_dim = embedding_dim
    _set_objective(config, objective)
    config.s2sd.target_dims = (512, 1024, 1536, 2048)
    config.s2sd.temperature = 1.0
    config.s2sd.distill_weight = 50.0
    config.s2sd.feature_distill_weight = published["feature_weight"]
    config.s2sd.feature_distill_delay = 1000
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 1e-5
    # PyTorch's.
    config.optimizer.settings.epsilon = 1e-8
    config.model.l2 = 4e-4
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
        settings = {"alpha": 2.0, "beta": 40.0, "lambda_": 0.5, "epsilon": 0.1}
    else:
        settings = {
            "margin": 0.2,
            "beta": 0.6 if name == "r_margin" else 1.2,
            "nu": 0.0,
            "miner": "rho_distance" if name == "r_margin" else "distance_weighted",
            # 5e-4 beside 1e-5.
            "learning_rate_multiplier": 50.0,
        }
    config.objective[config.objective.name].update(settings)
