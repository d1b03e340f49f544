"""CosFace loss."""

from typing import Any

import tensorflow as tf

from s2sd_tf.checks import check_above, check_at_least
from s2sd_tf.objectives.base import register
from s2sd_tf.objectives.proxy_softmax import SoftmaxObjective, lower_own


@register("cosface")
class CosFace(SoftmaxObjective):
    """CosFace: softmax loss with an additive cosine margin (Wang et al., CVPR 2018, eq. 4).

    The mean cross entropy of `scale` times the cosine similarities to the proxies, where the similarity to the image's
    own class is cos(theta_y) - margin.

    Args:
        num_classes: >= 1.
        margin: >= 0.
        scale: > 0.
        learning_rate_multiplier: see `ArcFace`.
        **kwargs: arguments of `Objective`.
    """

    formula = "mean -log softmax(scale * (s_j - m [j = y]))_y"
    paper = "Wang et al., CVPR 2018"

    def __init__(
        self,
        num_classes: int | None = None,
        margin: float = 0.35,
        scale: float = 64.0,
        learning_rate_multiplier: float = 50.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes=num_classes, learning_rate_multiplier=learning_rate_multiplier, **kwargs)
        check_at_least("margin", margin, 0)
        check_above("scale", scale, 0)
        self.margin = margin
        self.scale = scale

    @property
    def logit_scale(self) -> float:
        return self.scale

    def with_margin(self, logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        return lower_own(logits, labels, self.scale * self.margin)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "margin": self.margin, "scale": self.scale}
