"""Turns gradients into new weights: coupled L2, sums over replicas, and factors on the updates of groups of weights."""

import fnmatch
import types
from collections.abc import Iterable, Mapping, Sequence

import tensorflow as tf

from s2sd_tf.checks import check_at_least
from s2sd_tf.keras_compat import apply_gradients, apply_summed_gradients, keras, scale_loss, sums_gradients_too_late
from s2sd_tf.losses import replicas
from s2sd_tf.objectives.base import Objective

GROUPS = ("backbone", "heads", "embedding_head", "objectives")
# The prefix of keys that end in a pattern of layer names.
_LAYERS = "backbone/"
# Optimizers that compute the weights themselves and not a step: a factor on the difference could make it grow forever.
_WITHOUT_STEPS = {"COCOB", "Ftrl", "Lookahead", "ScheduleFreeAdamW"}


class Updates:
    """Updates the weights of a model in a step, with any Keras optimizer.

    Args:
        backbone: the model's backbone.
        heads: layers of the group "heads".
        decayed: those `heads` whose weights get L2; the weights of the backbone always do.
        objectives: layers of the group "objectives"; each one's `learning_rate_multiplier` applies too.
        l2: >= 0, see `S2SDModel`.
        multipliers: the `learning_rate_multipliers` of `S2SDModel`.

    Attributes:
        l2, multipliers: as passed; groups without a multiplier have 1.

    Raises:
        ValueError: an invalid argument; the message names it.
    """

    def __init__(
        self,
        backbone: keras.Model,
        heads: Iterable[keras.layers.Layer],
        decayed: Iterable[keras.layers.Layer],
        objectives: Iterable[Objective],
        l2: float,
        multipliers: Mapping[str, float] | None,
    ) -> None:
        check_at_least("l2", l2, 0)
        multipliers = dict(multipliers or {})
        for key, value in multipliers.items():
            if not key.startswith(_LAYERS) and key not in GROUPS:
                raise ValueError(
                    f"learning_rate_multipliers: expected {', '.join(map(repr, GROUPS))} or 'backbone/<pattern>'. "
                    f"Received: {key!r}"
                )
            check_at_least(f"learning_rate_multipliers[{key!r}]", value, 0)
        self.l2 = l2
        self.multipliers = types.MappingProxyType({**dict.fromkeys(GROUPS, 1.0), **multipliers})
        self._backbone = backbone
        self._heads = tuple(heads)
        self._decayed = tuple(decayed)
        self._objectives = tuple(objectives)

    def check_optimizer(self, optimizer: keras.optimizers.Optimizer) -> None:
        """Checks that the optimizer's updates can be scaled by the factors of the groups.

        Raises:
            ValueError: there are factors other than 0 and 1, and the optimizer sets weights otherwise than by steps.
        """
        factors = dict(self.multipliers)
        for objective in self._objectives:
            factors[objective.name] = objective.learning_rate_multiplier
        factors = {key: factor for key, factor in factors.items() if factor not in (0.0, 1.0)}
        optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        names = {cls.__name__ for cls in type(optimizer).__mro__}
        overwrites = getattr(optimizer, "use_ema", False) and getattr(optimizer, "ema_overwrite_frequency", None)
        if factors and (names & _WITHOUT_STEPS or overwrites):
            kind = f"{type(optimizer).__name__}{' with ema_overwrite_frequency' if overwrites else ''}"
            raise ValueError(
                f"learning_rate_multipliers: expected factors of 0 or 1 with {kind}, whose new weights are not the old "
                f"ones and a step. Received: {factors}"
            )

    def groups(self) -> list[tuple[str, list[tf.Variable], float]]:
        """Returns `(key, trainable variables, factor)` of every group of weights.

        Each head, each objective and each pattern of layer names is a group.

        Raises:
            ValueError: a pattern matches no trainable layer of the backbone.
        """
        found = self._backbone_groups()
        for head in self._heads:
            # The embedding head is the head whose name is a key too.
            factor = self.multipliers["heads"] * self.multipliers.get(head.name, 1.0)
            found.append(("heads", head.trainable_variables, factor))
        for objective in self._objectives:
            factor = self.multipliers["objectives"] * objective.learning_rate_multiplier
            found.append(("objectives", objective.trainable_variables, factor))
        return found

    def loss_to_differentiate(
        self, optimizer: keras.optimizers.Optimizer, loss: tf.Tensor, regularizers: Iterable[tf.Tensor]
    ) -> tf.Tensor:
        """Returns the scalar whose gradients `apply` takes.

        It is `loss` plus L2 plus the model's own `regularizers`, scaled for the optimizer (mixed precision) and for the
        number of replicas.
        """
        for term in regularizers:
            loss += tf.cast(term, loss.dtype)
        if self.l2:
            for layer in (self._backbone, *self._decayed):
                for variable in layer.trainable_variables:
                    loss += self.l2 * tf.cast(tf.nn.l2_loss(tf.convert_to_tensor(variable)), loss.dtype)
        # With a distribution strategy, Keras sums the gradients of the replicas.
        return scale_loss(optimizer, loss / tf.cast(replicas.count(), loss.dtype))

    def apply(
        self,
        optimizer: keras.optimizers.Optimizer,
        gradients: Sequence[tf.Tensor | tf.IndexedSlices | None],
        variables: Sequence[tf.Variable],
        norm: bool = False,
    ) -> tf.Tensor | None:
        """Runs the optimizer and scales its updates by the factors of the groups.

        Args:
            optimizer: the optimizer.
            gradients: the gradients of `loss_to_differentiate`, in the order of `variables`.
            variables: the trainable variables.
            norm: whether to compute the norm of the gradients.

        Returns:
            The norm of the gradients, summed over all replicas and unscaled, as a scalar tensor; None without `norm`.
        """
        gradients = [_dense(gradient) for gradient in gradients]
        scaled = [(variable, factor) for _, group, factor in self.groups() if factor != 1.0 for variable in group]
        before = [tf.identity(variable) for variable, _ in scaled]
        summed = replicas.count() > 1 and (norm or sums_gradients_too_late(optimizer))
        if summed:
            gradients = replicas.sum_gradients(gradients)
        found = _norm(optimizer, gradients) if norm else None
        if summed:
            apply_summed_gradients(optimizer, gradients, variables, replicas.count())
        else:
            apply_gradients(optimizer, gradients, variables)
        for (variable, factor), old in zip(scaled, before):
            variable.assign(old + factor * (tf.convert_to_tensor(variable) - old))
        return found

    def _backbone_groups(self) -> list[tuple[str, list[tf.Variable], float]]:
        patterns = [key for key in self.multipliers if key.startswith(_LAYERS)]
        own = self.multipliers["backbone"]
        found: dict[str, list[tf.Variable]] = {key: [] for key in patterns}
        for layer in dict.fromkeys(leaves(self._backbone)) if patterns else ():
            match = [key for key in patterns if fnmatch.fnmatchcase(layer.name, key[len(_LAYERS) :])][:1]
            for key in match:
                found[key] += layer.trainable_variables
        unused = [key for key, variables in found.items() if not variables]
        if unused:
            names = [layer.name for layer in leaves(self._backbone) if layer.trainable_variables]
            raise ValueError(
                f"learning_rate_multipliers: expected patterns that match trainable layers of the backbone, {names}. "
                f"Received: {unused}, which match none, or only layers that an earlier pattern matches"
            )
        taken = {id(variable) for variables in found.values() for variable in variables}
        rest = [variable for variable in self._backbone.trainable_variables if id(variable) not in taken]
        groups = [(key, variables, own * self.multipliers[key]) for key, variables in found.items()]
        return [*groups, ("backbone", rest, own)]


def leaves(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """Returns the layers of a model and of the models nested in it; for any other layer, the layer itself."""
    parts = getattr(layer, "layers", None)
    if not parts:
        return [layer]
    return [leaf for part in parts for leaf in leaves(part)]


def _dense(gradient):
    # Keras 3's optimizers would square the entries of a sparse gradient before summing repeated ones.
    return tf.convert_to_tensor(gradient) if isinstance(gradient, tf.IndexedSlices) else gradient


def _norm(optimizer, gradients):
    scale = tf.cast(scale_loss(optimizer, tf.ones([])), tf.float32)
    present = [tf.cast(gradient, tf.float32) for gradient in gradients if gradient is not None]
    return tf.linalg.global_norm(present) / scale
