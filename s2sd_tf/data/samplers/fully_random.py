"""Batches of random images, whatever their classes."""

import numpy as np

from s2sd_tf.checks import checked_int
from s2sd_tf.data.samplers.base import Queue, Sampler, register


@register("random")
class FullyRandom(Sampler):
    """Batches from a permutation of all images, whatever their classes, with a new permutation when it runs out.

    No image is in a batch twice, and none is seen again in an epoch before all have been seen.

    Args:
        batch_size: int >= 1.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = checked_int("batch_size", batch_size, 1)

    def check(self, labels: np.ndarray) -> None:
        if len(labels) < self.batch_size:
            raise ValueError(
                f"batch_size: expected at most {len(labels)}, the number of images. Received: {self.batch_size}"
            )

    def draw(self, labels: np.ndarray, steps: int, generator: np.random.Generator) -> np.ndarray:
        queue = Queue(np.arange(len(labels)), generator)
        return np.stack([queue.take(self.batch_size) for _ in range(steps)])
