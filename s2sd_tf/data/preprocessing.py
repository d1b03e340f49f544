"""From encoded or decoded images to what the model takes; the same in training, evaluation and in exported graphs."""

import math
import numbers

import tensorflow as tf

from s2sd_tf.checks import checked_int
from s2sd_tf.untrusted import read_json_object, reading


def decode_rgb(encoded):
    """An encoded image, a string scalar, to float RGB `(h, w, 3)` up to 1: the form that every format decodes to."""
    image = tf.io.decode_image(encoded, channels=3, expand_animations=False)
    image.set_shape([None, None, 3])
    return tf.cast(image, tf.float32) / 255.0


def to_grayscale(images):
    """RGB `(..., 3)` to luma `(..., 1)` (ITU-R 601)."""
    # TensorFlow's own weights add up to 0.9999, which would darken what is gray already.
    return tf.reduce_sum(images * tf.constant([0.299, 0.587, 0.114]), axis=-1, keepdims=True)


def with_channels(images, channels):
    """Images `(..., 1)` or `(..., 3)` as grayscale (1) or RGB (3)."""
    if images.shape[-1] == channels:
        return images
    return to_grayscale(images) if channels == 1 else tf.image.grayscale_to_rgb(images)


def resize_antialiased(images, height, width):
    """`tf.image.resize(images, (height, width), antialias=True)`, equal to the last bit and several times as fast.

    TensorFlow's operation is slow along the width and for few channels. Here it scales along the height alone, with
    whole rows as channels: first the height, then, of the transposed images, the width.

    Args:
        images: numeric `(h, w, channels)` or `(batch, h, w, channels)`, of known rank and channels.
        height, width: int, or int32 scalars.

    Returns:
        float32 images of that size.
    """
    channels = images.shape[-1]
    *batch, _, old_width, _ = _sizes(images)
    swap = [*range(len(batch)), len(batch) + 1, len(batch), len(batch) + 2]

    def scale_height(images, new_height, row):
        old_height = _sizes(images)[-3]
        rows = tf.image.resize(
            tf.reshape(images, [*batch, old_height, 1, row * channels]), (new_height, 1), antialias=True
        )
        return tf.reshape(rows, [*batch, new_height, row, channels])

    images = scale_height(images, height, old_width)
    images = scale_height(tf.transpose(images, swap), width, height)
    return tf.transpose(images, swap)


def _sizes(images):
    """Shape as a list, with tensors for what is not known."""
    dynamic = tf.shape(images)
    return [dynamic[axis] if size is None else size for axis, size in enumerate(images.shape)]


class Preprocessing:
    """Resizing, centre crop, inversion, channel order and normalisation of images.

    The steps: `resize_size` scales the shorter side to that length and the centre `(height, width)` is cropped; without
    it, the image is scaled to `(height, width)` whatever its shape (bilinear, with antialiasing). Then `invert` takes
    1 - x, `channel_order` orders the channels, and (x - mean) / std is what comes out.

    Args:
        height, width: int >= 1, size of the result, in pixels.
        channels: 1 (grayscale) or 3 (RGB).
        resize_size: int >= max(height, width), or None.
        invert: bool; for dark drawings on white, so that the background is 0.
        mean, std: float, std > 0, or one for each channel in the order that comes out; on the scale where white is 1.
        channel_order: "rgb" or "bgr", the order that comes out; images come in as RGB.

    Raises:
        ValueError: an argument out of its range; the message names it.
    """

    def __init__(
        self, height, width, channels=3, resize_size=None, invert=False, mean=0.0, std=1.0, channel_order="rgb"
    ):
        height, width = checked_int("height", height, 1), checked_int("width", width, 1)
        if isinstance(channels, bool) or channels not in (1, 3):
            raise ValueError(f"channels: expected 1 or 3. Received: {channels!r}")
        if resize_size is not None and checked_int("resize_size", resize_size, 1) < max(height, width):
            raise ValueError(
                f"resize_size: expected at least the size of the crop, {height} x {width}. Received: {resize_size}"
            )
        if not isinstance(invert, bool):
            raise ValueError(f"invert: expected a bool. Received: {invert!r}")
        for argument, value in (("mean", mean), ("std", std)):
            values = value if isinstance(value, (list, tuple)) else [value]
            fits = all(isinstance(v, numbers.Real) and math.isfinite(v) for v in values) and len(values) in (
                1,
                channels,
            )
            if not fits or (argument == "std" and not min(values) > 0):
                wanted = "finite numbers > 0" if argument == "std" else "finite numbers"
                raise ValueError(f"{argument}: expected 1 or {channels} {wanted}. Received: {value!r}")
        if channel_order not in ("rgb", "bgr"):
            raise ValueError(f"channel_order: expected 'rgb' or 'bgr'. Received: {channel_order!r}")
        self.height = height
        self.width = width
        self.channels = channels
        self.resize_size = resize_size
        self.invert = invert
        self.mean = mean
        self.std = std
        self.channel_order = channel_order

    @classmethod
    def load(cls, path):
        """That of a JSON file of `get_config()`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: something else in it; the message names the file.
        """
        config = read_json_object(path)
        with reading(path, "the arguments of Preprocessing"):
            return cls(**config)

    @property
    def output_shape(self):
        """`(height, width, channels)`."""
        return (self.height, self.width, self.channels)

    def get_config(self):
        """Constructor arguments, complete and JSON-serialisable."""
        names = ("height", "width", "channels", "resize_size", "invert", "mean", "std", "channel_order")
        return {name: getattr(self, name) for name in names}

    def __call__(self, images):
        """Float images `(h, w, channels)` or `(batch, h, w, channels)`, white being 1, to the model's input."""
        return self.normalize(self.resize(tf.convert_to_tensor(images)))

    def normalize(self, images):
        """What follows on resizing and cropping: inversion, channel order, mean and standard deviation."""
        if self.invert:
            images = 1.0 - images
        if self.channel_order == "bgr":
            images = images[..., ::-1]
        # As rows of width * channels: TensorFlow is five times as slow where only the channels are broadcast.
        rows = tf.reshape(images, [*_sizes(images)[:-2], self.width * self.channels])
        mean, std = (
            tf.tile(tf.broadcast_to(tf.constant(value, images.dtype), [self.channels]), [self.width])
            for value in (self.mean, self.std)
        )
        return tf.reshape((rows - mean) / std, _sizes(images))

    def crop_size(self, height, width):
        """`(height, width)`, int32, of the part of a `height` x `width` image that becomes the crop, in its pixels."""
        if self.resize_size is None:
            return height, width
        scale = tf.cast(tf.minimum(height, width), tf.float32) / self.resize_size
        return tuple(
            tf.clip_by_value(tf.cast(tf.round(length * scale), tf.int32), 1, side)
            for length, side in ((float(self.height), height), (float(self.width), width))
        )

    def without_normalization(self):
        """The same crop as RGB pixels, white being 1: for people to look at."""
        return Preprocessing(self.height, self.width, self.channels, self.resize_size)

    def decode(self, encoded):
        """A PNG, JPEG, BMP or GIF (first frame) image, a string scalar, to float `(h, w, channels)` up to 1."""
        return with_channels(decode_rgb(encoded), self.channels)

    def from_pixels(self, pixels):
        """uint8 images `(..., h, w, c)` to the model's input; gray becomes RGB or RGB gray as asked."""
        images = tf.cast(pixels, tf.float32) / 255.0
        return self(with_channels(images, self.channels))

    def from_bytes(self, encoded):
        """An encoded image, a scalar string, to the model's input `(height, width, channels)`."""
        return self(self.decode(encoded))

    def resize(self, images):
        """Float images `(..., h, w, channels)` to `(..., height, width, channels)`, resized and cropped."""
        size = (self.height, self.width)
        if self.resize_size is None:
            if images.shape[-3:-1] == size:
                return images
            return self._set_size(resize_antialiased(images, *size))
        height, width = tf.shape(images)[-3], tf.shape(images)[-2]
        shorter = tf.cast(tf.minimum(height, width), tf.float32)
        scaled = [
            tf.maximum(tf.cast(tf.round(tf.cast(side, tf.float32) * self.resize_size / shorter), tf.int32), least)
            for side, least in ((height, self.height), (width, self.width))
        ]
        images = resize_antialiased(images, *scaled)
        top, left = (scaled[0] - self.height) // 2, (scaled[1] - self.width) // 2
        return self._set_size(images[..., top : top + self.height, left : left + self.width, :])

    def _set_size(self, images):
        images.set_shape([*images.shape[:-3], *self.output_shape])
        return images
