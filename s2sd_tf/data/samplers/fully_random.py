"""Batches of images of any class."""

import numpy as np

from s2sd_tf.checks import checked_int
from s2sd_tf.data.samplers.base import Queue, Sampler, register


@register("random")
class FullyRandom(Sampler):
    """Batches of a permutation of all images, whatever their classes, that is drawn anew when it runs out.

    No image comes twice in a batch, and none a second time in an epoch before all have come once, but for what a batch
    border demands.

    Args:
        batch_size: int >= 1.
    """

    def __init__(self, batch_size):
        self.batch_size = checked_int("batch_size", batch_size, 1)

    def check(self, labels):
        if len(labels) < self.batch_size:
            raise ValueError(f"batch_size: expected at most {len(labels)}, all images. Received: {self.batch_size}")

    def draw(self, labels, steps, generator):
        queue = Queue(np.arange(len(labels)), generator)
        return np.stack([queue.take(self.batch_size) for _ in range(steps)])
