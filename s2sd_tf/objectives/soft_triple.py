"""SoftTriple loss."""

import functools
from typing import Any

import tensorflow as tf

from s2sd_tf.checks import check_above, check_at_least, check_number, checked_int
from s2sd_tf.objectives.base import ProxyObjective, register, square_root
from s2sd_tf.objectives.proxy_softmax import lower_own, softmax_loss


@register("soft_triple")
class SoftTriple(ProxyObjective):
    """SoftTriple loss: softmax over classes with several centres each (Qian et al., ICCV 2019).

    The similarity S_c to a class is the mean of the similarities to its centres, weighted by a softmax over the
    centres:

        S_c = sum_k softmax_k(s_ck / gamma) s_ck
        mean -log(exp(scale (S_y - margin)) / (exp(scale (S_y - margin)) + sum_(c != y) exp(scale S_c)))
        + regularization / (C K (K - 1)) sum_c sum_(t < s) |w_cs - w_ct|

    The last term pulls the centres of a class together, so that centres can merge and each class finds its number.

    Args:
        num_classes: >= 1, C.
        proxies_per_class: >= 1, K.
        margin: the paper's delta.
        gamma: > 0.
        scale: > 0, the paper's lambda.
        regularization: >= 0, the paper's tau.
        **kwargs: arguments of `Objective`.
    """

    formula = "mean -log softmax(scale (S_c - m [c = y]))_y + tau sum_(c, t < s) |w_cs - w_ct| / (C K (K - 1))"
    paper = "Qian et al., ICCV 2019"
    cost = "B C K"

    def __init__(
        self,
        num_classes: int | None = None,
        proxies_per_class: int = 2,
        margin: float = 0.01,
        gamma: float = 0.1,
        scale: float = 8.0,
        regularization: float = 0.2,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes=num_classes, **kwargs)
        checked_int("proxies_per_class", proxies_per_class, 1)
        check_above("gamma", gamma, 0)
        check_above("scale", scale, 0)
        check_at_least("regularization", regularization, 0)
        self.proxies_per_class = proxies_per_class
        check_number("margin", margin)
        self.margin = margin
        self.gamma = gamma
        self.scale = scale
        self.regularization = regularization

    def proxies_shape(self, dim: int) -> tuple[int, ...]:
        return (self.proxies_per_class, *super().proxies_shape(dim))

    def compute(self, embeddings: tf.Tensor, labels: tf.Tensor, training: bool) -> tf.Tensor:
        del training
        centers = tf.unstack(self.unit_proxies())
        # One matrix per centre, because a softmax along a last axis of two or three entries is slow.
        similarities = [tf.matmul(embeddings, center, transpose_b=True) for center in centers]
        peak = tf.stop_gradient(functools.reduce(tf.maximum, similarities))
        weights = [tf.exp((s - peak) / self.gamma) for s in similarities]
        relaxed = tf.add_n([w * s for w, s in zip(weights, similarities)]) / tf.add_n(weights)
        loss = softmax_loss(self.scale * lower_own(relaxed, labels, self.margin), labels)
        return loss + self._regularization(centers)

    def _regularization(self, centers):
        count = len(centers)
        total = tf.zeros([], centers[0].dtype)
        for s in range(count):
            for t in range(s):
                squared = tf.reduce_sum(tf.square(centers[s] - centers[t]), axis=1)
                total += tf.reduce_sum(square_root(squared))
        return self.regularization * total / max(1, self.num_classes * count * (count - 1))

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "proxies_per_class": self.proxies_per_class,
            "margin": self.margin,
            "gamma": self.gamma,
            "scale": self.scale,
            "regularization": self.regularization,
        }
