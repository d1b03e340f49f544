"""Normalised softmax loss."""

from typing import Any

from s2sd_tf.checks import check_above
from s2sd_tf.objectives.base import register
from s2sd_tf.objectives.proxy_softmax import SoftmaxObjective


@register("normalized_softmax")
class NormalizedSoftmax(SoftmaxObjective):
    """Normalised softmax (Zhai and Wu, "Classification is a Strong Baseline for Deep Metric Learning", BMVC 2019).

    The mean cross entropy of the cosine similarities to the proxies, divided by a temperature.

    Args:
        num_classes: >= 1.
        temperature: > 0.
        **kwargs: arguments of `Objective`.
    """

    formula = "mean -log softmax(s / T)_y"
    paper = "Zhai and Wu, BMVC 2019"

    def __init__(self, num_classes: int | None = None, temperature: float = 0.05, **kwargs: Any) -> None:
        super().__init__(num_classes=num_classes, **kwargs)
        check_above("temperature", temperature, 0)
        self.temperature = temperature

    @property
    def logit_scale(self) -> float:
        return 1.0 / self.temperature

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "temperature": self.temperature}
