"""s2sd_tf: image-retrieval embeddings in TensorFlow with simultaneous similarity-based self-distillation."""

from s2sd_tf import data, evaluation, export, losses, mining, models, objectives, serving
from s2sd_tf.distillation import similarity_kl
from s2sd_tf.losses import S2SDLoss
from s2sd_tf.models import S2SDModel, preset

__version__ = "0.1.0"
__all__ = [
    "S2SDLoss",
    "S2SDModel",
    "data",
    "evaluation",
    "export",
    "losses",
    "mining",
    "models",
    "objectives",
    "preset",
    "serving",
    "similarity_kl",
]
