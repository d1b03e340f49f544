"""Nearest neighbours, indexes and metrics on plain arrays, and a Keras callback."""

from s2sd_tf.evaluation.audit_classes import Confusions, SplitClass
from s2sd_tf.evaluation.audit_items import SimilarPairs
from s2sd_tf.evaluation.callback import RetrievalEvaluation
from s2sd_tf.evaluation.clustering import clustering_metrics
from s2sd_tf.evaluation.dataset_audit import Audit, audit
from s2sd_tf.evaluation.dimensions import metrics_by_dim
from s2sd_tf.evaluation.embeddings import EmbeddingShards, read_embeddings
from s2sd_tf.evaluation.expansion import expand
from s2sd_tf.evaluation.funnel_index import FunnelIndex
from s2sd_tf.evaluation.geometry import embedding_geometry
from s2sd_tf.evaluation.hierarchy import hierarchical_metrics
from s2sd_tf.evaluation.metrics import RetrievalResult, evaluate_retrieval, retrieval_metrics
from s2sd_tf.evaluation.multi_label import multi_label_metrics
from s2sd_tf.evaluation.neighbors import Neighbors
from s2sd_tf.evaluation.open_set import open_set_metrics
from s2sd_tf.evaluation.reranking import reranked_neighbors
from s2sd_tf.evaluation.scann_index import ScannIndex
from s2sd_tf.evaluation.search import build_index, find_neighbors, load_index
from s2sd_tf.evaluation.verification import VerificationResult, verification_metrics
from s2sd_tf.evaluation.whitening import Whitening

__all__ = [
    "Audit",
    "Confusions",
    "EmbeddingShards",
    "FunnelIndex",
    "Neighbors",
    "RetrievalEvaluation",
    "RetrievalResult",
    "ScannIndex",
    "SimilarPairs",
    "SplitClass",
    "VerificationResult",
    "Whitening",
    "audit",
    "build_index",
    "clustering_metrics",
    "embedding_geometry",
    "evaluate_retrieval",
    "expand",
    "find_neighbors",
    "hierarchical_metrics",
    "load_index",
    "metrics_by_dim",
    "multi_label_metrics",
    "open_set_metrics",
    "read_embeddings",
    "reranked_neighbors",
    "retrieval_metrics",
    "verification_metrics",
]
