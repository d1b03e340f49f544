"""The base classes of the objectives, and the registry."""

import tensorflow as tf

from s2sd_tf import mining
from s2sd_tf.checks import check_at_least, checked_int
from s2sd_tf.keras_compat import keras
from s2sd_tf.registry import Registry


class Objective(keras.layers.Layer):
    """A metric-learning loss as a Keras layer: `objective(embeddings, labels)` is a scalar.

    A subclass implements `compute(embeddings, labels, training)`, and `build` where it has weights. Embeddings come to
    `compute` l2-normalised and in float32 (float64 for a float64 layer), whatever precision they had. A batch in which
    the loss is not defined (no positives, no negatives, nothing active) has loss 0 and zero, finite gradients.

    Args:
        num_classes: int, number of training classes; labels are in `[0, num_classes)`. For objectives with weights a
            class (`uses_classes`).
        learning_rate_multiplier: float >= 0, factor on the update of the objective's own weights relative to the rest
            of the model. `S2SDModel` applies it.
        name: name of the layer.
        dtype: "float32" (default) or "float64".

    Attributes:
        kind: "pair", "tuple" or "proxy"; "addons" for losses of tensorflow-addons.
        formula, paper, cost: one line each, for the table of all objectives in the documentation.
    """

    uses_classes = False
    kind = formula = paper = cost = ""

    def __init__(self, num_classes=None, learning_rate_multiplier=1.0, name=None, dtype="float32", **kwargs):
        super().__init__(name=name, dtype=dtype, **kwargs)
        if self.compute_dtype not in ("float32", "float64"):
            raise ValueError(f"dtype: expected 'float32' or 'float64'. Received: {dtype!r}")
        if num_classes is not None:
            num_classes = checked_int("num_classes", num_classes, 1)
        check_at_least("learning_rate_multiplier", learning_rate_multiplier, 0)
        self.num_classes = num_classes
        self.learning_rate_multiplier = learning_rate_multiplier

    def call(self, embeddings, labels, training=False):
        """Loss of a batch.

        Args:
            embeddings: float tensor `(batch, dim)`, batch >= 1.
            labels: integer tensor `(batch,)` or `(batch, 1)`, within the range of int32.
            training: bool; stochastic miners move on to new draws, and a cross-batch memory counts, only in training.

        Returns:
            Scalar tensor; NaN where an embedding is not finite. With labels outside `[0, num_classes)` an objective
            that has `num_classes` raises `InvalidArgumentError`; under XLA, which knows no assertions, it is NaN.
        """
        labels = tf.cast(tf.reshape(labels, [-1]), tf.int32)
        embeddings = tf.cast(embeddings, self.compute_dtype)
        # Comparisons with NaN are false: masks would hide it, and training go on with broken weights. The squares are
        # those of the normalisation.
        valid = tf.reduce_all(tf.math.is_finite(tf.reduce_sum(tf.square(embeddings), axis=-1, keepdims=True)))
        embeddings = self.prepare(embeddings)
        checks = []
        if self.uses_classes and self.num_classes is not None:
            in_range = tf.reduce_all((labels >= 0) & (labels < self.num_classes))
            told = f"labels: expected integers in [0, {self.num_classes}) for {self.name}. Received:"
            check = tf.debugging.Assert(in_range, [told, labels], 1000)
            checks = [check] if check is not None else []
            valid &= in_range
        with tf.control_dependencies(checks):
            loss = self.compute(embeddings, labels, training)
        return tf.where(valid, loss, tf.constant(float("nan"), loss.dtype))

    def prepare(self, embeddings):
        """What `compute` gets: l2-normalised embeddings."""
        return unit_rows(embeddings)

    def compute(self, embeddings, labels, training):
        """Loss of prepared `embeddings` `(batch, dim)` and int32 `labels` `(batch,)`."""
        raise NotImplementedError

    def get_config(self):
        return {
            **super().get_config(),
            "num_classes": self.num_classes,
            "learning_rate_multiplier": self.learning_rate_multiplier,
        }


class MinedObjective(Objective):
    """An objective over what a miner chooses from the batch.

    Args:
        miner: name of a registered miner, or a `mining.Miner`.
        seed: int, seed of a stochastic miner. The draws are a function of `seed` and of a step counter that is saved
            with the model.
        **kwargs: arguments of `Objective`.
    """

    def __init__(self, miner, seed=0, **kwargs):
        super().__init__(**kwargs)
        if isinstance(miner, dict):
            miner = keras.utils.deserialize_keras_object(miner)
        self.miner = mining.get(miner)
        self.seed = checked_int("seed", seed, 0)

    def build(self, input_shape):
        self.draws = self.add_weight(name="draws", shape=(), dtype="int64", initializer="zeros", trainable=False)
        super().build(input_shape)

    def compute(self, embeddings, labels, training):
        draw = tf.convert_to_tensor(self.draws)
        if training:
            self.draws.assign(draw + 1)
        seed = tf.stack([tf.constant(self.seed, tf.int32), tf.cast(draw, tf.int32)])
        return self.compute_mined(embeddings, labels, seed, training)

    def compute_mined(self, embeddings, labels, seed, training):
        """Loss over the choice that the miner makes with `seed`."""
        raise NotImplementedError

    def mine(self, choose, embeddings, labels, seed):
        """What `choose`, the miner or a method of it, takes from a batch."""
        # Miners know distances of unit rows, whatever the objective takes.
        distances = tf.stop_gradient(euclidean_distances(unit_rows(embeddings)))
        return choose(distances, labels, dim=embeddings.shape[1], seed=seed)

    def get_config(self):
        return {**super().get_config(), "miner": keras.utils.serialize_keras_object(self.miner), "seed": self.seed}


class TupleObjective(MinedObjective):
    """An objective over triplets that a miner chooses.

    Args:
        miner: name of a registered miner, or a `mining.Miner`, that chooses triplets. "all" is every valid triplet of
            the batch.
        seed: see `MinedObjective`.
        **kwargs: arguments of `Objective`.
    """

    kind = "tuple"

    def __init__(self, miner, **kwargs):
        super().__init__(miner=miner, **kwargs)
        if isinstance(self.miner, mining.PairMiner):
            raise ValueError(
                f"miner: expected one that chooses triplets, for {self.registered_name}. Received: "
                f"{self.miner.registered_name!r}, which chooses pairs"
            )

    def compute_mined(self, embeddings, labels, seed, training):
        del training
        if isinstance(self.miner, mining.AllTriplets):
            return self.compute_all(embeddings, labels, seed)
        return self.compute_triplets(embeddings, labels, self.mine(self.miner, embeddings, labels, seed), seed)

    def compute_triplets(self, embeddings, labels, triplets, seed):
        """Loss over `mining.Triplets`; `seed` is for further draws."""
        raise NotImplementedError

    def compute_all(self, embeddings, labels, seed):
        """Loss over every valid triplet; a closed form in a subclass spares the batch^3 entries."""
        return self.compute_triplets(embeddings, labels, self.mine(self.miner, embeddings, labels, seed), seed)


class PairObjective(MinedObjective):
    """An objective over the pairs of a batch, or over those that a miner chooses; on demand also over the pairs with
    embeddings of past batches.

    The cross-batch memory (XBM; Wang et al., "Cross-Batch Memory for Embedding Learning", CVPR 2020) keeps the last
    `memory_size` embeddings and labels of training. With them the loss in training is L(batch, batch) + memory_weight *
    L(batch, memory): all pairs of the batch with the memory, whatever the miner. The memory is saved with the model; in
    an `S2SDModel` every target has one of its own, of `memory_size` times its dimension numbers.

    Args:
        miner: name of a registered miner, or a `mining.Miner`, whose negatives are of other classes. "all" is every
            pair; of triplets, their pairs count.
        memory_size: int >= 0, embeddings in the memory; 0: no memory.
        memory_weight: float >= 0.
        memory_start: int >= 0, training steps before the memory counts: embeddings drift fast at first.
        seed: see `MinedObjective`.
        **kwargs: arguments of `Objective`.
    """

    kind = "pair"

    def __init__(self, miner="all", memory_size=0, memory_weight=1.0, memory_start=1000, **kwargs):
        super().__init__(miner=miner, **kwargs)
        if self.miner.negatives_in_class:
            raise ValueError(
                f"miner: expected one whose negatives are of other classes, for {self.registered_name}. Received: "
                f"{self.miner.registered_name!r}"
            )
        self.memory_size = checked_int("memory_size", memory_size, 0)
        check_at_least("memory_weight", memory_weight, 0)
        self.memory_weight = memory_weight
        self.memory_start = checked_int("memory_start", memory_start, 0)

    def build(self, input_shape):
        if self.memory_size:

            def make(name, shape, dtype):
                return self.add_weight(name=name, shape=shape, dtype=dtype, initializer="zeros", trainable=False)

            self.memory = make("memory", (self.memory_size, input_shape[-1]), None)
            self.memory_labels = make("memory_labels", (self.memory_size,), "int32")
            self.remembered = make("remembered", (), "int32")
        super().build(input_shape)

    def compute_mined(self, embeddings, labels, seed, training):
        if isinstance(self.miner, mining.NPair):
            loss = self._one_pair_a_class(embeddings, labels, seed)
        else:
            loss = self.compute_pairs(embeddings, embeddings, self.mine(self.miner.pairs, embeddings, labels, seed))
        if not self.memory_size or not training:
            return loss
        memory, memory_labels = tf.convert_to_tensor(self.memory), tf.convert_to_tensor(self.memory_labels)
        remembered = tf.convert_to_tensor(self.remembered)
        same = tf.equal(labels[:, None], memory_labels[None, :])
        filled = (tf.range(self.memory_size) < remembered) & (seed[1] >= self.memory_start)
        pairs = mining.Pairs(same & filled, tf.logical_not(same) & filled)
        loss += self.memory_weight * self.compute_pairs(embeddings, memory, pairs)
        for variable, new, old in (
            (self.memory, tf.stop_gradient(embeddings), memory),
            (self.memory_labels, labels, memory_labels),
        ):
            variable.assign(tf.ensure_shape(tf.concat([new, old], axis=0)[: self.memory_size], variable.shape))
        self.remembered.assign(tf.minimum(remembered + tf.shape(labels)[0], self.memory_size))
        return loss

    def _one_pair_a_class(self, embeddings, labels, seed):
        # The matrices are those of the pairs, at most half as high and wide as those of the batch.
        anchors, positives, valid = self.miner.one_pair_a_class(labels, seed)
        return self.compute_one_pair_a_class(tf.gather(embeddings, anchors), tf.gather(embeddings, positives), valid)

    def compute_one_pair_a_class(self, anchors, positives, valid):
        """Loss of `anchors` against `positives`, both `(m, dim)` and a pair a class in a row each, where `valid`."""
        own = tf.eye(tf.shape(valid)[0], dtype=tf.bool)
        pairs = mining.Pairs(own & valid, tf.logical_not(own) & valid & valid[:, None])
        return self.compute_pairs(anchors, positives, pairs)

    def compute_pairs(self, anchors, references, pairs):
        """Loss of `anchors` `(batch, dim)` against `references` `(m, dim)`: the anchors themselves, or the memory.

        The masks of `pairs`, a `mining.Pairs`, are `(batch, m)`.
        """
        raise NotImplementedError

    def get_config(self):
        return {
            **super().get_config(),
            "memory_size": self.memory_size,
            "memory_weight": self.memory_weight,
            "memory_start": self.memory_start,
        }


class LengthPenalizedObjective(PairObjective):
    """An objective over pairs whose paper takes embeddings of any length, and keeps them short by a penalty.

    Args:
        normalize: bool, l2-normalise the embeddings, as `S2SDModel` does anyway; the penalty is then a constant and
            left out.
        l2_weight: float >= 0, factor on the mean squared length.
        **kwargs: arguments of `PairObjective`.
    """

    def __init__(self, normalize=True, l2_weight=0.005, **kwargs):
        super().__init__(**kwargs)
        check_at_least("l2_weight", l2_weight, 0)
        self.normalize = normalize
        self.l2_weight = l2_weight

    def prepare(self, embeddings):
        return super().prepare(embeddings) if self.normalize else embeddings

    def compute(self, embeddings, labels, training):
        loss = super().compute(embeddings, labels, training)
        if self.normalize:
            return loss
        return loss + self.l2_weight * tf.reduce_mean(tf.reduce_sum(tf.square(embeddings), axis=1))

    def get_config(self):
        return {**super().get_config(), "normalize": self.normalize, "l2_weight": self.l2_weight}


class ProxyObjective(Objective):
    """An objective over embeddings and learned, l2-normalised proxies of the classes.

    Args:
        num_classes: int >= 1.
        **kwargs: arguments of `Objective`.
    """

    kind = "proxy"
    uses_classes = True

    def __init__(self, num_classes=None, **kwargs):
        if num_classes is None:
            raise ValueError(
                f"num_classes: expected the number of training classes for {self.registered_name}. Received: None"
            )
        super().__init__(num_classes=num_classes, **kwargs)

    def build(self, input_shape):
        self.proxies = self.add_weight(
            name="proxies",
            shape=self.proxies_shape(input_shape[-1]),
            initializer=keras.initializers.VarianceScaling(2.0, mode="fan_in", distribution="untruncated_normal"),
            trainable=True,
        )
        super().build(input_shape)

    def proxies_shape(self, dim):
        """Shape of the proxies for embeddings `(batch, dim)`."""
        return (self.num_classes, dim)

    def unit_proxies(self, length=1.0):
        """The proxies, l2-normalised along the last axis, times `length`."""
        return unit_rows(tf.convert_to_tensor(self.proxies), length)


def unit_rows(values, length=1.0):
    """Values `(..., dim)` l2-normalised along the last axis, times `length`; rows shorter than 1e-6 stay shorter."""

    # `tf.math.l2_normalize` in half the operations of its gradient.
    @tf.custom_gradient
    def normalize(rows):
        squares = tf.reduce_sum(tf.square(rows), axis=-1, keepdims=True)
        scales = length * tf.math.rsqrt(tf.maximum(squares, 1e-12))
        scaled = rows * scales

        def gradient(upstream):
            along = tf.reduce_sum(upstream * scaled, axis=-1, keepdims=True) / length**2
            return scales * (upstream - scaled * tf.where(squares > 1e-12, along, 0.0))

        return scaled, gradient

    return normalize(values)


def squared_distances(embeddings, references=None):
    """Squared Euclidean distances `(batch, batch)`, never negative, the diagonal 0; or `(batch, m)` to `references`."""
    itself = references is None or references is embeddings
    references = embeddings if itself else references
    products = tf.matmul(embeddings, references, transpose_b=True)
    squares = tf.reduce_sum(tf.square(embeddings), axis=1)
    others = squares if itself else tf.reduce_sum(tf.square(references), axis=1)
    distances = tf.nn.relu(squares[:, None] + others[None, :] - 2.0 * products)
    return zero_diagonal(distances) if itself else distances


@tf.custom_gradient
def zero_diagonal(matrix):
    """A square matrix with zeros in its diagonal, which have no gradient."""
    # XLA refuses the gradient of `tf.linalg.set_diag` for a batch whose size is not known beforehand.
    zeros = tf.zeros_like(matrix[0])
    return tf.linalg.set_diag(matrix, zeros), lambda upstream: tf.linalg.set_diag(upstream, zeros)


def euclidean_distances(embeddings, references=None):
    """Euclidean distances, as `squared_distances`; the gradient of a zero distance is 0."""
    return square_root(squared_distances(embeddings, references))


def square_root(values):
    """Square root of numbers >= 0; the gradient at 0 is 0."""
    positive = values > 0
    return tf.where(positive, tf.sqrt(tf.where(positive, values, 1.0)), 0.0)


def masked_logsumexp(values, mask, axis):
    """log of the sum of exp(values) over `mask` along `axis`; -1e30, with zero gradient, where the mask is empty."""
    return tf.reduce_logsumexp(tf.where(mask, values, tf.constant(-1e30, values.dtype)), axis=axis)


def masked_log1p_sum_exp(values, mask, axis):
    """log(1 + sum of exp(values) over `mask`) along `axis`: 0, with zero gradient, where the mask is empty."""
    return tf.nn.softplus(masked_logsumexp(values, mask, axis))


def mean_where(values, mask):
    """Mean of `values` over `mask`; 0, with zero gradient, where the mask is empty."""
    mask = tf.cast(mask, values.dtype)
    return tf.math.divide_no_nan(tf.reduce_sum(values * mask), tf.reduce_sum(mask))


_registry = Registry("objective", Objective)
lookup = _registry.lookup
settings = _registry.settings


def names(kind=None):
    """Names of the objectives, sorted; with `kind` ("pair", "tuple", "proxy", "addons") those of it."""
    return [name for name in _registry.names() if kind in (None, _registry.lookup(name).kind)]


def register(name):
    """Class decorator: makes an objective known by `name`, and known to Keras for saving."""

    def add(cls):
        return _registry.add(name, keras.utils.register_keras_serializable("s2sd_tf")(cls))

    return add


def get(identifier, **settings):
    """An objective from its registered name and settings, or the objective given.

    Example:
        >>> s2sd_tf.objectives.get("margin", num_classes=100, beta=0.6, miner="distance_weighted")

    Raises:
        ValueError: an unknown name or setting, or settings beside an instance.
    """
    return _registry.get(identifier, **settings)
