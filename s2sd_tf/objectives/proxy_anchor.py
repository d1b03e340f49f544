"""Proxy-anchor loss."""

from typing import Any

import tensorflow as tf

from s2sd_tf.checks import check_above, check_number
from s2sd_tf.objectives.base import ProxyObjective, masked_log1p_sum_exp, mean_where, register


@register("proxy_anchor")
class ProxyAnchor(ProxyObjective):
    """Proxy-anchor loss (Kim et al., CVPR 2020, eq. 4).

    With cosine similarities s of embeddings and l2-normalised proxies, one per class, it is

        mean over classes present of log(1 + sum_{x of p} exp(-alpha (s(x, p) - margin)))
        + mean over all classes of log(1 + sum_{x not of p} exp(alpha (s(x, p) + margin)))

    Args:
        num_classes: >= 1.
        margin: any finite number.
        alpha: > 0, the scale.
        learning_rate_multiplier: the paper trains the proxies at 100 times the learning rate of the network.
        **kwargs: arguments of `Objective`.
    """

    formula = "mean_(p present) log(1 + sum_(x of p) e^(-a (s - m))) + mean_p log(1 + sum_(x not of p) e^(a (s + m)))"
    paper = "Kim et al., CVPR 2020"
    cost = "B C"

    def __init__(
        self,
        num_classes: int | None = None,
        margin: float = 0.1,
        alpha: float = 32.0,
        learning_rate_multiplier: float = 100.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes=num_classes, learning_rate_multiplier=learning_rate_multiplier, **kwargs)
        check_above("alpha", alpha, 0)
        check_number("margin", margin)
        self.margin = margin
        self.alpha = alpha

    def compute(self, embeddings: tf.Tensor, labels: tf.Tensor, training: bool) -> tf.Tensor:
        del training
        similarities = tf.matmul(embeddings, self.unit_proxies(), transpose_b=True)
        own = tf.equal(tf.range(self.num_classes), labels[:, None])
        pull = masked_log1p_sum_exp(-self.alpha * (similarities - self.margin), own, axis=0)
        push = masked_log1p_sum_exp(self.alpha * (similarities + self.margin), tf.logical_not(own), axis=0)
        return mean_where(pull, tf.reduce_any(own, axis=0)) + tf.reduce_mean(push)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "margin": self.margin, "alpha": self.alpha}
