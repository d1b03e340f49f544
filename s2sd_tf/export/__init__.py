"""SavedModels that need nothing of this package to be loaded."""

from s2sd_tf.export.encoder import export_encoder
from s2sd_tf.export.retrieval import export_retrieval, load_retrieval

__all__ = ["export_encoder", "export_retrieval", "load_retrieval"]
