"""Negatives whose distances follow a chosen distribution."""

import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from s2sd_tf.mining.base import (
    Miner,
    Triplets,
    one_negative_a_positive,
    pair_masks,
    ranked,
    register,
    uniform_draws,
    weighted_members,
)
from s2sd_tf.mining.distance_weighted import log_inverse_density

SHAPES = ("uniform", "gaussian", "distance")


@register("parametric")
class Parametric(Miner):
    """One negative for each ordered positive pair, at a distance from the anchor that follows a distribution over
    distance bins (the sampling distribution that a policy adapts in Roth et al., "PADS: Policy-Adapted Sampling for
    Visual Similarity Learning", CVPR 2020, section 3).

    `support` is split into `bins` of equal width, each including its lower edge. Distances below or above `support`
    count in the first or last bin. First a bin is drawn, in proportion to its weight, from those with a negative of the
    anchor; then one of its negatives, uniformly. Bins of weight 0 are drawn only if the anchor has negatives in no
    other bin, all with equal probability. Returns triplets `(batch^2,)`, with none for an anchor without a negative.

    Args:
        shape: weight of a bin with centre c.
            "uniform": 1.
            "gaussian": exp(-(c - mu)^2 / (2 sigma^2)).
            "distance": 1 / q(c), with the density q of `DistanceWeighted`.
        bins: >= 1.
        support: two numbers, 0 <= lower < upper <= 2.
        mu: for "gaussian".
        sigma: > 0, for "gaussian".
        weights: `bins` numbers >= 0, at least one > 0, to use as the bins' weights instead of `shape`. Empty: `shape`.
    """

    def __init__(
        self,
        shape: str = "uniform",
        bins: int = 30,
        support: Sequence[float] = (0.1, 1.4),
        mu: float = 0.5,
        sigma: float = 0.05,
        weights: Sequence[float] = (),
    ) -> None:
        if shape not in SHAPES:
            raise ValueError(f"Parametric: shape: expected one of {list(SHAPES)}. Received: {shape!r}")
        if not _are_numbers([bins], numbers.Integral) or bins < 1:
            raise ValueError(f"Parametric: bins: expected an int >= 1. Received: {bins!r}")
        if not _are_numbers(support) or len(support) != 2 or not 0 <= support[0] < support[1] <= 2:
            raise ValueError(
                f"Parametric: support: expected two numbers with 0 <= lower < upper <= 2. Received: {support!r}"
            )
        if not _are_numbers([mu]):
            raise ValueError(f"Parametric: mu: expected a number. Received: {mu!r}")
        if not _are_numbers([sigma]) or not sigma > 0:
            raise ValueError(f"Parametric: sigma: expected a number > 0. Received: {sigma!r}")
        fits = _are_numbers(weights) and (not len(weights) or (len(weights) == bins and min(weights) >= 0))
        if not fits or (len(weights) and not max(weights) > 0):
            raise ValueError(
                f"Parametric: weights: expected {bins} numbers >= 0, one for each of the bins, at least one > 0. "
                f"Received: {weights!r}"
            )
        self.shape = shape
        self.bins = int(bins)
        self.support = [float(edge) for edge in support]
        self.mu = float(mu)
        self.sigma = float(sigma)
        self.weights = [float(weight) for weight in weights]

    def get_config(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "bins": self.bins,
            "support": self.support,
            "mu": self.mu,
            "sigma": self.sigma,
            "weights": self.weights,
        }

    def log_weights(self, dim: int) -> tf.Tensor:
        """Returns the logarithms of the bin weights, float64 `(bins,)`, up to a constant."""
        if self.weights:
            weights = np.array(self.weights) / max(self.weights)
            # -1e6 instead of log(0): far below any other, but finite, so that bins of weight 0 are equally likely.
            return tf.constant(np.log(weights, where=weights > 0, out=np.full(self.bins, -1e6)))
        edges = self._edges()
        centres = (edges[1:] + edges[:-1]) / 2
        if self.shape == "gaussian":
            return tf.constant(-0.5 * ((centres - self.mu) / self.sigma) ** 2)
        if self.shape == "distance":
            return log_inverse_density(tf.constant(centres), dim)
        return tf.zeros([self.bins], tf.float64)

    def _edges(self) -> np.ndarray:
        lower, upper = self.support
        return np.linspace(lower, upper, self.bins + 1)

    def __call__(self, distances: tf.Tensor, labels: tf.Tensor, *, dim: int, seed: tf.Tensor) -> Triplets:
        positive, negative = pair_masks(labels)
        batch = tf.shape(labels)[0]
        draws = uniform_draws([2, batch, batch], seed, tf.float64)
        # Sorted by distance, the negatives of a bin are at the positions from `starts` to before `ends`.
        order, rising = ranked(distances, negative)
        upper = np.append(self._edges()[1:-1], distances.dtype.max)
        upper = tf.broadcast_to(tf.constant(upper, distances.dtype)[None, :], [batch, self.bins])
        ends = tf.searchsorted(rising, upper, side="left")
        starts = tf.concat([tf.zeros_like(ends[:, :1]), ends[:, :-1]], axis=1)
        log_weights = tf.where(ends > starts, self.log_weights(dim)[None, :], tf.float64.min)
        log_weights -= tf.reduce_max(log_weights, axis=1, keepdims=True)
        weights = tf.where(ends > starts, tf.exp(log_weights), 0.0)
        probabilities = tf.math.divide_no_nan(weights, tf.reduce_sum(weights, axis=1, keepdims=True))
        choice = weighted_members(probabilities, draws[0])
        start = tf.gather(starts, choice, batch_dims=1)
        size = tf.gather(ends, choice, batch_dims=1) - start
        rank = start + tf.cast(tf.math.ceil(draws[1] * tf.cast(size, tf.float64)), tf.int32) - 1
        choice = tf.gather(order, tf.maximum(rank, 0), batch_dims=1)
        return one_negative_a_positive(choice, positive & tf.reduce_any(negative, axis=1, keepdims=True))


def _are_numbers(values, kind=numbers.Real):
    """Whether `values` is a sequence of finite numbers of type `kind`."""
    return isinstance(values, (list, tuple, np.ndarray)) and all(
        isinstance(value, kind) and not isinstance(value, bool) and np.isfinite(value) for value in values
    )
