"""PCA and whitening of embeddings, fitted on training embeddings."""

import numpy as np
import tensorflow as tf
from sklearn.decomposition import PCA

from s2sd_tf.checks import checked_int
from s2sd_tf.evaluation.embeddings import Rows
from s2sd_tf.evaluation.rows import checked_rows, normalized


class Whitening:
    """Whitening: an affine map after which the dimensions of the training embeddings are uncorrelated, of variance 1.

    Afterwards rows are scaled to unit length. Dimensions in which many unrelated items agree count less then (Jégou and
    Chum, "Negative evidences and co-occurences in image retrieval", ECCV 2012).

    Attributes:
        mean: of the training embeddings, float32 `(dim,)`.
        matrix: float32 `(dim, whitened_dim)`. `(rows - mean) @ matrix` is white.
    """

    def __init__(self, mean: np.ndarray, matrix: np.ndarray) -> None:
        self.mean = np.asarray(mean, np.float32)
        self.matrix = np.asarray(matrix, np.float32)

    @classmethod
    def fit(cls, embeddings: Rows | tf.Tensor, dim: int | None = None) -> "Whitening":
        """Fits the map to the embeddings of training images, which are first scaled to unit length.

        Args:
            embeddings: float rows `(n, embedding_dim)`, n > dim.
            dim: number of principal components to keep; None: all in which the embeddings vary.

        Raises:
            ValueError: a bad argument, or the embeddings do not vary in so many dimensions.
        """
        rows = normalized(np.asarray(checked_rows("embeddings", embeddings)[:]))
        if len(rows) < 2:
            raise ValueError(f"embeddings: expected at least 2 rows. Received: {len(rows)}")
        with np.errstate(invalid="ignore"):  # rows that are all equal
            pca = PCA(svd_solver="full").fit(rows.astype(np.float64))
        scales = np.sqrt(pca.explained_variance_)
        most = int(np.sum(scales > 1e-6 * max(scales[0], 1e-6)))
        dim = most if dim is None else checked_int("dim", dim, 1)
        if dim > most or not most:
            raise ValueError(f"dim: expected at most {most}, as the embeddings vary in no more. Received: {dim}")
        return cls(pca.mean_, pca.components_[:dim].T / scales[:dim])

    def __call__(self, embeddings: Rows | tf.Tensor) -> np.ndarray:
        """Returns whitened unit rows, float32 `(n, whitened_dim)`.

        Raises:
            ValueError: embeddings of another dimension.
        """
        rows = np.asarray(checked_rows("embeddings", embeddings)[:])
        if rows.shape[1] != len(self.mean):
            raise ValueError(f"embeddings: expected dimension {len(self.mean)}. Received: {rows.shape[1]}")
        return normalized((normalized(rows) - self.mean) @ self.matrix)

    def in_graph(self, embeddings: tf.Tensor) -> tf.Tensor:
        """The same for a float32 tensor `(n, dim)`, in operations that every export format has."""
        moved = (tf.math.l2_normalize(embeddings, axis=-1) - self.mean) @ self.matrix
        return tf.math.l2_normalize(moved, axis=-1)
