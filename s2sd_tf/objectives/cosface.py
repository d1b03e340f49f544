"""CosFace loss."""

from s2sd_tf.checks import check_above, check_at_least
from s2sd_tf.objectives.base import register
from s2sd_tf.objectives.proxy_softmax import SoftmaxObjective, lower_own


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
