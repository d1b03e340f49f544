"""Batches of P classes x M images, with the classes drawn uniformly or by weight."""

import numbers

import numpy as np

from s2sd_tf.data.samplers.base import ClassSampler, Queue, images_by_class, register

# A class whose inclusion probability is this close to 1 is in every batch: what is left is then safely below 1, so that
# rounding cannot let systematic sampling meet a class twice.
_CERTAIN = 1.0 - 1e-12


@register("class_balanced")
class ClassBalanced(ClassSampler):
    """Batches of P classes x M images.

    No class comes twice in a batch, and no image but where `short_classes="repeat"` asks for it. The images of a class
    are taken from a shuffled list that is shuffled anew when it runs out: no image is seen a second time before all of
    its class have been seen once, but for what a batch border demands.

    By default the classes are taken in the same way, so all are seen equally often. For long tails, `class_power` or
    `class_weights` give the classes weights w. Each batch is then a draw of its own, by systematic sampling (Madow,
    Annals of Mathematical Statistics 20, 1949) over a random order of the classes, by which class c is in a batch with
    probability exactly min(1, P * w_c / sum(w)); what a class loses at 1 goes to the others in proportion
    (see `inclusion_probabilities`).

    Args:
        classes_per_batch, samples_per_class, short_classes: see `ClassSampler`.
        class_power: float a; w_c is the number of images of class c to the power of a. 0: uniform, 1: by frequency,
            0.5: by its square root; a negative one prefers the rare. One so far from 0 that fewer than P classes keep a
            weight beside the largest, in float64, is refused with the labels.
        class_weights: floats >= 0, w itself, one for each class from 0 to the highest label at least; more are for
            classes without images. Sums run over the classes that a batch may hold (see `short_classes`), and at least
            P of these need a weight > 0. Empty: by `class_power`.
    """

    def __init__(self, classes_per_batch, samples_per_class, short_classes="raise", class_power=0.0, class_weights=()):
        super().__init__(classes_per_batch, samples_per_class, short_classes)
        try:
            weights = np.asarray(class_weights, np.float64)
        except (TypeError, ValueError):
            weights = np.array(np.nan)
        if weights.ndim != 1 or not np.all(np.isfinite(weights) & (weights >= 0)):
            raise ValueError(f"class_weights: expected finite numbers >= 0, one a class. Received: {class_weights!r}")
        if isinstance(class_power, bool) or not isinstance(class_power, numbers.Real) or not np.isfinite(class_power):
            raise ValueError(f"class_power: expected a finite number. Received: {class_power!r}")
        if len(weights) and class_power:
            raise ValueError(
                f"class_power and class_weights: expected at most one of them. Received: class_power={class_power} "
                f"and {len(weights)} weights"
            )
        self.class_power = class_power
        self.class_weights = weights

    def check(self, labels):
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

    def draw(self, labels, steps, generator):
        classes = self.usable_classes(labels)
        choose = self._class_choice(classes, labels, generator)
        members = images_by_class(labels)
        queues = {c: Queue(members[c], generator) for c in classes}
        return np.stack(
            [np.concatenate([queues[c].take(self.samples_per_class) for c in choose()]) for _ in range(steps)]
        )

    def _class_choice(self, classes, labels, generator):
        """A function that returns the P classes of the next batch."""
        if not len(self.class_weights) and not self.class_power:
            queue = Queue(classes, generator)
            return lambda: queue.take(self.classes_per_batch)
        probabilities = inclusion_probabilities(self._weights(classes, labels), self.classes_per_batch)
        return lambda: classes[systematic_sample(probabilities, generator)]

    def _weights(self, classes, labels):
        """Weights float64 of some of the classes, up to a factor."""
        if len(self.class_weights):
            return self.class_weights[classes]
        counts = np.bincount(labels)[classes]
        # The largest weight is 1, whatever the power.
        return (counts / (counts.max() if self.class_power > 0 else counts.min())) ** self.class_power


def inclusion_probabilities(weights, count):
    """Probabilities `(n,)` with sum `count` of n items to be among `count` ones, in proportion to `weights`.

    p_i = min(1, f * w_i) with the f by which they add up to `count`.

    Args:
        weights: float64 `(n,)`, each >= 0 and at least `count` of them > 0.
        count: int >= 1.
    """
    probabilities = np.zeros(len(weights))
    free = np.arange(len(weights))
    while count:
        # By the largest of them, as huge weights would add up to infinity.
        rest = weights[free] / weights[free].max()
        probabilities[free] = count * rest / rest.sum()
        over = probabilities[free] >= _CERTAIN
        if not over.any():
            return probabilities
        probabilities[free[over]] = 1.0
        count -= np.count_nonzero(over)
        free = free[~over]
    probabilities[free] = 0.0
    return probabilities


def systematic_sample(probabilities, generator):
    """Distinct positions, as many as `probabilities` `(n,)` add up to, each i with probability `probabilities[i]`."""
    certain = probabilities >= _CERTAIN
    order = generator.permutation(np.flatnonzero(~certain))
    ends = np.cumsum(probabilities[order])
    count = round(probabilities.sum()) - np.count_nonzero(certain)
    # Points at distance 1 on a line on which every item has a stretch as long as its probability.
    points = generator.random() + np.arange(count)
    hit = np.searchsorted(ends[:-1], points, side="right")
    return generator.permutation(np.concatenate([np.flatnonzero(certain), order[hit]]))
