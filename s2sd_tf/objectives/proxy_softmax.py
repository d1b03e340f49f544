"""Classification objectives: a softmax over the cosine similarities to the proxies."""

import math

import tensorflow as tf

from s2sd_tf.checks import check_above, check_at_least
from s2sd_tf.objectives.base import ProxyObjective, register


class SoftmaxObjective(ProxyObjective):
    """Mean cross entropy of `logit_scale` times the cosine similarities, of which that to the own class may change."""

    cost = "B C"

    def compute(self, embeddings, labels, training):
        del training
        logits = tf.matmul(embeddings, self.unit_proxies(self.logit_scale), transpose_b=True)
        return softmax_loss(self.with_margin(logits, labels), labels)

    @property
    def logit_scale(self):
        """Factor on the similarities."""
        raise NotImplementedError

    def with_margin(self, logits, labels):
        """The logits `(batch, num_classes)` with those of the own classes made harder."""
        del labels
        return logits


@register("normalized_softmax")
class NormalizedSoftmax(SoftmaxObjective):
    """Normalised softmax (Zhai and Wu, "Classification is a Strong Baseline for Deep Metric Learning", BMVC 2019):
    mean cross entropy of the cosine similarities to the proxies, divided by a temperature.

    Args:
        num_classes: int >= 1.
        temperature: float > 0.
        **kwargs: arguments of `Objective`.
    """

    formula = "mean -log softmax(s / T)_y"
    paper = "Zhai and Wu, BMVC 2019"

    def __init__(self, num_classes=None, temperature=0.05, **kwargs):
        super().__init__(num_classes=num_classes, **kwargs)
        check_above("temperature", temperature, 0)
        self.temperature = temperature

    @property
    def logit_scale(self):
        return 1.0 / self.temperature

    def get_config(self):
        return {**super().get_config(), "temperature": self.temperature}


@register("arcface")
class ArcFace(SoftmaxObjective):
    """ArcFace (Deng et al., CVPR 2019, eq. 3): mean cross entropy of `scale` times the cosine similarities to the
    proxies, with an additive angular margin on the own class: cos(theta_y + margin). Beyond theta_y + margin = pi,
    where that cosine rises again, it goes on as cos(theta_y) - margin * sin(margin), as the authors' code has it.

    Args:
        num_classes: int >= 1.
        margin: float in [0, pi), in radians.
        scale: float > 0; the paper has 64, the published S2SD code 16.
        learning_rate_multiplier: the published protocol trains the proxies at 5e-4 beside 1e-5: 50 times.
        **kwargs: arguments of `Objective`.
    """

    formula = "mean -log softmax(scale * cos(theta_j + m [j = y]))_y"
    paper = "Deng et al., CVPR 2019"

    def __init__(self, num_classes=None, margin=0.5, scale=16.0, learning_rate_multiplier=50.0, **kwargs):
        super().__init__(num_classes=num_classes, learning_rate_multiplier=learning_rate_multiplier, **kwargs)
        check_at_least("margin", margin, 0)
        if margin >= math.pi:
            raise ValueError(f"margin: expected radians in [0, pi). Received: {margin!r}")
        check_above("scale", scale, 0)
        self.margin = margin
        self.scale = scale

    @property
    def logit_scale(self):
        return self.scale

    def with_margin(self, logits, labels):
        positions = own_positions(labels)
        similarities = tf.gather_nd(logits, positions) / self.scale
        # A floor under the sine bounds the gradient at angle 0.
        sines = tf.sqrt(tf.maximum(1.0 - tf.square(similarities), 1e-9))
        moved = similarities * math.cos(self.margin) - sines * math.sin(self.margin)
        beyond = similarities <= -math.cos(self.margin)
        moved = tf.where(beyond, similarities - self.margin * math.sin(self.margin), moved)
        return tf.tensor_scatter_nd_add(logits, positions, self.scale * (moved - similarities))

    def get_config(self):
        return {**super().get_config(), "margin": self.margin, "scale": self.scale}


@register("cosface")
class CosFace(SoftmaxObjective):
    """CosFace (Wang et al., CVPR 2018, eq. 4): mean cross entropy of `scale` times the cosine similarities to the
    proxies, with an additive margin on the own class: cos(theta_y) - margin.

    Args:
        num_classes: int >= 1.
        margin: float >= 0.
        scale: float > 0.
        learning_rate_multiplier: as for ArcFace.
        **kwargs: arguments of `Objective`.
    """

    formula = "mean -log softmax(scale * (s_j - m [j = y]))_y"
    paper = "Wang et al., CVPR 2018"

    def __init__(self, num_classes=None, margin=0.35, scale=64.0, learning_rate_multiplier=50.0, **kwargs):
        super().__init__(num_classes=num_classes, learning_rate_multiplier=learning_rate_multiplier, **kwargs)
        check_at_least("margin", margin, 0)
        check_above("scale", scale, 0)
        self.margin = margin
        self.scale = scale

    @property
    def logit_scale(self):
        return self.scale

    def with_margin(self, logits, labels):
        return lower_own(logits, labels, self.scale * self.margin)

    def get_config(self):
        return {**super().get_config(), "margin": self.margin, "scale": self.scale}


def own_positions(labels):
    """Positions `(batch, 2)` of the own classes in a matrix `(batch, classes)`."""
    return tf.stack([tf.range(tf.shape(labels)[0], dtype=tf.int32), labels], axis=1)


def lower_own(logits, labels, amount):
    """Logits `(batch, classes)` with `amount` subtracted from those of the own classes."""
    amounts = tf.fill(tf.shape(labels), tf.constant(amount, logits.dtype))
    return tf.tensor_scatter_nd_sub(logits, own_positions(labels), amounts)


def softmax_loss(logits, labels):
    """Mean cross entropy of `logits` `(batch, classes)`; 0 for an empty batch."""
    positions = own_positions(labels)
    count = tf.maximum(tf.cast(tf.shape(labels)[0], logits.dtype), 1.0)

    # TensorFlow's own op is several times slower on a CPU where there are some hundred classes.
    @tf.custom_gradient
    def loss(values):
        logs = tf.nn.log_softmax(values)

        def gradient(upstream):
            shares = tf.exp(logs)
            return tf.tensor_scatter_nd_sub(shares, positions, tf.ones_like(shares[:, 0])) * (upstream / count)

        return -tf.reduce_sum(tf.gather_nd(logs, positions)) / count, gradient

    return loss(logits)
