"""Proxy-anchor loss."""

import tensorflow as tf

from s2sd_tf.keras_compat import keras
from s2sd_tf.objectives.base import Objective, masked_logsumexp, mean_where, register


@register("proxy_anchor")
class ProxyAnchor(Objective):
    """Proxy-anchor loss (Kim et al., CVPR 2020, eq. 4), on cosine similarities s of embeddings and l2-normalised
    proxies, one a class:

        mean over classes present of log(1 + sum_{x of p} exp(-alpha (s(x, p) - margin)))
        + mean over all classes of log(1 + sum_{x not of p} exp(alpha (s(x, p) + margin)))

    Args:
        num_classes: int >= 1.
        margin: float.
        alpha: float > 0, the scale.
        learning_rate_multiplier: the paper trains proxies at 100 times the rate of the network.
        **kwargs: arguments of `Objective`.
    """

    uses_classes = True

    def __init__(self, num_classes=None, margin=0.1, alpha=32.0, learning_rate_multiplier=100.0, **kwargs):
        if num_classes is None:
            raise ValueError("num_classes: expected the number of training classes for proxy_anchor. Received: None")
        super().__init__(num_classes=num_classes, learning_rate_multiplier=learning_rate_multiplier, **kwargs)
        if not alpha > 0:
            raise ValueError(f"alpha: expected a number > 0. Received: {alpha}")
        self.margin = margin
        self.alpha = alpha

    def build(self, input_shape):
        self.proxies = self.add_weight(
            name="proxies",
            shape=(self.num_classes, input_shape[-1]),
            initializer=keras.initializers.VarianceScaling(2.0, mode="fan_in", distribution="untruncated_normal"),
            trainable=True,
        )
        super().build(input_shape)

    def compute(self, embeddings, labels, training):
        del training
        proxies = tf.math.l2_normalize(tf.convert_to_tensor(self.proxies), axis=1, epsilon=1e-12)
        similarities = tf.matmul(embeddings, proxies, transpose_b=True)
        own = tf.one_hot(labels, self.num_classes, on_value=True, off_value=False, dtype=tf.bool)
        pull = masked_logsumexp(-self.alpha * (similarities - self.margin), own, axis=0)
        push = masked_logsumexp(self.alpha * (similarities + self.margin), tf.logical_not(own), axis=0)
        return mean_where(pull, tf.reduce_any(own, axis=0)) + tf.reduce_mean(push)

    def get_config(self):
        return {**super().get_config(), "margin": self.margin, "alpha": self.alpha}
