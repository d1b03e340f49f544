"""The loss of S2SD, as a layer from embeddings to its terms."""

import types

import tensorflow as tf

from s2sd_tf import objectives
from s2sd_tf.checks import check_above, check_at_least, check_bool, checked_int
from s2sd_tf.distillation import similarity_kl
from s2sd_tf.keras_compat import keras
from s2sd_tf.losses import replicas
from s2sd_tf.losses.diagnostics import effective_rank, mean_similarity
from s2sd_tf.losses.schedules import distillation_weight
from s2sd_tf.objectives.base import unit_rows


@keras.utils.register_keras_serializable("s2sd_tf")
class S2SDLoss(keras.layers.Layer):
    """S2SD's loss of a batch (Roth et al., ICML 2021, arXiv 2009.08348, section 3).

        loss = (L(z) + mean_k L_k(q_k)) / 2 + w * mean_k KL(S(q_k) -> S(z)) + w_f * KL(S(f) -> S(z))

    z is the base embedding, the one that is kept. The *targets* q_k are embeddings of higher dimension that are trained
    beside it and dropped at the end (the paper calls their branches auxiliary). L is a metric-learning objective, of
    which every embedding has its own. The *teachers*, whose similarities S within the batch are distilled into z, are
    the targets and the features f; no gradient flows into a teacher. With `target_dims=()` and `feature_distill=False`
    it is the plain objective.

    Args:
        objective: name of a registered objective or an `objectives.Objective`, for the base embedding.
        target_objective: the same for the targets, each of which gets an instance of its own. Default: the base's.
        target_dims: dimensions of the target embeddings, each >= 1.
        temperature: float > 0, T of the divergences.
        distill_weight: float >= 0, w.
        distill_warmup_steps: int >= 0; w is reached by a linear ramp of so many steps.
        feature_distill: bool, whether the features teach too.
        feature_distill_weight: float >= 0, w_f.
        feature_distill_delay: int >= 0, steps before the features begin to teach.
        feature_distill_warmup_steps: int >= 0, length of the ramp of w_f after the delay.
        num_classes: int, number of training classes, for objectives by name that have weights a class.
        similarity_kl_implementation: "auto", "fused" or "composed"; see `similarity_kl`.
        gather_replicas: bool, where a distribution strategy shares out a batch over replicas. True: objectives and
            teachers see the batch of all replicas, whose gradient is that of the whole batch on a single device. Every
            replica computes the objectives of the whole batch, and of the divergences its own rows. False: each replica
            sees its own part alone.
        diagnostics: bool, add terms in training that show how far embeddings are spread: "mean_similarity", the mean
            cosine of the base embeddings of different images; "embedding_rank", the participation ratio of their
            covariance, from 1 to their dimension; and, where there are targets, "target_mean_similarity" and
            "target_embedding_rank", of the target where it is largest and smallest. A similarity near 1 and a rank near
            1 are those of embeddings that have collapsed.
        name: name of the layer.
        dtype: "float32" (default) or "float64", in which the terms are computed.

    Attributes:
        step: int64 variable, training steps taken; the schedules of the weights follow it.
        first_nonfinite_step: int64 variable, the first step (from 0) whose loss was not finite; -1: none.
        objective, target_objectives: the objectives.
        jit_compile: whether the surrounding `tf.function` is compiled by XLA; None: not known. Where it is known, the
            fused op can be used more often. `S2SDModel` sets it.

    Raises:
        ValueError: an argument out of its range; the message names it.

    Example:
        >>> loss = s2sd_tf.S2SDLoss("multi_similarity", target_dims=(512, 1024))
        >>> terms = loss(embedding, [target512, target1024], features, labels, training=True)
        >>> terms["loss"]
    """

    def __init__(
        self,
        objective="multi_similarity",
        target_objective=None,
        *,
        target_dims=(512, 1024, 1536, 2048),
        temperature=1.0,
        distill_weight=50.0,
        distill_warmup_steps=0,
        feature_distill=True,
        feature_distill_weight=50.0,
        feature_distill_delay=1000,
        feature_distill_warmup_steps=0,
        num_classes=None,
        similarity_kl_implementation="auto",
        gather_replicas=True,
        diagnostics=False,
        name=None,
        dtype="float32",
        **kwargs,
    ):
        super().__init__(name=name, dtype=dtype, **kwargs)
        check_above("temperature", temperature, 0)
        for argument, value in (("distill_weight", distill_weight), ("feature_distill_weight", feature_distill_weight)):
            check_at_least(argument, value, 0)
        for argument, value in (
            ("feature_distill", feature_distill),
            ("gather_replicas", gather_replicas),
            ("diagnostics", diagnostics),
        ):
            check_bool(argument, value)
        self.target_dims = tuple(checked_int("target_dims", dim, 1) for dim in target_dims)
        self.temperature = temperature
        self.distill_weight = distill_weight
        self.distill_warmup_steps = checked_int("distill_warmup_steps", distill_warmup_steps, 0)
        self.feature_distill = feature_distill
        self.feature_distill_weight = feature_distill_weight
        self.feature_distill_delay = checked_int("feature_distill_delay", feature_distill_delay, 0)
        self.feature_distill_warmup_steps = checked_int("feature_distill_warmup_steps", feature_distill_warmup_steps, 0)
        self.num_classes = num_classes
        self.similarity_kl_implementation = similarity_kl_implementation
        self.gather_replicas = gather_replicas
        self.diagnostics = diagnostics
        self.jit_compile = None

        self.objective = self._make_objective(objective)
        template = self.objective if target_objective is None else self._make_objective(target_objective)
        # A proxy, as Keras would take a dict for a container of layers.
        self._target_objective = types.MappingProxyType(keras.utils.serialize_keras_object(template))
        self.target_objectives = [self._copy_of(template, k) for k in range(len(self.target_dims))]
        self.step = self._counter("step", 0)
        self.first_nonfinite_step = self._counter("first_nonfinite_step", -1)

    def build(self, input_shape):
        """Makes the objectives' weights, for base embeddings of `input_shape` `(batch, dim)`."""
        for objective, dim in zip((self.objective, *self.target_objectives), (input_shape[-1], *self.target_dims)):
            # A loaded objective comes built.
            if not objective.built:
                objective.build((None, dim))
        super().build(input_shape)

    def call(self, embedding, targets, features, labels, training=False):
        """The terms of the loss of a batch.

        Args:
            embedding: float tensor `(batch, dim)`, the base embeddings. Like targets and features they are
                l2-normalised here.
            targets: list of float tensors `(batch, target_dims[k])`.
            features: float tensor `(batch, features)`, the pooled features that teach; None without `feature_distill`.
            labels: integer tensor `(batch,)`.
            training: bool; with True `step`, and the draws of stochastic miners, move on.

        Returns:
            Dict of tensors: "loss", "objective" (scalars), and where there are targets or features that teach
            "target_objectives" `(K,)`, "distill_kls" `(K,)` and "feature_kl" (scalar), without their weights; and those
            of `diagnostics`. On several replicas with `gather_replicas` the mean of "loss" over them is the batch's.

        Raises:
            ValueError: targets that are not of `target_dims`, or no features where they should teach.
        """
        batch = self._checked_batch(embedding, targets, features, labels)
        if self.gather_replicas:
            batch = replicas.gather(batch)
        terms = {"objective": self.objective(batch.embedding, batch.labels, training=training)}
        loss = terms["objective"]
        if self.target_dims:
            terms["target_objectives"] = tf.stack(
                [
                    objective(target, batch.labels, training=training)
                    for objective, target in zip(self.target_objectives, batch.targets)
                ]
            )
            loss = (loss + tf.reduce_mean(terms["target_objectives"])) / 2.0
        if self.target_dims or self.feature_distill:
            total, kls = self._distill(batch, training)
            loss += tf.cast(total, loss.dtype)
            if self.target_dims:
                terms["distill_kls"] = kls[: len(self.target_dims)]
            if self.feature_distill:
                terms["feature_kl"] = kls[-1]
        if training:
            self._count(loss)
            if self.diagnostics:
                terms.update(_spread(batch))
        return {"loss": loss, **terms}

    def get_config(self):
        return {
            **super().get_config(),
            "objective": keras.utils.serialize_keras_object(self.objective),
            "target_objective": dict(self._target_objective),
            "target_dims": list(self.target_dims),
            "temperature": self.temperature,
            "distill_weight": self.distill_weight,
            "distill_warmup_steps": self.distill_warmup_steps,
            "feature_distill": self.feature_distill,
            "feature_distill_weight": self.feature_distill_weight,
            "feature_distill_delay": self.feature_distill_delay,
            "feature_distill_warmup_steps": self.feature_distill_warmup_steps,
            "num_classes": self.num_classes,
            "similarity_kl_implementation": self.similarity_kl_implementation,
            "gather_replicas": self.gather_replicas,
            "diagnostics": self.diagnostics,
        }

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        for key in ("objective", "target_objective"):
            config[key] = keras.utils.deserialize_keras_object(config[key])
        return cls(**config)

    def _make_objective(self, identifier):
        if not isinstance(identifier, str):
            return objectives.get(identifier)
        settings = {"dtype": self.compute_dtype, "name": identifier.replace("/", "_")}
        if objectives.lookup(identifier).uses_classes:
            settings["num_classes"] = self.num_classes
        return objectives.get(identifier, **settings)

    def _copy_of(self, template, k):
        """A fresh instance of the objective for target k, with draws of its own where it draws."""
        config = {**template.get_config(), "name": f"target{k}_{template.name}"}
        if "seed" in config:
            config["seed"] += k + 1
        return type(template).from_config(config)

    def _counter(self, name, start):
        return self.add_weight(
            name=name, shape=(), dtype="int64", initializer=keras.initializers.Constant(start), trainable=False
        )

    def _checked_batch(self, embedding, targets, features, labels):
        dims = [target.shape[-1] for target in targets]
        if dims != list(self.target_dims):
            raise ValueError(f"targets: expected embeddings of {list(self.target_dims)} dimensions. Received: {dims}")
        embedding, *targets = (unit_rows(tf.cast(matrix, self.compute_dtype)) for matrix in (embedding, *targets))
        if not self.feature_distill:
            features = None
        elif features is None:
            raise ValueError(
                "features: expected those that teach, (batch, features), with feature_distill. Received: None"
            )
        else:
            features = unit_rows(tf.cast(tf.stop_gradient(features), self.compute_dtype))
        return replicas.Batch(embedding, targets, features, labels)

    def _distill(self, batch, training):
        """The weighted sum of all divergences, and the divergences `(teachers,)`."""
        step, dtype = self.step, batch.embedding.dtype
        teachers, weights = list(batch.targets), []
        if self.target_dims:
            weight = distillation_weight(self.distill_weight, step, 0, self.distill_warmup_steps, dtype)
            weights += [weight / len(self.target_dims)] * len(self.target_dims)
        if self.feature_distill:
            teachers.append(batch.features)
            delay, warmup = self.feature_distill_delay, self.feature_distill_warmup_steps
            weights.append(distillation_weight(self.feature_distill_weight, step, delay, warmup, dtype))
        # One call for all teachers, as they share the student's similarities.
        total, kls = similarity_kl(
            batch.embedding,
            teachers,
            self.temperature,
            tf.stack(weights),
            self.similarity_kl_implementation,
            rows=batch.rows,
            compute_gradient=training,
            jit_compile=self.jit_compile,
        )
        if batch.share is not None:
            share = tf.cast(batch.share, total.dtype)
            total, kls = share * total, share * kls
        return total, kls

    def _count(self, loss):
        step, first = tf.convert_to_tensor(self.step), tf.convert_to_tensor(self.first_nonfinite_step)
        is_first = (first < 0) & ~tf.math.is_finite(loss)
        self.first_nonfinite_step.assign(tf.where(is_first, step, first))
        self.step.assign_add(1)


def _spread(batch):
    found = {
        "mean_similarity": mean_similarity(batch.embedding),
        "embedding_rank": effective_rank(batch.embedding),
    }
    if batch.targets:
        found["target_mean_similarity"] = tf.reduce_max([mean_similarity(target) for target in batch.targets])
        found["target_embedding_rank"] = tf.reduce_min([effective_rank(target) for target in batch.targets])
    return found
