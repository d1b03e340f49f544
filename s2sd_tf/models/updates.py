"""From gradients to new weights: coupled L2, sums over replicas, and factors on the updates of groups of weights."""

import fnmatch
import types

import tensorflow as tf

from s2sd_tf.checks import check_at_least
from s2sd_tf.keras_compat import apply_gradients, apply_summed_gradients, scale_loss, sums_gradients_too_late
from s2sd_tf.losses import replicas

GROUPS = ("backbone", "heads", "objectives")
# How the key of a factor begins that goes on with a pattern of layer names.
_LAYERS = "backbone/"


class Updates:
    """How the weights of a model change in a step, around any Keras optimizer.

    Args:
        backbone: `keras.Model`.
        heads: layers of the group "heads".
        decayed: those of them whose weights L2 is for, beside the backbone's.
        objectives: `objectives.Objective`s; each has a `learning_rate_multiplier` of its own on top.
        l2: float >= 0, see `S2SDModel`.
        multipliers: dict, the `learning_rate_multipliers` of `S2SDModel`.

    Attributes:
        l2, multipliers: as given; groups that were not named have the factor 1.

    Raises:
        ValueError: a bad argument; the message names it.
    """

    def __init__(self, backbone, heads, decayed, objectives, l2, multipliers):
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

    def groups(self):
        """`(key, trainable variables, factor)` of every group; each objective and each pattern of layer names is one.

        Raises:
            ValueError: a pattern that no layer of the backbone that trains matches.
        """
        found = self._backbone_groups()
        for head in self._heads:
            found.append(("heads", head.trainable_variables, self.multipliers["heads"]))
        for objective in self._objectives:
            factor = self.multipliers["objectives"] * objective.learning_rate_multiplier
            found.append(("objectives", objective.trainable_variables, factor))
        return found

    def loss_to_differentiate(self, optimizer, loss, regularizers):
        """The scalar whose gradient `apply` wants: `loss` with the L2 and the model's own `regularizers`, scaled as the
        optimizer wants it."""
        for term in regularizers:
            loss += tf.cast(term, loss.dtype)
        if self.l2:
            for layer in (self._backbone, *self._decayed):
                for variable in layer.trainable_variables:
                    loss += self.l2 * tf.cast(tf.nn.l2_loss(tf.convert_to_tensor(variable)), loss.dtype)
        # Keras sums the gradients of the replicas of a distribution strategy.
        return scale_loss(optimizer, loss / tf.cast(replicas.count(), loss.dtype))

    def apply(self, optimizer, gradients, variables, norm=False):
        """Takes the step of `optimizer`.

        Args:
            optimizer: Keras optimizer.
            gradients: those of `loss_to_differentiate`, in the order of `variables`.
            variables: list of the trainable variables.
            norm: bool, whether the norm of the gradients is wanted.

        Returns:
            The norm of the gradients of all replicas, a scalar tensor, or None.
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

    def _backbone_groups(self):
        patterns = [key for key in self.multipliers if key.startswith(_LAYERS)]
        own = self.multipliers["backbone"]
        found = {key: [] for key in patterns}
        for layer in dict.fromkeys(leaves(self._backbone)) if patterns else ():
            match = [key for key in patterns if fnmatch.fnmatchcase(layer.name, key[len(_LAYERS) :])][:1]
            for key in match:
                found[key] += layer.trainable_variables
        unused = [key for key, variables in found.items() if not variables]
        if unused:
            names = [layer.name for layer in leaves(self._backbone) if layer.trainable_variables]
            raise ValueError(
                f"learning_rate_multipliers: expected patterns of names of layers that train, out of {names}. "
                f"Received: {unused}, which match none, or only what others match before them"
            )
        taken = {id(variable) for variables in found.values() for variable in variables}
        rest = [variable for variable in self._backbone.trainable_variables if id(variable) not in taken]
        groups = [(key, variables, own * self.multipliers[key]) for key, variables in found.items()]
        return [*groups, ("backbone", rest, own)]


def leaves(layer):
    """The layers that a model is made of, and those of models in it."""
    parts = getattr(layer, "layers", None)
    if not parts:
        return [layer]
    return [leaf for part in parts for leaf in leaves(part)]


def _dense(gradient):
    # Keras 3's optimizers square the entries of a sparse gradient before they add up repeated ones.
    return tf.convert_to_tensor(gradient) if isinstance(gradient, tf.IndexedSlices) else gradient


def _norm(optimizer, gradients):
    scale = tf.cast(scale_loss(optimizer, tf.ones([])), tf.float32)
    present = [tf.cast(gradient, tf.float32) for gradient in gradients if gradient is not None]
    return tf.linalg.global_norm(present) / scale
