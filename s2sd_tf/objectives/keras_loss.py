"""Objectives as Keras losses for `compile`, for any Keras model that outputs embeddings."""

import uuid
import weakref
from typing import Any

import numpy as np
import tensorflow as tf

from s2sd_tf.keras_compat import keras, share_of_loss
from s2sd_tf.labels import exact_labels
from s2sd_tf.objectives.base import Objective, get, len_of

# The objectives of all live holders, by key. A loaded loss looks up the objective that was loaded with its model.
_held: weakref.WeakValueDictionary[str, Objective] = weakref.WeakValueDictionary()


def as_keras_loss(objective: str | Objective, **settings: Any) -> keras.losses.Loss:
    """Turns an objective into a `keras.losses.Loss` for `compile` of any Keras model.

    The loss expects integer labels `(batch,)` or `(batch, 1)` as `y_true`, or with a relevance `(batch, n)`, and
    embeddings `(batch, dim)` as `y_pred`, and computes the objective as in training. Batches need several images per
    class, such as those of `data.training_batches`.

    - With several replicas, each compares only the embeddings of its own part of the batch, and the loss is the mean
      over the replicas. `S2SDModel` compares the embeddings of all replicas.
    - A stochastic miner makes new draws at every call, in evaluation too. Without an `ObjectiveHolder`, a loaded
      model starts again with the first.
    - An objective with weights (proxies, boundaries) needs an `ObjectiveHolder` at the end of the model. The holder
      trains and saves the weights, and saves the position in the draws. `learning_rate_multiplier` has no effect.

    Args:
        objective: name of a registered objective without weights, or an `Objective`.
        **settings: settings of the objective; only with a name.

    Example:
        >>> model.compile("adam", loss=s2sd_tf.objectives.as_keras_loss("multi_similarity"))

    Raises:
        ValueError: an unknown name or setting; the name of an objective with weights; an objective with a cross-batch
            memory. When the loss is called: labels or embeddings of another shape; labels that are not whole numbers;
            sample weights; an objective with weights that is in no holder.
        InvalidArgumentError: when the loss is called in a graph with floating-point labels that are not whole numbers
            below 2^24 (2^53 in float64). XLA has no assertions; there the loss is NaN.
    """
    named = isinstance(objective, str)
    objective = get(objective, **settings)
    if named and _has_trainable_weights(objective):
        raise _without_holder(objective)
    return ObjectiveLoss(objective)


@keras.utils.register_keras_serializable("s2sd_tf")
class ObjectiveHolder(keras.layers.Layer):
    """An identity layer on embeddings that makes an objective's variables part of the model.

    Args:
        objective: `Objective`, or its serialised config.
        key: identifies the objective to a loss in the same file. Default: a random key.
        **kwargs: arguments of `keras.layers.Layer`.

    Example:
        >>> objective = s2sd_tf.objectives.get("proxy_anchor", num_classes=100)
        >>> model = keras.Sequential([backbone, keras.layers.Dense(64), s2sd_tf.objectives.ObjectiveHolder(objective)])
        >>> model.compile("adam", loss=s2sd_tf.objectives.as_keras_loss(objective))
    """

    def __init__(self, objective: Objective | dict[str, Any], key: str | None = None, **kwargs: Any) -> None:
        super().__init__(**{"autocast": False, **kwargs})
        self.objective = _deserialized(objective)
        self.key = key or uuid.uuid4().hex
        self.objective.holder_key = self.key
        _held[self.key] = self.objective

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        # A loaded objective is already built.
        if not self.objective.built:
            self.objective.build(input_shape)
        super().build(input_shape)

    def call(self, embeddings: tf.Tensor) -> tf.Tensor:
        return embeddings

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        objective = keras.utils.serialize_keras_object(self.objective)
        return {**super().get_config(), "objective": objective, "key": self.key}


@keras.utils.register_keras_serializable("s2sd_tf")
class ObjectiveLoss(keras.losses.Loss):
    """The Keras loss that `as_keras_loss` returns.

    Args:
        objective: `Objective`, its serialised config, or the key of its `ObjectiveHolder`.
        name: name of the loss. Default: the objective's.
    """

    def __init__(self, objective: str | Objective | dict[str, Any], name: str | None = None) -> None:
        found = _held.get(objective) if isinstance(objective, str) else _deserialized(objective)
        if found is None:
            raise ValueError("objective: expected its ObjectiveHolder in the loaded model. Received: none")
        memory_size = getattr(found, "memory_size", 0)
        if memory_size:
            raise ValueError(
                "memory_size: expected 0, as a Keras loss cannot tell training from evaluation; or use S2SDModel. "
                f"Received: {memory_size}"
            )
        super().__init__(name=name or found.name)
        self._needs_holder = _has_trainable_weights(found)
        # Not an attribute: Keras would save its variables with the loss, and expect them before it is built.
        self._objective = lambda: found

    def __call__(
        self, y_true: tf.Tensor | np.ndarray, y_pred: tf.Tensor | np.ndarray, sample_weight: Any = None
    ) -> tf.Tensor:
        # Replaces the base class's method, which in Keras 3 casts labels to float32: that changes labels above 2^24.
        if sample_weight is not None:
            raise ValueError("sample_weight: expected none (nor class_weight), as an objective has no loss per image")
        return share_of_loss(self.call(y_true, y_pred))

    def call(self, y_true: tf.Tensor | np.ndarray, y_pred: tf.Tensor | np.ndarray) -> tf.Tensor:
        y_pred = tf.convert_to_tensor(y_pred)
        if y_pred.shape.rank not in (None, 2):
            raise ValueError(f"y_pred: expected embeddings (batch, dim). Received: shape {tuple(y_pred.shape)}")
        objective = self._objective()
        if self._needs_holder and not hasattr(objective, "holder_key"):
            raise _without_holder(objective)
        # Floating point is accepted because Keras 3 traces a step with float labels before it runs one on several
        # replicas.
        labels, whole = exact_labels("y_true", y_true, len_of(y_pred), objective.label_columns)
        loss = objective(y_pred, labels, training=True)
        return tf.where(whole, loss, tf.constant(float("nan"), loss.dtype))

    def get_config(self) -> dict[str, Any]:
        objective = self._objective()
        key = getattr(objective, "holder_key", None)
        return {"name": self.name, "objective": key or keras.utils.serialize_keras_object(objective)}


def _deserialized(objective):
    return get(keras.utils.deserialize_keras_object(objective) if isinstance(objective, dict) else objective)


def _has_trainable_weights(objective):
    copy = type(objective).from_config(objective.get_config())
    copy.build((None, 1))
    return bool(copy.trainable_weights)


def _without_holder(objective):
    return ValueError(
        "objective: expected one without weights, or an instance that is in an ObjectiveHolder of the model; or use "
        f"S2SDModel. Received: {objective.registered_name!r}, which has weights"
    )
