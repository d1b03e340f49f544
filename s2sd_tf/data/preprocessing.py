"""From encoded or decoded images to what the model takes; the same in training, evaluation and in exported graphs."""

import tensorflow as tf


def decode_rgb(encoded):
    """An encoded image, a string scalar, to float RGB `(h, w, 3)` up to 1: the form that every format decodes to."""
    image = tf.io.decode_image(encoded, channels=3, expand_animations=False)
    image.set_shape([None, None, 3])
    return tf.cast(image, tf.float32) / 255.0


def _to_grayscale(images):
    # TensorFlow's own weights add up to 0.9999, which would darken what is gray already.
    return tf.reduce_sum(images * tf.constant([0.299, 0.587, 0.114]), axis=-1, keepdims=True)


class Preprocessing:
    """Resizing, centre crop, inversion and normalisation of images.

    The steps: `resize_size` scales the shorter side to that length and the centre `(height, width)` is cropped; without
    it, the image is scaled to `(height, width)` whatever its shape (bilinear, with antialiasing). Then `invert` takes
    1 - x, and (x - mean) / std is what comes out.

    Args:
        height, width: int >= 1, size of the result, in pixels.
        channels: 1 (grayscale) or 3 (RGB).
        resize_size: int >= max(height, width), or None.
        invert: bool; for dark drawings on white, so that the background is 0.
        mean, std: float, or one for each channel; on the scale where white is 1.
    """

    def __init__(self, height, width, channels=3, resize_size=None, invert=False, mean=0.0, std=1.0):
        if height < 1 or width < 1:
            raise ValueError(f"Preprocessing: expected height and width >= 1. Received: {height} x {width}")
        if channels not in (1, 3):
            raise ValueError(f"channels: expected 1 or 3. Received: {channels}")
        if resize_size is not None and resize_size < max(height, width):
            raise ValueError(
                f"resize_size: expected at least the size of the crop, {height} x {width}. Received: {resize_size}"
            )
        self.height = height
        self.width = width
        self.channels = channels
        self.resize_size = resize_size
        self.invert = invert
        self.mean = mean
        self.std = std

    @property
    def output_shape(self):
        """`(height, width, channels)`."""
        return (self.height, self.width, self.channels)

    def get_config(self):
        """Constructor arguments, complete and JSON-serialisable."""
        names = ("height", "width", "channels", "resize_size", "invert", "mean", "std")
        return {name: getattr(self, name) for name in names}

    def __call__(self, images):
        """Float images `(h, w, channels)` or `(batch, h, w, channels)`, white being 1, to the model's input."""
        images = self._resize(tf.convert_to_tensor(images))
        if self.invert:
            images = 1.0 - images
        return (images - tf.constant(self.mean, images.dtype)) / tf.constant(self.std, images.dtype)

    def decode(self, encoded):
        """A PNG, JPEG, BMP or GIF (first frame) image, a string scalar, to float `(h, w, channels)` up to 1."""
        image = decode_rgb(encoded)
        return _to_grayscale(image) if self.channels == 1 else image

    def from_pixels(self, pixels):
        """uint8 images `(..., h, w, c)` to the model's input; gray becomes RGB or RGB gray as asked."""
        images = tf.cast(pixels, tf.float32) / 255.0
        if images.shape[-1] != self.channels:
            images = _to_grayscale(images) if self.channels == 1 else tf.image.grayscale_to_rgb(images)
        return self(images)

    def from_bytes(self, encoded):
        """An encoded image, a scalar string, to the model's input `(height, width, channels)`."""
        return self(self.decode(encoded))

    def from_path(self, path):
        """An image file to the model's input `(height, width, channels)`."""
        return self.from_bytes(tf.io.read_file(path))

    def _resize(self, images):
        size = (self.height, self.width)
        if self.resize_size is None:
            if images.shape[-3:-1] == size:
                return images
            return self._set_size(tf.image.resize(images, size, antialias=True))
        height, width = tf.shape(images)[-3], tf.shape(images)[-2]
        shorter = tf.cast(tf.minimum(height, width), tf.float32)
        scaled = [
            tf.maximum(tf.cast(tf.round(tf.cast(side, tf.float32) * self.resize_size / shorter), tf.int32), least)
            for side, least in ((height, self.height), (width, self.width))
        ]
        images = tf.image.resize(images, scaled, antialias=True)
        top, left = (scaled[0] - self.height) // 2, (scaled[1] - self.width) // 2
        return self._set_size(images[..., top : top + self.height, left : left + self.width, :])

    def _set_size(self, images):
        images.set_shape([*images.shape[:-3], *self.output_shape])
        return images
