"""Objectives as losses of `compile`, for any Keras model whose outputs are embeddings."""

import tensorflow as tf

from s2sd_tf.keras_compat import keras
from s2sd_tf.objectives.base import get


def as_keras_loss(objective, **settings):
    """An objective as a `keras.losses.Loss`, which `compile` of any Keras model takes.

    Its `y_true` are integer labels `(batch,)` or `(batch, 1)`, its `y_pred` embeddings `(batch, dim)`. The value is that
    of the objective in training. Batches need several images of each class: `data.training_batches` makes them.

    - Several replicas: each compares the embeddings of its own part of the batch, and the loss of the batch is the mean
      of theirs. `S2SDModel` compares those of all.
    - The draws of a miner are new at every call, in evaluation too. They are no part of the model: a loaded model draws
      from the start again, unless it has an `ObjectiveHolder`.
    - Weights of the objective (proxies, boundaries) are trained and saved where the model has an `ObjectiveHolder`.
      `learning_rate_multiplier` has no effect.

    Args:
        objective: name of a registered objective without weights, or an `Objective`.
        **settings: of the objective, beside a name.

    Example:
        >>> model.compile("adam", loss=s2sd_tf.objectives.as_keras_loss("multi_similarity"))

    Raises:
        ValueError: an unknown name or setting; a name of an objective with weights; an objective with a cross-batch
            memory, which only a model can tell training from evaluation for. When it is called: labels that are no
            integers or have another shape; sample weights; an objective whose weights the model does not have.
    """
    by_name = isinstance(objective, str)
    objective = get(objective, **settings)
    if by_name and _has_trainable_weights(objective):
        raise _no_home(objective)
    return ObjectiveLoss(objective)


@keras.utils.register_keras_serializable("s2sd_tf")
class ObjectiveHolder(keras.layers.Layer):
    """Returns the embeddings it gets, and makes the weights of an objective weights of the model.

    So they are trained and saved with the model, and so are the draws of a miner. A loaded model is compiled with the
    objective that it holds.

    Args:
        objective: `Objective`.
        **kwargs: arguments of `keras.layers.Layer`.

    Example:
        >>> objective = s2sd_tf.objectives.get("proxy_anchor", num_classes=100)
        >>> model = keras.Sequential([backbone, keras.layers.Dense(64), s2sd_tf.objectives.ObjectiveHolder(objective)])
        >>> model.compile("adam", loss=s2sd_tf.objectives.as_keras_loss(objective))
    """

    def __init__(self, objective, **kwargs):
        super().__init__(**{"autocast": False, **kwargs})
        self.objective = _deserialized(objective)

    def build(self, input_shape):
        self.objective.build(input_shape)
        super().build(input_shape)

    def call(self, embeddings):
        return embeddings

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "objective": keras.utils.serialize_keras_object(self.objective)}


@keras.utils.register_keras_serializable("s2sd_tf")
class ObjectiveLoss(keras.losses.Loss):
    """What `as_keras_loss` makes.

    Args:
        objective: `Objective`.
        name: str; default: the objective's.
    """

    def __init__(self, objective, name=None):
        objective = _deserialized(objective)
        if getattr(objective, "memory_size", 0):
            raise ValueError(
                "memory_size: expected 0 in a Keras loss, which cannot tell training from evaluation; use S2SDModel. "
                f"Received: {objective.memory_size}"
            )
        super().__init__(name=name or objective.name)
        # Behind a function: of an attribute Keras would save the weights, and miss them in a loaded loss not yet built.
        self._objective = lambda: objective

    def __call__(self, y_true, y_pred, sample_weight=None):
        # Keras 3's own casts labels to float32, in which those above 2^24 become others.
        if sample_weight is not None:
            raise ValueError("sample_weight: expected none, nor class_weight, for an objective over pairs or proxies.")
        return self.call(y_true, y_pred)

    def call(self, y_true, y_pred):
        y_true, y_pred = tf.convert_to_tensor(y_true), tf.convert_to_tensor(y_pred)
        if not y_true.dtype.is_integer or y_true.shape.rank not in (None, 1) and y_true.shape[1:] != (1,):
            raise ValueError(
                "y_true: expected integer labels (batch,) or (batch, 1). "
                f"Received: {y_true.dtype.name} {tuple(y_true.shape)}"
            )
        if y_pred.shape.rank not in (None, 2):
            raise ValueError(f"y_pred: expected embeddings (batch, dim). Received: shape {tuple(y_pred.shape)}")
        objective = self._objective()
        if not objective.built and _has_trainable_weights(objective):
            raise _no_home(objective)
        return objective(y_pred, y_true, training=True)

    def get_config(self):
        return {"name": self.name, "objective": keras.utils.serialize_keras_object(self._objective())}


def _deserialized(objective):
    return get(keras.utils.deserialize_keras_object(objective) if isinstance(objective, dict) else objective)


def _has_trainable_weights(objective):
    copy = type(objective).from_config(objective.get_config())
    copy.build((None, 1))
    return bool(copy.trainable_weights)


def _no_home(objective):
    return ValueError(
        f"objective: expected one without weights, or one that an ObjectiveHolder makes part of the model (or use "
        f"S2SDModel). Received: {objective.registered_name!r} with weights of its own"
    )
