"""Batches: what a sampler chooses to train on, and images in order to evaluate on."""

import itertools
import weakref

import numpy as np
import tensorflow as tf

from s2sd_tf.checks import checked_int
from s2sd_tf.data.image_set import read_slice
from s2sd_tf.data.samplers import ClassBalanced, Sampler
from s2sd_tf.data.samplers.base import checked_labels

CACHE_BYTES = 512 * 2**20

# The tensors that datasets read images from, by `ImageSet`, while there is a dataset that does.
_sources = weakref.WeakValueDictionary()


class EpochBatches:
    """The batches that a sampler chooses, for a loop that knows which epoch it is in.

    An epoch is a function of `(seed, epoch)`, and of the stored embeddings where the sampler has any. So it can be
    resumed at any step: the batches from there on are what they would have been.

    Args:
        images: `ImageSet`; labels go out as they are in it.
        preprocessing: `Preprocessing`.
        sampler: `samplers.Sampler`.
        steps_per_epoch: int >= 1, batches an epoch. Default: `len(images) // sampler.batch_size`, about one look at
            every image.
        seed: int >= 0.
        cache: bool, keep all preprocessed images in memory. Default: where they take at most 512 MiB. Augmented images
            are made anew every time.
        augmentation: `Augmentation`, or None. Every image of an epoch gets its own, a function of `seed`, the epoch and
            the image's place in the epoch.

    Attributes:
        steps: int, batches an epoch.

    Raises:
        ValueError: a bad argument, labels that the sampler cannot draw a batch from, or a cache asked for together with
            an augmentation.

    Example:
        >>> batches = data.EpochBatches(train, preprocessing, sampler)
        >>> for epoch in range(50):
        ...     for images, labels in batches(epoch):
        ...         model.train_on_batch(images, labels)
    """

    def __init__(self, images, preprocessing, sampler, steps_per_epoch=None, seed=0, cache=None, augmentation=None):
        if not isinstance(sampler, Sampler):
            raise ValueError(f"sampler: expected a samplers.Sampler. Received: {sampler!r}")
        if steps_per_epoch is None:
            self.steps = max(1, len(images) // sampler.batch_size)
        else:
            self.steps = checked_int("steps_per_epoch", steps_per_epoch, 1)
        seed = checked_int("seed", seed, 0)
        if augmentation is not None and cache:
            raise ValueError("cache: expected none, as augmented images are made anew every time. Received: True")
        labels = checked_labels(images.labels)
        # Here, so that what cannot be drawn is refused at once and not by the first training step.
        sampler.check(labels)
        self._batch_size = sampler.batch_size
        self._draw = _drawing(sampler, labels, self.steps, seed)
        self._cached = self._load = None
        if augmentation is None and _is_cached(cache, images, preprocessing):
            with tf.device("CPU"):
                self._cached = tf.constant(_preprocess_all(images, preprocessing)), tf.constant(images.labels)
        else:
            self._load = _loader(images, preprocessing, augmentation, seed)
        # A graph, so that what reads the images is traced once and not for every epoch.
        self._dataset_of = tf.function(self._read_slices, reduce_retracing=True)

    def __call__(self, epoch, first_step=0, input_context=None):
        """A `tf.data.Dataset` of one epoch's batches.

        Args:
            epoch: int >= 0; where the sampler stores embeddings, the epoch that these were refreshed for.
            first_step: int >= 0, batches of the epoch that are left out.
            input_context: `tf.distribute.InputContext` that `strategy.distribute_datasets_from_function` hands over:
                the dataset is then of the parts of every batch that are the pipeline's replicas', one replica after the
                other, and reads no other images. Replica k of n has the k-th of n equal parts of a batch.

        Returns:
            Dataset of float32 images `(sampler.batch_size, height, width, channels)` and int32 labels
            `(sampler.batch_size,)`.

        Raises:
            ValueError: the stored embeddings are of another epoch, or the replicas cannot share a batch.
        """
        own, _ = _own_part(input_context, self._batch_size)
        drawn, chosen = self._draw(epoch)
        if drawn != epoch:
            raise ValueError(f"epoch: expected that of the stored embeddings, {drawn}. Received: {epoch}")
        with tf.device("CPU"):
            return self._dataset_of(*map(tf.constant, _rows(epoch, chosen, own, first_step)))

    def _read_slices(self, *rows):
        count, size = tf.shape(rows[0], tf.int64)[0], rows[0].shape[1]
        return self._read(tf.data.Dataset.from_tensor_slices(rows), size, count)

    def _read(self, rows, size, count):
        """The `count` batches of a dataset of what `_rows` returns."""
        if self._cached is not None:
            dataset = rows.map(lambda chosen, *_: tuple(tf.gather(values, chosen) for values in self._cached))
        else:
            dataset = _map(rows.unbatch(), self._load).batch(size, drop_remainder=True)
        return dataset.apply(tf.data.experimental.assert_cardinality(count)).prefetch(tf.data.AUTOTUNE)


def training_batches(
    images,
    preprocessing,
    sampler,
    steps_per_epoch=None,
    seed=0,
    start_epoch=0,
    cache=None,
    augmentation=None,
    input_context=None,
):
    """`EpochBatches` for `model.fit`: one `tf.data.Dataset`, every pass over which is the next epoch.

    The first pass is epoch `start_epoch`, the next one the epoch after, so that a run that is resumed at `start_epoch`
    gets the batches it would have got. Under a distribution strategy the replicas share out each batch; Keras 3 then
    takes one batch to build the model at every `fit`, which is a pass: all epochs after it get the batches of the next
    one.

    Where the sampler stores embeddings, a pass is of the epoch that they were last refreshed for, whatever passes there
    were (see `RefreshStorage`), and an epoch is a function of them too. An epoch's batches are drawn when its first one
    is asked for. So batches must not be read ahead across epochs, as by `.repeat().prefetch(...)`, or by `fit` with
    other `steps_per_epoch` than these: the next epoch would be drawn from the embeddings of the one before.

    Args:
        start_epoch: int >= 0, the epoch of the first pass. For a sampler with a storage it is `RefreshStorage` that
            has to know it.
        input_context: see `EpochBatches.__call__`.
        Others: see `EpochBatches`.

    Returns:
        Dataset of float32 images `(sampler.batch_size, height, width, channels)` and int32 labels
        `(sampler.batch_size,)`.

    Raises:
        ValueError: what `EpochBatches` raises.

    Example:
        >>> sampler = data.samplers.get("greedy_coreset", classes_per_batch=28, samples_per_class=4)
        >>> batches = data.training_batches(train, preprocessing, sampler)
        >>> model.fit(batches, epochs=50, callbacks=[data.RefreshStorage(sampler, train, preprocessing)])
    """
    batches = EpochBatches(images, preprocessing, sampler, steps_per_epoch, seed, cache, augmentation)
    own, size = _own_part(input_context, sampler.batch_size)
    # TensorFlow never lets go of `next_epoch`: it holds what it draws from, and not the images.
    epochs, draw = itertools.count(checked_int("start_epoch", start_epoch, 0)), batches._draw

    def next_epoch():
        return _rows(*draw(next(epochs)), own)

    def one_pass(_):
        rows = tf.numpy_function(next_epoch, [], [tf.int64] * 3)
        return tf.data.Dataset.from_tensor_slices(tuple(tf.ensure_shape(row, [None, size]) for row in rows))

    rows = tf.data.Dataset.range(1).flat_map(one_pass)
    return batches._read(rows, size, len(own(np.zeros([batches.steps, sampler.batch_size]))))


def class_balanced_batches(
    images,
    preprocessing,
    classes_per_batch,
    samples_per_class,
    steps_per_epoch=None,
    seed=0,
    start_epoch=0,
    cache=None,
    augmentation=None,
):
    """`training_batches` of the sampler "class_balanced": P classes x M samples a batch.

    Args:
        classes_per_batch, samples_per_class: P and M, int >= 1.
        Others: see `training_batches`.

    Raises:
        ValueError: fewer than P classes, or a class with fewer than M images.
    """
    sampler = ClassBalanced(classes_per_batch, samples_per_class)
    return training_batches(images, preprocessing, sampler, steps_per_epoch, seed, start_epoch, cache, augmentation)


def evaluation_batches(images, preprocessing, batch_size=256, cache=False):
    """A `tf.data.Dataset` of preprocessed images `(batch, height, width, channels)` in the order of the `ImageSet`.

    Args:
        images: `ImageSet`.
        preprocessing: `Preprocessing`.
        batch_size: int >= 1; the last batch may be smaller.
        cache: bool, keep the preprocessed images in memory after the first pass, for what is passed over again
            and again. None: where they take at most 512 MiB.
    """
    batch_size = checked_int("batch_size", batch_size, 1)
    indices = tf.data.Dataset.range(len(images))
    dataset = _map(indices, _loader(images, preprocessing)).map(lambda pixels, label: pixels).batch(batch_size)
    if _is_cached(cache, images, preprocessing):
        dataset = dataset.cache()
    return dataset.prefetch(tf.data.AUTOTUNE)


def batches_at(positions, images, preprocessing, batch_size=256):
    """A `tf.data.Dataset` of preprocessed images `(batch, height, width, channels)` at some positions.

    Args:
        positions: function of no arguments that returns int64 `(n,)`, positions in the `ImageSet`; asked at every pass.
        images, preprocessing, batch_size: see `evaluation_batches`.
    """

    def one_pass(_):
        return tf.data.Dataset.from_tensor_slices(tf.ensure_shape(tf.numpy_function(positions, [], tf.int64), [None]))

    dataset = _map(tf.data.Dataset.range(1).flat_map(one_pass), _loader(images, preprocessing))
    return dataset.map(lambda pixels, label: pixels).batch(batch_size).prefetch(tf.data.AUTOTUNE)


def _own_part(input_context, batch):
    """The function from `(steps, batch)` to `(steps * replicas, size)`, the parts of own replicas; and size."""
    if input_context is None:
        return lambda rows: rows, batch
    replicas, pipelines = input_context.num_replicas_in_sync, input_context.num_input_pipelines
    if batch % replicas:
        raise ValueError(f"sampler: expected a batch that {replicas} replicas can share. Received: {batch} images")
    size, count = batch // replicas, replicas // pipelines
    first = input_context.input_pipeline_id * count

    def own(rows):
        return rows.reshape(-1, replicas, size)[:, first : first + count].reshape(-1, size)

    return own, size


def _drawing(sampler, labels, steps, seed):
    """The function from an epoch to itself and its positions, int64 `(steps, batch)`; with a storage, to the epoch that
    was last refreshed.
    """

    def draw(epoch):
        if sampler.storage is None:
            return epoch, sampler.epoch(labels, steps, seed, epoch)
        # So that the epoch's number and the embeddings are of the same refresh.
        with sampler.storage.lock:
            epoch = sampler.storage.epoch
            return epoch, sampler.epoch(labels, steps, seed, epoch)

    return draw


def _rows(epoch, chosen, own, first_step=0):
    """The images' positions, their places in the epoch, and the epoch, each int64 `(batches, size)`."""
    places = np.arange(chosen.size).reshape(chosen.shape)
    chosen, places = own(chosen[first_step:]), own(places[first_step:])
    return chosen, places, np.full_like(places, epoch)


def _loader(images, preprocessing, augmentation=None, seed=0):
    """The function from a position to `(preprocessed image, label)`; to augment, from `(position, place, epoch)`."""
    source = _source(images)
    labels = tf.constant(images.labels)
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
        return tf.ensure_shape(image, preprocessing.output_shape), labels[index]

    return load


def _map(indices, load):
    return indices.map(load, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)


def _read_slice(source, index):
    # TensorFlow's own reading of records out of their order takes milliseconds each.
    arguments = [source[name][index] for name in ("path", "offset", "length")]
    return tf.ensure_shape(tf.numpy_function(read_slice, arguments, tf.string, stateful=False), [])


# An image, pixels or a string scalar, from the source and a position.
_READ = {
    "pixels": lambda source, index: source[index],
    "bytes": lambda source, index: source[index],
    "paths": lambda source, index: tf.io.read_file(source[index]),
    "slices": _read_slice,
}


def _source(images):
    """The images as a tensor, in which pixels and bytes are copied: the same one for all datasets of an `ImageSet`.

    Of slices, a dict of tensors.
    """
    # `tf.data` reads it there: a tensor on a GPU would be copied back.
    with tf.device("CPU"):
        if images.kind == "slices":
            return {name: tf.constant(images.images[name]) for name in images.images.dtype.names}
        source = _sources.get(images)
        if source is None:
            source = tf.constant(images.images if images.kind != "bytes" else images.images.tolist())
            _sources[images] = source
        return source


def _preprocess_all(images, preprocessing):
    return np.concatenate(list(evaluation_batches(images, preprocessing).as_numpy_iterator()))


def _is_cached(cache, images, preprocessing):
    return 4 * len(images) * int(np.prod(preprocessing.output_shape)) <= CACHE_BYTES if cache is None else cache
