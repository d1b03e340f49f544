"""Nearest neighbours, retrieval metrics, a Keras callback and pictures; all on plain arrays."""

from s2sd_tf.evaluation.callback import RetrievalEvaluation
from s2sd_tf.evaluation.metrics import retrieval_metrics
from s2sd_tf.evaluation.neighbors import Neighbors, find_neighbors

__all__ = ["Neighbors", "RetrievalEvaluation", "find_neighbors", "retrieval_metrics"]
