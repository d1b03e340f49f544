"""Objectives as losses of `compile`, for any Keras model whose outputs are embeddings."""

import uuid
import weakref

import tensorflow as tf

from s2sd_tf.keras_compat import keras, share_of_loss
from s2sd_tf.objectives.base import get

# Objectives of the holders there are, by key: a loaded loss finds the one that was loaded with its model here.
_held = weakref.WeakValueDictionary()


def as_keras_loss(objective, **settings):
    """An objective as a `keras.losses.Loss`, which `compile` of any Keras model takes.

    Its `y_true` are integer labels `(batch,)` or `(batch, 1)`, its `y_pred` embeddings `(batch, dim)`. The value is the
    objective's in training. Batches need several images of each class: `data.training_batches` makes such batches.

    - On several replicas each compares the embeddings of its own part of the batch, and the loss is the mean of theirs.
      `S2SDModel` compares those of all.
    - The draws of a miner are new at every call, in evaluation too. A loaded model draws from the start again.
    - An objective with weights (proxies, boundaries) goes into an `ObjectiveHolder` at the end of the model, which
      trains and saves them, and the place of the draws. `learning_rate_multiplier` has no effect.

    Args:
        objective: name of a registered objective without weights, or an `Objective`.
        **settings: of the objective, beside a name.

    Example:
        >>> model.compile("adam", loss=s2sd_tf.objectives.as_keras_loss("multi_similarity"))

    Raises:
        ValueError: an unknown name or setting; a name of an objective with weights; an objective with a cross-batch
            memory. When it is called: labels or embeddings of another shape; sample weights; an objective with weights
            without a holder.
        InvalidArgumentError: when it is called, labels in floating point that are not whole or not below 2^24. Under
            XLA, which knows no assertions, the loss is NaN.
    """
    named = isinstance(objective, str)
    objective = get(objective, **settings)
    if named and _has_trainable_weights(objective):
        raise _without_holder(objective)
    return ObjectiveLoss(objective)


@keras.utils.register_keras_serializable("s2sd_tf")
class ObjectiveHolder(keras.layers.Layer):
    """Returns the embeddings it gets, and makes the variables of an objective variables of the model.

    Args:
        objective: `Objective`.
        key: str by which a loss in the same file finds the objective; made where it is None.
        **kwargs: arguments of `keras.layers.Layer`.

    Example:
        >>> objective = s2sd_tf.objectives.get("proxy_anchor", num_classes=100)
        >>> model = keras.Sequential([backbone, keras.layers.Dense(64), s2sd_tf.objectives.ObjectiveHolder(objective)])
        >>> model.compile("adam", loss=s2sd_tf.objectives.as_keras_loss(objective))
    """

    def __init__(self, objective, key=None, **kwargs):
        super().__init__(**{"autocast": False, **kwargs})
        self.objective = _deserialized(objective)
        self.key = key or uuid.uuid4().hex
        self.objective.holder_key = self.key
        _held[self.key] = self.objective

    def build(self, input_shape):
        # Loaded, it is built already.
        if not self.objective.built:
            self.objective.build(input_shape)
        super().build(input_shape)

    def call(self, embeddings):
        return embeddings

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        objective = keras.utils.serialize_keras_object(self.objective)
        return {**super().get_config(), "objective": objective, "key": self.key}


@keras.utils.register_keras_serializable("s2sd_tf")
class ObjectiveLoss(keras.losses.Loss):
    """What `as_keras_loss` makes.

    Args:
        objective: `Objective`, or the key of the `ObjectiveHolder` that has it.
        name: str; default: the objective's.
    """

    def __init__(self, objective, name=None):
        objective = _held.get(objective) if isinstance(objective, str) else _deserialized(objective)
        if objective is None:
            raise ValueError("objective: expected its ObjectiveHolder in the model that is loaded. Received: none")
        if getattr(objective, "memory_size", 0):
            raise ValueError(
                "memory_size: expected 0, as a Keras loss cannot tell training from evaluation; or use S2SDModel. "
                f"Received: {objective.memory_size}"
            )
        super().__init__(name=name or objective.name)
        self._needs_holder = _has_trainable_weights(objective)
        # Not an attribute: Keras would save its variables with the loss, and want them back before it is built.
        self._objective = lambda: objective

    def __call__(self, y_true, y_pred, sample_weight=None):
        # Not the base's, which in Keras 3 makes labels float32, and above 2^24 others of them.
        if sample_weight is not None:
            raise ValueError("sample_weight: expected none (nor class_weight), as an objective has no loss an image")
        return share_of_loss(self.call(y_true, y_pred))

    def call(self, y_true, y_pred):
        y_true, y_pred = tf.convert_to_tensor(y_true), tf.convert_to_tensor(y_pred)
        if y_true.shape.rank not in (None, 1) and y_true.shape[1:] != (1,):
            raise ValueError(f"y_true: expected labels (batch,) or (batch, 1). Received: shape {tuple(y_true.shape)}")
        if y_pred.shape.rank not in (None, 2):
            raise ValueError(f"y_pred: expected embeddings (batch, dim). Received: shape {tuple(y_pred.shape)}")
        objective = self._objective()
        if self._needs_holder and not hasattr(objective, "holder_key"):
            raise _without_holder(objective)
        labels, whole = _integers(y_true)
        loss = objective(y_pred, labels, training=True)
        return tf.where(whole, loss, tf.constant(float("nan"), loss.dtype))

    def get_config(self):
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
        "objective: expected one without weights, or an instance that the model has in an ObjectiveHolder; or use "
        f"S2SDModel. Received: {objective.registered_name!r}, which has weights"
    )


def _integers(labels):
    """Labels as integers, and whether that is what they were."""
    if labels.dtype.is_integer:
        return labels, True
    # Keras 3 traces a step on several replicas with labels in floating point before it takes one.
    whole = tf.reduce_all(tf.equal(labels, tf.floor(labels)) & (tf.abs(labels) < 2**24))
    tf.debugging.Assert(whole, ["y_true: expected whole numbers, and below 2^24 in floating point. Received:", labels])
    return tf.cast(labels, tf.int32), whole
