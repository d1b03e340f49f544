"""Quadruplet loss."""

from typing import Any

import tensorflow as tf

from s2sd_tf.checks import check_at_least
from s2sd_tf.mining.base import Miner, Triplets, uniform_draws
from s2sd_tf.objectives.base import TupleObjective, mean_where, register, squared_distances


@register("quadruplet")
class Quadruplet(TupleObjective):
    """Quadruplet loss (Chen et al., "Beyond Triplet Loss: a Deep Quadruplet Network for Person Re-identification",
    CVPR 2017).

    The mean over the quadruplets, with Euclidean distances d of l2-normalised embeddings, of

        max(0, d(a, p)^2 - d(a, n)^2 + margin) + max(0, d(a, p)^2 - d(n, m)^2 + second_margin)

    The fourth image m of a quadruplet is drawn uniformly from the classes of neither a nor n. A batch of two classes
    has no such image, and the second term is left out.

    Args:
        margin: >= 0, alpha_1 in the paper.
        second_margin: >= 0, alpha_2.
        miner: name or `mining.Miner` that chooses the triplets.
        **kwargs: `seed` of the draws, and arguments of `Objective`.
    """

    formula = "mean_apnm [d_ap^2 - d_an^2 + m_1]+ + [d_ap^2 - d_nm^2 + m_2]+"
    paper = "Chen et al., CVPR 2017"
    cost = "B^2; with all triplets B^3"

    def __init__(
        self,
        margin: float = 0.2,
        second_margin: float = 0.2,
        miner: str | Miner = "distance_weighted",
        **kwargs: Any,
    ) -> None:
        super().__init__(miner=miner, **kwargs)
        check_at_least("margin", margin, 0)
        check_at_least("second_margin", second_margin, 0)
        self.margin = margin
        self.second_margin = second_margin

    def compute_triplets(
        self, embeddings: tf.Tensor, labels: tf.Tensor, triplets: Triplets, seed: tf.Tensor
    ) -> tf.Tensor:
        distances = squared_distances(embeddings)
        fourth, found = fourth_images(labels, triplets, seed)
        to_positive, to_negative = triplets.of(distances)
        between = tf.gather_nd(distances, tf.stack([triplets.negative, fourth], axis=1))
        losses = tf.nn.relu(to_positive - to_negative + self.margin)
        losses += tf.where(found, tf.nn.relu(to_positive - between + self.second_margin), 0.0)
        return mean_where(losses, triplets.valid)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "margin": self.margin, "second_margin": self.second_margin}


def fourth_images(labels: tf.Tensor, triplets: Triplets, seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """For each triplet, draws an image from neither class: its index, and whether there is one, int32 and bool `(T,)`.

    The draw is uniform over all such images.
    """
    batch = tf.shape(labels)[0]
    # Sorted by label, every class is a run. A draw among the images outside the triplet's two runs skips them.
    order = tf.argsort(labels, stable=True)
    ranked = tf.gather(labels, order)

    def run(positions):
        own = tf.gather(labels, positions)
        return tf.searchsorted(ranked, own, side="left"), tf.searchsorted(ranked, own, side="right")

    (start, end), (other_start, other_end) = run(triplets.anchor), run(triplets.negative)
    # If a miner chose the negative from the anchor's class, both runs are the same.
    other_end = tf.where(start == other_start, other_start, other_end)
    swap = start > other_start
    first_start, first_end = tf.where(swap, other_start, start), tf.where(swap, other_end, end)
    second_start, second_end = tf.where(swap, start, other_start), tf.where(swap, end, other_end)
    count = batch - (first_end - first_start) - (second_end - second_start)
    # The miner draws from the same seed, so these draws use another stream.
    seed = tf.stack([tf.bitwise.bitwise_xor(seed[0], 0x5BD1E995), seed[1]])
    draws = uniform_draws(tf.shape(triplets.anchor), seed, tf.float32)
    # Draws lie in (0, 1].
    choice = tf.cast(tf.math.ceil(draws * tf.cast(count, tf.float32)), tf.int32) - 1
    choice = tf.where(choice >= first_start, choice + first_end - first_start, choice)
    choice = tf.where(choice >= second_start, choice + second_end - second_start, choice)
    choice = tf.clip_by_value(choice, 0, batch - 1)
    return tf.gather(order, choice), count > 0
