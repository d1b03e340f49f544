"""Warns when embeddings collapse to a point or to a line."""

from collections.abc import Mapping

import tensorflow as tf
from absl import logging

from s2sd_tf.keras_compat import keras
from s2sd_tf.models import S2SDModel

FIRST_STEPS = 100
_SIMILARITY, _RANK = 0.9, 2.0
_ADVICE = {
    "": "a lower config.optimizer.learning_rate, a warm-up (config.optimizer.schedule.warmup_epochs), a smaller "
    "config.s2sd.distill_weight, or another config.objective.name may help",
    "target_": "another config.s2sd.target_objective, a warm-up (config.optimizer.schedule.warmup_epochs), or a lower "
    "config.optimizer.learning_rate may help",
}


class CollapseAlarm(keras.callbacks.Callback):
    """Logs a warning at the end of an epoch if embeddings have collapsed. It warns again only after they recovered.

    The embeddings of an untrained network are all similar too, so the first `after_steps` steps do not count. A run of
    `s2sd-train` does not count the warm-up of the learning rate either.

    It reads the logs of an `S2SDModel(diagnostics=True)`: for the base embedding and for the targets, the mean cosine
    between different images (above 0.9 is a collapse), and the participation ratio of the covariance, which is 1 for
    embeddings on a line (below 2 is a collapse, if the embedding has more dimensions).

    Args:
        after_steps: the alarm is silent until the model has taken this many steps.
    """

    def __init__(self, after_steps: int = FIRST_STEPS) -> None:
        super().__init__()
        self.after_steps = after_steps
        self._collapsed: set[str] = set()

    def on_epoch_end(self, epoch: int, logs: Mapping[str, float] | None = None) -> None:
        self.check(self.model, epoch, logs or {})

    def check(self, model: S2SDModel, epoch: int, logs: Mapping[str, float]) -> None:
        """Checks the logs of an epoch (from 0). Call it from a training loop that does not use `fit`."""
        if int(tf.convert_to_tensor(model.s2sd_loss.step)) < self.after_steps:
            return
        dims = {"": (model.embedding_dim,), "target_": model.s2sd_loss.target_dims}
        for prefix, name in (("", "the embeddings"), ("target_", "the targets' embeddings")):
            similarity, rank = logs.get(f"{prefix}mean_similarity"), logs.get(f"{prefix}embedding_rank")
            present, signs = dims[prefix], []
            if similarity is not None:
                signs.append(similarity > _SIMILARITY)
            if rank is not None:
                signs.append(rank < _RANK < min(present))
            if not any(signs):
                self._collapsed.discard(prefix)
            elif prefix not in self._collapsed:
                self._collapsed.add(prefix)
                seen = [] if similarity is None else [f"mean similarity {similarity:.2f}"]
                if rank is not None:
                    seen.append(f"rank {rank:.1f} of {' to '.join(map(str, sorted({min(present), max(present)})))}")
                logging.warning(
                    "Epoch %d: %s have collapsed: %s; %s.", epoch + 1, name, ", ".join(seen), _ADVICE[prefix]
                )
