"""Labelled images, class-disjoint splits, samplers of batches, and preprocessing."""

from s2sd_tf.data import samplers
from s2sd_tf.data.batches import class_balanced_batches, evaluation_batches, training_batches
from s2sd_tf.data.digits import load_digits
from s2sd_tf.data.image_folder import load_image_folder
from s2sd_tf.data.image_set import ImageSet, hold_out_classes, split_classes
from s2sd_tf.data.omniglot import load_omniglot
from s2sd_tf.data.preprocessing import Preprocessing
from s2sd_tf.data.refresh import RefreshStorage

__all__ = [
    "ImageSet",
    "Preprocessing",
    "RefreshStorage",
    "class_balanced_batches",
    "evaluation_batches",
    "hold_out_classes",
    "load_digits",
    "load_image_folder",
    "load_omniglot",
    "samplers",
    "split_classes",
    "training_batches",
]
