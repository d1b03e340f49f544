"""Margin loss."""

from typing import Any

import tensorflow as tf

from s2sd_tf.checks import check_at_least, check_bool, check_choice, check_number
from s2sd_tf.keras_compat import keras
from s2sd_tf.mining.base import Miner, Triplets, pair_masks
from s2sd_tf.objectives.base import TupleObjective, euclidean_distances, register

DIVISORS = ("hinges", "triplets")


@register("margin")
class Margin(TupleObjective):
    """Margin loss (Wu et al., "Sampling Matters in Deep Embedding Learning", ICCV 2017, eq. 7).

    With Euclidean distances d of l2-normalised embeddings it is

        sum over triplets of max(0, margin + d(a, p) - beta_a) + max(0, margin - d(a, n) + beta_a)

    divided by the number of hinges above 0 (see `divisor`). There is one boundary beta per class, or, without
    `num_classes`, one for all classes.

    Args:
        margin: >= 0.
        beta: initial value of the boundaries.
        nu: >= 0, weight of the penalty on beta (eq. 8): nu times the sum of the boundaries over the triplets, divided
            like the hinges.
        learnable_beta: whether the boundaries are trained.
        divisor: "hinges" counts the hinges above 0, as in the paper; "triplets" counts the triplets with at least one
            hinge above 0, as in the published code of S2SD.
        miner: name or `mining.Miner`. With "all" every valid triplet counts, in O(batch^2).
        learning_rate_multiplier: the default is that of the published protocol, which trains beta at 5e-4 and the
            network at 1e-5.
        **kwargs: `seed` of the miner, and arguments of `Objective`.
    """

    uses_classes = True
    formula = "sum_apn ([m + d_ap - b_a]+ + [m - d_an + b_a]+) / number of active hinges or triplets"
    paper = "Wu et al., ICCV 2017"
    cost = "B^2"

    def __init__(
        self,
        margin: float = 0.2,
        beta: float = 1.2,
        nu: float = 0.0,
        learnable_beta: bool = True,
        divisor: str = "hinges",
        miner: str | Miner = "distance_weighted",
        learning_rate_multiplier: float = 50.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(miner=miner, learning_rate_multiplier=learning_rate_multiplier, **kwargs)
        check_at_least("margin", margin, 0)
        check_number("beta", beta)
        check_at_least("nu", nu, 0)
        check_bool("learnable_beta", learnable_beta)
        check_choice("divisor", divisor, DIVISORS)
        self.margin = margin
        self.beta = beta
        self.nu = nu
        self.learnable_beta = learnable_beta
        self.divisor = divisor

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.betas = self.add_weight(
            name="betas",
            shape=(self.num_classes or 1,),
            initializer=keras.initializers.Constant(self.beta),
            trainable=self.learnable_beta,
        )
        super().build(input_shape)

    def compute_triplets(
        self, embeddings: tf.Tensor, labels: tf.Tensor, triplets: Triplets, seed: tf.Tensor
    ) -> tf.Tensor:
        del seed
        distances = euclidean_distances(embeddings)
        to_positive, to_negative = triplets.of(distances)
        betas = tf.gather(self._anchor_betas(labels), triplets.anchor)
        positive_hinges = self.margin + to_positive - betas
        negative_hinges = self.margin + betas - to_negative
        valid = tf.cast(triplets.valid, distances.dtype)
        either = tf.reduce_sum(tf.cast((positive_hinges > 0) | (negative_hinges > 0), distances.dtype) * valid)
        return self._reduce(betas, positive_hinges, negative_hinges, valid, valid, valid, either)

    def compute_all(self, embeddings: tf.Tensor, labels: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        del seed
        # An anchor's triplets combine each of its positives with each of its negatives. So a positive pair counts as
        # often as the anchor has negatives, and a negative pair as often as it has positives.
        distances = euclidean_distances(embeddings)
        positive, negative = (tf.cast(mask, distances.dtype) for mask in pair_masks(labels))
        positives = tf.reduce_sum(positive, axis=1, keepdims=True)
        negatives = tf.reduce_sum(negative, axis=1, keepdims=True)
        betas = self._anchor_betas(labels)[:, None]
        positive_hinges = self.margin + distances - betas
        negative_hinges = self.margin + betas - distances
        # A triplet is inactive if its pairs are both inactive.
        idle = [
            tf.reduce_sum(tf.cast(hinges <= 0, distances.dtype) * pairs, axis=1, keepdims=True)
            for hinges, pairs in ((positive_hinges, positive), (negative_hinges, negative))
        ]
        either = tf.reduce_sum(positives * negatives - idle[0] * idle[1])
        return self._reduce(
            betas,
            positive_hinges,
            negative_hinges,
            positive * negatives,
            negative * positives,
            positives * negatives,
            either,
        )

    def _anchor_betas(self, labels):
        betas = tf.convert_to_tensor(self.betas)
        return tf.gather(betas, labels if self.num_classes else tf.zeros_like(labels))

    def _reduce(
        self, betas, positive_hinges, negative_hinges, positive_weights, negative_weights, anchor_weights, active
    ):
        """The loss; `active` is the number of active triplets, and the weights say how often a hinge or beta counts."""
        dtype = positive_hinges.dtype
        total = tf.reduce_sum(tf.nn.relu(positive_hinges) * positive_weights)
        total += tf.reduce_sum(tf.nn.relu(negative_hinges) * negative_weights)
        total += self.nu * tf.reduce_sum(betas * anchor_weights)
        if self.divisor == "hinges":
            active = tf.reduce_sum(tf.cast(positive_hinges > 0, dtype) * positive_weights)
            active += tf.reduce_sum(tf.cast(negative_hinges > 0, dtype) * negative_weights)
        return tf.math.divide_no_nan(total, active)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "margin": self.margin,
            "beta": self.beta,
            "nu": self.nu,
            "learnable_beta": self.learnable_beta,
            "divisor": self.divisor,
        }
