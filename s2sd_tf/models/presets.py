"""The variants of the S2SD paper as settings of `S2SDModel`."""

import copy
from typing import Any

_BASE: dict[str, Any] = {
    "target_dims": (512, 1024, 1536, 2048),
    "target_pooling": "avg",
    "temperature": 1.0,
    "distill_weight": 50.0,
    "feature_distill": False,
    "feature_distill_weight": 50.0,
    "feature_distill_delay": 1000,
}

PRESETS: dict[str, dict[str, Any]] = {
    "plain": {**_BASE, "target_dims": ()},
    "dsd": {**_BASE, "target_dims": (2048,)},
    "msd": _BASE,
    "msda": {**_BASE, "target_pooling": "avg+max"},
    "msdf": {**_BASE, "feature_distill": True},
    "msdfa": {**_BASE, "target_pooling": "avg+max", "feature_distill": True},
}


def preset(name: str) -> dict[str, Any]:
    """Returns the `S2SDModel` settings for a variant of the paper (S2SD, section 3; the published hyperparameters).

    The published code trains the targets with the base's objective. For objectives other than "multi_similarity", that
    is `target_objective=None` in addition.

    Args:
        name: "dsd" (one target space), "msd" (several), "msda" (+ average and max pooling for the targets), "msdf"
            (+ feature distillation), "msdfa" (both), or "plain" (only the objective). Case does not matter.

    Raises:
        ValueError: unknown name.

    Example:
        >>> model = s2sd_tf.S2SDModel(backbone, 128, **s2sd_tf.preset("msdfa"))
    """
    if str(name).lower() not in PRESETS:
        raise ValueError(f"preset: expected one of {sorted(PRESETS)}. Received: {name!r}")
    return copy.deepcopy(PRESETS[name.lower()])
