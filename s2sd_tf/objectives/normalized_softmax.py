"""Normalised softmax loss."""

from s2sd_tf.checks import check_above
from s2sd_tf.objectives.base import register
from s2sd_tf.objectives.proxy_softmax import SoftmaxObjective


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
