"""s2sd_tf: image-retrieval embeddings in TensorFlow with simultaneous similarity-based self-distillation."""

import os
import sys

from s2sd_tf.cli import help as _help

_program = _help.program(sys.orig_argv)
if _program:
    # TensorFlow's start-up lines; its errors also raise exceptions.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# `s2sd-train --help` answers at once: importing TensorFlow takes seconds.
if not (_program and _help.answers(sys.orig_argv)):
    from s2sd_tf import data, evaluation, export, losses, mining, models, objectives, serving
    from s2sd_tf.distillation import similarity_kl
    from s2sd_tf.losses import S2SDLoss
    from s2sd_tf.models import S2SDModel, preset
    from s2sd_tf.truncation import truncate

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
    "truncate",
]
