"""Tells when embeddings collapse: when all images come to the same place, or to a line."""

from absl import logging

from s2sd_tf.keras_compat import keras

_ADVICE = {
    "": "a lower config.optimizer.learning_rate, a warm-up (config.optimizer.schedule.warmup_epochs), a smaller "
    "config.s2sd.distill_weight, or another config.objective.name may help",
    "target_": "another config.s2sd.target_objective, a warm-up (config.optimizer.schedule.warmup_epochs), or a lower "
    "config.optimizer.learning_rate may help",
}


class CollapseAlarm(keras.callbacks.Callback):
    """Warns in the log, at the end of an epoch, that embeddings have collapsed; once, until they have recovered.

    It reads what an `S2SDModel(diagnostics=True)` logs, of the base embedding and of the targets: the mean cosine of
    different images, and the participation ratio of the covariance, 1 for embeddings on a line.

    Args:
        similarity: float, mean cosines above it are a collapse.
        rank: float, ranks below it are a collapse, of embeddings that have more dimensions than that.
    """

    def __init__(self, similarity=0.9, rank=2.0):
        super().__init__()
        self.similarity = similarity
        self.rank = rank
        self._collapsed = set()

    def on_epoch_end(self, epoch, logs=None):
        self.check(self.model, epoch, logs or {})

    def check(self, model, epoch, logs):
        """Looks at what an epoch has logged, for loops without `fit`."""
        dims = {"": (model.embedding_dim,), "target_": model.s2sd_loss.target_dims}
        for prefix, whose in (("", "the embeddings"), ("target_", "the targets' embeddings")):
            similarity, rank = logs.get(f"{prefix}mean_similarity"), logs.get(f"{prefix}embedding_rank")
            whole, signs = dims[prefix], []
            if similarity is not None:
                signs.append(similarity > self.similarity)
            if rank is not None:
                signs.append(rank < self.rank < min(whole))
            if not any(signs):
                self._collapsed.discard(prefix)
            elif prefix not in self._collapsed:
                self._collapsed.add(prefix)
                seen = [] if similarity is None else [f"mean similarity {similarity:.2f}"]
                if rank is not None:
                    seen.append(f"rank {rank:.1f} of {' to '.join(map(str, sorted({min(whole), max(whole)})))}")
                logging.warning(
                    "Epoch %d: %s have collapsed: %s; %s.", epoch + 1, whose, ", ".join(seen), _ADVICE[prefix]
                )
