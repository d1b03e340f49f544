"""Turns images into the model's input, in the same way for training, evaluation and exported graphs."""

import functools
import math
import numbers
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from s2sd_tf.checks import checked_int
from s2sd_tf.data.decoding import (
    decode_jpeg_window,
    decode_other,
    decode_pixels,
    jpeg_reduction,
    jpeg_shape,
    with_box,
)
from s2sd_tf.files import local_path
from s2sd_tf.graph_checks import checked_range
from s2sd_tf.untrusted import read_json_object, reading

# Float images are in [0, 1], but resizing with a bicubic or Lanczos filter overshoots, by a quarter at corners.
_LOW, _HIGH = -0.5, 1.5
_EXPECTED = "images: expected numbers in [0, 1], where white is 1 (for uint8, use from_pixels or the signature pixels)"
# The most pixels of an image whose rows are scaled before its columns, as `tf.image.resize` does.
_MOST_BETWEEN = 2**22


def decode_rgb(encoded: tf.Tensor | bytes) -> tf.Tensor:
    """Decodes an image of any supported format, a string scalar, to upright float32 RGB `(h, w, 3)` in [0, 1]."""
    return tf.cast(decode_pixels(encoded), tf.float32) / 255.0


def checked_pixels(pixels: tf.Tensor | np.ndarray) -> tf.Tensor:
    """Returns `pixels` as a tensor.

    Raises:
        ValueError: floating-point numbers, which would be black if they are in [0, 1].
    """
    pixels = tf.convert_to_tensor(pixels)
    if pixels.dtype.is_floating:
        raise ValueError(
            "pixels: expected integers in [0, 255] (for numbers in [0, 1], call the Preprocessing). "
            f"Received: {pixels.dtype.name}"
        )
    return pixels


def to_grayscale(images: tf.Tensor) -> tf.Tensor:
    """Converts RGB `(..., 3)` to luma `(..., 1)` (ITU-R 601)."""
    # TensorFlow's own weights add up to 0.9999, which would darken gray images.
    return tf.reduce_sum(images * tf.constant([0.299, 0.587, 0.114]), axis=-1, keepdims=True)


def with_channels(images: tf.Tensor, channels: int) -> tf.Tensor:
    """Converts images `(..., 1)` or `(..., 3)` to grayscale (`channels` 1) or RGB (3)."""
    if images.shape[-1] == channels:
        return images
    return to_grayscale(images) if channels == 1 else tf.image.grayscale_to_rgb(images)


def resize_antialiased(
    images: tf.Tensor, height: int | tf.Tensor, width: int | tf.Tensor, box: tf.Tensor | None = None
) -> tf.Tensor:
    """Resizes as `tf.image.resize(images, (height, width), antialias=True)`, to the same bits but several times faster.

    TensorFlow's operation is slow along the width and for few channels. Here it scales only along the height, with
    whole rows as channels: first the images, then the transposed images for the width.

    Args:
        images: numeric `(h, w, channels)` or `(batch, h, w, channels)`, with static rank and channels.
        height, width: int, or int32 scalars.
        box: float64 `[top, left, height, width]`, the part to resize; it may begin and end within a pixel. None: all.

    Returns:
        float32 images of that size.
    """
    return _resized_window(images, [height, width], [0, 0], [height, width], box)


def _resized_window(images, size, corner, window, box=None):
    """The window `(height, width)` at `corner` of the box of images, resized to `size`; all are ints or int scalars.

    Only the part of the images that the window needs is resized. So neither time nor memory depends on `size`.
    """
    start, span, scale, shift = _needed(tf.shape(images)[-3:-1], box, size, corner, window)
    *batch, _, _, channels = images.shape.as_list()
    sides = [[len(batch), 1]]
    images = tf.slice(images, tf.pad(start, sides), tf.pad(span, sides, constant_values=-1))
    images.set_shape([*batch, None, None, channels])
    spans, scales, shifts = (tf.unstack(pair) for pair in (span, scale, shift))
    rows = functools.partial(_scale_axis, axis=-3, length=spans[0], size=window[0], scale=scales[0], shift=shifts[0])
    columns = functools.partial(_scale_axis, axis=-2, length=spans[1], size=window[1], scale=scales[1], shift=shifts[1])
    # Long strips would need much memory between the two steps in the usual order.
    between = tf.cast(window[0], tf.int64) * tf.cast(spans[1], tf.int64)
    return tf.cond(between <= _MOST_BETWEEN, lambda: columns(rows(images)), lambda: rows(columns(images)))


def _needed(lengths, box, new, begin, count):
    """What `count` pixels from `begin` on need of the sides of an image, of which the box is scaled to `new` pixels.

    Args:
        lengths: int32 `(2,)`, height and width of the image; `new`, `begin` and `count` are pairs of ints or int
            scalars, too.
        box: see `resize_antialiased`.

    Returns:
        `(start, span, scale, shift)`: the part of the sides, the factors that scale it, and where it then begins.
    """
    offset, extent = (tf.zeros([2], tf.float64), lengths) if box is None else (box[:2], box[2:])
    scale = tf.cast(new, tf.float32) / tf.cast(extent, tf.float32)
    begin = tf.cast(begin, tf.float64)
    # The triangle of the antialiasing reaches as far as one pixel of the smaller image.
    step = 1.0 / tf.cast(scale, tf.float64)
    reach = tf.maximum(step, 1.0) + 1.0
    start = tf.maximum(tf.floor((begin + 0.5) * step + offset - reach), 0.0)
    end = tf.math.ceil((begin + tf.cast(count, tf.float64) - 0.5) * step + offset + reach)
    span = tf.minimum(end, tf.cast(lengths, tf.float64)) - start
    shift = tf.cast((start - offset) * tf.cast(scale, tf.float64) - begin, tf.float32)
    return tf.cast(start, tf.int32), tf.cast(span, tf.int32), scale, shift


def _scale_axis(images, axis, length, size, scale, shift):
    """Scales the height (axis -3) or width (-2) of images, `length` pixels, by `scale`; returns `size` pixels from
    `-shift` on.
    """
    *batch, _, _, channels = _sizes(images)
    swap = [*range(len(batch)), len(batch) + 1, len(batch), len(batch) + 2]
    if axis == -2:
        images = tf.transpose(images, swap)
    images = tf.raw_ops.ScaleAndTranslate(
        images=tf.reshape(images, [math.prod(batch), length, 1, -1]),
        size=tf.stack([size, 1]),
        scale=tf.stack([scale, 1.0]),
        translation=tf.stack([shift, 0.0]),
        kernel_type="triangle",
        antialias=True,
    )
    images = tf.reshape(images, [*batch, size, -1, channels])
    return tf.transpose(images, swap) if axis == -2 else images


def _scaling_matrix(old, new, begin, length):
    """Float32 `(length, old)`: the matrix that scales a side of `old` pixels to `new`, of which it gives a window.

    The window has `length` pixels, from `begin` on. All are ints or int32 scalars. As `_scale_axis`, it weights by a
    triangle that reaches as far as one pixel of the smaller image.
    """
    step = tf.cast(old, tf.float32) / tf.cast(new, tf.float32)
    centres = (tf.cast(tf.range(length) + begin, tf.float32) + 0.5) * step
    distances = tf.abs(tf.cast(tf.range(old), tf.float32) + 0.5 - centres[:, tf.newaxis])
    weights = tf.maximum(1.0 - distances / tf.maximum(step, 1.0), 0.0)
    return weights / tf.reduce_sum(weights, axis=1, keepdims=True)


def _sizes(images):
    """The shape as a list, with tensors for the sizes that are not static."""
    dynamic = tf.shape(images)
    return [dynamic[axis] if size is None else size for axis, size in enumerate(images.shape)]


class Preprocessing:
    """Resizes, crops, inverts and normalises images.

    With `resize_size`, the shorter side is scaled to that length and the centre `(height, width)` is cropped. Without
    it, the image is scaled to `(height, width)`, whatever its aspect ratio. Both are bilinear with antialiasing. Then
    `invert` replaces x by 1 - x, `channel_order` orders the channels, and the result is (x - mean) / std.

    Args:
        height, width: int >= 1, size of the result in pixels.
        channels: 1 (grayscale) or 3 (RGB).
        resize_size: int >= max(height, width), or None.
        invert: for dark drawings on white, so that the background is 0.
        mean, std: one number, or one per channel in the order of the result, where white is 1; std > 0.
        channel_order: "rgb" or "bgr", order of the result. The input is RGB.

    Raises:
        ValueError: an argument out of its range; the message names it.
    """

    def __init__(
        self,
        height: int,
        width: int,
        channels: int = 3,
        resize_size: int | None = None,
        invert: bool = False,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
        channel_order: str = "rgb",
    ) -> None:
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
    def load(cls, path: str | os.PathLike) -> "Preprocessing":
        """Makes a `Preprocessing` from a JSON file of `get_config()`.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file has other content; the message names the file.
        """
        path = local_path("path", path)
        config = read_json_object(path)
        with reading(path, "the arguments of Preprocessing"):
            return cls(**config)

    @property
    def output_shape(self) -> tuple[int, int, int]:
        """Shape of a preprocessed image, `(height, width, channels)`."""
        return (self.height, self.width, self.channels)

    def get_config(self) -> dict[str, Any]:
        """All constructor arguments, JSON-serialisable."""
        names = ("height", "width", "channels", "resize_size", "invert", "mean", "std", "channel_order")
        return {name: getattr(self, name) for name in names}

    def __call__(self, images: tf.Tensor | np.ndarray) -> tf.Tensor:
        """Preprocesses float images in [0, 1], `(h, w, channels)` or `(batch, h, w, channels)`.

        Raises:
            ValueError: integers, which `from_pixels` takes; or numbers that are not finite or not in [-0.5, 1.5]. In a
                graph these numbers raise `tf.errors.InvalidArgumentError`.
        """
        images = tf.convert_to_tensor(images)
        if not images.dtype.is_floating:
            raise ValueError(f"{_EXPECTED}. Received: {images.dtype.name}")
        return self.normalize(self.resize(checked_range(images, _LOW, _HIGH, _EXPECTED)))

    def normalize(self, images: tf.Tensor) -> tf.Tensor:
        """Inverts resized images, orders their channels and applies mean and standard deviation."""
        if self.invert:
            images = 1.0 - images
        if self.channel_order == "bgr":
            images = images[..., ::-1]
        # As rows of width * channels: TensorFlow is five times slower if it broadcasts over the channels only.
        rows = tf.reshape(images, [*_sizes(images)[:-2], self.width * self.channels])
        mean, std = (
            tf.constant(np.tile(np.broadcast_to(value, self.channels), self.width), images.dtype)
            for value in (self.mean, self.std)
        )
        return tf.reshape((rows - mean) / std, _sizes(images))

    def crop_size(self, height: tf.Tensor, width: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The part of a `height` x `width` image that becomes the crop, as int32 `(height, width)` in its pixels."""
        if self.resize_size is None:
            return height, width
        scale = tf.cast(tf.minimum(height, width), tf.float32) / self.resize_size
        return tuple(
            tf.clip_by_value(tf.cast(tf.round(length * scale), tf.int32), 1, side)
            for length, side in ((float(self.height), height), (float(self.width), width))
        )

    def portable(self, images: tf.Tensor) -> tf.Tensor:
        """`self(images)` without its checks, by operations that ONNX and LiteRT have: antialiasing as matrix products.

        Args:
            images: float32 `(batch, h, w, channels)` in [0, 1].
        """
        size, sides = [self.height, self.width], _sizes(images)[-3:-1]
        if self.resize_size is None:
            rows, columns = (_scaling_matrix(side, length, 0, length) for side, length in zip(sides, size))
        else:
            scale = self.resize_size / tf.cast(tf.minimum(*sides), tf.float32)
            scaled = [
                tf.maximum(tf.cast(tf.round(tf.cast(side, tf.float32) * scale), tf.int32), length)
                for side, length in zip(sides, size)
            ]
            rows, columns = (
                _scaling_matrix(side, whole, (whole - length) // 2, length)
                for side, whole, length in zip(sides, scaled, size)
            )
        images = tf.einsum("qw,bpwc->bpqc", columns, tf.einsum("ph,bhwc->bpwc", rows, images))
        if self.channel_order == "bgr":
            images = images[..., ::-1]
        # As one affine map, because LiteRT's converter of TensorFlow 2.20 gets 1 - x - mean wrong.
        mean, std = (np.broadcast_to(np.asarray(value, np.float32), [self.channels]) for value in (self.mean, self.std))
        scale, shift = (-1.0, 1.0 - mean) if self.invert else (1.0, -mean)
        return self._set_size(images * tf.constant(scale / std) + tf.constant(shift / std))

    def without_normalization(self) -> "Preprocessing":
        """The same resizing and crop without the other steps, so images are in [0, 1], for people to look at."""
        return Preprocessing(self.height, self.width, self.channels, self.resize_size)

    def from_pixels(self, pixels: tf.Tensor | np.ndarray) -> tf.Tensor:
        """Preprocesses uint8 images `(..., h, w, c)`, converted to `channels` if needed.

        Raises:
            ValueError: floating-point numbers, which `__call__` takes.
        """
        return self.normalize(self.resize_pixels(pixels))

    def from_bytes(self, encoded: tf.Tensor | bytes) -> tf.Tensor:
        """Decodes and preprocesses an image, a string scalar, to `(height, width, channels)`; see `resize_bytes`."""
        return self.normalize(self.resize_bytes(encoded))

    def resize_bytes(self, encoded: tf.Tensor | bytes) -> tf.Tensor:
        """Decodes, resizes and crops an image, a string scalar, to `(height, width, channels)` in [0, 1].

        A JPEG that has four times the pixels of the result on each side, or more, is decoded at a half, a quarter or an
        eighth of its size, such that at least twice the pixels of the result are left on each side. That takes less
        time and memory than `resize_pixels(decode_pixels(encoded))`, and differs from it by 1/255 on average.
        """
        pixels, box = tf.cond(
            tf.io.is_jpeg(encoded), lambda: self._jpeg_pixels(encoded), lambda: with_box(decode_other(encoded))
        )
        return self.resize_pixels(pixels, box)

    def _jpeg_pixels(self, encoded):
        height, width, orientation = jpeg_shape(encoded)
        reduction = jpeg_reduction([height, width], self._scaled([height, width]))
        whole = tf.stack([0, 0, height, width])
        return decode_jpeg_window(encoded, whole, height, width, orientation, reduction)

    def resize_pixels(self, pixels: tf.Tensor | np.ndarray, box: tf.Tensor | None = None) -> tf.Tensor:
        """Resizes and crops uint8 images `(..., h, w, c)` to `(..., height, width, channels)` in [0, 1].

        Raises:
            ValueError: floating-point numbers, which `__call__` takes.
        """
        # As bytes until they are small, because large images take four times the memory as floats.
        resized = tf.cast(self.resize(checked_pixels(pixels), box), tf.float32)
        return with_channels(resized / 255.0, self.channels)

    def resize(self, images: tf.Tensor, box: tf.Tensor | None = None) -> tf.Tensor:
        """Resizes and crops images `(..., h, w, channels)` to float `(..., height, width, channels)`.

        Of a long image, only the part that becomes the crop is resized.

        Args:
            images: numeric, with static rank and channels.
            box: see `resize_antialiased`.
        """
        size = (self.height, self.width)
        if self.resize_size is None and box is None and images.shape[-3:-1] == size:
            return images
        sides = _sizes(images)[-3:-1] if box is None else tf.unstack(box[2:])
        scaled = self._scaled(sides)
        corner = [(length - least) // 2 for length, least in zip(scaled, size)]
        return self._set_size(_resized_window(images, scaled, corner, size, box))

    def _scaled(self, sides):
        """Height and width of the scaled image, of which the centre is cropped, for an image with these `sides`."""
        if self.resize_size is None:
            return [self.height, self.width]
        sides = [tf.cast(side, tf.float64) for side in sides]
        shorter = tf.minimum(*sides)
        # As int64, because the scaled image, which is not computed, may be longer than int32 counts.
        return [
            tf.maximum(tf.cast(tf.round(side * self.resize_size / shorter), tf.int64), least)
            for side, least in zip(sides, (self.height, self.width))
        ]

    def _set_size(self, images):
        images.set_shape([*images.shape[:-3], self.height, self.width, images.shape[-1]])
        return images
