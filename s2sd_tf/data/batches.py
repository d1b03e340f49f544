"""Batches of images: drawn by a sampler for training, in order for evaluation."""

import itertools
import weakref
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from s2sd_tf.checks import checked_int
from s2sd_tf.data.augmentation import Augmentation
from s2sd_tf.data.image_files import naming_unreadable
from s2sd_tf.data.image_set import ImageSet, read_slice
from s2sd_tf.data.preprocessing import Preprocessing
from s2sd_tf.data.samplers import ClassBalanced, Sampler
from s2sd_tf.data.samplers.base import checked_labels
from s2sd_tf.labels import label_array
from s2sd_tf.process_settings import threads

CACHE_BYTES = 512 * 2**20
# Batches that are made while the model takes one.
_AHEAD = 2
# tf.data passes functions through AutoGraph by default, which takes seconds. Subclasses of `Preprocessing` and
# `Augmentation` have to do without it, too.
_unconverted = tf.autograph.experimental.do_not_convert

# The tensors that datasets read images from, by `ImageSet`, as long as a dataset uses them.
_sources: weakref.WeakValueDictionary[ImageSet, tf.Tensor] = weakref.WeakValueDictionary()


class EpochBatches:
    """Training batches drawn by a sampler, for a loop that passes the number of the epoch.

    An epoch depends only on `(seed, epoch)` and, if the sampler uses them, on the stored embeddings. So a resumed epoch
    gets the same batches from any step on.

    Args:
        images: the training images. The batches have the labels of this set.
        preprocessing: makes the model's input.
        sampler: draws the batches.
        steps_per_epoch: int >= 1, the number of batches per epoch. Default: `len(images) // sampler.batch_size`, about
            one look at every image.
        seed: int >= 0.
        cache: whether to keep all preprocessed images in memory. Default: if they take at most 512 MiB. Augmented
            images are never cached.
        augmentation: None, or the augmentation of the images. Its random numbers depend on `seed`, the epoch and the
            image's place in the epoch.
        labels: integers `(n,)` or `(n, k)`, the labels in the batches, such as `images.levels()`, for an objective with
            a `relevance`. Default: those of `images`, which the sampler goes by in any case.

    Attributes:
        steps: the number of batches per epoch.

    Raises:
        ValueError: a bad argument, labels that the sampler cannot draw a batch from, or `cache` together with an
            augmentation.

    Example:
        >>> batches = data.EpochBatches(train, preprocessing, sampler)
        >>> for epoch in range(50):
        ...     for images, labels in batches(epoch):
        ...         model.train_on_batch(images, labels)
    """

    def __init__(
        self,
        images: ImageSet,
        preprocessing: Preprocessing,
        sampler: Sampler,
        steps_per_epoch: int | None = None,
        seed: int = 0,
        cache: bool | None = None,
        augmentation: Augmentation | None = None,
        labels: np.ndarray | None = None,
    ) -> None:
        if not isinstance(sampler, Sampler):
            raise ValueError(f"sampler: expected a samplers.Sampler. Received: {sampler!r}")
        if steps_per_epoch is None:
            self.steps = max(1, len(images) // sampler.batch_size)
        else:
            self.steps = checked_int("steps_per_epoch", steps_per_epoch, 1)
        seed = checked_int("seed", seed, 0)
        if augmentation is not None and cache:
            raise ValueError(
                "cache: expected False or None, because augmented images differ every time. Received: True"
            )
        classes = checked_labels(images.labels)
        # Here, so that unsuitable labels are refused at once and not by the first training step.
        sampler.check(classes)
        if labels is None:
            labels = images.labels
        else:
            labels = label_array("labels", labels, columns=-1 if np.ndim(labels) == 2 else 0, rows=len(images))
        self._batch_size = sampler.batch_size
        self._draw = _drawing(sampler, classes, self.steps, seed)
        self._is_cached = augmentation is None and _is_cached(cache, images, preprocessing)
        if self._is_cached:
            load = _cached_loader(images, preprocessing)
        else:
            load = _loader(images, preprocessing, augmentation, seed)
        self._load = _with_labels(load, labels, images.teachers)
        # A graph, so that the reading of images is traced once and not for every epoch.
        self._dataset_of = tf.function(self._read_slices, reduce_retracing=True, autograph=False)

    def __call__(
        self, epoch: int, first_step: int = 0, input_context: tf.distribute.InputContext | None = None
    ) -> tf.data.Dataset:
        """Makes the dataset of one epoch's batches.

        Args:
            epoch: int >= 0. If the sampler stores embeddings, they must have been refreshed for this epoch.
            first_step: int >= 0, the number of batches to skip.
            input_context: passed by `strategy.distribute_datasets_from_function`. Replica k of n gets the k-th of n
                equal parts of a batch. The dataset then has only the parts of this pipeline's replicas, one replica
                after the other, and reads only their images.

        Returns:
            Dataset of float32 images `(sampler.batch_size, height, width, channels)` and int32 labels
            `(sampler.batch_size,)`, or those of `labels`. If the images have teachers, they are
            `{"labels": labels, "teachers": teachers}`.

        Raises:
            ValueError: the stored embeddings are for another epoch, or the batch size is not a multiple of the number
                of replicas.
        """
        own, _ = _own_part(input_context, self._batch_size)
        drawn, chosen = self._draw(epoch)
        if drawn != epoch:
            raise ValueError(f"epoch: expected the epoch of the stored embeddings, {drawn}. Received: {epoch}")
        with tf.device("CPU"):
            return self._dataset_of(*map(tf.constant, _rows(epoch, chosen, own, first_step)))

    def _read_slices(self, *rows):
        count, size = tf.shape(rows[0], tf.int64)[0], rows[0].shape[1]
        return self._read(tf.data.Dataset.from_tensor_slices(rows), size, count)

    def _read(self, rows, size, count):
        """Turns a dataset of the rows of `_rows` into `count` batches."""
        if self._is_cached:
            dataset = rows.map(_unconverted(self._load))
        else:
            dataset = _map(rows.unbatch(), self._load).batch(size, drop_remainder=True)
        return dataset.apply(tf.data.experimental.assert_cardinality(count)).prefetch(_AHEAD)


def training_batches(
    images: ImageSet,
    preprocessing: Preprocessing,
    sampler: Sampler,
    steps_per_epoch: int | None = None,
    seed: int = 0,
    start_epoch: int = 0,
    cache: bool | None = None,
    augmentation: Augmentation | None = None,
    input_context: tf.distribute.InputContext | None = None,
    labels: np.ndarray | None = None,
) -> tf.data.Dataset:
    """Makes a dataset of training batches for `model.fit`, in which every pass is the next epoch.

    The first pass is epoch `start_epoch`, so a run that is resumed at `start_epoch` gets the same batches. Under a
    distribution strategy the replicas share each batch. Keras 3 then takes one batch at every `fit` to build the model.
    That counts as a pass, so each epoch gets the batches of the next one.

    If the sampler stores embeddings, a pass is the epoch that they were last refreshed for, however many passes came
    before (see `RefreshStorage`), and its batches depend on them too. The batches of an epoch are drawn when the first
    one is requested. So batches must not be read ahead across epochs, as with `.repeat().prefetch(...)`, or in `fit`
    with another `steps_per_epoch` than here: the next epoch would be drawn from the embeddings of the one before.

    Args:
        start_epoch: int >= 0, the epoch of the first pass. For a sampler that stores embeddings, `RefreshStorage` needs
            it instead.
        input_context: see `EpochBatches.__call__`.
        Others: see `EpochBatches`.

    Returns:
        Dataset of batches, see `EpochBatches.__call__`.

    Raises:
        ValueError: see `EpochBatches`.

    Example:
        >>> sampler = data.samplers.get("greedy_coreset", classes_per_batch=28, samples_per_class=4)
        >>> batches = data.training_batches(train, preprocessing, sampler)
        >>> model.fit(batches, epochs=50, callbacks=[data.RefreshStorage(sampler, train, preprocessing)])
    """
    batches = EpochBatches(images, preprocessing, sampler, steps_per_epoch, seed, cache, augmentation, labels)
    own, size = _own_part(input_context, sampler.batch_size)
    # TensorFlow never frees `next_epoch`. So it holds what it draws from, but not the images.
    epochs, draw = itertools.count(checked_int("start_epoch", start_epoch, 0)), batches._draw

    def next_epoch(_):
        epoch, chosen = draw(next(epochs))
        return _rows(epoch, chosen, own)

    def one_pass(start):
        rows = _called(next_epoch, start, [tf.int64] * 3)
        return tf.data.Dataset.from_tensor_slices(tuple(tf.ensure_shape(row, [None, size]) for row in rows))

    rows = tf.data.Dataset.range(1).flat_map(_unconverted(one_pass))
    return batches._read(rows, size, len(own(np.zeros([batches.steps, sampler.batch_size]))))


def class_balanced_batches(
    images: ImageSet,
    preprocessing: Preprocessing,
    classes_per_batch: int,
    samples_per_class: int,
    steps_per_epoch: int | None = None,
    seed: int = 0,
    start_epoch: int = 0,
    cache: bool | None = None,
    augmentation: Augmentation | None = None,
    labels: np.ndarray | None = None,
    short_classes: str = "raise",
) -> tf.data.Dataset:
    """Makes `training_batches` with the sampler "class_balanced": P classes x M images per batch.

    Args:
        classes_per_batch, samples_per_class: P and M, int >= 1.
        short_classes: what to do with classes of fewer than M images, see `ClassSampler`.
        Others: see `training_batches`.

    Raises:
        ValueError: fewer than P classes; or, with "raise", a class with fewer than M images.
    """
    sampler = ClassBalanced(classes_per_batch, samples_per_class, short_classes)
    settings = steps_per_epoch, seed, start_epoch, cache, augmentation
    return training_batches(images, preprocessing, sampler, *settings, labels=labels)


def evaluation_batches(
    images: ImageSet, preprocessing: Preprocessing, batch_size: int = 256, cache: bool | None = False
) -> tf.data.Dataset:
    """Makes a dataset of preprocessed images `(batch, height, width, channels)`, in the order of `images`.

    Args:
        images: the images.
        preprocessing: makes the model's input.
        batch_size: int >= 1; the last batch may be smaller.
        cache: whether to keep the preprocessed images in memory after the first pass, for repeated passes. None: if
            they take at most 512 MiB.
    """
    batch_size = checked_int("batch_size", batch_size, 1)
    indices = tf.data.Dataset.range(len(images))
    dataset = _map(indices, _loader(images, preprocessing)).batch(batch_size)
    if _is_cached(cache, images, preprocessing):
        dataset = dataset.cache()
    return dataset.prefetch(_AHEAD)


def batches_at(
    positions: Callable[[], np.ndarray], images: ImageSet, preprocessing: Preprocessing, batch_size: int = 256
) -> tf.data.Dataset:
    """Makes a dataset of preprocessed images `(batch, height, width, channels)` at some positions.

    Args:
        positions: returns int64 `(n,)`, positions in `images`. Called at every pass.
        images, preprocessing, batch_size: see `evaluation_batches`.
    """

    def one_pass(start):
        rows = _called(lambda _: positions(), start, tf.int64)
        return tf.data.Dataset.from_tensor_slices(tf.ensure_shape(rows, [None]))

    dataset = _map(tf.data.Dataset.range(1).flat_map(_unconverted(one_pass)), _loader(images, preprocessing))
    return dataset.batch(batch_size).prefetch(_AHEAD)


def _own_part(input_context, batch):
    """`(own, size)`: a function that takes the parts of this pipeline's replicas out of batches `(steps, batch)`, as
    `(steps * replicas, size)`; and the size of a part.
    """
    if input_context is None:
        return lambda rows: rows, batch
    replicas, pipelines = input_context.num_replicas_in_sync, input_context.num_input_pipelines
    if batch % replicas:
        raise ValueError(
            f"sampler: expected a batch size that is a multiple of the {replicas} replicas. Received: {batch}"
        )
    size, count = batch // replicas, replicas // pipelines
    first = input_context.input_pipeline_id * count

    def own(rows):
        return rows.reshape(-1, replicas, size)[:, first : first + count].reshape(-1, size)

    return own, size


def _drawing(sampler, labels, steps, seed):
    """A function from an epoch to `(epoch, positions)`, where positions are int64 `(steps, batch)`. With a storage, the
    epoch is the one that the storage was last refreshed for.
    """

    def draw(epoch):
        if sampler.storage is None:
            return epoch, sampler.epoch(labels, steps, seed, epoch)
        # Locked, so that the epoch's number and the embeddings are from the same refresh.
        with sampler.storage.lock:
            epoch = sampler.storage.epoch
            return epoch, sampler.epoch(labels, steps, seed, epoch)

    return draw


def _rows(epoch, chosen, own, first_step=0):
    """The positions of the images, their places in the epoch, and the epoch: each int64 `(batches, size)`."""
    places = np.arange(chosen.size).reshape(chosen.shape)
    chosen, places = own(chosen[first_step:]), own(places[first_step:])
    return chosen, places, np.full_like(places, epoch)


def _loader(images, preprocessing, augmentation=None, seed=0):
    """A function from a position, or with an augmentation from `(position, place, epoch)`, to an image."""
    source = _source(images)
    convert = "from_pixels" if images.kind == "pixels" else "from_bytes"

    def load(index, *where):
        image = _READ[images.kind](source, index)
        if augmentation is not None:
            own_seed = [tf.constant(seed, tf.int64), 0]
            for number in reversed(where):
                own_seed = tf.random.experimental.stateless_fold_in(own_seed, number)
            image = getattr(augmentation, convert)(image, preprocessing, own_seed)
        else:
            image = getattr(preprocessing, convert)(image)
        return tf.ensure_shape(image, preprocessing.output_shape)

    return load


def _cached_loader(images, preprocessing):
    """A function from positions to images that are all in memory."""
    with tf.device("CPU"):
        cached = tf.constant(_preprocess_all(images, preprocessing))
    return lambda positions, *_: tf.gather(cached, positions)


def _with_labels(load, labels, teachers):
    """A function like `load`, from positions to images, that returns their labels, and the teachers' rows, too."""
    with tf.device("CPU"):
        labels, teachers = tf.constant(labels), tuple(map(tf.constant, teachers))
    values = {"labels": labels, "teachers": teachers} if teachers else labels

    def load_with_labels(positions, *where):
        chosen = tf.nest.map_structure(lambda rows: tf.gather(rows, positions), values)
        return load(positions, *where), chosen

    return load_with_labels


def _map(indices, load):
    # TensorFlow's own optimisations change nothing here, but take seconds at every start: they compare the graphs that
    # decode an image.
    options = tf.data.Options()
    options.experimental_optimization.apply_default_optimizations = False
    # Nor is the number of calls tuned: a pass then waited at its end, often half a second, until its tuner was done.
    options.autotune.enabled = False
    # Images take different times, and the next ones go on while the first is awaited.
    return indices.map(_unconverted(load), num_parallel_calls=2 * threads(), deterministic=True).with_options(options)


def _called(function, start, dtypes):
    """What a function of NumPy returns, called once for every pass, with the pass's first element `start`."""
    # Said to have no state: in deterministic runs tf.data would otherwise load one image at a time, and none ahead.
    return tf.numpy_function(function, [start], dtypes, stateful=False)


def _read_slice(source, index):
    # TensorFlow's own reading of records in random order takes milliseconds per record.
    arguments = [source[name][index] for name in ("path", "offset", "length")]
    return tf.ensure_shape(tf.numpy_function(read_slice, arguments, tf.string, stateful=False), [])


# Functions from the source and a position to an image: pixels, or a string scalar.
_READ = {
    "pixels": lambda source, index: source[index],
    "bytes": lambda source, index: source[index],
    "paths": lambda source, index: tf.io.read_file(source[index]),
    "slices": _read_slice,
}


def _source(images):
    """The images as a tensor, or for slices as a dict of tensors.

    Pixels and bytes are copied into the tensor. All datasets of an `ImageSet` share it.
    """
    # On the CPU, where `tf.data` reads it: a tensor on a GPU would be copied back.
    with tf.device("CPU"):
        if images.kind == "slices":
            return {name: tf.constant(images.images[name]) for name in images.images.dtype.names}
        source = _sources.get(images)
        if source is None:
            source = tf.constant(images.images if images.kind != "bytes" else images.images.tolist())
            _sources[images] = source
        return source


def _preprocess_all(images, preprocessing):
    with naming_unreadable(images):
        return np.concatenate(list(evaluation_batches(images, preprocessing).as_numpy_iterator()))


def _is_cached(cache, images, preprocessing):
    return 4 * len(images) * int(np.prod(preprocessing.output_shape)) <= CACHE_BYTES if cache is None else cache
