"""Batches: P classes x M samples to train on, and images in order to evaluate on."""

import itertools

import numpy as np
import tensorflow as tf

CACHE_BYTES = 512 * 2**20


def class_balanced_indices(labels, classes_per_batch, samples_per_class, steps, seed, epoch):
    """Image positions of one epoch of P x M batches, int64 `(steps, P * M)`.

    No class comes twice in a batch and no image twice. Classes are taken from a shuffled list that is shuffled anew
    when it runs out, and so are the images of each class: nothing is seen a second time before all has been seen once,
    but for what a batch boundary demands. The result is a function of the arguments alone.

    Raises:
        ValueError: fewer than P classes, or a class with fewer than M images.
    """
    counts = np.bincount(labels)
    present = np.flatnonzero(counts)
    if classes_per_batch < 1 or samples_per_class < 1:
        raise ValueError(
            "class_balanced_indices: expected classes_per_batch >= 1 and samples_per_class >= 1. "
            f"Received: {classes_per_batch} and {samples_per_class}"
        )
    if len(present) < classes_per_batch:
        raise ValueError(f"classes_per_batch: expected at most {len(present)} classes. Received: {classes_per_batch}")
    short = present[counts[present] < samples_per_class]
    if len(short):
        raise ValueError(
            f"samples_per_class: expected at least {samples_per_class} images in every class. Received: "
            + ", ".join(f"class {c} with {counts[c]}" for c in short[:10])
            + (f" and {len(short) - 10} classes more" if len(short) > 10 else "")
        )
    generator = np.random.default_rng([seed, epoch])
    members = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
    class_queue = _Queue(present, generator)
    image_queues = {c: _Queue(members[c], generator) for c in present}
    batches = [
        np.concatenate([image_queues[c].take(samples_per_class) for c in class_queue.take(classes_per_batch)])
        for _ in range(steps)
    ]
    return np.stack(batches).astype(np.int64)


class _Queue:
    """Endless draws from `items`, all different within one `take`, each pass a new permutation."""

    def __init__(self, items, generator):
        self._items = np.asarray(items)
        self._generator = generator
        self._waiting = generator.permutation(self._items)

    def take(self, count):
        if len(self._waiting) < count:
            # What is left over goes out first; the next pass begins with others, so that none is taken twice.
            rest = self._waiting
            new = self._generator.permutation(self._items)
            again = np.isin(new, rest)
            self._waiting = np.concatenate([rest, new[~again], new[again]])
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        return taken


def class_balanced_batches(
    images,
    preprocessing,
    classes_per_batch,
    samples_per_class,
    steps_per_epoch=None,
    seed=0,
    start_epoch=0,
    cache=None,
):
    """A `tf.data.Dataset` of `(images, labels)` with P classes x M samples a batch, for `model.fit`.

    Every pass over it is an epoch with batches of its own, as after a reshuffle: the first pass is epoch `start_epoch`,
    the next one the epoch after. An epoch is a function of `(seed, epoch)`, so that a run that goes on at `start_epoch`
    gets the batches it would have got.

    Args:
        images: `ImageSet`; labels go out as they are in it.
        preprocessing: `Preprocessing`.
        classes_per_batch, samples_per_class: P and M, int >= 1.
        steps_per_epoch: int >= 1, batches an epoch. Default: `len(images) // (P * M)`, about one look at every image.
        seed: int >= 0.
        start_epoch: int >= 0, the epoch of the first pass.
        cache: bool, keep all preprocessed images in memory. Default: where they take at most 512 MiB.

    Returns:
        Dataset of float32 images `(P * M, height, width, channels)` and int32 labels `(P * M,)`.

    Raises:
        ValueError: see `class_balanced_indices`.
    """
    batch = classes_per_batch * samples_per_class
    steps = steps_per_epoch or max(1, len(images) // max(batch, 1))
    labels = np.asarray(images.labels)
    # Drawn once here so that what cannot be drawn is told at once and not by the first training step.
    class_balanced_indices(labels, classes_per_batch, samples_per_class, 1, seed, start_epoch)

    epochs = itertools.count(start_epoch)

    def next_epoch():
        return class_balanced_indices(labels, classes_per_batch, samples_per_class, steps, seed, next(epochs))

    def one_pass(_):
        indices = tf.numpy_function(next_epoch, [], tf.int64)
        return tf.data.Dataset.from_tensor_slices(tf.ensure_shape(indices, [steps, batch]))

    dataset = tf.data.Dataset.range(1).flat_map(one_pass)
    if _is_cached(cache, images, preprocessing):
        pixels = tf.constant(_preprocess_all(images, preprocessing))
        known = tf.constant(labels)
        dataset = dataset.map(lambda chosen: (tf.gather(pixels, chosen), tf.gather(known, chosen)))
    else:
        dataset = _load(dataset.unbatch(), images, preprocessing).batch(batch, drop_remainder=True)
    dataset = dataset.apply(tf.data.experimental.assert_cardinality(steps))
    return dataset.prefetch(tf.data.AUTOTUNE)


def evaluation_batches(images, preprocessing, batch_size=256, cache=False):
    """A `tf.data.Dataset` of preprocessed images `(batch, height, width, channels)` in the order of the `ImageSet`.

    Args:
        images: `ImageSet`.
        preprocessing: `Preprocessing`.
        batch_size: int >= 1; the last batch may be smaller.
        cache: bool, keep the preprocessed images in memory after the first pass, for what is passed over again
            and again. None: where they take at most 512 MiB.
    """
    indices = tf.data.Dataset.range(len(images))
    dataset = _load(indices, images, preprocessing).map(lambda pixels, label: pixels).batch(batch_size)
    if _is_cached(cache, images, preprocessing):
        dataset = dataset.cache()
    return dataset.prefetch(tf.data.AUTOTUNE)


def _load(indices, images, preprocessing):
    """Dataset of `(preprocessed image, label)` for a dataset of positions."""
    read = {
        "pixels": preprocessing.from_pixels,
        "bytes": preprocessing.from_bytes,
        "paths": preprocessing.from_path,
    }[images.kind]
    sources = tf.constant(images.images if images.kind != "bytes" else images.images.tolist())
    labels = tf.constant(images.labels)

    def load(index):
        pixels = tf.ensure_shape(read(sources[index]), preprocessing.output_shape)
        return pixels, labels[index]

    return indices.map(load, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)


def _preprocess_all(images, preprocessing):
    return np.concatenate(list(evaluation_batches(images, preprocessing).as_numpy_iterator()))


def _is_cached(cache, images, preprocessing):
    return 4 * len(images) * int(np.prod(preprocessing.output_shape)) <= CACHE_BYTES if cache is None else cache
