"""ArcFace loss."""

import math
from typing import Any

import tensorflow as tf

from s2sd_tf.checks import check_above, check_at_least
from s2sd_tf.objectives.base import register
from s2sd_tf.objectives.proxy_softmax import SoftmaxObjective, own_positions


@register("arcface")
class ArcFace(SoftmaxObjective):
    """ArcFace: softmax loss with an additive angular margin (Deng et al., CVPR 2019, eq. 3).

    The mean cross entropy of `scale` times the cosine similarities to the proxies, where the similarity to the image's
    own class is cos(theta_y + margin). Beyond theta_y + margin = pi, where that cosine rises again,
    cos(theta_y) - margin * sin(margin) replaces it, as in the authors' code.

    Args:
        num_classes: >= 1.
        margin: in [0, pi), in radians.
        scale: > 0; 64 in the paper, 16 in the published S2SD code.
        learning_rate_multiplier: the default is that of the published protocol, which trains the proxies at 5e-4 and
            the network at 1e-5.
        **kwargs: arguments of `Objective`.
    """

    formula = "mean -log softmax(scale * cos(theta_j + m [j = y]))_y"
    paper = "Deng et al., CVPR 2019"

    def __init__(
        self,
        num_classes: int | None = None,
        margin: float = 0.5,
        scale: float = 16.0,
        learning_rate_multiplier: float = 50.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes=num_classes, learning_rate_multiplier=learning_rate_multiplier, **kwargs)
        check_at_least("margin", margin, 0)
        if margin >= math.pi:
            raise ValueError(f"margin: expected radians in [0, pi). Received: {margin!r}")
        check_above("scale", scale, 0)
        self.margin = margin
        self.scale = scale

    @property
    def logit_scale(self) -> float:
        return self.scale

    def with_margin(self, logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        positions = own_positions(labels)
        similarities = tf.gather_nd(logits, positions) / self.scale
        # The lower bound of the sine bounds the gradient at angle 0.
        sines = tf.sqrt(tf.maximum(1.0 - tf.square(similarities), 1e-9))
        moved = similarities * math.cos(self.margin) - sines * math.sin(self.margin)
        beyond = similarities <= -math.cos(self.margin)
        moved = tf.where(beyond, similarities - self.margin * math.sin(self.margin), moved)
        return tf.tensor_scatter_nd_add(logits, positions, self.scale * (moved - similarities))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "margin": self.margin, "scale": self.scale}
