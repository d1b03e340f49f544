"""Exports SavedModels that load without this package, and loads models without running code from them."""

from s2sd_tf.export.encoder import export_encoder
from s2sd_tf.export.model_file import load_model
from s2sd_tf.export.retrieval import export_retrieval, load_retrieval

__all__ = ["export_encoder", "export_retrieval", "load_model", "load_retrieval"]
