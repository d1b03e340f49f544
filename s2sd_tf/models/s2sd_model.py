"""The model that trains an embedding by simultaneous similarity-based self-distillation."""

import fnmatch
import types

import numpy as np
import tensorflow as tf

from s2sd_tf import objectives
from s2sd_tf.checks import check_above, check_at_least, checked_int
from s2sd_tf.distillation import distillation_weight, similarity_kl
from s2sd_tf.keras_compat import (
    apply_gradients,
    apply_summed_gradients,
    build_optimizer,
    dtype_policy_config,
    import_addons,
    keras,
    legacy_optimizer_state,
    loss_dtype,
    report_first_replica,
    resolve_jit_compile,
    restore_legacy_optimizer_state,
    restores_random_layers,
    scale_loss,
    sums_gradients_too_late,
)
from s2sd_tf.models import replicas
from s2sd_tf.models.diagnostics import effective_rank, mean_similarity
from s2sd_tf.models.gradient_caching import gradients_in_parts, outputs_in_parts
from s2sd_tf.models.heads import AuxiliaryHead, EmbeddingHead
from s2sd_tf.models.pooling import POOLINGS, GeM, pool

GROUPS = ("backbone", "heads", "objectives")
SIMILARITIES = ("global", "replica")
# How a key of the multipliers begins that goes on with a pattern of layer names.
_LAYERS = "backbone/"
# Names in a saved model of what Keras does not save of an optimizer.
_LEGACY_OPTIMIZER = "legacy_optimizer_"


@keras.utils.register_keras_serializable("s2sd_tf")
class S2SDModel(keras.Model):
    """An image-retrieval embedding trained with S2SD (Roth et al., ICML 2021, arXiv 2009.08348).

    With the backbone's pooled features f, the model trains a base embedding z = norm(W f + b) together with auxiliary
    target embeddings q_k = norm(MLP_k(f')), each under a metric-learning objective, and distils the in-batch
    similarity structure of every target, and of the features themselves, into the base embedding:

        loss = (L(z) + mean_k L_k(q_k)) / 2 + w * mean_k KL(S(q_k) -> S(z)) + w_f * KL(S(norm(f')) -> S(z))

    The last term starts at step `feature_distill_delay`. Calling the model and `predict` give z, `(batch,
    embedding_dim)` with unit-norm rows. With `target_dims=()` and `feature_distill=False` it is the plain objective.
    `fit` takes batches `(images, labels)`, labels being integers `(batch,)`.

    Args:
        backbone: `keras.Model` from images to feature maps `(batch, h, w, features)` or to pooled features
            `(batch, features)`.
        embedding_dim: int >= 1, dimension of the base embedding.
        objective: name of a registered objective or an `objectives.Objective`, for the base embedding.
        target_objective: the same for the targets, each of which gets an instance of its own. Default: the base's.
        target_dims: dimensions of the target embeddings, each >= 1.
        pooling: "avg", "max", "avg+max" (their sum) or "gem" (`GeM`): how feature maps become the f of the base
            embedding.
        target_pooling: the same for f', which feeds the targets and is the feature teacher. Where both are "gem", they
            are one layer, so that f' is f, as with other equal poolings.
        temperature: float > 0, T of the divergences.
        distill_weight: float >= 0, w.
        distill_warmup_steps: int >= 0; w is reached by a linear ramp of so many steps.
        feature_distill: bool, whether the features teach too.
        feature_distill_weight: float >= 0, w_f.
        feature_distill_delay: int >= 0, steps before the features begin to teach.
        feature_distill_warmup_steps: int >= 0, length of the ramp of w_f after the delay.
        num_classes: int, number of training classes, for objectives by name that have weights a class.
        l2: float >= 0; adds `l2 * weight` to the gradient of every trainable weight of backbone and heads: L2 coupled
            to the optimizer, as opposed to the decoupled decay of AdamW. The power of `GeM`, which is trained with the
            heads, is left out, as in its authors' code.
        learning_rate_multipliers: factors on the updates of the groups "backbone", "heads" and "objectives" (the
            latter on top of each objective's own multiplier), and of "backbone/<shell pattern>": the layers of the
            backbone of such names, on top of the backbone's factor; the first pattern that matches counts. They scale
            what the optimizer does to a weight, so they mean the same with every Keras optimizer; an update below the
            float32 spacing of the weight (1e-7 of it) is lost before it is scaled. Default: 1 each.
        log_per_target: bool, log every target's objective and divergence beside their means.
        similarity_kl_implementation: "auto", "fused" or "composed"; see `similarity_kl`.
        similarities: where a distribution strategy shares a batch out over replicas, "global": objectives and teachers
            see the batch of all of them, and a step is that of one device with the whole batch, but for BatchNorm,
            whose statistics are each replica's own. Every replica computes the objectives of the whole batch, and of
            the divergences its own rows. "replica": each replica sees its own part alone.
        micro_batch_size: int >= 1, or None. Images of a replica that the backbone takes at a time in training: the
            memory is that of such a part, while the loss is that of the whole batch and its gradients are exact, but
            for BatchNorm that trains, whose statistics are the part's. The backbone computes every image twice forward
            and once backward (Gao et al., RepL4NLP 2021, arXiv 2101.06983).
        diagnostics: bool, log how training goes beside the loss, without a copy to the host: "gradient_norm", the norm
            of the gradients of all weights; "mean_similarity", the mean cosine of the base embeddings of different
            images; "embedding_rank", the participation ratio of their covariance, from 1 to `embedding_dim`; and where
            there are targets "target_mean_similarity" and "target_embedding_rank", of the target where it is largest
            and smallest. A similarity near 1 and a rank near 1 are those of embeddings that have collapsed.
        name, dtype: as for any Keras model.

    Attributes:
        step: int64 variable, training steps taken; saved with the model.
        first_nonfinite_step: int64 variable, the first step (from 0) whose loss was not finite; -1: none.
        embedding_head, auxiliary_heads, objective, target_objectives: the layers.
        gem: the `GeM` layer; None where neither pooling is "gem".

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
        *,
        objective="multi_similarity",
        target_objective=None,
        target_dims=(512, 1024, 1536, 2048),
        pooling="avg",
        target_pooling="avg",
        temperature=1.0,
        distill_weight=50.0,
        distill_warmup_steps=0,
        feature_distill=True,
        feature_distill_weight=50.0,
        feature_distill_delay=1000,
        feature_distill_warmup_steps=0,
        num_classes=None,
        l2=0.0,
        learning_rate_multipliers=None,
        log_per_target=False,
        similarity_kl_implementation="auto",
        similarities="global",
        micro_batch_size=None,
        diagnostics=False,
        name=None,
        **kwargs,
    ):
        super().__init__(name=name, **kwargs)
        report_first_replica(self)
        check_at_least("embedding_dim", embedding_dim, 1)
        for dim in target_dims:
            check_at_least("target_dims", dim, 1)
        _check_choice("pooling", pooling, POOLINGS)
        _check_choice("target_pooling", target_pooling, POOLINGS)
        check_above("temperature", temperature, 0)
        for argument, value in [
            ("distill_weight", distill_weight),
            ("distill_warmup_steps", distill_warmup_steps),
            ("feature_distill_weight", feature_distill_weight),
            ("feature_distill_delay", feature_distill_delay),
            ("feature_distill_warmup_steps", feature_distill_warmup_steps),
            ("l2", l2),
        ]:
            check_at_least(argument, value, 0)
        _check_choice("similarities", similarities, SIMILARITIES)
        if micro_batch_size is not None:
            micro_batch_size = checked_int("micro_batch_size", micro_batch_size, 1)
        multipliers = dict(learning_rate_multipliers or {})
        for group, value in multipliers.items():
            if not group.startswith(_LAYERS):
                _check_choice("learning_rate_multipliers", group, GROUPS)
            check_at_least(f"learning_rate_multipliers[{group!r}]", value, 0)

        self.embedding_dim = int(embedding_dim)
        self.target_dims = tuple(int(dim) for dim in target_dims)
        self.pooling = pooling
        self.target_pooling = target_pooling
        self.temperature = temperature
        self.distill_weight = distill_weight
        self.distill_warmup_steps = distill_warmup_steps
        self.feature_distill = feature_distill
        self.feature_distill_weight = feature_distill_weight
        self.feature_distill_delay = feature_distill_delay
        self.feature_distill_warmup_steps = feature_distill_warmup_steps
        self.num_classes = num_classes
        self.l2 = l2
        self.learning_rate_multipliers = types.MappingProxyType({**dict.fromkeys(GROUPS, 1.0), **multipliers})
        self.log_per_target = log_per_target
        self.similarity_kl_implementation = similarity_kl_implementation
        self.similarities = similarities
        self.micro_batch_size = micro_batch_size
        self.diagnostics = diagnostics
        self._steps_are_jitted = None  # not known before `compile`

        self.backbone = backbone
        uses_gem = "gem" in (pooling, target_pooling)
        self.gem = GeM(dtype=loss_dtype(self), name="gem") if uses_gem else None
        self.embedding_head = EmbeddingHead(self.embedding_dim, dtype=self.dtype_policy, name="embedding_head")
        self.auxiliary_heads = [
            AuxiliaryHead(dim, dtype=self.dtype_policy, name=f"auxiliary_head{k}_{dim}")
            for k, dim in enumerate(self.target_dims)
        ]
        self.objective = self._make_objective(objective)
        template = self.objective if target_objective is None else self._make_objective(target_objective)
        # A proxy, as Keras would take a dict for a container of layers.
        self._target_objective = types.MappingProxyType(keras.utils.serialize_keras_object(template))
        self.target_objectives = [self._copy_of(template, k) for k in range(len(self.target_dims))]
        self.step = self.add_weight(name="step", shape=(), dtype="int64", initializer="zeros", trainable=False)
        self.first_nonfinite_step = self.add_weight(
            name="first_nonfinite_step",
            shape=(),
            dtype="int64",
            initializer=keras.initializers.Constant(-1),
            trainable=False,
        )
        self._make_metrics()
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
        if len(shape) == 2 and {self.pooling, self.target_pooling} != {"avg"}:
            raise ValueError(
                f"pooling: expected 'avg' for a backbone that gives pooled features {shape}; the others need feature "
                f"maps. Received: pooling={self.pooling!r}, target_pooling={self.target_pooling!r}"
            )
        if self.gem is not None and not self.gem.built:
            self.gem.build(shape)
        layers = [
            (self.embedding_head, shape[-1]),
            (self.objective, self.embedding_dim),
            *((head, shape[-1]) for head in self.auxiliary_heads),
            *zip(self.target_objectives, self.target_dims),
        ]
        for layer, dim in layers:
            # A loaded objective comes built.
            if not layer.built:
                layer.build((None, dim))
        self._backbone_groups()
        if self.micro_batch_size:
            self._check_parts_can_be_repeated()
        self._feature_dim = shape[-1]
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
        self._steps_are_jitted = bool(self.jit_compile)

    def compile_from_config(self, config):
        """Compiles a loaded model; Keras leaves that to classes with a `compile` of their own."""
        if "tensorflow_addons" in repr(config):
            import_addons("the optimizer of the saved model", "load it with compile=False")
        self.compile(**keras.utils.deserialize_keras_object(config))
        if self.built:
            build_optimizer(self)

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
        """Every term of the loss of one batch, as a dict of tensors.

        On several replicas and with `similarities="global"` the mean over the replicas is the batch's.

        Args:
            inputs: images, as the backbone takes them.
            labels: integer tensor `(batch,)`.
            training: bool, for backbone and miners.

        Returns:
            "loss", "objective" (scalars), and where there is a target or feature teacher "target_objectives" `(K,)`,
            "distill_kls" `(K,)` and "feature_kl" (scalar): unweighted terms.
        """
        if not self.built:
            self.build(inputs.shape)
        return self._losses_of(self._pooled(inputs, training), labels, training)[0]

    def train_step(self, data):
        """One optimizer step on a batch `(images, labels)`; returns the running means of the logged terms."""
        inputs, labels = _unpack(data)
        if not self.built:
            self.build(inputs.shape)
        variables = self.trainable_variables
        losses, batch, gradients = (self._gradients_in_parts if self.micro_batch_size else self._gradients)(
            inputs, labels, variables
        )
        # The updates that are not taken as the optimizer makes them.
        scaled = [
            (variable, multiplier)
            for _, group, multiplier in self.learning_rate_groups()
            if multiplier != 1.0
            for variable in group
        ]
        before = [tf.identity(variable) for variable, _ in scaled]
        diagnosed = {}
        summed = replicas.count() > 1 and (self.diagnostics or sums_gradients_too_late(self.optimizer))
        if summed:
            gradients = replicas.sum_gradients(gradients)
        if self.diagnostics:
            diagnosed = self._diagnose(batch, gradients)
        if summed:
            apply_summed_gradients(self.optimizer, gradients, variables, replicas.count())
        else:
            apply_gradients(self.optimizer, gradients, variables)
        for (variable, multiplier), old in zip(scaled, before):
            variable.assign(old + multiplier * (tf.convert_to_tensor(variable) - old))
        step, first = tf.convert_to_tensor(self.step), tf.convert_to_tensor(self.first_nonfinite_step)
        is_first = (first < 0) & ~tf.math.is_finite(losses["loss"])
        self.first_nonfinite_step.assign(tf.where(is_first, step, first))
        self.step.assign_add(1)
        return self._log({**losses, **diagnosed})

    def test_step(self, data):
        """The terms of the loss of a batch `(images, labels)`, without training."""
        inputs, labels = _unpack(data)
        return self._log(self.compute_losses(inputs, labels, training=False))

    @property
    def metrics(self):
        """Running means of the logged terms."""
        return [getattr(self, attribute) for attribute in self._metric_attributes]

    def get_config(self):
        return {
            **super().get_config(),
            "dtype": dtype_policy_config(self),
            "backbone": keras.utils.serialize_keras_object(self.backbone),
            "embedding_dim": self.embedding_dim,
            "objective": keras.utils.serialize_keras_object(self.objective),
            "target_objective": dict(self._target_objective),
            "target_dims": list(self.target_dims),
            "pooling": self.pooling,
            "target_pooling": self.target_pooling,
            "temperature": self.temperature,
            "distill_weight": self.distill_weight,
            "distill_warmup_steps": self.distill_warmup_steps,
            "feature_distill": self.feature_distill,
            "feature_distill_weight": self.feature_distill_weight,
            "feature_distill_delay": self.feature_distill_delay,
            "feature_distill_warmup_steps": self.feature_distill_warmup_steps,
            "num_classes": self.num_classes,
            "l2": self.l2,
            "learning_rate_multipliers": dict(self.learning_rate_multipliers),
            "log_per_target": self.log_per_target,
            "similarity_kl_implementation": self.similarity_kl_implementation,
            "similarities": self.similarities,
            "micro_batch_size": self.micro_batch_size,
            "diagnostics": self.diagnostics,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        for key in ("backbone", "objective", "target_objective"):
            if isinstance(config[key], dict):
                config[key] = keras.utils.deserialize_keras_object(config[key], custom_objects=custom_objects)
        return cls(**config)

    def _make_objective(self, identifier):
        if not isinstance(identifier, str):
            return objectives.get(identifier)
        settings = {"dtype": loss_dtype(self), "name": identifier.replace("/", "_")}
        if objectives.lookup(identifier).uses_classes:
            settings["num_classes"] = self.num_classes
        return objectives.get(identifier, **settings)

    def _copy_of(self, template, k):
        """A fresh instance of the objective for target k, with draws of its own where it draws."""
        config = {**template.get_config(), "name": f"target{k}_{template.name}"}
        if "seed" in config:
            config["seed"] += k + 1
        return type(template).from_config(config)

    def _pooled(self, inputs, training):
        """`[f, f']`, the pooled features of images, or `[f]` where they are the same."""
        features = self.backbone(inputs, training=training)
        poolings = dict.fromkeys((self.pooling, self.target_pooling))
        return [pool(features, pooling, self.gem) for pooling in poolings]

    def _losses_of(self, pooled, labels, training):
        """What `compute_losses` returns, and the `replicas.Batch` that it is of, from `_pooled` features."""
        target_features = pooled[-1]
        batch = replicas.Batch(
            self.embedding_head(pooled[0]), [head(target_features) for head in self.auxiliary_heads], None, labels
        )
        if self.feature_distill:
            features = tf.cast(tf.stop_gradient(target_features), batch.embedding.dtype)
            batch = batch._replace(features=tf.math.l2_normalize(features, axis=1, epsilon=1e-12))
        if self.similarities == "global":
            batch = replicas.gather(batch)

        losses = {"objective": self.objective(batch.embedding, batch.labels, training=training)}
        loss = losses["objective"]
        teachers, weights, dtype = list(batch.targets), [], batch.embedding.dtype
        if self.target_dims:
            losses["target_objectives"] = tf.stack(
                [
                    objective(target, batch.labels, training=training)
                    for objective, target in zip(self.target_objectives, batch.targets)
                ]
            )
            loss = (loss + tf.reduce_mean(losses["target_objectives"])) / 2.0
            weight = distillation_weight(self.distill_weight, self.step, 0, self.distill_warmup_steps, dtype)
            weights = [weight / len(self.target_dims)] * len(self.target_dims)
        if self.feature_distill:
            teachers.append(batch.features)
            weights.append(
                distillation_weight(
                    self.feature_distill_weight,
                    self.step,
                    self.feature_distill_delay,
                    self.feature_distill_warmup_steps,
                    dtype,
                )
            )
        if teachers:
            # One call for all teachers, as they share the student's similarities.
            total, kls = similarity_kl(
                batch.embedding,
                teachers,
                self.temperature,
                tf.stack(weights),
                self.similarity_kl_implementation,
                rows=batch.rows,
                compute_gradient=training,
                jit_compile=self._steps_are_jitted,
            )
            if batch.share is not None:
                share = tf.cast(batch.share, total.dtype)
                total, kls = share * total, share * kls
            loss += tf.cast(total, loss.dtype)
            if self.target_dims:
                losses["distill_kls"] = kls[: len(self.target_dims)]
            if self.feature_distill:
                losses["feature_kl"] = kls[-1]
        return {"loss": loss, **losses}, batch

    def _loss_to_differentiate(self, loss):
        """The loss as the optimizer wants it, with what regularises the weights."""
        loss += self._regularization(loss.dtype)
        # Keras sums the gradients of the replicas of a distribution strategy.
        return scale_loss(self.optimizer, loss / tf.cast(replicas.count(), loss.dtype))

    def _gradients(self, inputs, labels, variables):
        """`(losses, batch, gradients)` of a training step."""
        with tf.GradientTape() as tape:
            losses, batch = self._losses_of(self._pooled(inputs, True), labels, training=True)
            loss = self._loss_to_differentiate(losses["loss"])
        return losses, batch, _dense(tape.gradient(loss, variables))

    def _gradients_in_parts(self, inputs, labels, variables):
        """The same, with the backbone computing `micro_batch_size` images at a time."""
        dtype = loss_dtype(self)
        size = self.micro_batch_size

        def compute(part):
            return [tf.cast(features, dtype) for features in self._pooled(part, True)]

        # Statistics and random numbers of the second time shall be those of the first.
        state = self.backbone.non_trainable_variables
        before = [tf.identity(variable) for variable in state]
        dims = [self._feature_dim] * len({self.pooling, self.target_pooling})
        pooled = outputs_in_parts(compute, inputs, size, dims, dtype)
        for variable, value in zip(state, before):
            variable.assign(value)
        with tf.GradientTape() as tape:
            tape.watch(pooled)
            losses, batch = self._losses_of(pooled, labels, training=True)
            loss = self._loss_to_differentiate(losses["loss"])
        gradients, upstream = tape.gradient(loss, (variables, pooled))
        gradients = _dense(gradients)

        trained = {id(v) for layer in (self.backbone, self.gem) if layer is not None for v in layer.trainable_variables}
        places = [k for k, variable in enumerate(variables) if id(variable) in trained]
        in_parts = gradients_in_parts(compute, inputs, size, upstream, [variables[k] for k in places])
        for k, gradient in zip(places, in_parts):
            if gradient is not None:
                gradients[k] = gradient if gradients[k] is None else gradients[k] + gradient
        return losses, batch, gradients

    def _check_parts_can_be_repeated(self):
        for layer in _leaves(self.backbone):
            if getattr(layer, "activity_regularizer", None) is not None:
                raise ValueError(
                    "micro_batch_size: expected a backbone without activity regularizers. "
                    f"Received: one with {layer.name!r}"
                )
            if not restores_random_layers() and getattr(layer, "rate", 0) and "rate" in layer.get_config():
                raise ValueError(
                    "micro_batch_size: expected a backbone without dropout or noise with Keras 2, which cannot draw "
                    f"the same random numbers twice. Received: one with {layer.name!r}"
                )

    def _diagnose(self, batch, gradients):
        scale = tf.cast(scale_loss(self.optimizer, tf.ones([])), tf.float32)
        present = [tf.cast(gradient, tf.float32) for gradient in gradients if gradient is not None]
        found = {
            "gradient_norm": tf.linalg.global_norm(present) / scale,
            "mean_similarity": mean_similarity(batch.embedding),
            "embedding_rank": effective_rank(batch.embedding),
        }
        if self.target_dims:
            found["target_mean_similarity"] = tf.reduce_max([mean_similarity(target) for target in batch.targets])
            found["target_embedding_rank"] = tf.reduce_min([effective_rank(target) for target in batch.targets])
        return found

    def _regularization(self, dtype):
        total = tf.zeros([], dtype)
        for loss in self.losses:
            total += tf.cast(loss, dtype)
        if self.l2:
            for layer in (self.backbone, self.embedding_head, *self.auxiliary_heads):
                for variable in layer.trainable_variables:
                    total += self.l2 * tf.cast(tf.nn.l2_loss(tf.convert_to_tensor(variable)), dtype)
        return total

    def learning_rate_groups(self):
        """`(name, trainable variables, multiplier)` of the groups of `learning_rate_multipliers`, every objective and
        every pattern of layer names being one of its own.
        """
        multipliers = self.learning_rate_multipliers
        groups = self._backbone_groups()
        gem = () if self.gem is None else (self.gem,)
        for head in (*gem, self.embedding_head, *self.auxiliary_heads):
            groups.append(("heads", head.trainable_variables, multipliers["heads"]))
        for objective in (self.objective, *self.target_objectives):
            multiplier = multipliers["objectives"] * objective.learning_rate_multiplier
            groups.append(("objectives", objective.trainable_variables, multiplier))
        return groups

    def _backbone_groups(self):
        patterns = [key for key in self.learning_rate_multipliers if key.startswith(_LAYERS)]
        own = self.learning_rate_multipliers["backbone"]
        found = {key: [] for key in patterns}
        for layer in dict.fromkeys(_leaves(self.backbone)) if patterns else ():
            match = [key for key in patterns if fnmatch.fnmatchcase(layer.name, key[len(_LAYERS) :])][:1]
            for key in match:
                found[key] += layer.trainable_variables
        unused = [key for key, variables in found.items() if not variables]
        if unused:
            names = [layer.name for layer in _leaves(self.backbone) if layer.trainable_variables]
            raise ValueError(
                f"learning_rate_multipliers: expected patterns of names of layers that train, out of {names}. "
                f"Received: {unused}, which match none, or only what others match before them"
            )
        scaled = {id(variable) for variables in found.values() for variable in variables}
        rest = [variable for variable in self.backbone.trainable_variables if id(variable) not in scaled]
        groups = [(key, variables, own * self.learning_rate_multipliers[key]) for key, variables in found.items()]
        return [*groups, ("backbone", rest, own)]

    def _make_metrics(self):
        names = ["loss", "objective"]
        if self.target_dims:
            names += ["target_objective", "distill_kl"]
            if self.log_per_target:
                names += [f"target{k}_{dim}_objective" for k, dim in enumerate(self.target_dims)]
                names += [f"target{k}_{dim}_kl" for k, dim in enumerate(self.target_dims)]
        if self.feature_distill:
            names.append("feature_kl")
        if self.diagnostics:
            names += ["gradient_norm", "mean_similarity", "embedding_rank"]
            names += ["target_mean_similarity", "target_embedding_rank"] if self.target_dims else []
        self._metric_attributes = tuple(f"_mean_{name}" for name in names)
        for attribute, name in zip(self._metric_attributes, names):
            # One attribute each: Keras 2 would take metrics in a list for layers.
            setattr(self, attribute, _RunningMean(name=name))

    def _log(self, losses):
        values = dict(losses)
        if self.target_dims:
            values["target_objective"] = tf.reduce_mean(losses["target_objectives"])
            values["distill_kl"] = tf.reduce_mean(losses["distill_kls"])
            if self.log_per_target:
                for k, dim in enumerate(self.target_dims):
                    values[f"target{k}_{dim}_objective"] = losses["target_objectives"][k]
                    values[f"target{k}_{dim}_kl"] = losses["distill_kls"][k]
        logged = [metric for metric in self.metrics if metric.name in values]
        for metric in logged:
            metric.update_state(values[metric.name])
        return {metric.name: metric.result() for metric in logged}


class _RunningMean(keras.metrics.Mean):
    """A mean that can be loaded in the scope of a strategy: Keras 2 would share out the file's array over replicas."""

    def load_own_variables(self, store):
        # Keras 3 stores none.
        for key in list(store.keys()):
            self.variables[int(key)].assign(np.array(store[key]))


def _output_shape(backbone, input_shape):
    # A functional model knows its outputs, where Keras 2 could not compute their shape: it asks every layer, and
    # multi-head attention and the operations in ConvNeXt cannot tell.
    outputs = getattr(backbone, "outputs", None)
    return tuple(outputs[0].shape if outputs else backbone.compute_output_shape(input_shape))


def _leaves(layer):
    """The layers that a model is made of, and those of models in it."""
    parts = getattr(layer, "layers", None)
    if not parts:
        return [layer]
    return [leaf for part in parts for leaf in _leaves(part)]


def _dense(gradients):
    # Keras 3's optimizers square the entries of a sparse gradient before they add up repeated ones.
    return [
        tf.convert_to_tensor(gradient) if isinstance(gradient, tf.IndexedSlices) else gradient for gradient in gradients
    ]


def _unpack(data):
    inputs, labels, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    if labels is None:
        raise ValueError("data: expected batches (images, labels); received batches without labels")
    if sample_weight is not None:
        raise ValueError("data: expected batches (images, labels); sample weights are not supported")
    return inputs, labels


def _check_choice(argument, value, choices):
    if value not in choices:
        raise ValueError(f"{argument}: expected one of {list(choices)}. Received: {value!r}")
