"""The model that trains an embedding by simultaneous similarity-based self-distillation."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from s2sd_tf.checks import check_bool, checked_int
from s2sd_tf.files import local_path
from s2sd_tf.keras_compat import (
    build_optimizer,
    dtype_policy_config,
    import_addons,
    is_keras_tensor,
    keras,
    legacy_optimizer_state,
    loss_dtype,
    report_first_replica,
    resolve_jit_compile,
    restore_legacy_optimizer_state,
)
from s2sd_tf.labels import checked_labels
from s2sd_tf.losses import S2SDLoss
from s2sd_tf.models.gradient_caching import GradientCaching
from s2sd_tf.models.heads import EmbeddingHead, TargetHead
from s2sd_tf.models.pooling import POOLINGS, GeM, pool
from s2sd_tf.models.step_metrics import StepMetrics
from s2sd_tf.models.updates import Updates
from s2sd_tf.registry import constructor_arguments

# The format of the config; saved models of another format are refused.
_FORMAT = 2
# The prefix of names in a saved model for the optimizer state that Keras does not save.
_LEGACY_OPTIMIZER = "legacy_optimizer_"


@keras.utils.register_keras_serializable("s2sd_tf")
class S2SDModel(keras.Model):
    """An image-retrieval embedding trained with S2SD (Roth et al., ICML 2021, arXiv 2009.08348).

    The model has a backbone, an embedding head, a head for each target embedding, and an `S2SDLoss`. With f and f', the
    features pooled by `pooling` and by `target_pooling`, the base embedding is z = norm(W f + b) and the targets are
    q_k = norm(MLP_k(f')). The loss trains them together and distils the targets, and f', into z. Calling the model and
    `predict` return z, `(batch, embedding_dim)` with unit-norm rows. `fit` takes batches `(images, labels)`; labels are
    integers `(batch,)`, or `(batch, n)` if the objective has a `relevance`. With `external_teachers`, it takes
    `(images, {"labels": labels, "teachers": teachers})`, where each teacher is a float matrix `(batch, any dimension)`.

    Args:
        backbone: model from images to feature maps `(batch, h, w, features)` or to pooled features `(batch, features)`.
            One without a known input shape (subclassed, or a `Sequential` that is not built) is built at the first
            batch.
        embedding_dim: >= 1, dimension of the base embedding.
        loss: the loss; by default, one with `loss_settings`.
        pooling: "avg", "max", "avg+max" (their sum) or "gem" (`GeM`); turns feature maps into the f of the base
            embedding.
        target_pooling: the same for f', which feeds the targets and is the feature teacher. If both are "gem", they
            share one layer. Equal poolings make f' = f.
        l2: >= 0; adds `l2 * weight` to the gradient of every trainable weight of backbone and embedding head. This L2
            is coupled to the optimizer, unlike the decoupled decay of AdamW. It excludes the power of `GeM`, which is
            trained with the heads, as in its authors' code.
        l2_on_targets: whether `l2` includes the target heads. It does not in the published code: their gradients are
            small, so under Adam it would take most of their rank, and they would teach little.
        uniform_biases: whether the biases of the heads start uniform in +-1/sqrt(inputs), as their kernels do and as in
            PyTorch, and not at 0.
        learning_rate_multipliers: factors on the updates of the groups "backbone", "heads" and "objectives"; of
            "embedding_head", one of the heads; and of "backbone/<shell pattern>", the backbone's layers with a matching
            name; the first pattern that matches counts. Each objective's own multiplier is applied on top of the factor
            of "objectives", the factor of "embedding_head" on top of that of "heads", and the factor of a pattern on
            top of that of "backbone". The factors scale the updates that the optimizer makes, so they mean the same
            with every Keras optimizer that makes steps (not Ftrl, ScheduleFreeAdamW, Lookahead, COCOB and
            `ema_overwrite_frequency`). An update below the float32 spacing of the weight (1e-7 of it) is lost before it
            is scaled. The averages of `use_ema` are of weights before they are scaled; `fit` ends by writing these
            averages into the weights, also into those with a factor of 0. Default: 1 each.
        micro_batch_size: >= 0, how many images of a replica the backbone processes at a time in training; 0: all.
            Only one part needs memory at a time, but the loss is that of the whole batch and its gradients are exact.
            The exception is BatchNorm that is not frozen: it uses the statistics of each part. The backbone computes
            every image twice forward and once backward (Gao et al., RepL4NLP 2021, arXiv 2101.06983).
        log_per_target: whether to log every target's objective and divergence, in addition to their means. With
            `nested_dims`, also every prefix's objective, and its mean divergence over the teachers.
        name, trainable, dtype: as for any Keras model.
        **loss_settings: arguments of `S2SDLoss` (`objective`, `target_dims`, `nested_dims`, ...). With
            `diagnostics=True`, the norm of the gradients of all weights is logged too, as "gradient_norm".

    Attributes:
        s2sd_loss: the `S2SDLoss`; its `step` counts the training steps.
        embedding_head, target_heads: the heads.
        gem: the `GeM` layer; None if neither pooling is "gem".
        weight_updates: the `Updates`, with the groups of `learning_rate_multipliers`.

    Raises:
        ValueError: an argument is out of range; the message names it.
        TypeError: `loss_settings` has an unknown argument.

    Example:
        >>> model = s2sd_tf.S2SDModel(backbone, 128, objective="multi_similarity", **s2sd_tf.preset("msdfa"))
        >>> model.compile(optimizer="adam")
        >>> model.fit(batches, epochs=50)
    """

    built: bool

    def __init__(
        self,
        backbone: keras.Model,
        embedding_dim: int,
        loss: S2SDLoss | None = None,
        *,
        pooling: str = "avg",
        target_pooling: str = "avg",
        l2: float = 0.0,
        l2_on_targets: bool = False,
        uniform_biases: bool = False,
        learning_rate_multipliers: Mapping[str, float] | None = None,
        micro_batch_size: int = 0,
        log_per_target: bool = False,
        name: str | None = None,
        trainable: bool = True,
        dtype: Any = None,
        **loss_settings: Any,
    ) -> None:
        super().__init__(name=name, trainable=trainable, dtype=dtype)
        report_first_replica(self)
        self.embedding_dim = checked_int("embedding_dim", embedding_dim, 1)
        for argument, value in (("pooling", pooling), ("target_pooling", target_pooling)):
            if value not in POOLINGS:
                raise ValueError(f"{argument}: expected one of {list(POOLINGS)}. Received: {value!r}")
        for argument, given in (
            ("l2_on_targets", l2_on_targets),
            ("uniform_biases", uniform_biases),
            ("log_per_target", log_per_target),
        ):
            check_bool(argument, given)
        self.pooling = pooling
        self.target_pooling = target_pooling
        self.micro_batch_size = checked_int("micro_batch_size", micro_batch_size, 0)
        self.log_per_target = log_per_target
        self.l2_on_targets = l2_on_targets
        self.uniform_biases = uniform_biases

        if not isinstance(backbone, keras.Model):
            raise ValueError(
                f"backbone: expected a Keras model, such as those of s2sd_tf.models.backbones. Received: {backbone!r}"
            )
        self.backbone = backbone
        self.s2sd_loss = _checked_loss(loss, loss_settings, loss_dtype(self))
        uses_targets = self.s2sd_loss.target_dims or self.s2sd_loss.feature_distill
        # The poolings of f and f', without duplicates.
        self._poolings = tuple(dict.fromkeys((pooling, target_pooling) if uses_targets else (pooling,)))
        uses_gem = "gem" in self._poolings
        self.gem = GeM(dtype=loss_dtype(self), name="gem") if uses_gem else None
        shared = {"uniform_biases": uniform_biases, "dtype": self.dtype_policy}
        self.embedding_head = EmbeddingHead(self.embedding_dim, **shared, name="embedding_head")
        self.target_heads = [
            TargetHead(dim, **shared, name=f"target_head{k}_{dim}") for k, dim in enumerate(self.s2sd_loss.target_dims)
        ]
        heads = (self.embedding_head, *self.target_heads)
        objectives = (
            self.s2sd_loss.objective,
            *self.s2sd_loss.target_objectives,
            *self.s2sd_loss.nested_objectives,
        )
        gem = () if self.gem is None else (self.gem,)
        decayed = heads if l2_on_targets else (self.embedding_head,)
        self.weight_updates = Updates(backbone, (*gem, *heads), decayed, objectives, l2, learning_rate_multipliers)
        self._step_metrics = StepMetrics(self.s2sd_loss, log_per_target)
        # A subclassed model does not know its input shape, even if it has been called.
        shape = getattr(backbone, "input_shape", None) if backbone.built else None
        if shape is not None:
            self.build(shape)

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Creates all weights, for images of the shape `input_shape`, `(batch, ...)`.

        Raises:
            ValueError: the backbone does not fit the poolings or `micro_batch_size`, or a pattern of
                `learning_rate_multipliers` matches no trainable layer.
        """
        if self.built:
            return
        shape = _output_shape(self.backbone, input_shape)
        if len(shape) not in (2, 4) or not shape[-1]:
            raise ValueError(
                f"backbone: expected an output of shape (batch, h, w, features) or (batch, features). Received: {shape}"
            )
        if len(shape) == 2 and self._poolings != ("avg",):
            raise ValueError(
                f"pooling: expected 'avg' for a backbone that outputs pooled features {shape}; the others need "
                f"feature maps. Received: pooling={self.pooling!r}, target_pooling={self.target_pooling!r}"
            )
        if self.gem is not None and not self.gem.built:
            self.gem.build(shape)
        for layer, dim in (
            (self.embedding_head, shape[-1]),
            *((head, shape[-1]) for head in self.target_heads),
            (self.s2sd_loss, self.embedding_dim),
        ):
            # A loaded loss is already built.
            if not layer.built:
                layer.build((None, dim))
        self.weight_updates.groups()  # raises if a pattern matches no layer
        if self.micro_batch_size:
            dtype, dims = loss_dtype(self), [shape[-1]] * len(self._poolings)
            self._caching = GradientCaching(
                self.backbone,
                lambda part: [tf.cast(features, dtype) for features in self._pooled(part, True)],
                self.micro_batch_size,
                dims,
                dtype,
            )
        self._image_shape = tuple(input_shape)[1:]
        self.built = True

    def get_build_config(self) -> dict[str, Any]:
        """The shape that `build_from_config` builds a loaded model with (Keras hook)."""
        return {"input_shape": [None, *self._image_shape]} if self.built else {}

    def build_from_config(self, config: dict[str, Any]) -> None:
        """Builds a loaded model whose backbone has no known input shape (Keras hook)."""
        if config.get("input_shape"):
            self.build(tuple(config["input_shape"]))

    def compile(
        self,
        optimizer: Any = "rmsprop",
        loss: None = None,
        *args: Any,
        jit_compile: bool | str = "auto",
        **kwargs: Any,
    ) -> None:
        """Compiles the model like any Keras model, except that it has its own loss and metrics.

        `jit_compile="auto"` uses XLA with Keras 3 on a single replica with a GPU. If you wrap `train_step` in your own
        function with `jit_compile=True`, compile the model with `jit_compile=True` too: the loss depends on it.

        Raises:
            ValueError: a loss or metrics, which the model would not use; an optimizer that no factor of
                `learning_rate_multipliers` suits; `jit_compile=True` on several replicas: XLA does not support the
                collectives of TensorFlow's strategies.
        """
        given = {"loss": loss, **dict(zip(("metrics or loss_weights",) * 2 + ("weighted_metrics",), args))}
        given.update((name, kwargs.get(name)) for name in ("loss_weights", "metrics", "weighted_metrics"))
        for name, value in given.items():
            if value:
                raise ValueError(
                    f"{name}: expected none in compile: S2SDModel is trained with its own loss, whose terms it logs; "
                    f"choose it by S2SDModel(objective=...). Received: {value!r}"
                )
        several = self.distribute_strategy.num_replicas_in_sync > 1
        if several and jit_compile is True:
            raise ValueError(
                "jit_compile: expected False or 'auto' under a distribution strategy with several replicas. Received: "
                f"True with {self.distribute_strategy.num_replicas_in_sync} replicas"
            )
        jit_compile = False if several else resolve_jit_compile(jit_compile)
        super().compile(optimizer, None, *args, jit_compile=jit_compile, **kwargs)
        self.weight_updates.check_optimizer(self.optimizer)
        self.s2sd_loss.jit_compile = bool(self.jit_compile)

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles a loaded model. Keras requires this method of classes that override `compile`."""
        if "tensorflow_addons" in repr(config):
            import_addons("the optimizer of the saved model", "load it with compile=False")
        self.compile(**keras.utils.deserialize_keras_object(config))
        if self.built:
            build_optimizer(self)

    def make_train_function(self, force: bool = False) -> Any:
        """Keras's hook before training. Creates the optimizer's variables, so that a step is traced only once."""
        if self.built:
            self._check_trainable()
            build_optimizer(self)
        return super().make_train_function(force)

    def save(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """Saves the model like any Keras model, in the format ".keras".

        Raises:
            ValueError: a file in the format HDF5, which Keras could not load.
        """
        if str(filepath).endswith((".h5", ".hdf5")) or kwargs.get("save_format") == "h5":
            raise ValueError(f"filepath: expected a file that ends in '.keras', not in HDF5. Received: {filepath!r}")
        super().save(_keras_path(filepath), *args, **kwargs)

    def export(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """Exports the model from images to base embeddings like any Keras model.

        `s2sd_tf.export.export_encoder` writes the preprocessing of the images with it.

        Raises:
            ValueError: the model is not built.
        """
        if not self.built:
            raise ValueError(
                "export: expected a model that is built: train or call it, or use s2sd_tf.export.export_encoder. "
                "Received: one whose backbone has no input shape yet"
            )
        # Keras exports what a model has been called with; training does not call it.
        self(tf.zeros([1, *(size or 64 for size in self._image_shape)]))
        super().export(_keras_path(filepath), *args, **kwargs)

    def save_own_variables(self, store: Any) -> None:
        """Saves the model's own variables and the legacy optimizer state that Keras does not save (Keras hook)."""
        super().save_own_variables(store)
        for k, array in enumerate(legacy_optimizer_state(getattr(self, "optimizer", None))):
            store[f"{_LEGACY_OPTIMIZER}{k}"] = array

    def load_own_variables(self, store: Any) -> None:
        """Loads what `save_own_variables` saved (Keras hook)."""
        names = list(store.keys())
        of_optimizer = [name for name in names if name.startswith(_LEGACY_OPTIMIZER)]
        if not of_optimizer:
            super().load_own_variables(store)
            return
        super().load_own_variables({name: store[name] for name in names if name not in of_optimizer})
        state = [np.array(store[f"{_LEGACY_OPTIMIZER}{k}"]) for k in range(len(of_optimizer))]
        restore_legacy_optimizer_state(getattr(self, "optimizer", None), self.trainable_variables, state)

    def call(self, inputs: Any, training: bool | None = None) -> tf.Tensor:
        """Returns the base embedding z of images, `(batch, embedding_dim)`."""
        return self.embedding_head(pool(self.backbone(inputs, training=training), self.pooling, self.gem))

    def compute_losses(
        self, inputs: Any, labels: tf.Tensor, training: bool = False, teachers: Sequence[tf.Tensor] = ()
    ) -> dict[str, tf.Tensor]:
        """Returns all terms of the loss of one batch, as `S2SDLoss` returns them.

        Args:
            inputs: images, in the backbone's input format.
            labels: integers `(batch,)` or `(batch, n)`, as for `Objective.call`.
            training: whether backbone and loss run in training mode.
            teachers: the external teachers, each float `(batch, any dimension)`.
        """
        labels = checked_labels("labels", labels, columns=self.s2sd_loss.label_columns)
        if not self.built:
            self.build(inputs.shape)
        return self._losses_of(self._pooled(inputs, training), labels, training, teachers)

    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        """Runs one optimizer step on a batch `(images, labels)`; returns the running means of the logged terms."""
        inputs, labels, teachers = self._unpack(data)
        if not self.built:
            self.build(inputs.shape)
        self._check_trainable()
        variables = self.trainable_variables

        def loss_of(pooled):
            terms = self._losses_of(pooled, labels, True, teachers)
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

    def test_step(self, data: Any) -> dict[str, tf.Tensor]:
        """Evaluates a batch `(images, labels)`; returns the running means of the logged terms."""
        inputs, labels, teachers = self._unpack(data)
        return self._step_metrics.update(self.compute_losses(inputs, labels, False, teachers))

    @property
    def nested_dims(self) -> tuple[int, ...]:
        """The dimensions of the prefixes that are trained as embeddings, see `S2SDLoss`; () for none."""
        return self.s2sd_loss.nested_dims

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """Running means of the logged terms."""
        return self._step_metrics.metrics

    def get_config(self) -> dict[str, Any]:
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
            "l2_on_targets": self.l2_on_targets,
            "uniform_biases": self.uniform_biases,
            "learning_rate_multipliers": dict(self.weight_updates.multipliers),
            "micro_batch_size": self.micro_batch_size,
            "log_per_target": self.log_per_target,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Mapping[str, Any] | None = None) -> "S2SDModel":
        config = dict(config)
        found = config.pop("format", 1)
        if found != _FORMAT:
            raise ValueError(
                f"S2SDModel: expected a saved model of format {_FORMAT}. Received: format {found}; load it with the "
                "version of s2sd_tf that wrote it"
            )
        for key in ("backbone", "loss"):
            config[key] = keras.utils.deserialize_keras_object(config[key], custom_objects=custom_objects)
        return cls(**config)

    def _unpack(self, data):
        inputs, labels, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        if labels is None:
            raise ValueError("data: expected batches (images, labels). Received: batches without labels")
        if sample_weight is not None:
            raise ValueError(
                "data: expected batches (images, labels). Received: sample weights, which are not supported"
            )
        teachers = ()
        if isinstance(labels, Mapping):
            if "labels" not in labels or set(labels) - {"labels", "teachers"}:
                raise ValueError(
                    'data: expected batches (images, labels) or (images, {"labels": labels, "teachers": teachers}). '
                    f"Received: a dict of {sorted(labels)}"
                )
            labels, teachers = labels["labels"], labels.get("teachers", ())
        return inputs, checked_labels("labels", labels, columns=self.s2sd_loss.label_columns), teachers

    def _check_trainable(self):
        if not self.trainable_variables:
            raise ValueError(
                "trainable: expected at least one weight of the model to train. Received: a model of which everything "
                "is frozen (trainable=False)"
            )

    def _pooled(self, inputs, training):
        """Returns the pooled features of images, `[f, f']`, or `[f]` if both are the same."""
        features = self.backbone(inputs, training=training)
        return [pool(features, pooling, self.gem) for pooling in self._poolings]

    def _losses_of(self, pooled, labels, training, teachers):
        """Returns the terms of the loss, given the features that `_pooled` returns."""
        targets = [head(pooled[-1]) for head in self.target_heads]
        features = pooled[-1] if self.s2sd_loss.feature_distill else None
        base = self.embedding_head(pooled[0])
        return self.s2sd_loss(base, targets, features, labels, training=training, teachers=teachers)


def _checked_loss(loss, settings, dtype):
    if loss is None:
        known = set(constructor_arguments([S2SDLoss])) - {"name", "dtype"}
        unknown = sorted(settings.keys() - known)
        if unknown:
            raise TypeError(f"S2SDModel: expected arguments of S2SDModel or S2SDLoss. Received: {unknown}")
        return S2SDLoss(**settings, name="s2sd_loss", dtype=dtype)
    if not isinstance(loss, S2SDLoss):
        raise ValueError(f"loss: expected an S2SDLoss, or its settings as keyword arguments. Received: {loss!r}")
    if settings:
        raise ValueError(
            f"loss: expected an S2SDLoss or its settings, not both. Received: {loss!r} and {sorted(settings)}"
        )
    return loss


def _output_shape(backbone, input_shape):
    """Shape of the backbone's output for images of a shape. Creates its weights, if it has none yet."""
    # A functional model knows its output. Keras 2 cannot always compute the shape: it calls every layer's
    # `compute_output_shape`, which fails for multi-head attention and for the operations in ConvNeXt.
    if getattr(backbone, "outputs", None):
        if len(backbone.inputs) != 1:
            raise ValueError(
                f"backbone: expected a model with one input, images. Received: one with {len(backbone.inputs)} inputs"
            )
        # A `Sequential` has one, and with Keras 3 no `output` until it is called.
        output = backbone.outputs[0] if isinstance(backbone, keras.Sequential) else backbone.output
    else:
        try:
            # Its weights must not belong to the step that is being traced.
            with tf.init_scope():
                output = backbone(keras.Input(tuple(input_shape)[1:]))
        except Exception as error:  # of any kind, because the model is anybody's code
            raise ValueError(
                f"backbone: expected a model that can be called with images {tuple(input_shape)}. Received: one that "
                f"raises {type(error).__name__}: {_one_line(error)}"
            ) from error
    if isinstance(output, (dict, list, tuple)):
        received = f"the outputs {list(output)}" if isinstance(output, dict) else f"a list of {len(output)}"
        raise ValueError(
            "backbone: expected one output, feature maps or pooled features; make it with "
            f"keras.Model(backbone.input, the output). Received: a model with {received}"
        )
    # A tensor of Keras 2 may stand for None, and then has no dtype, or for an array, and then has a number of rows.
    called = not getattr(backbone, "outputs", None)
    if not (is_keras_tensor(output) and hasattr(output, "dtype")) or (
        called and tuple(output.shape)[:1] not in ((), (None,))
    ):
        raise ValueError(
            "backbone: expected one output, feature maps or pooled features. Received: a model that returns no tensor"
        )
    if not tf.as_dtype(output.dtype).is_floating:
        raise ValueError(
            f"backbone: expected an output of floats, to be trained. Received: {tf.as_dtype(output.dtype).name}"
        )
    return tuple(output.shape)


def _keras_path(path):
    """A path for Keras, which takes some URLs."""
    return path if isinstance(path, str) and "://" in path else local_path("filepath", path)


def _one_line(error):
    """What Keras reports of an error in a model, without where it was raised and without colours."""
    text = re.sub(r"\x1b\[\d+m", "", str(error))
    return " ".join(re.sub(r"^Exception encountered when calling .*\n", "", text).split())[:300]
