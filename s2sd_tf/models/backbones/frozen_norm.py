"""Batch normalisation that does not update its moving statistics in training."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from s2sd_tf.keras_compat import keras


def freeze_batch_norm(model: keras.Model, kind: str) -> keras.Model:
    """Copies a model with its weights and freezes the batch normalisation of the copy.

    This is common when a pretrained network is fine-tuned for retrieval: batches of few classes have other statistics
    than the data that the network was trained on. The copy stays frozen if it is saved and loaded, also inside another
    model, and if its `trainable` is set.

    Args:
        model: functional or sequential model; no model nested in it may have batch normalisation.
        kind: "statistics": the moving statistics are used in training too and do not change; gamma and beta train, as
            in the published code of S2SD. "all": gamma and beta do not change either.

    Returns:
        The copy.

    Raises:
        ValueError: unknown kind; no `BatchNormalization` in the model, or one in a nested model.
    """
    check_kind("kind", kind)
    if any(_has_norm(layer) for layer in model.layers if isinstance(layer, keras.Model)):
        raise ValueError(f"frozen_bn: expected no nested model with batch normalisation in {model.name}. Received: one")
    if not _has_norm(model):
        raise ValueError(
            f"frozen_bn: expected None for {model.name}, which has no batch normalisation. Received: {kind!r}"
        )
    frozen = {"statistics": FrozenStatisticsBatchNormalization, "all": FrozenBatchNormalization}[kind]

    def copy(layer):
        is_norm = isinstance(layer, keras.layers.BatchNormalization)
        return (frozen if is_norm else type(layer)).from_config(layer.get_config())

    clone = keras.models.clone_model(model, clone_function=copy)
    # Input layers, which have no weights, may get another name in the clone.
    for layer in (layer for layer in model.layers if layer.weights):
        clone.get_layer(layer.name).set_weights(layer.get_weights())
    return clone


def check_kind(argument: str, kind: Any) -> None:
    """Raises ValueError if `kind` is not a kind of `freeze_batch_norm`; `argument` is its name in the message."""
    if kind not in ("statistics", "all"):
        raise ValueError(f"{argument}: expected 'statistics' or 'all'. Received: {kind!r}")


@keras.utils.register_keras_serializable("s2sd_tf")
class FrozenStatisticsBatchNormalization(keras.layers.BatchNormalization):
    """`BatchNormalization` that always uses its moving statistics and never updates them; gamma and beta train."""

    def call(self, inputs: tf.Tensor, training: bool | None = None, **kwargs: Any) -> tf.Tensor:
        return super().call(inputs, training=False, **kwargs)


@keras.utils.register_keras_serializable("s2sd_tf")
class FrozenBatchNormalization(FrozenStatisticsBatchNormalization):
    """`BatchNormalization` that always uses its moving statistics and never trains any of its variables."""

    def build(self, input_shape: Sequence[int | None]) -> None:
        super().build(input_shape)
        self.trainable = False

    @property
    def trainable(self) -> bool:
        """Always False; setting it has no effect."""
        return False

    @trainable.setter
    def trainable(self, value: bool) -> None:
        keras.layers.BatchNormalization.trainable.fset(self, False)


def _has_norm(layer):
    if isinstance(layer, keras.Model):
        return any(_has_norm(inner) for inner in layer.layers)
    return isinstance(layer, keras.layers.BatchNormalization)
