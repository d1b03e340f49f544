"""The published protocol of S2SD: its hyperparameters, once for all data sets and backbones."""

from s2sd_tf.training.config import default_config, preset_config

OBJECTIVES = ("multi_similarity", "margin", "r_margin")
# Per data set: variant and objective of the published runs, weight of the feature distillation, and what retrieval is
# measured at there.
_DATA = {
    "cub200": {"variant": "msdfa", "objective": "multi_similarity", "feature_weight": 50.0, "ks": (1, 2, 4, 8)},
    "cars196": {"variant": "msdfa", "objective": "multi_similarity", "feature_weight": 50.0, "ks": (1, 2, 4, 8)},
    "sop": {"variant": "msdf", "objective": "margin", "feature_weight": 5.0, "ks": (1, 10, 100, 1000)},
    "inshop": {"variant": "msdf", "objective": "margin", "feature_weight": 5.0, "ks": (1, 10, 20, 30, 40, 50)},
}
# The same author's later recipe: weight of the feature distillation by data set and dimension.
_LATER = {("cub200", 128): 125.0, ("cub200", 512): 60.0, ("cars196", 128): 50.0, ("cars196", 512): 40.0}
_BACKBONES = {"resnet50_v1_5": "statistics", "bn_inception": ""}


def published_config(data, backbone, embedding_dim, options=""):
    """A config of the published protocol (Roth et al., ICML 2021, section 4, and the published runs).

    Args:
        data: "cub200", "cars196", "sop" or "inshop". The paper has no In-Shop: that is run as SOP is.
        backbone: "resnet50_v1_5" (BatchNorm's statistics frozen) or "bn_inception" (BatchNorm trains).
        embedding_dim: int >= 1.
        options: words separated by commas, in any order. One of "plain", "dsd", "msd", "msda", "msdf", "msdfa" chooses
            the variant; one of "multi_similarity", "margin" (beta 1.2, distance-weighted), "r_margin" (beta 0.6,
            rho-regularised) the objective; "frozen" freezes BatchNorm's statistics; "later" is the same author's later
            recipe for CUB200 and CARS196: no delay, batches of 108, other weights of the feature distillation.
            What is not chosen is as published for the data set.

    Returns:
        `ConfigDict`.

    Raises:
        ValueError: an unknown data set, backbone or option, or options that exclude each other.
    """
    for argument, value, known in (("data", data, _DATA), ("backbone", backbone, _BACKBONES)):
        if value not in known:
            raise ValueError(f"{argument}: expected one of {sorted(known)}. Received: {value!r}")
    published = _DATA[data]
    words = [word.strip() for word in options.split(",") if word.strip()]
    variants = [word for word in words if word in ("plain", "dsd", "msd", "msda", "msdf", "msdfa")]
    chosen = [word for word in words if word in OBJECTIVES]
    unknown = sorted(set(words) - {*variants, *chosen, "frozen", "later"})
    if unknown or len(variants) > 1 or len(chosen) > 1:
        raise ValueError(
            "options: expected at most one variant (plain, dsd, msd, msda, msdf, msdfa), at most one objective "
            f"({', '.join(OBJECTIVES)}), and 'frozen' and 'later'. Received: {options!r}"
        )
    if "later" in words and (data, embedding_dim) not in _LATER:
        raise ValueError(f"options: expected 'later' with one of {sorted(_LATER)}. Received: {(data, embedding_dim)}")

    config = default_config()
    config.data.name = data
    config.data.check = "files"
    config.data.image_size = 224
    config.data.resize_size = 256
    config.data.augmentation = "base"
    config.data.classes_per_batch = 56
    config.data.samples_per_class = 2
    config.model.backbone = backbone
    config.model.weights = "imagenet"
    config.model.frozen_bn = "statistics" if "frozen" in words else _BACKBONES[backbone]
    config.model.embedding_dim = embedding_dim
    _set_objective(config, chosen[0] if chosen else published["objective"])
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
    preset_config(config, variants[0] if variants else published["variant"])
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
