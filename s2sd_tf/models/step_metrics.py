"""Running means of the terms that a training or test step logs."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from s2sd_tf.keras_compat import keras
from s2sd_tf.losses import S2SDLoss


class StepMetrics:
    """Running means of the terms of an `S2SDLoss`, by name.

    Args:
        loss: the loss whose terms are logged.
        per_target: whether to log the objective and the divergence of every target and of every prefix too.

    Attributes:
        metrics: list of `keras.metrics.Mean`.
    """

    def __init__(self, loss: S2SDLoss, per_target: bool) -> None:
        self._targets = [f"target{k}_{dim}" for k, dim in enumerate(loss.target_dims)] if per_target else []
        nested = per_target and len(loss.nested_dims) > 1
        self._nested = [f"nested{dim}" for dim in loss.nested_dims] if nested else []
        names = ["loss", "objective", *(f"{prefix}_objective" for prefix in self._nested)]
        names += [f"{prefix}_kl" for prefix in self._nested] if loss.has_teachers else []
        if loss.target_dims:
            names += ["target_objective", "distill_kl"]
            names += [f"{target}_objective" for target in self._targets] + [f"{target}_kl" for target in self._targets]
        if loss.external_teachers:
            names.append("external_kl")
        if loss.feature_distill:
            names.append("feature_kl")
        if loss.diagnostics:
            names += ["gradient_norm", "mean_similarity", "embedding_rank"]
            names += ["target_mean_similarity", "target_embedding_rank"] if loss.target_dims else []
        self.metrics = [_RunningMean(name=name) for name in names]

    def update(self, terms: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Adds the terms of a step and returns their running means by name."""
        values = dict(terms)
        if "target_objectives" in terms:
            values["target_objective"] = tf.reduce_mean(terms["target_objectives"])
            values["distill_kl"] = tf.reduce_mean(terms["distill_kls"])
        if "external_kls" in terms:
            values["external_kl"] = tf.reduce_mean(terms["external_kls"])
        for k, target in enumerate(self._targets):
            values[f"{target}_objective"] = terms["target_objectives"][k]
            values[f"{target}_kl"] = terms["distill_kls"][k]
        for d, prefix in enumerate(self._nested):
            values[f"{prefix}_objective"] = terms["nested_objectives"][d]
            if "nested_kls" in terms:
                values[f"{prefix}_kl"] = tf.reduce_mean(terms["nested_kls"][d])
        logged = [metric for metric in self.metrics if metric.name in values]
        for metric in logged:
            value = values[metric.name]
            if metric.name == "gradient_norm":
                # Where the loss is scaled, a step whose gradients overflow is skipped.
                counts = tf.math.is_finite(value)
                metric.update_state(tf.where(counts, value, 0.0), sample_weight=tf.cast(counts, tf.float32))
            else:
                metric.update_state(value)
        return {metric.name: metric.result() for metric in logged}


class _RunningMean(keras.metrics.Mean):
    """A mean that loads in the scope of a strategy, where Keras 2 would split the saved array across replicas."""

    def load_own_variables(self, store: Any) -> None:
        # With Keras 3, the store is empty.
        for key in list(store.keys()):
            self.variables[int(key)].assign(np.array(store[key]))
