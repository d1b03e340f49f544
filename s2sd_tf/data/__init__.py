"""Labelled images, retrieval data sets, class-disjoint splits, shards, batch samplers and preprocessing."""

from s2sd_tf.data import datasets, samplers
from s2sd_tf.data.augmentation import Augmentation
from s2sd_tf.data.batches import EpochBatches, class_balanced_batches, evaluation_batches, training_batches
from s2sd_tf.data.cars196 import load_cars196
from s2sd_tf.data.cub200 import load_cub200
from s2sd_tf.data.digits import load_digits
from s2sd_tf.data.exclude import exclude_images
from s2sd_tf.data.folder import load_folder
from s2sd_tf.data.image_folder import load_image_folder
from s2sd_tf.data.image_list import load_image_list, load_lists
from s2sd_tf.data.image_set import ImageSet, hold_out_classes, image_slices, split_classes, split_samples
from s2sd_tf.data.inshop import load_inshop
from s2sd_tf.data.omniglot import load_omniglot
from s2sd_tf.data.preprocessing import Preprocessing
from s2sd_tf.data.refresh import RefreshStorage
from s2sd_tf.data.retrieval_split import RetrievalSplit
from s2sd_tf.data.shards import read_shards, write_shards
from s2sd_tf.data.sop import load_sop
from s2sd_tf.data.tensorflow_datasets import load_tfds

__all__ = [
    "Augmentation",
    "EpochBatches",
    "ImageSet",
    "Preprocessing",
    "RefreshStorage",
    "RetrievalSplit",
    "class_balanced_batches",
    "datasets",
    "evaluation_batches",
    "exclude_images",
    "hold_out_classes",
    "image_slices",
    "load_cars196",
    "load_cub200",
    "load_digits",
    "load_folder",
    "load_image_folder",
    "load_image_list",
    "load_inshop",
    "load_lists",
    "load_omniglot",
    "load_sop",
    "load_tfds",
    "read_shards",
    "samplers",
    "split_classes",
    "split_samples",
    "training_batches",
    "write_shards",
]
