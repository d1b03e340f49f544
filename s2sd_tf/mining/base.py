"""The interface of a miner, and the registry."""

from typing import NamedTuple

import tensorflow as tf

from s2sd_tf.keras_compat import keras
from s2sd_tf.registry import Registry


class Triplets(NamedTuple):
    """Index triplets of fixed number T, so that they have a static shape under XLA.

    Attributes:
        anchor, positive, negative: int32 `(T,)`, positions in the batch.
        valid: bool `(T,)`; an entry that is False stands for no triplet, and its indices mean nothing.
    """

    anchor: tf.Tensor
    positive: tf.Tensor
    negative: tf.Tensor
    valid: tf.Tensor

    def of(self, distances):
        """The entries `(T,)` of a matrix `(batch, batch)` for anchor and positive, and for anchor and negative."""
        return (
            tf.gather_nd(distances, tf.stack([self.anchor, self.positive], axis=1)),
            tf.gather_nd(distances, tf.stack([self.anchor, self.negative], axis=1)),
        )


class Pairs(NamedTuple):
    """Which pairs of a batch count, a row for every anchor.

    Attributes:
        positive, negative: bool `(batch, batch)`; entry `[i, j]` says that j is a positive, or a negative, of anchor i.
            A row without an entry is no anchor. Both are set only where the miner's `negatives_in_class` is True.
    """

    positive: tf.Tensor
    negative: tf.Tensor

    def complete(self):
        """bool `(batch,)`: which anchors have both a positive and a negative."""
        return tf.reduce_any(self.positive, axis=1) & tf.reduce_any(self.negative, axis=1)


class Miner:
    """Chooses triplets from a batch. Stateless: a stochastic miner draws from the seed it is handed.

    A miner is called with `distances` `(batch, batch)`, the Euclidean distances between l2-normalised embeddings;
    `labels` int32 `(batch,)`; `dim`, the embedding dimension; and `seed`, an integer tensor `(2,)`. It returns
    `Triplets`. The same arguments give the same triplets, in a graph, eagerly and under XLA.

    Attributes:
        negatives_in_class: bool, whether a triplet's negative may be a sample of the anchor's class.
    """

    negatives_in_class = False

    def __call__(self, distances, labels, *, dim, seed):
        raise NotImplementedError

    def pairs(self, distances, labels, *, dim, seed):
        """The same choice as `Pairs`: the pairs that are in any of the triplets."""
        found = self(distances, labels, dim=dim, seed=seed)
        batch = tf.shape(labels)[0]
        count = tf.cast(found.valid, tf.int32)

        def mask(column):
            cells = tf.math.unsorted_segment_sum(count, found.anchor * batch + column, batch * batch)
            return tf.reshape(cells > 0, [batch, batch])

        return Pairs(mask(found.positive), mask(found.negative))

    def get_config(self):
        """Constructor arguments, complete."""
        return {}

    @classmethod
    def from_config(cls, config):
        return cls(**config)


class PairMiner(Miner):
    """A miner whose choice is no set of triplets, as an anchor has many negatives: only `pairs` is defined."""

    def __call__(self, distances, labels, *, dim, seed):
        raise TypeError(f"miner: {self.registered_name!r} chooses pairs and no triplets")

    def pairs(self, distances, labels, *, dim, seed):
        raise NotImplementedError


def uniform_draws(shape, seed, dtype):
    """Draws from (0, 1] on a grid of 2^-24, the same in a graph, eagerly and under XLA.

    Made from the random bits here, as XLA makes other floats of the same bits.
    """
    bits = tf.random.stateless_uniform(shape, seed, minval=None, maxval=None, dtype=tf.uint32, alg="philox")
    draws = tf.cast(tf.bitwise.right_shift(bits, tf.constant(8, tf.uint32)), tf.int32)
    return (tf.cast(draws, dtype) + 1.0) * 2.0**-24


def pair_masks(labels):
    """All `Pairs`: masks of equal and of different labels, the diagonal in neither."""
    same = tf.equal(labels[:, None], labels[None, :])
    others = tf.logical_not(tf.eye(tf.shape(labels)[0], dtype=tf.bool))
    return Pairs(same & others, tf.logical_not(same))


def nearest(distances, mask):
    """Position int32 `(batch,)` of the smallest distance of every row within `mask`, the first of equal ones; 0 in a
    row without an entry.
    """
    return tf.argmin(tf.where(mask, distances, distances.dtype.max), axis=1, output_type=tf.int32)


def farthest(distances, mask):
    """Position int32 `(batch,)` of the largest distance of every row within `mask`, the first of equal ones; 0 in a
    row without an entry.
    """
    return tf.argmax(tf.where(mask, distances, distances.dtype.min), axis=1, output_type=tf.int32)


def ranked(distances, mask):
    """Every row's entries of `mask` by rising distance, the other positions behind them.

    Returns:
        Positions int32 `(batch, batch)`, and the distances in that order, the dtype's largest number for the others.
    """
    distances = tf.where(mask, distances, distances.dtype.max)
    order = tf.argsort(distances, axis=1)
    return order, tf.gather(distances, order, batch_dims=1)


def drawn_members(mask, draws, besides=False):
    """A uniformly drawn entry of every row of a mask, for each of the row's draws.

    Args:
        mask: bool `(batch, columns)`.
        draws: float `(batch, draws)`, from `uniform_draws`.
        besides: bool; the j-th draw of a row is out of its entries other than column j. Needs as many draws as columns.

    Returns:
        Columns int32 `(batch, draws)`; 0 where there is nothing to draw from.
    """
    entries = tf.cast(mask, draws.dtype)
    # Counts and ranks are whole numbers, which floats hold exactly: nothing depends on the order of the additions.
    rank_of = tf.cumsum(entries, axis=1)
    count = rank_of[:, -1:]
    if besides:
        rank = tf.math.ceil(draws * (count - entries))
        rank += tf.cast(mask & (rank >= rank_of), draws.dtype)
    else:
        rank = tf.math.ceil(draws * count)
    return tf.searchsorted(rank_of, rank, side="left")


def weighted_members(probabilities, draws):
    """A column of every row, drawn with the row's probabilities, for each of the row's draws: inverse-CDF sampling.

    Args:
        probabilities: float `(batch, columns)`, rows with sum 1, or 0 where there is nothing to draw from.
        draws: float `(batch, draws)`, from `uniform_draws`.

    Returns:
        Columns int32 `(batch, draws)`, never one of probability 0; 0 where there is nothing to draw from.
    """
    # In whole numbers, as the rounding of cumulative sums differs between XLA and the rest, and in parallel sums could
    # let a column of probability 0 in. Draws are in (0, total]: the first sum that reaches one has just risen.
    cumulative = tf.cumsum(tf.floor(tf.cast(probabilities, tf.float64) * 2.0**48), axis=1)
    return tf.searchsorted(cumulative, tf.cast(draws, tf.float64) * cumulative[:, -1:], side="left")


def one_negative_a_positive(negative, valid):
    """Triplets of every ordered pair (a, p), from the negative index chosen for it and whether there is one.

    Args:
        negative: int32 `(batch, batch)`; `negative[a, p]` goes with anchor a and positive p.
        valid: bool `(batch, batch)`.
    """
    batch = tf.shape(negative)[0]
    positions = tf.range(batch, dtype=tf.int32)
    anchor = tf.reshape(tf.broadcast_to(positions[:, None], (batch, batch)), [-1])
    positive = tf.reshape(tf.broadcast_to(positions[None, :], (batch, batch)), [-1])
    return Triplets(anchor, positive, tf.reshape(negative, [-1]), tf.reshape(valid, [-1]))


def one_triplet_an_anchor(positive, negative, valid):
    """Triplets with every sample as the anchor once, from int32 `positive`, int32 `negative` and bool `valid`, all
    `(batch,)`.
    """
    return Triplets(tf.range(tf.shape(positive)[0], dtype=tf.int32), positive, negative, valid)


_registry = Registry("miner", Miner)
names = _registry.names
lookup = _registry.lookup
settings = _registry.settings


def register(name):
    """Class decorator: makes a miner known by `name`, and known to Keras for saving.

    To Keras under a package name of the miners' own, as an objective may have a miner's class name.
    """

    def add(cls):
        return _registry.add(name, keras.utils.register_keras_serializable("s2sd_tf.mining")(cls))

    return add


def get(identifier, **settings):
    """A miner from its registered name and settings, or the miner given.

    Raises:
        ValueError: an unknown name, or settings beside an instance.
    """
    return _registry.get(identifier, **settings)
