"""The base classes of the objectives, and the registry."""

import tensorflow as tf

from s2sd_tf import mining
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
    """

    uses_classes = False

    def __init__(self, num_classes=None, learning_rate_multiplier=1.0, name=None, dtype="float32", **kwargs):
        super().__init__(name=name, dtype=dtype, **kwargs)
        if num_classes is not None and not num_classes >= 1:
            raise ValueError(f"num_classes: expected an int >= 1. Received: {num_classes}")
        if not learning_rate_multiplier >= 0:
            raise ValueError(f"learning_rate_multiplier: expected a number >= 0. Received: {learning_rate_multiplier}")
        self.num_classes = num_classes
        self.learning_rate_multiplier = learning_rate_multiplier

    def call(self, embeddings, labels, training=False):
        """Loss of a batch.

        Args:
            embeddings: float tensor `(batch, dim)`.
            labels: integer tensor `(batch,)` or `(batch, 1)`.
            training: bool; stochastic miners move on to new draws only in training.

        Returns:
            Scalar tensor. With labels outside `[0, num_classes)` an objective that has `num_classes` raises
            `InvalidArgumentError`; under XLA, which knows no assertions, it is NaN.
        """
        labels = tf.cast(tf.reshape(labels, [-1]), tf.int32)
        embeddings = tf.math.l2_normalize(tf.cast(embeddings, self.compute_dtype), axis=1, epsilon=1e-12)
        if not self.uses_classes or self.num_classes is None:
            return self.compute(embeddings, labels, training)
        in_range = tf.reduce_all((labels >= 0) & (labels < self.num_classes))
        check = tf.debugging.Assert(
            in_range, [f"labels: expected integers in [0, {self.num_classes}) for {self.name}. Received:", labels], 1000
        )
        with tf.control_dependencies([check] if check is not None else []):
            loss = self.compute(embeddings, labels, training)
        return tf.where(in_range, loss, tf.constant(float("nan"), loss.dtype))

    def compute(self, embeddings, labels, training):
        """Loss of l2-normalised `embeddings` `(batch, dim)` and int32 `labels` `(batch,)`."""
        raise NotImplementedError

    def get_config(self):
        return {
            **super().get_config(),
            "num_classes": self.num_classes,
            "learning_rate_multiplier": self.learning_rate_multiplier,
        }


class TupleObjective(Objective):
    """An objective over triplets that a miner chooses.

    Args:
        miner: name of a registered miner, or a `mining.Miner`. "all" is every valid triplet of the batch.
        seed: int, seed of a stochastic miner. The draws are a function of `seed` and of a step counter that is saved
            with the model.
        **kwargs: arguments of `Objective`.
    """

    def __init__(self, miner, seed=0, **kwargs):
        super().__init__(**kwargs)
        if isinstance(miner, dict):
            miner = keras.utils.deserialize_keras_object(miner)
        self.miner = mining.get(miner)
        self.seed = seed

    def build(self, input_shape):
        self.draws = self.add_weight(name="draws", shape=(), dtype="int64", initializer="zeros", trainable=False)
        super().build(input_shape)

    def compute(self, embeddings, labels, training):
        if isinstance(self.miner, mining.AllTriplets):
            return self.compute_all(embeddings, labels)
        draw = tf.cast(tf.convert_to_tensor(self.draws), tf.int32)
        if training:
            self.draws.assign(tf.cast(draw, tf.int64) + 1)
        distances = tf.stop_gradient(euclidean_distances(embeddings))
        seed = tf.stack([tf.constant(self.seed, tf.int32), draw])
        triplets = self.miner(distances, labels, dim=embeddings.shape[1], seed=seed)
        return self.compute_triplets(embeddings, labels, triplets)

    def compute_triplets(self, embeddings, labels, triplets):
        """Loss over `mining.Triplets`."""
        raise NotImplementedError

    def compute_all(self, embeddings, labels):
        """Loss over every valid triplet; a closed form in a subclass spares the batch^3 entries."""
        triplets = self.miner(
            euclidean_distances(embeddings), labels, dim=embeddings.shape[1], seed=tf.zeros([2], tf.int32)
        )
        return self.compute_triplets(embeddings, labels, triplets)

    def get_config(self):
        return {**super().get_config(), "miner": keras.utils.serialize_keras_object(self.miner), "seed": self.seed}


def squared_distances(embeddings):
    """Squared Euclidean distances `(batch, batch)`, never negative, the diagonal 0."""
    squares = tf.reduce_sum(tf.square(embeddings), axis=1)
    products = tf.matmul(embeddings, embeddings, transpose_b=True)
    distances = tf.nn.relu(squares[:, None] + squares[None, :] - 2.0 * products)
    return tf.linalg.set_diag(distances, tf.zeros_like(squares))


def euclidean_distances(embeddings):
    """Euclidean distances `(batch, batch)`; the gradient of a zero distance is 0."""
    squared = squared_distances(embeddings)
    apart = squared > 0
    return tf.where(apart, tf.sqrt(tf.where(apart, squared, 1.0)), 0.0)


def masked_logsumexp(values, mask, axis):
    """log(1 + sum of exp(values) over `mask`) along `axis`: 0, with zero gradient, where the mask is empty."""
    lowest = tf.constant(values.dtype.min / 2, values.dtype)
    values = tf.where(mask, values, lowest)
    peak = tf.stop_gradient(tf.maximum(tf.reduce_max(values, axis=axis, keepdims=True), 0.0))
    total = tf.reduce_sum(tf.where(mask, tf.exp(values - peak), 0.0), axis=axis, keepdims=True) + tf.exp(-peak)
    return tf.squeeze(tf.math.log(total) + peak, axis=axis)


def mean_where(values, mask):
    """Mean of `values` over `mask`; 0, with zero gradient, where the mask is empty."""
    mask = tf.cast(mask, values.dtype)
    return tf.math.divide_no_nan(tf.reduce_sum(values * mask), tf.reduce_sum(mask))


_registry = Registry("objective", Objective)
names = _registry.names
lookup = _registry.lookup
settings = _registry.settings


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
