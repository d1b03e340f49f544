"""Batches that resemble the training images: the best of several by a statistic of the stored embeddings."""

from collections.abc import Callable

import numpy as np

from s2sd_tf.checks import checked_int
from s2sd_tf.data.samplers.base import register
from s2sd_tf.data.samplers.class_balanced import ClassBalanced
from s2sd_tf.data.samplers.storage import StorageSampler
from s2sd_tf.process_settings import one_thread

# The number of image pairs whose distances are computed at a time.
_BLOCK_PAIRS = 2**20


class MatchingSampler(StorageSampler):
    """Takes the best of `candidates` batches of stored images, each drawn as in `ClassBalanced` by default.

    The best batch is the one nearest to all stored images, by the `distance` of a subclass.

    Args:
        classes_per_batch, samples_per_class, short_classes, max_mib: see `StorageSampler`; P * M >= 2.
        candidates: int >= 1. With 1 the embeddings do not matter.
    """

    def __init__(
        self,
        classes_per_batch: int,
        samples_per_class: int,
        short_classes: str = "raise",
        candidates: int = 10,
        max_mib: float = 256.0,
    ) -> None:
        super().__init__(classes_per_batch, samples_per_class, short_classes, max_mib)
        if self.batch_size < 2:
            raise ValueError(f"{type(self).__name__}: expected batches of at least 2 images. Received: 1")
        self.candidates = checked_int("candidates", candidates, 1)

    def distance(self, embeddings: np.ndarray, generator: np.random.Generator) -> Callable[[np.ndarray], np.ndarray]:
        """Returns a function from batches `(k, batch, dim)` to their distances `(k,)` from `embeddings` `(n, dim)`."""
        raise NotImplementedError

    def draw(self, labels: np.ndarray, steps: int, generator: np.random.Generator) -> np.ndarray:
        positions, embeddings = self.stored(labels)
        drawn = ClassBalanced(self.classes_per_batch, self.samples_per_class, self.short_classes).draw(
            labels[positions], steps * self.candidates, generator
        )
        drawn = drawn.reshape(steps, self.candidates, self.batch_size)
        # The matrices of a batch are small: on a busy machine, threads make eigenvalues ten times slower.
        with one_thread():
            distance = self.distance(embeddings, generator)
            return positions[np.stack([batches[np.argmin(distance(embeddings[batches]))] for batches in drawn])]


@register("distance_matching")
class DistanceMatching(MatchingSampler):
    """Takes the batch with the distribution of pairwise distances most similar to a random part of the storage.

    The Euclidean distances of all pairs, of equal and of different classes, are counted in equal bins over [0, 2].
    Histograms are compared by their Wasserstein-1 distance, the area between the cumulative histograms. Based on the
    batch-matching samplers of Roth et al., "Revisiting training strategies and generalization performance in deep
    metric learning", ICML 2020.

    Args:
        bins: int >= 2, the number of bins.
        reference_images: int >= 2, the number of images in the random part, which is drawn once per epoch. Time grows
            with its square. Memory does not, because about a million distances are counted at a time.
        Others: see `MatchingSampler`.
    """

    def __init__(
        self,
        classes_per_batch: int,
        samples_per_class: int,
        short_classes: str = "raise",
        candidates: int = 10,
        bins: int = 50,
        reference_images: int = 2000,
        max_mib: float = 256.0,
    ) -> None:
        super().__init__(classes_per_batch, samples_per_class, short_classes, candidates, max_mib)
        self.bins = checked_int("bins", bins, 2)
        self.reference_images = checked_int("reference_images", reference_images, 2)

    def distance(self, embeddings: np.ndarray, generator: np.random.Generator) -> Callable[[np.ndarray], np.ndarray]:
        count = min(self.reference_images, len(embeddings))
        part = embeddings[generator.choice(len(embeddings), count, replace=False)]
        reference = cumulative_histograms(part[None], self.bins)
        width = 2.0 / self.bins
        return lambda batches: width * np.abs(cumulative_histograms(batches, self.bins) - reference).sum(axis=1)


@register("fid_matching")
class FidMatching(MatchingSampler):
    """Takes the batch whose Gaussian (mean and covariance) has the smallest Fréchet distance to the storage's.

    The distance is that of Heusel et al., "GANs trained by a two time-scale update rule converge to a local Nash
    equilibrium", NeurIPS 2017, in the embedding space of the trained model. Based on the batch-matching samplers of
    Roth et al., ICML 2020. Arguments: see `MatchingSampler`.
    """

    def distance(self, embeddings: np.ndarray, generator: np.random.Generator) -> Callable[[np.ndarray], np.ndarray]:
        mean, factor = gaussian(embeddings)
        return lambda batches: frechet_distances(batches, mean, factor)


def cumulative_histograms(batches: np.ndarray, bins: int) -> np.ndarray:
    """Cumulative histograms of the pairwise distances within each batch, as shares, float64 `(k, bins)`.

    Args:
        batches: float32 `(k, batch, dim)`, rows of norm 1. A batch of one image has no distances: all shares are 0.
        bins: int >= 1, equal bins over [0, 2].
    """
    count, images = batches.shape[:2]
    counts = np.zeros(bins * count, np.int64)
    rows = max(1, _BLOCK_PAIRS // (count * images))
    for start in range(0, images, rows):
        # Pairs of each of these images with the images after it.
        some, later = batches[:, start : start + rows], batches[:, start:]
        first, second = np.triu_indices(some.shape[1], 1, later.shape[1])
        cosines = np.matmul(some, later.transpose(0, 2, 1))[:, first, second]
        distances = np.sqrt(np.maximum(2.0 - 2.0 * cosines, 0.0))
        cells = np.minimum((distances * (bins / 2.0)).astype(np.int64), bins - 1)
        cells += bins * np.arange(count)[:, None]
        counts += np.bincount(cells.ravel(), minlength=bins * count)
    return np.cumsum(counts.reshape(count, bins), axis=1) / max(1, images * (images - 1) // 2)


def gaussian(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fits a Gaussian to points `(n, dim)`.

    Returns:
        `(mean, factor)`: float64 `(dim,)` and `(dim, rank)`, where factor @ factor.T is the covariance.
    """
    mean = points.mean(axis=0, dtype=np.float64)
    covariance = np.zeros((len(mean), len(mean)))
    for start in range(0, len(points), 4096):
        block = points[start : start + 4096] - mean
        covariance += block.T @ block
    covariance /= max(1, len(points) - 1)
    values, vectors = np.linalg.eigh(covariance)
    kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
    return mean, vectors[:, kept] * np.sqrt(values[kept])


def frechet_distances(batches: np.ndarray, mean: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Squared Fréchet distances of batches to a Gaussian, float64 `(k,)`.

    The distance is |m - mean|^2 + tr S + tr C - 2 tr (S C)^(1/2), where m and S are the mean and covariance of a batch
    and C is the Gaussian's covariance. Let A be the centred rows, so S = A^T A / (batch - 1), and F F^T = C. Then the
    non-zero eigenvalues of S C are those of (A F)(A F)^T / (batch - 1). So the last trace is the sum of the singular
    values of A F / sqrt(batch - 1), and no square root of a dim x dim matrix is needed.

    Args:
        batches: `(k, batch, dim)`, batch >= 2.
        mean, factor: see `gaussian`.
    """
    means = batches.mean(axis=1, keepdims=True, dtype=np.float64)
    centred = batches - means
    product = centred @ factor
    flipped = product.transpose(0, 2, 1)
    gram = product @ flipped if product.shape[1] <= product.shape[2] else flipped @ product
    degrees = batches.shape[1] - 1
    # Eigenvalues of the smaller Gram matrix, in float64, are several times faster than singular values.
    roots = np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0.0)).sum(axis=1) / np.sqrt(degrees)
    traces = np.square(centred).sum(axis=(1, 2)) / degrees + np.square(factor).sum()
    return np.square(means[:, 0] - mean).sum(axis=1) + traces - 2.0 * roots
