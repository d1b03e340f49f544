"""The S2SD loss as a Keras layer: from embeddings to the terms of the loss."""

import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from s2sd_tf import objectives
from s2sd_tf.checks import check_above, check_at_least, check_bool, checked_int
from s2sd_tf.distillation import similarity_kl
from s2sd_tf.keras_compat import keras
from s2sd_tf.labels import checked_labels
from s2sd_tf.losses import nested, replicas
from s2sd_tf.losses.diagnostics import effective_rank, mean_similarity
from s2sd_tf.losses.schedules import distillation_weight
from s2sd_tf.objectives.base import len_of, unit_rows


@keras.utils.register_keras_serializable("s2sd_tf")
class S2SDLoss(keras.layers.Layer):
    """The S2SD loss of a batch (Roth et al., ICML 2021, arXiv 2009.08348, section 3).

        loss = (L(z) + mean_k L_k(q_k)) / 2 + w * mean_k KL(S(q_k) -> S(z)) + w_f * KL(S(f) -> S(z))

    z is the base embedding, the one you keep. The *targets* q_k are embeddings of higher dimension that are trained
    beside it and dropped after training (the paper calls their branches auxiliary). L is a metric-learning objective;
    every embedding has its own instance. The *teachers* are the targets and the features f: their similarities S within
    the batch are distilled into z, and no gradient flows into them. With `target_dims=()` and `feature_distill=False`
    the loss is the plain objective.

    Teachers from outside, `external_teachers`, are embeddings t_j that come with the batch: those of a frozen, larger
    model, or of the names of the classes by a language model (Roth et al., CVPR 2022, arXiv 2203.08543). They add

        w_e * mean_j KL(S(t_j) -> S(z))

    With `nested_dims`, every prefix z_d of the base embedding, its first d dimensions l2-normalised, is trained to be
    an embedding too (Kusupati et al., NeurIPS 2022, arXiv 2205.13147). All prefixes have the same teachers:

        loss = (mean_d L_d(z_d) + mean_k L_k(q_k)) / 2
             + w * mean_d mean_k KL(S(q_k) -> S(z_d)) + w_f * mean_d KL(S(f) -> S(z_d))

    Args:
        objective: registered name or `objectives.Objective`, for the base embedding. With a `relevance` of its own,
            labels are `(batch, n)`, and the objectives of the targets get this relevance.
        target_objective: the same for the targets; each target gets its own instance. None: as for the base, which is
            the published loss. The targets of some objectives collapse and harm the base embedding; those of
            multi-similarity helped, or did no harm, with every objective tried. If it names the base's objective, the
            targets have the base's settings.
        target_dims: dimensions of the target embeddings, each >= 1.
        temperature: > 0, T, by which the similarities are divided in the divergences.
        distill_weight: >= 0, w, the weight of the targets' divergences.
        distill_warmup_steps: >= 0, length of the linear ramp up to w.
        feature_distill: whether the features are a teacher too.
        feature_distill_weight: >= 0, w_f, the weight of the features' divergence.
        feature_distill_delay: >= 0, steps before the features begin to teach.
        feature_distill_warmup_steps: >= 0, length of the ramp up to w_f after the delay.
        external_teachers: >= 0, the number of teachers that come with every batch.
        external_distill_weight: >= 0, w_e, the weight of their divergences. The default is not published; larger ones
            did harm in benchmarks/omniglot_teachers.py.
        external_distill_delay: >= 0, steps before they begin to teach.
        external_distill_warmup_steps: >= 0, length of the ramp up to w_e after the delay.
        nested_dims: the dimensions of the prefixes, strictly increasing; the last one is the whole dimension of the
            base embedding. (): no prefixes. Each prefix has its own instance of the objective.
        nested_weights: >= 0, the weight of each prefix in the means over the prefixes. (): equal weights.
        num_classes: number of training classes, for objectives given by name that have weights per class.
        similarity_kl_implementation: "auto", "fused" or "composed"; see `similarity_kl`.
        gather_replicas: matters if a distribution strategy splits each batch over replicas. True: objectives and
            teachers see the whole batch, and the gradient equals the single-device gradient. Every replica computes the
            objectives of the whole batch, but only its own rows of the divergences. False: each replica sees only its
            own part.
        diagnostics: in training, add terms that show how spread out the embeddings are: "mean_similarity", the mean
            cosine between base embeddings of different images; "embedding_rank", the participation ratio of their
            covariance, from 1 to their dimension; and, with targets, "target_mean_similarity" (largest over the
            targets) and "target_embedding_rank" (smallest over the targets). Collapsed embeddings have a similarity
            and a rank near 1.
        name: name of the layer.
        dtype: "float32" or "float64", in which the terms are computed.

    Attributes:
        step: int64 variable, the number of training steps taken; the weight schedules depend on it.
        first_nonfinite_step: int64 variable, the first step (from 0) whose loss was not finite; -1: none.
        objective, target_objectives: the objectives.
        nested_objectives: the objectives of the prefixes that are shorter than the base embedding.
        jit_compile: whether XLA compiles the surrounding `tf.function`; None: unknown. If it is known, the fused op can
            be used more often. `S2SDModel` sets it.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> loss = s2sd_tf.S2SDLoss("multi_similarity", target_dims=(512, 1024))
        >>> terms = loss(embedding, [target512, target1024], features, labels, training=True)
        >>> terms["loss"]
    """

    def __init__(
        self,
        objective: str | objectives.Objective = "multi_similarity",
        target_objective: str | objectives.Objective | None = "multi_similarity",
        *,
        target_dims: Sequence[int] = (512, 1024, 1536, 2048),
        temperature: float = 1.0,
        distill_weight: float = 50.0,
        distill_warmup_steps: int = 0,
        feature_distill: bool = True,
        feature_distill_weight: float = 50.0,
        feature_distill_delay: int = 1000,
        feature_distill_warmup_steps: int = 0,
        external_teachers: int = 0,
        external_distill_weight: float = 5.0,
        external_distill_delay: int = 0,
        external_distill_warmup_steps: int = 0,
        nested_dims: Sequence[int] = (),
        nested_weights: Sequence[float] = (),
        num_classes: int | None = None,
        similarity_kl_implementation: str = "auto",
        gather_replicas: bool = True,
        diagnostics: bool = False,
        name: str | None = None,
        dtype: Any = "float32",
        **kwargs: Any,
    ) -> None:
        super().__init__(name=name, dtype=dtype, **kwargs)
        check_above("temperature", temperature, 0)
        for argument, value in (
            ("distill_weight", distill_weight),
            ("feature_distill_weight", feature_distill_weight),
            ("external_distill_weight", external_distill_weight),
        ):
            check_at_least(argument, value, 0)
        for argument, value in (
            ("feature_distill", feature_distill),
            ("gather_replicas", gather_replicas),
            ("diagnostics", diagnostics),
        ):
            check_bool(argument, value)
        scalar = not isinstance(target_dims, Iterable) or getattr(target_dims, "shape", None) == ()
        if scalar or isinstance(target_dims, (str, bytes)):
            raise ValueError(
                f"target_dims: expected a sequence of ints >= 1, such as (512,). Received: {target_dims!r}"
            )
        self.target_dims = tuple(checked_int("target_dims", dim, 1) for dim in target_dims)
        self.temperature = temperature
        self.distill_weight = distill_weight
        self.distill_warmup_steps = checked_int("distill_warmup_steps", distill_warmup_steps, 0)
        self.feature_distill = feature_distill
        self.feature_distill_weight = feature_distill_weight
        self.feature_distill_delay = checked_int("feature_distill_delay", feature_distill_delay, 0)
        self.feature_distill_warmup_steps = checked_int("feature_distill_warmup_steps", feature_distill_warmup_steps, 0)
        self.external_teachers = checked_int("external_teachers", external_teachers, 0)
        self.external_distill_weight = external_distill_weight
        self.external_distill_delay = checked_int("external_distill_delay", external_distill_delay, 0)
        self.external_distill_warmup_steps = checked_int(
            "external_distill_warmup_steps", external_distill_warmup_steps, 0
        )
        self.nested_dims = nested.checked_dims(nested_dims)
        self.nested_weights = nested.checked_weights(nested_weights, self.nested_dims)
        self.num_classes = None if num_classes is None else checked_int("num_classes", num_classes, 1)
        self.similarity_kl_implementation = similarity_kl_implementation
        self.gather_replicas = gather_replicas
        self.diagnostics = diagnostics
        self.jit_compile = None

        self.objective = self._make_objective(objective)
        same = target_objective is None or (
            isinstance(target_objective, str) and type(self.objective) is objectives.lookup(target_objective)
        )
        template = self.objective if same else self._make_objective(target_objective, self.objective.relevance)
        if self.target_dims and template.relevance != self.objective.relevance:
            known = [name for name in objectives.names() if "relevance" in objectives.settings(name)]
            raise ValueError(
                f"target_objective: expected the relevance of the base objective, {self.objective.relevance!r}; those "
                f"with a relevance are {known}. Received: {template.registered_name!r} with {template.relevance!r}"
            )
        # A read-only view, because Keras treats a dict attribute as a container of layers.
        self._target_objective = types.MappingProxyType(keras.utils.serialize_keras_object(template))
        self.target_objectives = [self._copy_of(template, f"target{k}", k + 1) for k in range(len(self.target_dims))]
        self.nested_objectives = [
            self._copy_of(self.objective, f"nested{dim}", len(self.target_dims) + k + 1)
            for k, dim in enumerate(self.nested_dims[:-1])
        ]
        self.step = self._counter("step", 0)
        self.first_nonfinite_step = self._counter("first_nonfinite_step", -1)

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Creates the objectives' weights; `input_shape` is that of the base embeddings, `(batch, dim)`.

        Raises:
            ValueError: the last of `nested_dims` is not dim.
        """
        if self.nested_dims and self.nested_dims[-1] != input_shape[-1]:
            raise ValueError(
                f"nested_dims: expected the dimension of the base embedding, {input_shape[-1]}, as the last one. "
                f"Received: {self.nested_dims}"
            )
        dims = (input_shape[-1], *self.target_dims, *self.nested_dims[:-1])
        for objective, dim in zip((self.objective, *self.target_objectives, *self.nested_objectives), dims):
            # A loaded objective is already built.
            if not objective.built:
                objective.build((None, dim))
        super().build(input_shape)

    def __call__(
        self,
        embedding: tf.Tensor,
        targets: Sequence[tf.Tensor],
        features: tf.Tensor | None,
        labels: tf.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, tf.Tensor]:
        # Before Keras; see `Objective.__call__`.
        labels = checked_labels("labels", labels, len_of(embedding), self.label_columns)
        return super().__call__(embedding, targets, features, labels, *args, **kwargs)

    def call(
        self,
        embedding: tf.Tensor,
        targets: Sequence[tf.Tensor],
        features: tf.Tensor | None,
        labels: tf.Tensor,
        training: bool = False,
        teachers: Sequence[tf.Tensor] = (),
    ) -> dict[str, tf.Tensor]:
        """Computes the terms of the loss of a batch. The layer l2-normalises all embeddings and the features.

        Args:
            embedding: float `(batch, dim)`, the base embeddings.
            targets: each float `(batch, target_dims[k])`.
            features: float `(batch, features)`, the pooled features that teach; None without `feature_distill`.
            labels: integers `(batch,)`, or `(batch, n)` with a relevance; as for `Objective.call`.
            training: if True, `step` is incremented and stochastic miners draw new samples.
            teachers: the external teachers, each float `(batch, any dimension)`.

        Returns:
            The terms by name: "loss" and "objective" (scalars); with targets also "target_objectives" `(K,)` and
            "distill_kls" `(K,)`; with `external_teachers` also "external_kls" `(E,)`; with `feature_distill` also
            "feature_kl" (scalar); and the terms of `diagnostics`. The divergences are not multiplied by their weights.
            With D >= 2 `nested_dims`, these are means over the prefixes, and there are "nested_objectives" `(D,)` and,
            with a teacher, "nested_kls" `(D, teachers)`: of the targets, the external teachers and the features. On
            several replicas with `gather_replicas`, the mean of "loss" over the replicas is the loss of the batch.

        Raises:
            ValueError: the dimensions of the targets are not `target_dims`, features are missing, `teachers` are not
                `external_teachers` matrices of the batch's rows, or labels that are not one whole number for each
                image.
        """
        batch = self._checked_batch(embedding, targets, features, labels, teachers)
        if self.gather_replicas:
            batch = replicas.gather(batch, self.label_columns)
        prefixes = nested.prefixes(batch.embedding, self.nested_dims)
        found = [
            objective(prefix, batch.labels, training=training)
            for objective, prefix in zip((*self.nested_objectives, self.objective), prefixes)
        ]
        terms = {"objective": nested.mean(found, self.nested_weights)}
        if self.nested_objectives:
            terms["nested_objectives"] = tf.stack(found)
        loss = terms["objective"]
        if self.target_dims:
            terms["target_objectives"] = tf.stack(
                [
                    objective(target, batch.labels, training=training)
                    for objective, target in zip(self.target_objectives, batch.targets)
                ]
            )
            loss = (loss + tf.reduce_mean(terms["target_objectives"])) / 2.0
        if self.has_teachers:
            divergences = [self._distill(batch._replace(embedding=prefix), training) for prefix in prefixes]
            total, kls = (nested.mean(values, self.nested_weights) for values in zip(*divergences))
            loss += tf.cast(total, loss.dtype)
            if self.nested_objectives:
                terms["nested_kls"] = tf.stack([values for _, values in divergences])
            if self.target_dims:
                terms["distill_kls"] = kls[: len(self.target_dims)]
            if self.external_teachers:
                terms["external_kls"] = kls[len(self.target_dims) :][: self.external_teachers]
            if self.feature_distill:
                terms["feature_kl"] = kls[-1]
        if training:
            self._count(loss)
            if self.diagnostics:
                terms.update(_spread(batch))
        return {"loss": loss, **terms}

    @property
    def has_teachers(self) -> bool:
        """Whether anything is distilled into the base embedding."""
        return bool(self.target_dims or self.external_teachers or self.feature_distill)

    @property
    def label_columns(self) -> int:
        """How many labels an image has: 0 for one class, -1 for any number; see `GradedPairObjective`."""
        return self.objective.label_columns

    def get_config(self) -> dict[str, Any]:
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
            "external_teachers": self.external_teachers,
            "external_distill_weight": self.external_distill_weight,
            "external_distill_delay": self.external_distill_delay,
            "external_distill_warmup_steps": self.external_distill_warmup_steps,
            "nested_dims": list(self.nested_dims),
            "nested_weights": list(self.nested_weights),
            "num_classes": self.num_classes,
            "similarity_kl_implementation": self.similarity_kl_implementation,
            "gather_replicas": self.gather_replicas,
            "diagnostics": self.diagnostics,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "S2SDLoss":
        config = dict(config)
        for key in ("objective", "target_objective"):
            config[key] = keras.utils.deserialize_keras_object(config[key])
        return cls(**config)

    def _make_objective(self, identifier, relevance=()):
        if not isinstance(identifier, str):
            return objectives.get(identifier)
        settings = {"dtype": self.compute_dtype, "name": identifier.replace("/", "_")}
        if objectives.lookup(identifier).uses_classes:
            settings["num_classes"] = self.num_classes
        if relevance and "relevance" in objectives.settings(identifier):
            settings["relevance"] = relevance
        return objectives.get(identifier, **settings)

    def _copy_of(self, template, prefix, number):
        """A new instance of the objective, with `prefix` in its name, and with a different seed if it has one."""
        config = {**template.get_config(), "name": f"{prefix}_{template.name}"}
        if "seed" in config:
            config["seed"] += number
        return type(template).from_config(config)

    def _counter(self, name, start):
        return self.add_weight(
            name=name, shape=(), dtype="int64", initializer=keras.initializers.Constant(start), trainable=False
        )

    def _checked_batch(self, embedding, targets, features, labels, teachers):
        dims = [target.shape[-1] for target in targets]
        if dims != list(self.target_dims):
            raise ValueError(f"targets: expected embeddings of {list(self.target_dims)} dimensions. Received: {dims}")
        embedding, *targets = (unit_rows(tf.cast(matrix, self.compute_dtype)) for matrix in (embedding, *targets))
        frozen = self._checked_teachers(teachers, embedding)
        if self.feature_distill and features is None:
            raise ValueError(
                "features: expected the features that teach, (batch, features), with feature_distill. Received: None"
            )
        if self.feature_distill:
            frozen.append(features)
        frozen = [unit_rows(tf.cast(tf.stop_gradient(teacher), self.compute_dtype)) for teacher in frozen]
        return replicas.Batch(embedding, targets, frozen, labels)

    def _checked_teachers(self, teachers, embedding):
        teachers = list(teachers) if isinstance(teachers, (list, tuple)) else [teachers]
        shapes = [tuple(getattr(teacher, "shape", ())) for teacher in teachers]
        rows = len_of(embedding)
        if len(teachers) != self.external_teachers or any(
            len(shape) != 2 or not shape[1] or (None not in (rows, shape[0]) and shape[0] != rows) for shape in shapes
        ):
            raise ValueError(
                f"teachers: expected external_teachers={self.external_teachers} matrices "
                f"({rows or 'batch'}, dimension) with the batch, as in (images, {{'labels': labels, 'teachers': "
                f"[matrix]}}). Received: {shapes}"
            )
        return teachers

    def _distill(self, batch, training):
        """`(weighted sum of all divergences, the divergences (teachers,))`."""
        step, dtype = self.step, batch.embedding.dtype
        teachers, weights = [*batch.targets, *batch.frozen], []
        if self.target_dims:
            weight = distillation_weight(self.distill_weight, step, 0, self.distill_warmup_steps, dtype)
            weights += [weight / len(self.target_dims)] * len(self.target_dims)
        if self.external_teachers:
            delay, warmup = self.external_distill_delay, self.external_distill_warmup_steps
            weight = distillation_weight(self.external_distill_weight, step, delay, warmup, dtype)
            weights += [weight / self.external_teachers] * self.external_teachers
        if self.feature_distill:
            delay, warmup = self.feature_distill_delay, self.feature_distill_warmup_steps
            weights.append(distillation_weight(self.feature_distill_weight, step, delay, warmup, dtype))
        # One call for all teachers: they share the student's similarities.
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
