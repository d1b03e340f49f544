"""Labelled images, class-disjoint splits, batches of P classes x M samples, and preprocessing."""

from s2sd_tf.data.batches import class_balanced_batches, class_balanced_indices, evaluation_batches
from s2sd_tf.data.digits import load_digits
from s2sd_tf.data.image_folder import load_image_folder
from s2sd_tf.data.image_set import ImageSet, hold_out_classes, split_classes
from s2sd_tf.data.omniglot import load_omniglot
from s2sd_tf.data.preprocessing import Preprocessing

__all__ = [
    "ImageSet",
    "Preprocessing",
    "class_balanced_batches",
    "class_balanced_indices",
    "evaluation_batches",
    "hold_out_classes",
    "load_digits",
    "load_image_folder",
    "load_omniglot",
    "split_classes",
]
