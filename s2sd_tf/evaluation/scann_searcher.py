"""ScaNN itself: whether it is there, what kind of search a gallery's size asks for, and its searcher."""

import importlib

import numpy as np

# ScaNN's authors: brute force below the first size, quantisation without a tree below the second, a tree above.
BRUTE_FORCE_SIZE = 20_000
TREE_SIZE = 100_000


def import_scann(module="scann"):
    """The module `scann`, or one of its own.

    Raises:
        ImportError: it is missing or was built for another TensorFlow; the message says what to install.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:  # a library that does not load raises TensorFlow's errors too
        raise ImportError(
            "method='scann' needs ScaNN built for this TensorFlow: `pip install scann==1.4.2` for TensorFlow 2.20, "
            "`pip install scann==1.3.0` for 2.15. Or use method='exact'."
        ) from error


def settings_for(size, spilling):
    """How ScaNN is to search a gallery of that size, before it is tuned: see `ScannIndex.settings`."""
    if size < BRUTE_FORCE_SIZE:
        return {"kind": "brute_force"}
    if size < TREE_SIZE:
        return {"kind": "hashing", "reorder": 200}
    leaves = int(2 * np.sqrt(size))
    numbers = {"leaves": leaves, "leaves_to_search": max(1, leaves // 10), "reorder": 200}
    return {"kind": "tree", **numbers, "spilling": spilling}


def build_searcher(ops, rows, metric, settings, k):
    """ScaNN's searcher of prepared rows.

    Args:
        ops: ScaNN's module of its own interface, or of TensorFlow's operations; the latter, and the Euclidean metric,
            know no spilling.
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
    # The threshold is for products: errors along a row count more, as those decide whether it is found.
    threshold = {"anisotropic_quantization_threshold": 0.2} if metric == "cosine" else {}
    return builder.score_ah(2, **threshold).reorder(min(settings["reorder"], len(rows))).build()
