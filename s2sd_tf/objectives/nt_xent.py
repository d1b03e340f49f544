"""Normalised, temperature-scaled cross entropy."""

from s2sd_tf.checks import check_above
from s2sd_tf.objectives.base import PairObjective, register
from s2sd_tf.objectives.n_pair import pair_softmax


@register("nt_xent")
class NTXent(PairObjective):
    """Normalised temperature-scaled cross entropy (SimCLR; Chen et al., ICML 2020, eq. 1; InfoNCE), on cosine
    similarities s, mean over the positive pairs of anchors that have a negative:

        -log(exp(s_ap / temperature) / (exp(s_ap / temperature) + sum_n exp(s_an / temperature)))

    The paper has one positive an anchor; here every further one is a pair of its own, and no negative of the others.

    Args:
        temperature: float > 0.
        **kwargs: arguments of `PairObjective`.
    """

    formula = "mean_ap -log(e^(s_ap/T) / (e^(s_ap/T) + sum_n e^(s_an/T)))"
    paper = "Chen et al., ICML 2020"
    cost = "B^2"

    def __init__(self, temperature=0.1, **kwargs):
        super().__init__(**kwargs)
        check_above("temperature", temperature, 0)
        self.temperature = temperature

    def compute_pairs(self, anchors, references, pairs):
        return pair_softmax(anchors, references, pairs, self.temperature)

    def get_config(self):
        return {**super().get_config(), "temperature": self.temperature}
