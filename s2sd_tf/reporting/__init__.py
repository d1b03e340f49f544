"""Output for people: HTML reports of evaluations and audits, pictures, and files for TensorBoard's projector."""

from s2sd_tf.reporting.audit_files import save_audit
from s2sd_tf.reporting.embedded_images import EmbeddedImages
from s2sd_tf.reporting.pictures import choose_queries, save_curves, save_figure, save_gallery, save_matches, thumbnail
from s2sd_tf.reporting.projector import save_projector
from s2sd_tf.reporting.report import save_report

__all__ = [
    "EmbeddedImages",
    "choose_queries",
    "save_audit",
    "save_curves",
    "save_figure",
    "save_gallery",
    "save_matches",
    "save_projector",
    "save_report",
    "thumbnail",
]
