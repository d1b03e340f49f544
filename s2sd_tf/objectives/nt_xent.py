"""Normalised temperature-scaled cross entropy."""

from typing import Any

import tensorflow as tf

from s2sd_tf.checks import check_above
from s2sd_tf.mining.base import Pairs
from s2sd_tf.objectives.base import PairObjective, register
from s2sd_tf.objectives.n_pair import pair_softmax


@register("nt_xent")
class NTXent(PairObjective):
    """Normalised temperature-scaled cross entropy (SimCLR; Chen et al., ICML 2020, eq. 1; InfoNCE).

    The mean over the positive pairs of anchors that have a negative, with cosine similarities s, of

        -log(exp(s_ap / temperature) / (exp(s_ap / temperature) + sum_n exp(s_an / temperature)))

    In the paper an anchor has one positive. Here each further positive forms a pair too, and is not a negative for the
    other pairs.

    Args:
        temperature: > 0.
        **kwargs: arguments of `PairObjective`.
    """

    formula = "mean_ap -log(e^(s_ap/T) / (e^(s_ap/T) + sum_n e^(s_an/T)))"
    paper = "Chen et al., ICML 2020"
    cost = "B^2"

    def __init__(self, temperature: float = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_above("temperature", temperature, 0)
        self.temperature = temperature

    def compute_pairs(self, anchors: tf.Tensor, references: tf.Tensor, pairs: Pairs) -> tf.Tensor:
        return pair_softmax(anchors, references, pairs, self.temperature)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "temperature": self.temperature}
