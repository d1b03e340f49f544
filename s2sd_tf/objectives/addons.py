"""The losses of tensorflow-addons (classic stack) as objectives."""

import types
from typing import Any

import tensorflow as tf

from s2sd_tf.checks import check_at_least
from s2sd_tf.keras_compat import import_addons
from s2sd_tf.mining.base import pair_masks
from s2sd_tf.objectives.base import Objective, euclidean_distances, mean_where, register

DISTANCE_METRICS = ("L2", "squared-L2", "angular")


class AddonsObjective(Objective):
    """A loss of tensorflow-addons 0.23 as an objective, on l2-normalised embeddings.

    tensorflow-addons computes the value, in float32 whatever the layer's dtype. If a batch has no positive or no
    negative pair, most of its losses are NaN; here the loss and the gradients are then 0.

    A subclass implements `addons_loss(losses, embeddings, labels)`.

    Attributes:
        instead: what to use instead without tensorflow-addons.

    Raises:
        ImportError: tensorflow-addons is missing; the message says what to install and what to use instead.
    """

    kind = "addons"
    cost = "B^2"
    instead = ""

    def __init__(self, **kwargs: Any) -> None:
        self._import()
        super().__init__(**kwargs)

    def compute(self, embeddings: tf.Tensor, labels: tf.Tensor, training: bool) -> tf.Tensor:
        del training
        positive, negative = pair_masks(labels)
        defined = tf.reduce_any(positive) & tf.reduce_any(negative)
        losses = self._import().losses

        # The gradient needs a mask of its own, because the gradient of a masked NaN is NaN. `tf.cond` would need none,
        # but under XLA it turns the labels into constants, and every batch is compiled again.
        @tf.custom_gradient
        def masked(rows):
            with tf.GradientTape() as tape:
                tape.watch(rows)
                loss = self.addons_loss(losses, rows, labels)
            gradient = tape.gradient(loss, rows)
            return tf.where(defined, loss, 0.0), lambda upstream: tf.where(defined, upstream * gradient, 0.0)

        return tf.cast(masked(tf.cast(embeddings, tf.float32)), embeddings.dtype)

    def addons_loss(self, losses: types.ModuleType, embeddings: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        """Computes the scalar loss of a batch that has positive and negative pairs.

        Args:
            losses: the module `tensorflow_addons.losses`.
            embeddings: float32 `(batch, dim)`, l2-normalised.
            labels: int64 `(batch,)`.
        """
        raise NotImplementedError

    def _import(self):
        return import_addons(f"objective {self.registered_name!r}", self.instead)


@register("addons/triplet_semihard")
class AddonsTripletSemiHard(AddonsObjective):
    """`tfa.losses.TripletSemiHardLoss` (FaceNet, Schroff et al., CVPR 2015).

    The mean over the ordered positive pairs of max(0, d(a, p) - d(a, n) + margin), where n is the nearest negative that
    is farther than the positive, or the farthest negative if there is none.

    With "squared-L2" it equals the objective "triplet" with the miner "semi_hard" and the same margin.

    Args:
        margin: >= 0.
        distance_metric: d, one of "L2" (Euclidean), "squared-L2" and "angular" (1 - cosine similarity).
        **kwargs: arguments of `Objective`.
    """

    formula = "mean_ap [d_ap - d_an + m]+, n semi-hard"
    paper = "Schroff et al., CVPR 2015"
    cost = "B^3"
    instead = 'objective "triplet" with miner "semi_hard", the same with squared distances'

    def __init__(self, margin: float = 1.0, distance_metric: str = "L2", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_at_least("margin", margin, 0)
        _check_distance_metric(distance_metric)
        self.margin = margin
        self.distance_metric = distance_metric

    def addons_loss(self, losses: types.ModuleType, embeddings: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        return losses.TripletSemiHardLoss(self.margin, self.distance_metric)(labels, embeddings)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "margin": self.margin, "distance_metric": self.distance_metric}


@register("addons/triplet_hard")
class AddonsTripletHard(AddonsObjective):
    """`tfa.losses.TripletHardLoss` (Hermans et al., "In Defense of the Triplet Loss for Person Re-Identification",
    2017, eq. 5).

    The mean over the images of max(0, d(a, p) - d(a, n) + margin), or of log(1 + exp(d(a, p) - d(a, n))) if `soft`,
    with the farthest positive and the nearest negative of each image.

    An image without a positive counts too, with a positive at distance 0.

    Args:
        margin: >= 0; not used if `soft`.
        soft: whether to use the second form.
        distance_metric: d, one of "L2" (Euclidean), "squared-L2" and "angular" (1 - cosine similarity).
        **kwargs: arguments of `Objective`.
    """

    formula = "mean_a [max_p d_ap - min_n d_an + m]+, or log(1 + e^(max_p d_ap - min_n d_an))"
    paper = "Hermans et al., 2017"
    instead = 'objective "triplet" with miner "hard", the same with squared distances'

    def __init__(self, margin: float = 1.0, soft: bool = False, distance_metric: str = "L2", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_at_least("margin", margin, 0)
        _check_distance_metric(distance_metric)
        self.margin = margin
        self.soft = soft
        self.distance_metric = distance_metric

    def addons_loss(self, losses: types.ModuleType, embeddings: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        return losses.TripletHardLoss(self.margin, bool(self.soft), self.distance_metric)(labels, embeddings)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "margin": self.margin,
            "soft": self.soft,
            "distance_metric": self.distance_metric,
        }


@register("addons/lifted_struct")
class AddonsLiftedStruct(AddonsObjective):
    """`tfa.losses.LiftedStructLoss` (Song et al., "Deep Metric Learning via Lifted Structured Feature Embedding", CVPR
    2016, eq. 4), on Euclidean distances. It equals the objective "lifted_structure" with the miner "all".

    Args:
        margin: >= 0.
        **kwargs: arguments of `Objective`.
    """

    formula = "mean_ap 1/2 [log(sum_n e^(m - d_an) + sum_n e^(m - d_pn)) + d_ap]+^2"
    paper = "Song et al., CVPR 2016"
    cost = "B^3"
    instead = 'objective "lifted_structure" with miner "all"'

    def __init__(self, margin: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_at_least("margin", margin, 0)
        self.margin = margin

    def addons_loss(self, losses: types.ModuleType, embeddings: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        return losses.LiftedStructLoss(self.margin)(labels, embeddings)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "margin": self.margin}


@register("addons/npairs")
class AddonsNpairs(AddonsObjective):
    """`tfa.losses.NpairsLoss` (Sohn, "Improved Deep Metric Learning with Multi-class N-pair Loss Objective", NIPS 2016,
    eq. 7): a softmax cross entropy over the dot products of each anchor with the positives of all pairs.

    The pairs are formed within each class: each image in the first half of the class is an anchor, and its positive is
    the image half a class later. If the number of images is odd, the last one is left out. Two images per class give
    one pair per class, as in the paper. If a class has several pairs, the loss spreads the target over their positives.

    Args:
        **kwargs: arguments of `Objective`.
    """

    formula = "mean_a log(1 + sum_n e^(s_an - s_ap))"
    paper = "Sohn, NIPS 2016"
    instead = 'objective "n_pair"'

    def addons_loss(self, losses: types.ModuleType, embeddings: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        batch = tf.shape(labels)[0]
        positions = tf.range(batch)
        same = tf.equal(labels[:, None], labels[None, :])
        rank = tf.reduce_sum(tf.cast(same & (positions[None, :] < positions[:, None]), tf.int32), axis=1)
        half = tf.reduce_sum(tf.cast(same, tf.int32), axis=1) // 2
        is_anchor = rank < half
        is_partner = same & tf.equal(rank[None, :], (rank + half)[:, None])
        partners = tf.gather(embeddings, tf.argmax(tf.cast(is_partner, tf.int32), axis=1))
        # All rows stay, so that XLA knows the shape. An image that is not an anchor gets its own class and positive,
        # and adds no loss.
        rest = tf.where(tf.eye(batch, dtype=tf.bool), 0.0, -1e9)
        similarities = tf.where(
            is_anchor[:, None] & is_anchor[None, :], tf.matmul(embeddings, partners, transpose_b=True), rest
        )
        # The loss compares labels as floats, which hold small integers exactly.
        classes = tf.argmax(tf.cast(same, tf.int32), axis=1, output_type=tf.int32)
        mean = losses.NpairsLoss()(tf.where(is_anchor, classes, batch + positions), similarities)
        count = tf.reduce_sum(tf.cast(is_anchor, mean.dtype))
        return mean * tf.cast(batch, mean.dtype) / count


@register("addons/contrastive")
class AddonsContrastive(AddonsObjective):
    """`tfa.losses.ContrastiveLoss` (Hadsell et al., "Dimensionality Reduction by Learning an Invariant Mapping", CVPR
    2006, eq. 4).

    The mean over all pairs of the batch, the many negatives and the few positives together, of d^2 for a positive pair
    and max(0, margin - d)^2 for a negative pair, with Euclidean distances d. The objective "contrastive" with `squared`
    averages positives and negatives separately.

    Args:
        margin: >= 0.
        **kwargs: arguments of `Objective`.
    """

    formula = "mean_ij d_ij^2 if positive, else [m - d_ij]+^2"
    paper = "Hadsell et al., CVPR 2006"
    instead = 'objective "contrastive" with squared=True, the same except for the weights of positives and negatives'

    def __init__(self, margin: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_at_least("margin", margin, 0)
        self.margin = margin

    def addons_loss(self, losses: types.ModuleType, embeddings: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        positions = tf.range(tf.shape(labels)[0])
        same = tf.equal(labels[:, None], labels[None, :])
        once = positions[:, None] < positions[None, :]
        loss = losses.ContrastiveLoss(self.margin, reduction="none")
        values = loss(tf.reshape(same, [-1]), tf.reshape(euclidean_distances(embeddings), [-1]))
        return mean_where(values, tf.reshape(once, [-1]))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "margin": self.margin}


def _check_distance_metric(value):
    if value not in DISTANCE_METRICS:
        raise ValueError(f"distance_metric: expected one of {list(DISTANCE_METRICS)}. Received: {value!r}")
