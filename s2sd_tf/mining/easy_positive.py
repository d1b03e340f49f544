"""Triplets with the nearest positive."""

from typing import Any

import tensorflow as tf

from s2sd_tf.mining.base import (
    Miner,
    Triplets,
    farthest,
    nearest,
    one_triplet_an_anchor,
    pair_masks,
    register,
    uniform_draws,
    weighted_members,
)
from s2sd_tf.mining.distance_weighted import DistanceWeighted

NEGATIVES = ("semi_hard", "hard", "distance_weighted")


@register("easy_positive")
class EasyPositive(Miner):
    """The nearest positive and one negative of each anchor (Xuan et al., "Improved Embeddings with Easy Positive
    Triplet Mining", WACV 2020, section 3). Returns triplets `(batch,)`, with none for an anchor that lacks a positive
    or a negative.

    Args:
        negatives: how the negative is chosen.
            "semi_hard": the nearest one farther than the positive, or the farthest if there is none, as in `SemiHard`.
            "hard": the nearest one.
            "distance_weighted": one drawn as in `DistanceWeighted`, with its default cutoffs.
    """

    def __init__(self, negatives: str = "semi_hard") -> None:
        if negatives not in NEGATIVES:
            raise ValueError(f"EasyPositive: negatives: expected one of {list(NEGATIVES)}. Received: {negatives!r}")
        self.negatives = negatives

    def get_config(self) -> dict[str, Any]:
        return {"negatives": self.negatives}

    def __call__(self, distances: tf.Tensor, labels: tf.Tensor, *, dim: int, seed: tf.Tensor) -> Triplets:
        positive, negative = pair_masks(labels)
        easiest = nearest(distances, positive)
        if self.negatives == "hard":
            choice = nearest(distances, negative)
        elif self.negatives == "semi_hard":
            farther = negative & (distances > tf.gather(distances, easiest, batch_dims=1)[:, None])
            choice = tf.where(
                tf.reduce_any(farther, axis=1), nearest(distances, farther), farthest(distances, negative)
            )
        else:
            draws = uniform_draws([tf.shape(labels)[0], 1], seed, tf.float64)
            choice = weighted_members(DistanceWeighted().probabilities(distances, labels, dim), draws)[:, 0]
        valid = tf.reduce_any(positive, axis=1) & tf.reduce_any(negative, axis=1)
        return one_triplet_an_anchor(easiest, choice, valid)
