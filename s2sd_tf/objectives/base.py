"""The base classes and registry of the objectives, and functions that they share."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tensorflow as tf

from s2sd_tf import mining
from s2sd_tf.checks import check_at_least, checked_int
from s2sd_tf.keras_compat import keras
from s2sd_tf.labels import checked_labels, exact_labels
from s2sd_tf.mining.n_pair import NPair
from s2sd_tf.registry import Registry, check_config
from s2sd_tf.relevance import JACCARD, checked_relevance, label_columns, relevance_matrix


class Objective(keras.layers.Layer):
    """A metric-learning loss as a Keras layer: `objective(embeddings, labels)` returns a scalar.

    A subclass implements `compute(embeddings, labels, training)`, and `build` if it has weights. `compute` receives
    l2-normalised embeddings in float32 (float64 in a float64 layer), whatever their precision was. If the loss of a
    batch is undefined (no positives, no negatives, nothing active), the loss is 0 and the gradients are zero.

    Args:
        num_classes: number of training classes, for objectives with weights per class (`uses_classes`). Labels are in
            `[0, num_classes)`.
        learning_rate_multiplier: >= 0, factor on the updates of the objective's own weights relative to the rest of
            the model. `S2SDModel` applies it.
        name: name of the layer.
        dtype: "float32" or "float64".

    Attributes:
        uses_classes: whether the objective has, or can have, weights per class.
        relevance: graded relevance of images with several labels, see `GradedPairObjective`; (): one class each.
        kind: "pair", "tuple" or "proxy"; "addons" for losses of tensorflow-addons.
        formula, paper, cost: one line each, for the table of objectives in the documentation.
    """

    uses_classes = False
    relevance: tuple[float, ...] | str = ()
    kind = formula = paper = cost = ""

    def __init__(
        self,
        num_classes: int | None = None,
        learning_rate_multiplier: float = 1.0,
        name: str | None = None,
        dtype: str = "float32",
        **kwargs: Any,
    ) -> None:
        super().__init__(name=name, dtype=dtype, **kwargs)
        if self.compute_dtype not in ("float32", "float64"):
            raise ValueError(f"dtype: expected 'float32' or 'float64'. Received: {dtype!r}")
        if num_classes is not None:
            num_classes = checked_int("num_classes", num_classes, 1)
        check_at_least("learning_rate_multiplier", learning_rate_multiplier, 0)
        self.num_classes = num_classes
        self.learning_rate_multiplier = learning_rate_multiplier

    def __call__(self, embeddings: tf.Tensor, labels: tf.Tensor, *args: Any, **kwargs: Any) -> tf.Tensor:
        # Before Keras, which casts float labels to float32 and appends all arguments to an error in `call`.
        labels = checked_labels("labels", labels, len_of(embeddings), self.label_columns)
        return super().__call__(embeddings, labels, *args, **kwargs)

    def call(self, embeddings: tf.Tensor, labels: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Computes the loss of a batch.

        Args:
            embeddings: float `(batch, dim)`, batch >= 1.
            labels: integers `(batch,)` or `(batch, 1)`, of any integer dtype. Whole numbers in floating point count
                as integers, as far as the dtype holds them exactly. With `relevance`, `(batch, n)`.
            training: only in training do stochastic miners advance to new draws, and does a cross-batch memory count.

        Returns:
            A scalar. It is NaN if an embedding is not finite.

        Raises:
            ValueError: labels of another type or shape, or that are not whole numbers.
            InvalidArgumentError: the objective has weights per class and labels are outside `[0, num_classes)`; labels
                other than 0 and 1 with the relevance "jaccard"; or in a graph, floating-point labels that are not whole
                numbers. XLA has no assertions; there the loss is NaN.
        """
        labels, whole = exact_labels("labels", labels, len_of(embeddings), self.label_columns)
        embeddings = tf.cast(embeddings, self.compute_dtype)
        # Comparisons with NaN are false, so masks would hide a NaN and training would continue with broken weights. The
        # normalisation computes the same squares, so they cost nothing extra.
        valid = tf.reduce_all(tf.math.is_finite(tf.reduce_sum(tf.square(embeddings), axis=-1, keepdims=True)))
        valid &= whole
        embeddings = self.prepare(embeddings)
        checks = []
        limit = 2 if self.relevance == JACCARD else self.num_classes if self.uses_classes else None
        if limit is not None:
            in_range = tf.reduce_all((labels >= 0) & (labels < limit))
            message = f"labels: expected integers in [0, {limit}) for {self.name}. Received:"
            check = tf.debugging.Assert(in_range, [message, labels], 1000)
            checks = [check] if check is not None else []
            valid &= in_range
            # Positions of weights.
            labels = tf.cast(labels, tf.int32)
        with tf.control_dependencies(checks):
            loss = self.compute(embeddings, labels, training)
        return tf.where(valid, loss, tf.constant(float("nan"), loss.dtype))

    @property
    def label_columns(self) -> int:
        """How many labels an image has, as `labels.checked_labels` takes it: 0 for one class, -1 for any number."""
        return label_columns(self.relevance)

    def prepare(self, embeddings: tf.Tensor) -> tf.Tensor:
        """Returns the embeddings that `compute` receives: l2-normalised."""
        return unit_rows(embeddings)

    def compute(self, embeddings: tf.Tensor, labels: tf.Tensor, training: bool) -> tf.Tensor:
        """Computes the loss of prepared `embeddings` `(batch, dim)` with `labels` `(batch,)`, or `(batch, n)` with
        `relevance`.

        The labels are int64, and int32 if they are checked to be small: those of an objective with weights per class,
        and those of "jaccard".
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement this method")

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "num_classes": self.num_classes,
            "learning_rate_multiplier": self.learning_rate_multiplier,
        }


class MinedObjective(Objective):
    """An objective over the triplets or pairs that a miner chooses from the batch.

    Args:
        miner: name of a registered miner, or a `mining.Miner`.
        seed: >= 0, seed of a stochastic miner. Draws depend on `seed` and on a step counter that is saved with the
            model.
        **kwargs: arguments of `Objective`.
    """

    def __init__(self, miner: str | mining.Miner | dict[str, Any], seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.miner = mining.get(keras.utils.deserialize_keras_object(miner) if isinstance(miner, dict) else miner)
        self.seed = checked_int("seed", seed, 0)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.draws = self.add_weight(name="draws", shape=(), dtype="int64", initializer="zeros", trainable=False)
        super().build(input_shape)

    def compute(self, embeddings: tf.Tensor, labels: tf.Tensor, training: bool) -> tf.Tensor:
        draw = tf.convert_to_tensor(self.draws)
        if training:
            self.draws.assign(draw + 1)
        seed = tf.stack([tf.constant(self.seed, tf.int32), tf.cast(draw, tf.int32)])
        return self.compute_mined(embeddings, labels, seed, training)

    def compute_mined(self, embeddings: tf.Tensor, labels: tf.Tensor, seed: tf.Tensor, training: bool) -> tf.Tensor:
        """Computes the loss over what the miner chooses with `seed`."""
        raise NotImplementedError(f"{type(self).__name__} does not implement this method")

    def mine(self, choose: Callable[..., Any], embeddings: tf.Tensor, labels: tf.Tensor, seed: tf.Tensor) -> Any:
        """Returns what `choose`, the miner or one of its methods, chooses from the batch."""
        # Miners work on distances of unit rows, even if the objective does not normalise.
        distances = tf.stop_gradient(euclidean_distances(unit_rows(embeddings)))
        return choose(distances, labels, dim=embeddings.shape[1], seed=seed)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "miner": keras.utils.serialize_keras_object(self.miner), "seed": self.seed}


class TupleObjective(MinedObjective):
    """An objective over triplets that a miner chooses.

    Args:
        miner: name of a registered miner, or a `mining.Miner`, that chooses triplets. "all" chooses every valid triplet
            of the batch.
        seed: see `MinedObjective`.
        **kwargs: arguments of `Objective`.
    """

    kind = "tuple"

    def __init__(self, miner: str | mining.Miner | dict[str, Any], **kwargs: Any) -> None:
        super().__init__(miner=miner, **kwargs)
        if isinstance(self.miner, mining.PairMiner):
            raise ValueError(
                f"miner: expected one that chooses triplets, for {self.registered_name}. Received: "
                f"{self.miner.registered_name!r}, which chooses pairs"
            )

    def compute_mined(self, embeddings: tf.Tensor, labels: tf.Tensor, seed: tf.Tensor, training: bool) -> tf.Tensor:
        del training
        if isinstance(self.miner, mining.AllTriplets):
            return self.compute_all(embeddings, labels, seed)
        return self.compute_triplets(embeddings, labels, self.mine(self.miner, embeddings, labels, seed), seed)

    def compute_triplets(
        self, embeddings: tf.Tensor, labels: tf.Tensor, triplets: mining.Triplets, seed: tf.Tensor
    ) -> tf.Tensor:
        """Computes the loss over `triplets`; `seed` is for further draws."""
        raise NotImplementedError(f"{type(self).__name__} does not implement this method")

    def compute_all(self, embeddings: tf.Tensor, labels: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Computes the loss over every valid triplet. A subclass with a closed form avoids the batch^3 entries."""
        return self.compute_triplets(embeddings, labels, self.mine(self.miner, embeddings, labels, seed), seed)


class PairObjective(MinedObjective):
    """An objective over the pairs that a miner chooses, optionally also over pairs with embeddings of past batches.

    The cross-batch memory (XBM; Wang et al., "Cross-Batch Memory for Embedding Learning", CVPR 2020) keeps the last
    `memory_size` training embeddings and labels. The training loss is then L(batch, batch) + memory_weight *
    L(batch, memory), with all pairs between the batch and the memory, whatever the miner. The memory is saved with the
    model. In an `S2SDModel` every target has its own memory, of `memory_size` embeddings in the target's dimension.

    Args:
        miner: name of a registered miner, or a `mining.Miner`, whose negatives are from other classes. "all" chooses
            every pair. If the miner chooses triplets, their pairs count.
        memory_size: >= 0, number of embeddings in the memory; 0: no memory.
        memory_weight: >= 0.
        memory_start: >= 0, number of training steps before the memory counts: embeddings drift fast at first.
        seed: see `MinedObjective`.
        **kwargs: arguments of `Objective`.
    """

    kind = "pair"

    def __init__(
        self,
        miner: str | mining.Miner | dict[str, Any] = "all",
        memory_size: int = 0,
        memory_weight: float = 1.0,
        memory_start: int = 1000,
        **kwargs: Any,
    ) -> None:
        super().__init__(miner=miner, **kwargs)
        if self.miner.negatives_in_class:
            raise ValueError(
                f"miner: expected one whose negatives are from other classes, for {self.registered_name}. Received: "
                f"{self.miner.registered_name!r}"
            )
        self.memory_size = checked_int("memory_size", memory_size, 0)
        check_at_least("memory_weight", memory_weight, 0)
        self.memory_weight = memory_weight
        self.memory_start = checked_int("memory_start", memory_start, 0)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        if self.memory_size:

            def make(name, shape, dtype):
                return self.add_weight(name=name, shape=shape, dtype=dtype, initializer="zeros", trainable=False)

            self.memory = make("memory", (self.memory_size, input_shape[-1]), None)
            columns = (self.label_columns,) if self.label_columns else ()
            self.memory_labels = make("memory_labels", (self.memory_size, *columns), "int64")
            self.remembered = make("remembered", (), "int32")
        super().build(input_shape)

    def compute_mined(self, embeddings: tf.Tensor, labels: tf.Tensor, seed: tf.Tensor, training: bool) -> tf.Tensor:
        if isinstance(self.miner, NPair):
            # Only the rows of the chosen pairs: the matrices are at most half as high and wide as those of the batch.
            anchors, positives, valid = self.miner.one_pair_per_class(labels, seed)
            loss = self.compute_one_pair_per_class(
                tf.gather(embeddings, anchors), tf.gather(embeddings, positives), valid
            )
        else:
            loss = self.compute_pairs(embeddings, embeddings, self.pairs_within(embeddings, labels, seed))
        if not self.memory_size or not training:
            return loss
        memory, memory_labels = tf.convert_to_tensor(self.memory), tf.convert_to_tensor(self.memory_labels)
        remembered = tf.convert_to_tensor(self.remembered)
        filled = (tf.range(self.memory_size) < remembered) & (seed[1] >= self.memory_start)
        pairs = self.pairs_between(tf.cast(labels, tf.int64), memory_labels).within(filled, filled)
        loss += self.memory_weight * self.compute_pairs(embeddings, memory, pairs)
        for variable, new, old in (
            (self.memory, tf.stop_gradient(embeddings), memory),
            (self.memory_labels, tf.cast(labels, tf.int64), memory_labels),
        ):
            variable.assign(tf.ensure_shape(tf.concat([new, old], axis=0)[: self.memory_size], variable.shape))
        self.remembered.assign(tf.minimum(remembered + tf.shape(labels)[0], self.memory_size))
        return loss

    def pairs_within(self, embeddings: tf.Tensor, labels: tf.Tensor, seed: tf.Tensor) -> mining.Pairs:
        """Returns the pairs of the batch that count: those that the miner chooses."""
        return self.mine(self.miner.pairs, embeddings, labels, seed)

    def pairs_between(self, labels: tf.Tensor, references: tf.Tensor) -> mining.Pairs:
        """Returns all pairs of two sets, given their labels `(batch,)` and `(m,)`."""
        same = tf.equal(labels[:, None], references[None, :])
        return mining.Pairs(same, tf.logical_not(same))

    def compute_one_pair_per_class(self, anchors: tf.Tensor, positives: tf.Tensor, valid: tf.Tensor) -> tf.Tensor:
        """Computes the loss over one pair per class: row i of `anchors` and of `positives`, both `(m, dim)`, is a pair.

        Rows where `valid`, bool `(m,)`, is False do not count.
        """
        own = tf.eye(tf.shape(valid)[0], dtype=tf.bool)
        pairs = mining.Pairs(own & valid, tf.logical_not(own) & valid & valid[:, None])
        return self.compute_pairs(anchors, positives, pairs)

    def compute_pairs(self, anchors: tf.Tensor, references: tf.Tensor, pairs: mining.Pairs) -> tf.Tensor:
        """Computes the loss over pairs of an anchor and a reference.

        Args:
            anchors: `(batch, dim)`.
            references: `(m, dim)`, the anchors themselves or the memory.
            pairs: masks `(batch, m)` of the pairs that count; for a `GradedPairObjective`, masks or weights.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement this method")

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "memory_size": self.memory_size,
            "memory_weight": self.memory_weight,
            "memory_start": self.memory_start,
        }


class GradedPairObjective(PairObjective):
    """A pair objective that also takes images with several labels, which are more or less relevant to each other.

    A pair with relevance r counts r as a positive and 1 - r as a negative; how is up to the objective. If all
    relevances are 0 or 1, the loss is that of one class for each image.

    Args:
        relevance: () for labels `(batch,)`, one class for each image. Numbers in [0, 1], the last one 1, for the
            classes of a hierarchy, labels `(batch, n)` from coarse to fine: the relevance of two images whose finest
            common level is the first, the second, ...: with (0.3, 1.0), 0.3 for the same super-class and 1 for the same
            class. "jaccard" for any number of labels, `(batch, n)` of 0 and 1: the number of labels that both images
            have, divided by the number that either has.
        **kwargs: arguments of `PairObjective`. With `relevance`, the miner is "all", and with "jaccard" there is no
            memory.
    """

    def __init__(self, relevance: Sequence[float] | str = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.relevance = checked_relevance(relevance)
        if self.relevance and not isinstance(self.miner, mining.AllTriplets):
            raise ValueError(
                f"miner: expected 'all' together with relevance, for {self.registered_name}. Received: "
                f"{self.miner.registered_name!r}"
            )
        if self.relevance == JACCARD and self.memory_size:
            raise ValueError(f"memory_size: expected 0 with the relevance 'jaccard'. Received: {self.memory_size}")

    def pairs_within(self, embeddings: tf.Tensor, labels: tf.Tensor, seed: tf.Tensor) -> mining.Pairs:
        if not self.relevance:
            return super().pairs_within(embeddings, labels, seed)
        others = tf.logical_not(tf.eye(tf.shape(labels)[0], dtype=tf.bool))
        return self.pairs_between(labels, labels).within(others, others)

    def pairs_between(self, labels: tf.Tensor, references: tf.Tensor) -> mining.Pairs:
        if not self.relevance:
            return super().pairs_between(labels, references)
        relevance = relevance_matrix(labels, references, self.relevance, self.compute_dtype)
        return mining.Pairs(relevance, 1.0 - relevance)

    def get_config(self) -> dict[str, Any]:
        relevance = self.relevance if isinstance(self.relevance, str) else list(self.relevance)
        return {**super().get_config(), "relevance": relevance}


class LengthPenalizedObjective(PairObjective):
    """A pair objective whose paper uses embeddings of any length, and keeps them short with a penalty.

    Args:
        normalize: whether to l2-normalise the embeddings, as `S2SDModel` does anyway; the penalty would then be
            constant, and is left out.
        l2_weight: >= 0, factor on the mean squared length.
        **kwargs: arguments of `PairObjective`.
    """

    def __init__(self, normalize: bool = True, l2_weight: float = 0.005, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_at_least("l2_weight", l2_weight, 0)
        self.normalize = normalize
        self.l2_weight = l2_weight

    def prepare(self, embeddings: tf.Tensor) -> tf.Tensor:
        return super().prepare(embeddings) if self.normalize else embeddings

    def compute(self, embeddings: tf.Tensor, labels: tf.Tensor, training: bool) -> tf.Tensor:
        loss = super().compute(embeddings, labels, training)
        if self.normalize:
            return loss
        return loss + self.l2_weight * tf.reduce_mean(tf.reduce_sum(tf.square(embeddings), axis=1))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "normalize": self.normalize, "l2_weight": self.l2_weight}


class ProxyObjective(Objective):
    """An objective over embeddings and learned, l2-normalised proxies of the classes.

    Args:
        num_classes: >= 1.
        **kwargs: arguments of `Objective`.
    """

    kind = "proxy"
    uses_classes = True
    num_classes: int

    def __init__(self, num_classes: int | None = None, **kwargs: Any) -> None:
        if num_classes is None:
            raise ValueError(
                f"num_classes: expected the number of training classes for {self.registered_name}. Received: None"
            )
        super().__init__(num_classes=num_classes, **kwargs)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.proxies = self.add_weight(
            name="proxies",
            shape=self.proxies_shape(input_shape[-1]),  # type: ignore[arg-type]
            initializer=keras.initializers.VarianceScaling(2.0, mode="fan_in", distribution="untruncated_normal"),
            trainable=True,
        )
        super().build(input_shape)

    def proxies_shape(self, dim: int) -> tuple[int, ...]:
        """Returns the shape of the proxies for embeddings `(batch, dim)`."""
        return (self.num_classes, dim)

    def unit_proxies(self, length: float = 1.0) -> tf.Tensor:
        """Returns the proxies, l2-normalised along the last axis, times `length`."""
        return unit_rows(tf.convert_to_tensor(self.proxies), length)


def len_of(values: Any) -> int | None:
    """Number of rows of a tensor or array; None if it is unknown."""
    shape = tuple(getattr(values, "shape", None) or ())
    return shape[0] if shape else None


def unit_rows(values: tf.Tensor, length: float = 1.0) -> tf.Tensor:
    """L2-normalises `(..., dim)` along the last axis, times `length`; rows shorter than 1e-6 stay shorter."""

    # Like `tf.math.l2_normalize`, with half the operations in the gradient.
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


def squared_distances(embeddings: tf.Tensor, references: tf.Tensor | None = None) -> tf.Tensor:
    """Computes squared Euclidean distances, never negative: `(batch, m)` to `references`, if given.

    Without `references` they are the distances within the batch, `(batch, batch)`, with a diagonal of exact zeros.
    """
    itself = references is None or references is embeddings
    references = embeddings if itself else references
    products = tf.matmul(embeddings, references, transpose_b=True)
    squares = tf.reduce_sum(tf.square(embeddings), axis=1)
    others = squares if itself else tf.reduce_sum(tf.square(references), axis=1)
    distances = tf.nn.relu(squares[:, None] + others[None, :] - 2.0 * products)
    return zero_diagonal(distances) if itself else distances


def zero_diagonal(matrix: tf.Tensor) -> tf.Tensor:
    """Sets the diagonal of a square matrix to zero; no gradient flows through the diagonal."""

    # XLA refuses the gradient of `tf.linalg.set_diag` if the batch size is not static.
    @tf.custom_gradient
    def set_zeros(values):
        zeros = tf.zeros_like(values[0])
        return tf.linalg.set_diag(values, zeros), lambda upstream: tf.linalg.set_diag(upstream, zeros)

    return set_zeros(matrix)


def euclidean_distances(embeddings: tf.Tensor, references: tf.Tensor | None = None) -> tf.Tensor:
    """Computes the square roots of `squared_distances`; the gradient of a zero distance is 0."""
    return square_root(squared_distances(embeddings, references))


def square_root(values: tf.Tensor) -> tf.Tensor:
    """Computes the square root of numbers >= 0; the gradient at 0 is 0."""
    positive = values > 0
    return tf.where(positive, tf.sqrt(tf.where(positive, values, 1.0)), 0.0)


def masked_logsumexp(values: tf.Tensor, mask: tf.Tensor, axis: int) -> tf.Tensor:
    """Computes log(sum of exp(values) over `mask`) along `axis`: -1e30, with zero gradient, if the mask is empty.

    `mask` is bool, or weights >= 0 of the summands.
    """
    if not mask.dtype.is_bool:
        values, mask = values + tf.math.log(tf.where(mask > 0, mask, tf.ones([], mask.dtype))), mask > 0
    return tf.reduce_logsumexp(tf.where(mask, values, tf.constant(-1e30, values.dtype)), axis=axis)


def masked_log1p_sum_exp(values: tf.Tensor, mask: tf.Tensor, axis: int) -> tf.Tensor:
    """Computes log(1 + sum of exp(values) over `mask`) along `axis`: 0, with zero gradient, if the mask is empty.

    `mask` is bool, or weights >= 0 of the summands.
    """
    return tf.nn.softplus(masked_logsumexp(values, mask, axis))


def mean_where(values: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
    """Computes the mean of `values` over `mask`: 0, with zero gradient, if the mask is empty.

    `mask` is bool, or weights >= 0.
    """
    mask = tf.cast(mask, values.dtype)
    return tf.math.divide_no_nan(tf.reduce_sum(values * mask), tf.reduce_sum(mask))


_ObjectiveClass = TypeVar("_ObjectiveClass", bound=type[Objective])
_registry = Registry("objective", Objective)
lookup = _registry.lookup
settings = _registry.settings


def names(kind: str | None = None) -> list[str]:
    """Returns the sorted names of all objectives, or of those of one `kind`: "pair", "tuple", "proxy" or "addons"."""
    return [name for name in _registry.names() if kind in (None, _registry.lookup(name).kind)]


def register(name: str) -> Callable[[_ObjectiveClass], _ObjectiveClass]:
    """Class decorator: registers an objective under `name`, and with Keras for saving.

    Raises:
        ValueError: the name or the class name is taken by another objective, or settings are missing in `get_config`.
    """

    def add(cls: _ObjectiveClass) -> _ObjectiveClass:
        check_config(cls)
        return keras.utils.register_keras_serializable("s2sd_tf")(_registry.add(name, cls))

    return add


def get(identifier: str | Objective, **settings: Any) -> Objective:
    """Makes an objective from its registered name and settings; an `Objective` is returned as it is.

    Example:
        >>> s2sd_tf.objectives.get("margin", num_classes=100, beta=0.6, miner="distance_weighted")

    Raises:
        ValueError: an unknown name or setting, or settings together with an instance.
    """
    return _registry.get(identifier, **settings)
