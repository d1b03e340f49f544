"""ArcFace loss."""

import math

import tensorflow as tf

from s2sd_tf.checks import check_above, check_at_least
from s2sd_tf.objectives.base import register
from s2sd_tf.objectives.proxy_softmax import SoftmaxObjective, own_positions


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
