"""Imports ScaNN where it is installed, chooses its settings for a gallery size, and builds its searcher."""

import importlib
from typing import Any

import numpy as np
from absl import logging

from s2sd_tf.evaluation.neighbors import METHODS

# ScaNN's TensorFlow operations.
SCANN_OPS = "scann.scann_ops.py.scann_ops"
# ScaNN's authors advise brute force below the first size, quantisation without a tree below the second, a tree above.
BRUTE_FORCE_SIZE = 20_000
TREE_SIZE = 100_000


def import_scann(module: str = "scann") -> Any:
    """Imports ScaNN, or one of its submodules.

    Raises:
        ImportError: it is missing or was built for another TensorFlow; the message says what to install.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:  # a library that fails to load raises errors of TensorFlow too
        what, instead = ("method='scann'", " Or use method='exact'.") if module == "scann" else ("The SavedModel", "")
        raise ImportError(
            f"{what} needs ScaNN built for this TensorFlow: `pip install scann==1.4.2` for TensorFlow 2.20, "
            f"`pip install scann==1.3.0` for 2.15, on Linux.{instead}"
        ) from error


def usable_methods() -> tuple[str, ...]:
    """The search methods that can be used here: `METHODS`, or without "scann", which is logged once."""
    try:
        import_scann()
    except ImportError as error:
        logging.log_first_n(logging.WARNING, "Search is exact only: %s", 1, error)
        return ("exact",)
    return METHODS


def settings_for(size: int, spilling: bool) -> dict[str, Any]:
    """ScaNN settings for a gallery of that size, before tuning; see `ScannIndex.settings`."""
    if size < BRUTE_FORCE_SIZE:
        return {"kind": "brute_force"}
    if size < TREE_SIZE:
        return {"kind": "hashing", "reorder": 200}
    leaves = int(2 * np.sqrt(size))
    numbers = {"leaves": leaves, "leaves_to_search": max(1, leaves // 10), "reorder": 200}
    return {"kind": "tree", **numbers, "spilling": spilling}


def build_searcher(ops: Any, rows: np.ndarray, metric: str, settings: dict[str, Any], k: int) -> Any:
    """Builds a ScaNN searcher of prepared rows.

    Args:
        ops: ScaNN's Python module `scann_ops_pybind`, or its TensorFlow operations `scann_ops`. The latter and the
            Euclidean metric do not support spilling.
        rows: float32 array `(n, dim)`, of unit length for the cosine metric.
        metric, settings: see `ScannIndex`.
        k: int >= 1.
    """
    builder = ops.builder(rows, min(k, len(rows)), "dot_product" if metric == "cosine" else "squared_l2")
    if settings["kind"] == "brute_force":
        return builder.score_brute_force().build()
    if settings["kind"] == "tree":
        builder = builder.tree(
            settings["leaves"],
            settings["leaves_to_search"],
            training_sample_size=min(len(rows), 250_000),
            **({"soar_lambda": 1.5} if settings["spilling"] else {}),
        )
    # The threshold is for inner products: errors along a row count more, as those decide whether it is found.
    threshold = {"anisotropic_quantization_threshold": 0.2} if metric == "cosine" else {}
    return builder.score_ah(2, **threshold).reorder(min(settings["reorder"], len(rows))).build()
