"""Batch normalisation that does not follow the statistics of training."""

from s2sd_tf.keras_compat import keras


def freeze_batch_norm(model, kind):
    """A copy of `model`, with its weights, whose batch normalisation is frozen.

    Fine-tuning of pretrained networks for retrieval does so, as the batches of few classes have other statistics than
    what the network was trained on. The copy stays frozen when it is saved and loaded, within another model too, and
    whatever its `trainable` is set to.

    Args:
        model: functional or sequential `keras.Model`, whose batch normalisation is not within a model in it.
        kind: "statistics": the moving statistics are used in training too, and stay; gamma and beta train, as in the
            published code of S2SD. "all": gamma and beta stay too.

    Returns:
        A `keras.Model`.

    Raises:
        ValueError: another kind, or no `BatchNormalization` in the model, or one within a model in it.
    """
    check_kind("kind", kind)
    if any(_has_norm(layer) for layer in model.layers if isinstance(layer, keras.Model)):
        raise ValueError(f"frozen_bn: expected no model with batch normalisation within {model.name}. Received: one")
    if not _has_norm(model):
        raise ValueError(
            f"frozen_bn: expected None for {model.name}, which has no batch normalisation. Received: {kind!r}"
        )
    frozen = {"statistics": FrozenStatisticsBatchNormalization, "all": FrozenBatchNormalization}[kind]

    def copy(layer):
        is_norm = isinstance(layer, keras.layers.BatchNormalization)
        return (frozen if is_norm else type(layer)).from_config(layer.get_config())

    clone = keras.models.clone_model(model, clone_function=copy)
    # An input layer may get another name.
    for layer in (layer for layer in model.layers if layer.weights):
        clone.get_layer(layer.name).set_weights(layer.get_weights())
    return clone


def check_kind(argument, kind):
    """Raises ValueError where `kind` is not one of those of `freeze_batch_norm`."""
    if kind not in ("statistics", "all"):
        raise ValueError(f"{argument}: expected 'statistics' or 'all'. Received: {kind!r}")


@keras.utils.register_keras_serializable("s2sd_tf")
class FrozenStatisticsBatchNormalization(keras.layers.BatchNormalization):
    """`BatchNormalization` that always uses its moving statistics and never updates them; gamma and beta train."""

    def call(self, inputs, training=None, **kwargs):
        return super().call(inputs, training=False, **kwargs)


@keras.utils.register_keras_serializable("s2sd_tf")
class FrozenBatchNormalization(FrozenStatisticsBatchNormalization):
    """`BatchNormalization` that always uses its moving statistics, and none of whose variables is ever trained."""

    def build(self, input_shape):
        super().build(input_shape)
        self.trainable = False

    @property
    def trainable(self):
        """False, whatever it is set to."""
        return False

    @trainable.setter
    def trainable(self, value):
        keras.layers.BatchNormalization.trainable.fset(self, False)


def _has_norm(layer):
    if isinstance(layer, keras.Model):
        return any(_has_norm(inner) for inner in layer.layers)
    return isinstance(layer, keras.layers.BatchNormalization)
