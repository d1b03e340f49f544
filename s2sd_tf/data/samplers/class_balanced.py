"""Batches of P classes x M images, with classes drawn uniformly or by weight."""

from collections.abc import Sequence

import numpy as np

from s2sd_tf.checks import check_bool, check_number
from s2sd_tf.data.samplers.base import ClassSampler, Queue, images_by_class, register

# A class with at least this inclusion probability is in every batch. The others are then safely below 1, so rounding
# cannot make systematic sampling draw a class twice.
_CERTAIN = 1.0 - 1e-12


@register("class_balanced")
class ClassBalanced(ClassSampler):
    """Batches of P classes x M images.

    No class is in a batch twice, and no image unless `short_classes="repeat"` requires it (but see `replacement`). The
    images of a class come from a list that is shuffled, and shuffled again when it runs out, so no image is seen again
    before all images of its class have been seen.

    By default the classes are drawn in the same way, so all are seen equally often. For long tails, `class_power` or
    `class_weights` give the classes weights w. Each batch is then drawn independently, by systematic sampling (Madow,
    Annals of Mathematical Statistics 20, 1949) over a random order of the classes. Class c is in a batch with
    probability exactly min(1, P * w_c / sum(w)); what is cut off at 1 goes to the other classes in proportion (see
    `inclusion_probabilities`).

    Args:
        classes_per_batch, samples_per_class, short_classes: see `ClassSampler`.
        class_power: float a; w_c is the number of images of class c to the power of a. 0 is uniform, 1 by frequency,
            0.5 by its square root; negative values prefer rare classes. `check` refuses a value so far from 0 that
            fewer than P weights, relative to the largest, are > 0 in float64.
        class_weights: floats >= 0, the weights w, at least one for each class from 0 to the highest label. Additional
            ones are for classes without images. Sums are over the classes that a batch may contain (see
            `short_classes`), and at least P of these need a weight > 0. Empty: `class_power` gives the weights.
        replacement: whether the P classes are drawn independently by their weights, and the M images of each
            independently and uniformly, as in the published code. A batch may then have a class or an image twice.
    """

    def __init__(
        self,
        classes_per_batch: int,
        samples_per_class: int,
        short_classes: str = "raise",
        class_power: float = 0.0,
        class_weights: Sequence[float] | np.ndarray = (),
        replacement: bool = False,
    ) -> None:
        super().__init__(classes_per_batch, samples_per_class, short_classes)
        try:
            weights = np.asarray(class_weights, np.float64)
        except (TypeError, ValueError):
            weights = np.array(np.nan)
        if weights.ndim != 1 or not np.all(np.isfinite(weights) & (weights >= 0)):
            raise ValueError(f"class_weights: expected finite numbers >= 0, one per class. Received: {class_weights!r}")
        check_number("class_power", class_power)
        if len(weights) and class_power:
            raise ValueError(
                f"class_power and class_weights: expected at most one of them. Received: class_power={class_power} "
                f"and {len(weights)} weights"
            )
        check_bool("replacement", replacement)
        self.class_power = class_power
        self.class_weights = weights
        self.replacement = replacement

    def check(self, labels: np.ndarray) -> None:
        super().check(labels)
        if len(self.class_weights) and len(self.class_weights) <= labels.max():
            raise ValueError(
                f"class_weights: expected at least {labels.max() + 1}, one for each class up to the highest label. "
                f"Received: {len(self.class_weights)}"
            )
        positive = np.count_nonzero(self._weights(self.usable_classes(labels), labels))
        if positive < self.classes_per_batch:
            name = "class_weights" if len(self.class_weights) else f"class_power {self.class_power}"
            raise ValueError(
                f"{name}: expected at least {self.classes_per_batch} classes with a weight > 0 (classes_per_batch). "
                f"Received: {positive}"
            )

    def draw(self, labels: np.ndarray, steps: int, generator: np.random.Generator) -> np.ndarray:
        classes = self.usable_classes(labels)
        members = images_by_class(labels)
        if self.replacement:
            weights = self._weights(classes, labels)
            chosen = generator.choice(classes, (steps, self.classes_per_batch), p=_shares(weights))
            return np.stack(
                [np.concatenate([generator.choice(members[c], self.samples_per_class) for c in row]) for row in chosen]
            )
        choose = self._class_choice(classes, labels, generator)
        queues = {c: Queue(members[c], generator) for c in classes}
        return np.stack(
            [np.concatenate([queues[c].take(self.samples_per_class) for c in choose()]) for _ in range(steps)]
        )

    def _class_choice(self, classes, labels, generator):
        """A function that draws the P classes of the next batch."""
        if not len(self.class_weights) and not self.class_power:
            queue = Queue(classes, generator)
            return lambda: queue.take(self.classes_per_batch)
        probabilities = inclusion_probabilities(self._weights(classes, labels), self.classes_per_batch)
        return lambda: classes[systematic_sample(probabilities, generator)]

    def _weights(self, classes, labels):
        """The weights of some classes up to a factor, float64."""
        if len(self.class_weights):
            return self.class_weights[classes]
        counts = np.bincount(labels)[classes]
        # The largest weight is 1, whatever the power.
        return (counts / (counts.max() if self.class_power > 0 else counts.min())) ** self.class_power


def inclusion_probabilities(weights: np.ndarray, count: int) -> np.ndarray:
    """The probabilities `(n,)` of n items to be among `count` drawn ones, in proportion to `weights`.

    p_i = min(1, f * w_i), with f such that the sum is `count`.

    Args:
        weights: float64 `(n,)`, each >= 0 and at least `count` of them > 0.
        count: int >= 1.
    """
    probabilities = np.zeros(len(weights))
    free = np.arange(len(weights))
    while count:
        probabilities[free] = count * _shares(weights[free])
        over = probabilities[free] >= _CERTAIN
        if not over.any():
            return probabilities
        probabilities[free[over]] = 1.0
        count -= int(np.count_nonzero(over))
        free = free[~over]
    probabilities[free] = 0.0
    return probabilities


def _shares(weights):
    """The weights divided by their sum."""
    # Divided by the largest one, because huge weights would add up to infinity.
    weights = weights / weights.max()
    return weights / weights.sum()


def systematic_sample(probabilities: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Draws distinct positions, position i with probability `probabilities[i]`.

    The number of positions is the sum of `probabilities` `(n,)`.
    """
    certain = probabilities >= _CERTAIN
    order = generator.permutation(np.flatnonzero(~certain))
    ends = np.cumsum(probabilities[order])
    count = round(probabilities.sum()) - np.count_nonzero(certain)
    # Points at distance 1 on a line, on which every item covers an interval as long as its probability.
    points = generator.random() + np.arange(count)
    hit = np.searchsorted(ends[:-1], points, side="right")
    return generator.permutation(np.concatenate([np.flatnonzero(certain), order[hit]]))
