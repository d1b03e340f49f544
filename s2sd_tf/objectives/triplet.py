"""Triplet loss."""

from typing import Any

import tensorflow as tf

from s2sd_tf.checks import check_at_least
from s2sd_tf.mining.base import Miner, Triplets, pair_masks
from s2sd_tf.objectives.base import TupleObjective, mean_where, register, squared_distances


@register("triplet")
class Triplet(TupleObjective):
    """Triplet loss on squared distances (FaceNet, Schroff et al., CVPR 2015, eq. 3).

    The mean over the triplets of max(0, d(a, p)^2 - d(a, n)^2 + margin), with Euclidean distances d of l2-normalised
    embeddings.

    Args:
        margin: >= 0.
        miner: name or `mining.Miner`. With "all" every valid triplet counts, in O(batch^2 log batch).
        **kwargs: `seed` of the miner, and arguments of `Objective`.
    """

    formula = "mean_apn [d_ap^2 - d_an^2 + m]+"
    paper = "Schroff et al., CVPR 2015"
    cost = "B^2; with all triplets B^2 log B"

    def __init__(self, margin: float = 0.2, miner: str | Miner = "distance_weighted", **kwargs: Any) -> None:
        super().__init__(miner=miner, **kwargs)
        check_at_least("margin", margin, 0)
        self.margin = margin

    def compute_triplets(
        self, embeddings: tf.Tensor, labels: tf.Tensor, triplets: Triplets, seed: tf.Tensor
    ) -> tf.Tensor:
        del labels, seed
        return triplet_hinges(squared_distances(embeddings), triplets, self.margin)

    def compute_all(self, embeddings: tf.Tensor, labels: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        del seed
        return all_triplet_hinges(squared_distances(embeddings), labels, self.margin)[0]

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "margin": self.margin}


def triplet_hinges(distances: tf.Tensor, triplets: Triplets, margin: float) -> tf.Tensor:
    """Computes the mean over triplets of max(0, d(a, p) - d(a, n) + margin), from distances `(batch, batch)`."""
    to_positive, to_negative = triplets.of(distances)
    return mean_where(tf.nn.relu(to_positive - to_negative + margin), triplets.valid)


def all_triplet_hinges(distances: tf.Tensor, labels: tf.Tensor, margin: float) -> tuple[tf.Tensor, tf.Tensor]:
    """Computes `triplet_hinges` over every valid triplet of the batch; returns `(loss, number of triplets)`."""
    # For an anchor and a positive, the active negatives are those nearer than d(a, p) + margin. With the negatives
    # sorted and cumulatively summed once per anchor, a pair needs one binary search instead of a row of the batch.
    positive, negative = pair_masks(labels)
    counts = tf.reduce_sum(tf.cast(negative, tf.int32), axis=1, keepdims=True)
    top = tf.stop_gradient(tf.reduce_max(distances)) + margin + 1.0
    ranked = tf.sort(tf.where(negative, distances, top), axis=1)
    limits = distances + margin
    active = tf.searchsorted(tf.stop_gradient(ranked), tf.stop_gradient(limits), side="left")
    active = tf.minimum(active, counts)
    sums = tf.concat([tf.zeros_like(ranked[:, :1]), tf.cumsum(ranked, axis=1)], axis=1)
    active_sums = tf.gather(sums, active, batch_dims=1)
    losses = tf.cast(active, distances.dtype) * limits - active_sums
    triplets = tf.reduce_sum(tf.cast(positive, distances.dtype) * tf.cast(counts, distances.dtype))
    return tf.math.divide_no_nan(tf.reduce_sum(tf.where(positive, losses, 0.0)), triplets), triplets
