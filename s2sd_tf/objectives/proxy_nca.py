"""ProxyNCA loss."""

from typing import Any

import tensorflow as tf

from s2sd_tf.checks import check_above, check_bool
from s2sd_tf.objectives.base import ProxyObjective, masked_logsumexp, mean_where, register
from s2sd_tf.objectives.proxy_softmax import softmax_loss


@register("proxy_nca")
class ProxyNCA(ProxyObjective):
    """ProxyNCA (Movshovitz-Attias et al., "No Fuss Distance Metric Learning using Proxies", ICCV 2017).

    The mean over the batch, with squared Euclidean distances d between l2-normalised embeddings and proxies, of

        -log(exp(-scale d(x, p_y)) / sum_(j != y) exp(-scale d(x, p_j)))

    Args:
        num_classes: >= 1; with one class the loss is 0.
        scale: > 0; 1 in the paper.
        own_class_in_sum: whether the sum includes the image's own class, which the paper leaves out. The loss is then a
            softmax loss, never below 0, as in ProxyNCA++ (Teh et al., ECCV 2020, with scale 9) and other libraries.
        learning_rate_multiplier: the default is that of the published S2SD code.
        **kwargs: arguments of `Objective`.
    """

    formula = "mean d(x, p_y) + log sum_(j != y) e^(-d(x, p_j))"
    paper = "Movshovitz-Attias et al., ICCV 2017"
    cost = "B C"

    def __init__(
        self,
        num_classes: int | None = None,
        scale: float = 1.0,
        own_class_in_sum: bool = False,
        learning_rate_multiplier: float = 50.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes=num_classes, learning_rate_multiplier=learning_rate_multiplier, **kwargs)
        check_above("scale", scale, 0)
        self.scale = scale
        check_bool("own_class_in_sum", own_class_in_sum)
        self.own_class_in_sum = own_class_in_sum

    def compute(self, embeddings: tf.Tensor, labels: tf.Tensor, training: bool) -> tf.Tensor:
        del training
        # -scale times the squared distance, up to a constant that is the same for all classes.
        logits = tf.matmul(embeddings, self.unit_proxies(2.0 * self.scale), transpose_b=True)
        if self.own_class_in_sum:
            return softmax_loss(logits, labels)
        if self.num_classes == 1:
            return tf.reduce_sum(logits) * 0.0
        own = tf.equal(tf.range(self.num_classes), labels[:, None])
        others = masked_logsumexp(logits, tf.logical_not(own), axis=1)
        losses = others - tf.gather(logits, labels, batch_dims=1)
        return mean_where(losses, tf.ones_like(losses))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "scale": self.scale, "own_class_in_sum": self.own_class_in_sum}
