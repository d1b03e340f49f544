"""The model that trains an embedding by simultaneous similarity-based self-distillation."""

import numpy as np
import tensorflow as tf

from s2sd_tf.checks import check_bool, checked_int
from s2sd_tf.keras_compat import (
    build_optimizer,
    dtype_policy_config,
    import_addons,
    keras,
    legacy_optimizer_state,
    loss_dtype,
    report_first_replica,
    resolve_jit_compile,
    restore_legacy_optimizer_state,
)
from s2sd_tf.losses import S2SDLoss
from s2sd_tf.models.gradient_caching import GradientCaching
from s2sd_tf.models.heads import EmbeddingHead, TargetHead
from s2sd_tf.models.pooling import POOLINGS, GeM, pool
from s2sd_tf.models.step_metrics import StepMetrics
from s2sd_tf.models.updates import Updates
from s2sd_tf.registry import constructor_arguments

# Of what `get_config` returns; saved models of another one are refused.
_FORMAT = 2
# Names in a saved model of what Keras does not save of an optimizer.
_LEGACY_OPTIMIZER = "legacy_optimizer_"


@keras.utils.register_keras_serializable("s2sd_tf")
class S2SDModel(keras.Model):
    """An image-retrieval embedding trained with S2SD (Roth et al., ICML 2021, arXiv 2009.08348).

    A backbone, an embedding head, a head for each target embedding, and an `S2SDLoss`. With the backbone's pooled
    features f, the base embedding is z = norm(W f + b), and the targets are q_k = norm(MLP_k(f')); the loss trains them
    together and distils the targets, and f', into z. Calling the model and `predict` give z, `(batch, embedding_dim)`
    with unit-norm rows. `fit` takes batches `(images, labels)`, labels being integers `(batch,)`.

    Args:
        backbone: `keras.Model` from images to feature maps `(batch, h, w, features)` or to pooled features
            `(batch, features)`.
        embedding_dim: int >= 1, dimension of the base embedding.
        loss: `S2SDLoss`. Default: one that is made of `loss_settings`.
        pooling: "avg", "max", "avg+max" (their sum) or "gem" (`GeM`): how feature maps become the f of the base
            embedding.
        target_pooling: the same for f', which feeds the targets and is the feature teacher. Where both are "gem", they
            are one layer, so that f' is f, as with other equal poolings.
        l2: float >= 0; adds `l2 * weight` to the gradient of every trainable weight of backbone and heads: L2 coupled
            to the optimizer, as opposed to the decoupled decay of AdamW. The power of `GeM`, which is trained with the
            heads, is left out, as in its authors' code.
        learning_rate_multipliers: factors on the updates of the groups "backbone", "heads" and "objectives" (the
            latter on top of each objective's own multiplier), and of "backbone/<shell pattern>": the layers of the
            backbone of such names, on top of the backbone's factor; the first pattern that matches counts. They scale
            what the optimizer does to a weight, so they mean the same with every Keras optimizer; an update below the
            float32 spacing of the weight (1e-7 of it) is lost before it is scaled. Default: 1 each.
        micro_batch_size: int >= 0. Images of a replica that the backbone takes at a time in training, 0: all of them.
            The memory is that of such a part, while the loss is that of the whole batch and its gradients are exact,
            except for BatchNorm that trains, whose statistics are the part's. The backbone computes every image twice
            forward and once backward (Gao et al., RepL4NLP 2021, arXiv 2101.06983).
        log_per_target: bool, log every target's objective and divergence beside their means.
        name, trainable, dtype: as for any Keras model.
        **loss_settings: arguments of `S2SDLoss` (`objective`, `target_dims`, `temperature`, ...). With
            `diagnostics=True` the norm of the gradients of all weights is logged too, as "gradient_norm".

    Attributes:
        s2sd_loss: the `S2SDLoss`; its `step` counts the training steps.
        embedding_head, target_heads: the heads.
        gem: the `GeM` layer; None where neither pooling is "gem".
        weight_updates: the `Updates`, with the groups of `learning_rate_multipliers`.

    Raises:
        ValueError: an argument out of its range; the message names it.

    Example:
        >>> model = s2sd_tf.S2SDModel(backbone, 128, objective="multi_similarity", **s2sd_tf.preset("msdfa"))
        >>> model.compile(optimizer="adam")
        >>> model.fit(batches, epochs=50)
    """

    def __init__(
        self,
        backbone,
        embedding_dim,
        loss=None,
        *,
        pooling="avg",
        target_pooling="avg",
        l2=0.0,
        learning_rate_multipliers=None,
        micro_batch_size=0,
        log_per_target=False,
        name=None,
        trainable=True,
        dtype=None,
        **loss_settings,
    ):
        super().__init__(name=name, trainable=trainable, dtype=dtype)
        report_first_replica(self)
        self.embedding_dim = checked_int("embedding_dim", embedding_dim, 1)
        for argument, value in (("pooling", pooling), ("target_pooling", target_pooling)):
            if value not in POOLINGS:
                raise ValueError(f"{argument}: expected one of {list(POOLINGS)}. Received: {value!r}")
        check_bool("log_per_target", log_per_target)
        self.pooling = pooling
        self.target_pooling = target_pooling
        self.micro_batch_size = checked_int("micro_batch_size", micro_batch_size, 0)
        self.log_per_target = log_per_target

        self.backbone = backbone
        self.s2sd_loss = _checked_loss(loss, loss_settings, loss_dtype(self))
        has_teachers = self.s2sd_loss.target_dims or self.s2sd_loss.feature_distill
        # Of f and f', each once.
        self._poolings = tuple(dict.fromkeys((pooling, target_pooling) if has_teachers else (pooling,)))
        uses_gem = "gem" in self._poolings
        self.gem = GeM(dtype=loss_dtype(self), name="gem") if uses_gem else None
        self.embedding_head = EmbeddingHead(self.embedding_dim, dtype=self.dtype_policy, name="embedding_head")
        self.target_heads = [
            TargetHead(dim, dtype=self.dtype_policy, name=f"target_head{k}_{dim}")
            for k, dim in enumerate(self.s2sd_loss.target_dims)
        ]
        heads = (self.embedding_head, *self.target_heads)
        objectives = (self.s2sd_loss.objective, *self.s2sd_loss.target_objectives)
        gem = () if self.gem is None else (self.gem,)
        self.weight_updates = Updates(backbone, (*gem, *heads), heads, objectives, l2, learning_rate_multipliers)
        self._step_metrics = StepMetrics(self.s2sd_loss, log_per_target)
        if backbone.built:
            self.build(backbone.input_shape)

    def build(self, input_shape):
        """Makes all weights, for images of `input_shape` `(batch, ...)`."""
        if self.built:
            return
        if not self.backbone.built:
            self.backbone.build(input_shape)
        shape = _output_shape(self.backbone, input_shape)
        if len(shape) not in (2, 4) or shape[-1] is None:
            raise ValueError(
                f"backbone: expected an output of shape (batch, h, w, features) or (batch, features). Received: {shape}"
            )
        if len(shape) == 2 and self._poolings != ("avg",):
            raise ValueError(
                f"pooling: expected 'avg' for a backbone that gives pooled features {shape}; the others need feature "
                f"maps. Received: pooling={self.pooling!r}, target_pooling={self.target_pooling!r}"
            )
        if self.gem is not None and not self.gem.built:
            self.gem.build(shape)
        for layer, dim in (
            (self.embedding_head, shape[-1]),
            *((head, shape[-1]) for head in self.target_heads),
            (self.s2sd_loss, self.embedding_dim),
        ):
            # A loaded loss comes built.
            if not layer.built:
                layer.build((None, dim))
        self.weight_updates.groups()  # refuses patterns that match no layer
        if self.micro_batch_size:
            dtype, dims = loss_dtype(self), [shape[-1]] * len(self._poolings)
            self._caching = GradientCaching(
                self.backbone,
                lambda part: [tf.cast(features, dtype) for features in self._pooled(part, True)],
                self.micro_batch_size,
                dims,
                dtype,
            )
        self.built = True

    def compile(self, *args, jit_compile="auto", **kwargs):
        """As for any Keras model; `jit_compile="auto"` jits where there is a GPU, and no other one beside it.

        The steps rely on it: a function of one's own with `jit_compile=True` around `train_step` wants a model that is
        compiled with `jit_compile=True` too.

        Raises:
            ValueError: `jit_compile=True` on several replicas: XLA knows no collectives of TensorFlow's strategies.
        """
        several = self.distribute_strategy.num_replicas_in_sync > 1
        if several and jit_compile is True:
            raise ValueError(
                "jit_compile: expected False or 'auto' under a distribution strategy of several replicas. Received: "
                f"True, and {self.distribute_strategy.num_replicas_in_sync} replicas"
            )
        jit_compile = False if several else resolve_jit_compile(jit_compile)
        super().compile(*args, jit_compile=jit_compile, **kwargs)
        self.s2sd_loss.jit_compile = bool(self.jit_compile)

    def compile_from_config(self, config):
        """Compiles a loaded model; Keras leaves that to classes with a `compile` of their own."""
        if "tensorflow_addons" in repr(config):
            import_addons("the optimizer of the saved model", "load it with compile=False")
        self.compile(**keras.utils.deserialize_keras_object(config))
        if self.built:
            build_optimizer(self)

    def make_train_function(self, force=False):
        """Keras's hook before training. Creates the optimizer's variables, so that a step is traced only once."""
        if self.built:
            build_optimizer(self)
        return super().make_train_function(force)

    def save_own_variables(self, store):
        """Keras's hook for saving: the model's own variables, and what Keras does not save of a legacy optimizer."""
        super().save_own_variables(store)
        for k, array in enumerate(legacy_optimizer_state(getattr(self, "optimizer", None))):
            store[f"{_LEGACY_OPTIMIZER}{k}"] = array

    def load_own_variables(self, store):
        """Keras's hook for loading, the inverse of `save_own_variables`."""
        names = list(store.keys())
        of_optimizer = [name for name in names if name.startswith(_LEGACY_OPTIMIZER)]
        if not of_optimizer:
            super().load_own_variables(store)
            return
        super().load_own_variables({name: store[name] for name in names if name not in of_optimizer})
        state = [np.array(store[f"{_LEGACY_OPTIMIZER}{k}"]) for k in range(len(of_optimizer))]
        restore_legacy_optimizer_state(getattr(self, "optimizer", None), self.trainable_variables, state)

    def call(self, inputs, training=None):
        """The base embedding z, `(batch, embedding_dim)`, of images."""
        return self.embedding_head(pool(self.backbone(inputs, training=training), self.pooling, self.gem))

    def compute_losses(self, inputs, labels, training=False):
        """Every term of the loss of one batch, a dict of tensors: what `S2SDLoss` returns.

        Args:
            inputs: images, as the backbone takes them.
            labels: integer tensor `(batch,)`.
            training: bool, for backbone and loss.
        """
        if not self.built:
            self.build(inputs.shape)
        return self._losses_of(self._pooled(inputs, training), labels, training)

    def train_step(self, data):
        """One optimizer step on a batch `(images, labels)`; returns the running means of the logged terms."""
        inputs, labels = _unpack(data)
        if not self.built:
            self.build(inputs.shape)
        variables = self.trainable_variables

        def loss_of(pooled):
            terms = self._losses_of(pooled, labels, training=True)
            return terms, self.weight_updates.loss_to_differentiate(self.optimizer, terms["loss"], self.losses)

        if self.micro_batch_size:
            layers = (self.backbone,) if self.gem is None else (self.backbone, self.gem)
            computing = [variable for layer in layers for variable in layer.trainable_variables]
            terms, gradients = self._caching.gradients(inputs, loss_of, variables, computing)
        else:
            with tf.GradientTape() as tape:
                terms, loss = loss_of(self._pooled(inputs, True))
            gradients = tape.gradient(loss, variables)
        norm = self.weight_updates.apply(self.optimizer, gradients, variables, norm=self.s2sd_loss.diagnostics)
        return self._step_metrics.update(terms if norm is None else {**terms, "gradient_norm": norm})

    def test_step(self, data):
        """The terms of the loss of a batch `(images, labels)`, without training."""
        inputs, labels = _unpack(data)
        return self._step_metrics.update(self.compute_losses(inputs, labels, training=False))

    @property
    def metrics(self):
        """Running means of the logged terms."""
        return self._step_metrics.metrics

    def get_config(self):
        return {
            **super().get_config(),
            "format": _FORMAT,
            "dtype": dtype_policy_config(self),
            "backbone": keras.utils.serialize_keras_object(self.backbone),
            "embedding_dim": self.embedding_dim,
            "loss": keras.utils.serialize_keras_object(self.s2sd_loss),
            "pooling": self.pooling,
            "target_pooling": self.target_pooling,
            "l2": self.weight_updates.l2,
            "learning_rate_multipliers": dict(self.weight_updates.multipliers),
            "micro_batch_size": self.micro_batch_size,
            "log_per_target": self.log_per_target,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        found = config.pop("format", 1)
        if found != _FORMAT:
            raise ValueError(
                f"S2SDModel: expected a saved model of format {_FORMAT}. Received: format {found}, written by "
                "another version of s2sd_tf, which can read it"
            )
        for key in ("backbone", "loss"):
            config[key] = keras.utils.deserialize_keras_object(config[key], custom_objects=custom_objects)
        return cls(**config)

    def _pooled(self, inputs, training):
        """`[f, f']`, the pooled features of images, or `[f]` where they are the same."""
        features = self.backbone(inputs, training=training)
        return [pool(features, pooling, self.gem) for pooling in self._poolings]

    def _losses_of(self, pooled, labels, training):
        """The terms of the loss, from `_pooled` features."""
        targets = [head(pooled[-1]) for head in self.target_heads]
        features = pooled[-1] if self.s2sd_loss.feature_distill else None
        return self.s2sd_loss(self.embedding_head(pooled[0]), targets, features, labels, training=training)


def _checked_loss(loss, settings, dtype):
    if loss is None:
        known = set(constructor_arguments([S2SDLoss])) - {"name", "dtype"}
        unknown = sorted(settings.keys() - known)
        if unknown:
            raise TypeError(f"S2SDModel: expected arguments of its own or of S2SDLoss. Received: {unknown}")
        return S2SDLoss(**settings, name="s2sd_loss", dtype=dtype)
    if not isinstance(loss, S2SDLoss):
        raise ValueError(f"loss: expected an S2SDLoss, or its settings by name. Received: {loss!r}")
    if settings:
        raise ValueError(
            f"loss: expected an S2SDLoss or its settings, not both. Received: {loss!r} and {sorted(settings)}"
        )
    return loss


def _output_shape(backbone, input_shape):
    # A functional model knows its outputs, where Keras 2 could not compute their shape: it asks every layer, and
    # multi-head attention and the operations in ConvNeXt cannot tell.
    outputs = getattr(backbone, "outputs", None)
    return tuple(outputs[0].shape if outputs else backbone.compute_output_shape(input_shape))


def _unpack(data):
    inputs, labels, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    if labels is None:
        raise ValueError("data: expected batches (images, labels); received batches without labels")
    if sample_weight is not None:
        raise ValueError("data: expected batches (images, labels); sample weights are not supported")
    return inputs, labels
