"""The miner interface and registry, and helpers for writing miners."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import tensorflow as tf

from s2sd_tf.keras_compat import keras
from s2sd_tf.labels import exact_labels
from s2sd_tf.registry import Registry, check_config


class Triplets(NamedTuple):
    """T index triplets, where T depends only on the batch size: XLA needs static shapes.

    Attributes:
        anchor, positive, negative: int32 `(T,)`, positions in the batch.
        valid: bool `(T,)`; where it is False there is no triplet, and the indices are meaningless.
    """

    anchor: tf.Tensor
    positive: tf.Tensor
    negative: tf.Tensor
    valid: tf.Tensor

    def of(self, distances: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Looks up anchor-positive and anchor-negative entries, `(T,)` each, in a matrix `(batch, batch)`."""
        return (
            tf.gather_nd(distances, tf.stack([self.anchor, self.positive], axis=1)),
            tf.gather_nd(distances, tf.stack([self.anchor, self.negative], axis=1)),
        )


class Pairs(NamedTuple):
    """Masks of the pairs that count, with one row per anchor.

    Attributes:
        positive, negative: bool `(batch, batch)`; entry `[i, j]` says that j is a positive, or a negative, of anchor i.
            A sample whose row is empty is not an anchor. A pair can be in both masks only if the miner's
            `negatives_in_class` is True. A `GradedPairObjective` may have weights in [0, 1], float, instead of masks;
            a pair can then be in both.
    """

    positive: tf.Tensor
    negative: tf.Tensor

    def masks(self) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns `(positive, negative)` as masks, also if they are weights."""
        if self.positive.dtype.is_bool:
            return self.positive, self.negative
        return self.positive > 0, self.negative > 0

    def within(self, positive: tf.Tensor, negative: tf.Tensor) -> "Pairs":
        """Returns the pairs that are also in the masks `positive` and `negative`."""
        if self.positive.dtype.is_bool:
            return Pairs(self.positive & positive, self.negative & negative)
        nothing = tf.zeros([], self.positive.dtype)
        return Pairs(tf.where(positive, self.positive, nothing), tf.where(negative, self.negative, nothing))

    def complete(self) -> tf.Tensor:
        """Returns bool `(batch,)`: which anchors have both a positive and a negative."""
        positive, negative = self.masks()
        return tf.reduce_any(positive, axis=1) & tf.reduce_any(negative, axis=1)


class Miner:
    """Chooses triplets from a batch. A miner is stateless: a stochastic one draws from the seed it receives.

    A miner is called with `distances` `(batch, batch)`, the Euclidean distances between l2-normalised embeddings;
    `labels`, integers `(batch,)`; `dim`, the embedding dimension; and `seed`, an integer tensor `(2,)`. The same
    arguments give the same triplets in a graph, eagerly and under XLA.

    Attributes:
        negatives_in_class: whether a triplet's negative may be a sample of the anchor's class.
        registered_name: the name that `register` was called with.
    """

    negatives_in_class = False
    registered_name: str

    def __call__(self, distances: tf.Tensor, labels: tf.Tensor, *, dim: int, seed: tf.Tensor) -> Triplets:
        raise NotImplementedError

    def pairs(self, distances: tf.Tensor, labels: tf.Tensor, *, dim: int, seed: tf.Tensor) -> Pairs:
        """Returns the same choice as `Pairs`: the pairs that occur in any of the triplets."""
        found = self(distances, labels, dim=dim, seed=seed)
        batch = tf.shape(labels)[0]
        count = tf.cast(found.valid, tf.int32)

        def mask(column):
            cells = tf.math.unsorted_segment_sum(count, found.anchor * batch + column, batch * batch)
            return tf.reshape(cells > 0, [batch, batch])

        return Pairs(mask(found.positive), mask(found.negative))

    def get_config(self) -> dict[str, Any]:
        """Returns all constructor arguments."""
        return {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Miner":
        return cls(**config)


class PairMiner(Miner):
    """A miner that chooses pairs, with many negatives per anchor, and no triplets: only `pairs` is defined."""

    def __call__(self, distances: tf.Tensor, labels: tf.Tensor, *, dim: int, seed: tf.Tensor) -> Triplets:
        raise TypeError(
            f"miner: expected one that chooses triplets. Received: {self.registered_name!r}, which chooses pairs"
        )

    def pairs(self, distances: tf.Tensor, labels: tf.Tensor, *, dim: int, seed: tf.Tensor) -> Pairs:
        raise NotImplementedError


def uniform_draws(shape: Sequence[int | tf.Tensor] | tf.Tensor, seed: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """Draws uniformly from (0, 1] on a grid of 2^-24; the draws are the same in a graph, eagerly and under XLA."""
    # Computed here from the random bits, because XLA turns the same bits into other floats.
    bits = tf.random.stateless_uniform(shape, seed, minval=None, maxval=None, dtype=tf.uint32, alg="philox")
    draws = tf.cast(tf.bitwise.right_shift(bits, tf.constant(8, tf.uint32)), tf.int32)
    return (tf.cast(draws, dtype) + 1.0) * 2.0**-24


def pair_masks(labels: tf.Tensor) -> Pairs:
    """Returns all `Pairs`: masks of equal and of different labels, both without the diagonal.

    Raises:
        ValueError: labels that `checked_labels` refuses.
    """
    labels, _ = exact_labels("labels", labels)
    same = tf.equal(labels[:, None], labels[None, :])
    others = tf.logical_not(tf.eye(tf.shape(labels)[0], dtype=tf.bool))
    return Pairs(same & others, tf.logical_not(same))


def nearest(distances: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
    """Returns int32 `(batch,)`: where each row has its smallest distance within `mask`.

    The first position wins a tie. It is 0 for a row without an entry in `mask`.
    """
    return tf.argmin(tf.where(mask, distances, distances.dtype.max), axis=1, output_type=tf.int32)


def farthest(distances: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
    """Returns int32 `(batch,)`: where each row has its largest distance within `mask`.

    The first position wins a tie. It is 0 for a row without an entry in `mask`.
    """
    return tf.argmax(tf.where(mask, distances, distances.dtype.min), axis=1, output_type=tf.int32)


def ranked(distances: tf.Tensor, mask: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Sorts each row's entries of `mask` by rising distance, followed by the positions outside `mask`.

    Returns:
        Positions int32 `(batch, batch)`, and the distances in that order. Outside `mask` the distance is the dtype's
        largest number.
    """
    distances = tf.where(mask, distances, distances.dtype.max)
    order = tf.argsort(distances, axis=1)
    return order, tf.gather(distances, order, batch_dims=1)


def drawn_members(mask: tf.Tensor, draws: tf.Tensor, besides: bool = False) -> tf.Tensor:
    """For each draw, picks one of the row's entries in `mask` uniformly.

    Args:
        mask: bool `(batch, columns)`.
        draws: float `(batch, draws)`, from `uniform_draws`.
        besides: if True, a row's j-th draw never picks column j. Needs as many draws as columns.

    Returns:
        Columns int32 `(batch, draws)`; 0 where there is nothing to draw from.
    """
    entries = tf.cast(mask, draws.dtype)
    # Counts and ranks are whole numbers, which floats hold exactly: the order of the additions does not matter.
    rank_of = tf.cumsum(entries, axis=1)
    count = rank_of[:, -1:]
    if besides:
        rank = tf.math.ceil(draws * (count - entries))
        rank += tf.cast(mask & (rank >= rank_of), draws.dtype)
    else:
        rank = tf.math.ceil(draws * count)
    return tf.searchsorted(rank_of, rank, side="left")


def weighted_members(probabilities: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
    """For each draw, picks a column with the row's probabilities, by inverse-CDF sampling.

    Args:
        probabilities: float `(batch, columns)`; each row sums to 1, or to 0 if there is nothing to draw from.
        draws: float `(batch, draws)`, from `uniform_draws`.

    Returns:
        Columns int32 `(batch, draws)`, never one of probability 0; 0 where there is nothing to draw from.
    """
    # In whole numbers: XLA rounds cumulative sums differently, and with parallel sums the rounding could let in a
    # column of probability 0. Draws are in (0, total], so the first sum to reach one belongs to a column that added to
    # the sum.
    cumulative = tf.cumsum(tf.floor(tf.cast(probabilities, tf.float64) * 2.0**48), axis=1)
    return tf.searchsorted(cumulative, tf.cast(draws, tf.float64) * cumulative[:, -1:], side="left")


def one_negative_a_positive(negative: tf.Tensor, valid: tf.Tensor) -> Triplets:
    """Returns one triplet for each ordered pair (a, p).

    Args:
        negative: int32 `(batch, batch)`; `negative[a, p]` is the negative for anchor a and positive p.
        valid: bool `(batch, batch)`; whether the pair has a triplet.
    """
    batch = tf.shape(negative)[0]
    positions = tf.range(batch, dtype=tf.int32)
    anchor = tf.reshape(tf.broadcast_to(positions[:, None], (batch, batch)), [-1])
    positive = tf.reshape(tf.broadcast_to(positions[None, :], (batch, batch)), [-1])
    return Triplets(anchor, positive, tf.reshape(negative, [-1]), tf.reshape(valid, [-1]))


def one_triplet_an_anchor(positive: tf.Tensor, negative: tf.Tensor, valid: tf.Tensor) -> Triplets:
    """Returns triplets with each sample as the anchor once.

    Args:
        positive, negative: int32 `(batch,)`, the positive and the negative of each anchor.
        valid: bool `(batch,)`; whether the anchor has a triplet.
    """
    return Triplets(tf.range(tf.shape(positive)[0], dtype=tf.int32), positive, negative, valid)


_MinerClass = TypeVar("_MinerClass", bound=type[Miner])
_registry = Registry("miner", Miner)
names = _registry.names
lookup = _registry.lookup
settings = _registry.settings


def register(name: str) -> Callable[[_MinerClass], _MinerClass]:
    """Class decorator: registers a miner under `name`, and with Keras for saving.

    Raises:
        ValueError: the name or the class name is taken by another miner, or settings are missing in `get_config`.
    """

    # Keras gets a package name used only for miners, because an objective may have the class name of a miner.
    def add(cls: _MinerClass) -> _MinerClass:
        check_config(cls)
        return keras.utils.register_keras_serializable("s2sd_tf.mining")(_registry.add(name, cls))

    return add


def get(identifier: str | Miner, **settings: Any) -> Miner:
    """Makes a miner from its registered name and settings; a `Miner` instance is returned as it is.

    Raises:
        ValueError: an unknown name or setting, or settings together with an instance.
    """
    return _registry.get(identifier, **settings)
