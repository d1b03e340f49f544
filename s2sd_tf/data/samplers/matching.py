"""Batches that look like the whole: the best of several by a statistic of the stored embeddings."""

import threading

import numpy as np
from threadpoolctl import threadpool_limits

from s2sd_tf.checks import checked_int
from s2sd_tf.data.samplers.base import register
from s2sd_tf.data.samplers.class_balanced import ClassBalanced
from s2sd_tf.data.samplers.storage import StorageSampler

# A limit of BLAS's threads is one for the process, and the one before is put back at its end: no two may overlap.
_blas_lock = threading.Lock()
# Pairs of images whose distances are computed at a time.
_BLOCK_PAIRS = 2**20


class MatchingSampler(StorageSampler):
    """The best of `candidates` batches of stored images, each drawn as `ClassBalanced` does by default: the one that is
    nearest to all of the storage, as a subclass measures it.

    Args:
        classes_per_batch, samples_per_class, short_classes, max_mib: see `StorageSampler`; P * M >= 2.
        candidates: int >= 1. With 1 the embeddings have no say.
    """

    def __init__(self, classes_per_batch, samples_per_class, short_classes="raise", candidates=10, max_mib=256.0):
        super().__init__(classes_per_batch, samples_per_class, short_classes, max_mib)
        if self.batch_size < 2:
            raise ValueError(f"{type(self).__name__}: expected batches of at least 2 images. Received: 1")
        self.candidates = checked_int("candidates", candidates, 1)

    def distance(self, embeddings, generator):
        """A function from batches `(k, batch, dim)` to how far each is from `embeddings` `(n, dim)`, float `(k,)`."""
        raise NotImplementedError

    def draw(self, labels, steps, generator):
        positions, embeddings = self.stored(labels)
        drawn = ClassBalanced(self.classes_per_batch, self.samples_per_class, self.short_classes).draw(
            labels[positions], steps * self.candidates, generator
        )
        drawn = drawn.reshape(steps, self.candidates, self.batch_size)
        # The matrices of a batch are small: on a busy machine, threads make their eigenvalues ten times slower.
        with _blas_lock, threadpool_limits(1, "blas"):
            distance = self.distance(embeddings, generator)
            return positions[np.stack([batches[np.argmin(distance(embeddings[batches]))] for batches in drawn])]


@register("distance_matching")
class DistanceMatching(MatchingSampler):
    """The batch whose distances between images are distributed most like those of a random part of the storage.

    The Euclidean distances of all pairs, of equal and of different classes, are counted in equal bins over [0, 2]; two
    histograms are as far apart as their Wasserstein-1 distance, the area between the cumulative ones. After the
    batch-matching samplers of Roth et al., "Revisiting training strategies and generalization performance in deep
    metric learning", ICML 2020.

    Args:
        bins: int >= 2.
        reference_images: int >= 2, images of the random part, which is drawn once an epoch. Time grows with its square;
            memory does not, as the distances are counted about a million at a time.
        Others: see `MatchingSampler`.
    """

    def __init__(
        self,
        classes_per_batch,
        samples_per_class,
        short_classes="raise",
        candidates=10,
        bins=50,
        reference_images=2000,
        max_mib=256.0,
    ):
        super().__init__(classes_per_batch, samples_per_class, short_classes, candidates, max_mib)
        self.bins = checked_int("bins", bins, 2)
        self.reference_images = checked_int("reference_images", reference_images, 2)

    def distance(self, embeddings, generator):
        count = min(self.reference_images, len(embeddings))
        part = embeddings[generator.choice(len(embeddings), count, replace=False)]
        reference = cumulative_histograms(part[None], self.bins)
        width = 2.0 / self.bins
        return lambda batches: width * np.abs(cumulative_histograms(batches, self.bins) - reference).sum(axis=1)


@register("fid_matching")
class FidMatching(MatchingSampler):
    """The batch with the smallest Fréchet distance between Gaussians to the storage, by mean and covariance.

    Heusel et al., "GANs trained by a two time-scale update rule converge to a local Nash equilibrium", NeurIPS 2017; in
    the embedding space of the model that is trained. After the batch-matching samplers of Roth et al., ICML 2020.
    Arguments: see `MatchingSampler`.
    """

    def distance(self, embeddings, generator):
        mean, factor = gaussian(embeddings)
        return lambda batches: frechet_distances(batches, mean, factor)


def cumulative_histograms(batches, bins):
    """Shares of the distances within each batch that lie in the bins up to each one, float64 `(k, bins)`.

    Args:
        batches: float32 `(k, batch, dim)`, rows of norm 1. One image has no distances: all shares are 0.
        bins: int >= 1, equal bins over [0, 2].
    """
    count, images = batches.shape[:2]
    counts = np.zeros(bins * count, np.int64)
    rows = max(1, _BLOCK_PAIRS // (count * images))
    for start in range(0, images, rows):
        # Each of some images with those after it.
        some, later = batches[:, start : start + rows], batches[:, start:]
        first, second = np.triu_indices(some.shape[1], 1, later.shape[1])
        cosines = np.matmul(some, later.transpose(0, 2, 1))[:, first, second]
        distances = np.sqrt(np.maximum(2.0 - 2.0 * cosines, 0.0))
        cells = np.minimum((distances * (bins / 2.0)).astype(np.int64), bins - 1)
        cells += bins * np.arange(count)[:, None]
        counts += np.bincount(cells.ravel(), minlength=bins * count)
    return np.cumsum(counts.reshape(count, bins), axis=1) / max(1, images * (images - 1) // 2)


def gaussian(points):
    """`(mean, factor)` of points `(n, dim)`: float64 `(dim,)` and `(dim, rank)`, factor @ factor.T their covariance."""
    mean = points.mean(axis=0, dtype=np.float64)
    covariance = np.zeros((len(mean), len(mean)))
    for start in range(0, len(points), 4096):
        block = points[start : start + 4096] - mean
        covariance += block.T @ block
    covariance /= max(1, len(points) - 1)
    values, vectors = np.linalg.eigh(covariance)
    kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
    return mean, vectors[:, kept] * np.sqrt(values[kept])


def frechet_distances(batches, mean, factor):
    """Squared Fréchet distances of batches to a Gaussian, float64 `(k,)`.

    |m - mean|^2 + tr S + tr C - 2 tr (S C)^(1/2), where m and S are mean and covariance of a batch and C is the
    Gaussian's. With centred rows A, S = A^T A / (batch - 1), and F F^T = C, the eigenvalues of S C that are not 0 are
    those of (A F)(A F)^T / (batch - 1): the last trace is the sum of the singular values of A F / sqrt(batch - 1), and
    no square root of a dim x dim matrix is needed.

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
    # By eigenvalues of the smaller Gram matrix, in float64: several times faster than singular values.
    roots = np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0.0)).sum(axis=1) / np.sqrt(degrees)
    traces = np.square(centred).sum(axis=(1, 2)) / degrees + np.square(factor).sum()
    return np.square(means[:, 0] - mean).sum(axis=1) + traces - 2.0 * roots
