"""SavedModels that need nothing of this package to be loaded."""

from s2sd_tf.export.encoder import export_encoder

__all__ = ["export_encoder"]
