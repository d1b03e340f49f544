"""Classification objectives: a softmax over the cosine similarities to the proxies."""

import math

import tensorflow as tf

from s2sd_tf.objectives.base import ProxyObjective, check_above, check_at_least, register


class SoftmaxObjective(ProxyObjective):
    """Mean cross entropy of `scale` times the cosine similarities, of which that to the own class may be changed."""

    cost = "B C"

    def compute(self, embeddings, labels, training):
        del training
        similarities = tf.matmul(embeddings, self.unit_proxies(), transpose_b=True)
        positions = tf.stack([tf.range(tf.shape(labels)[0], dtype=tf.int32), labels], axis=1)
        own = tf.gather_nd(similarities, positions)
        similarities = tf.tensor_scatter_nd_add(similarities, positions, self.own_similarity(own) - own)
        return softmax_loss(self.logit_scale * similarities, labels)

    @property
    def logit_scale(self):
        """Factor on the similarities."""
        raise NotImplementedError

    def own_similarity(self, similarities):
        """What stands in for the similarities `(batch,)` to the proxies of the own classes."""
        raise NotImplementedError


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

    def own_similarity(self, similarities):
        return similarities

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
        if not 0 <= margin < math.pi:
            raise ValueError(f"margin: expected radians in [0, pi). Received: {margin}")
        check_above("scale", scale, 0)
        self.margin = margin
        self.scale = scale

    @property
    def logit_scale(self):
        return self.scale

    def own_similarity(self, similarities):
        # A floor under the sine bounds the gradient at angle 0.
        sines = tf.sqrt(tf.maximum(1.0 - tf.square(similarities), 1e-9))
        moved = similarities * math.cos(self.margin) - sines * math.sin(self.margin)
        beyond = similarities <= -math.cos(self.margin)
        return tf.where(beyond, similarities - self.margin * math.sin(self.margin), moved)

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

    def own_similarity(self, similarities):
        return similarities - self.margin

    def get_config(self):
        return {**super().get_config(), "margin": self.margin, "scale": self.scale}


def softmax_loss(logits, labels):
    """Mean cross entropy of `logits` `(batch, classes)`; 0 for an empty batch."""
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
    return tf.math.divide_no_nan(tf.reduce_sum(losses), tf.cast(tf.shape(labels)[0], losses.dtype))
