"""Random crops, flips and colour changes of training images.

The operations are the same with Keras 2 and Keras 3. TensorFlow crops, because only its decode-and-crop skips decoding
the rest of the image. Colours change as by keras-cv's layers, in a third of their time. Its layers apply RandAugment:
Keras 2 has none, and those of Keras 3 differ. The random numbers are drawn here, not in the layers. The layers use a
generator with a state, so an image's augmentation would depend on the order of threads, and a resumed run would differ
from an uninterrupted one.
"""

import copy
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from s2sd_tf.checks import checked_int
from s2sd_tf.data.decoding import decode_jpeg_window, decode_other, jpeg_reduction, jpeg_shape, rare, with_box
from s2sd_tf.data.preprocessing import (
    Preprocessing,
    checked_pixels,
    resize_antialiased,
    to_grayscale,
    with_channels,
)

# Random crops to try before falling back to the centre crop, as in torchvision.
_ATTEMPTS = 10
CROPS = ("resized", "random", "center")


class Augmentation:
    """Random crop, flip and colour changes of a training image. The result depends only on the image and a seed.

    The steps are a crop, scaled to the size of the `Preprocessing`; a horizontal flip; brightness, contrast, saturation
    and hue, in the order of keras-cv's `RandomColorJitter`; grayscale; RandAugment (Cubuk et al., CVPR Workshops 2020)
    with the operations of keras-cv's `RandAugment`, in sequence. The `Preprocessing` then applies inversion, channel
    order and normalisation.

    Args:
        crop: "resized" draws a share of the area from `scale` and an aspect ratio from `ratio`, as for Inception
            (Szegedy et al., CVPR 2015). "random" scales the shorter side to the `resize_size` of the `Preprocessing`
            and crops its `(height, width)` at a random place. "center" crops as in evaluation.
        scale: two floats in (0, 1], smallest and largest share of the image's area.
        ratio: two floats > 0, smallest and largest width / height; its logarithm is drawn uniformly.
        flip: probability of a horizontal flip, in [0, 1].
        brightness: float in [0, 1]; up to this share of white is added or subtracted.
        contrast: float c in [0, 1]; distances from the mean of each channel are multiplied by a factor in 1 +- c.
        saturation: float s in [0, 1]; the saturation is multiplied by a factor in 1 +- s.
        hue: float in [0, 0.5]; the hue is rotated by up to this share of the circle.
        grayscale: probability of conversion to grayscale, in [0, 1].
        rand_augment: int >= 0, the number of RandAugment operations per image.
        magnitude: float in [0, 1], strength of the RandAugment operations.

    Raises:
        ValueError: an argument out of its range; the message names it.
    """

    def __init__(
        self,
        crop: str = "resized",
        scale: Sequence[float] = (0.08, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        brightness: float = 0.0,
        contrast: float = 0.0,
        saturation: float = 0.0,
        hue: float = 0.0,
        grayscale: float = 0.0,
        rand_augment: int = 0,
        magnitude: float = 0.5,
    ) -> None:
        if crop not in CROPS:
            raise ValueError(f"crop: expected one of {list(CROPS)}. Received: {crop!r}")
        _check_range("scale", scale, 1.0)
        _check_range("ratio", ratio, float("inf"))
        for argument, value, most in [
            ("flip", flip, 1.0),
            ("brightness", brightness, 1.0),
            ("contrast", contrast, 1.0),
            ("saturation", saturation, 1.0),
            ("hue", hue, 0.5),
            ("grayscale", grayscale, 1.0),
            ("magnitude", magnitude, 1.0),
        ]:
            if not _is_number(value) or not 0.0 <= value <= most:
                raise ValueError(f"{argument}: expected a number in [0, {most:g}]. Received: {value!r}")
        self.crop = crop
        self.scale = tuple(scale)
        self.ratio = tuple(ratio)
        self.flip = flip
        self.brightness = brightness
        self.contrast = contrast
        self.saturation = saturation
        self.hue = hue
        self.grayscale = grayscale
        self.rand_augment = checked_int("rand_augment", rand_augment, 0)
        self.magnitude = magnitude
        self._jitters = bool(brightness or contrast or saturation or hue)
        # Made once, not at every tracing, because keras-cv's layers are Keras layers.
        self._operations = _rand_augment_operations(magnitude) if rand_augment else []

    @property
    def changes_colors(self) -> bool:
        """Whether the augmentation does more than crop and flip. Grayscale images then become RGB in between."""
        return bool(self._jitters or self.grayscale or self._operations)

    def from_bytes(self, encoded: tf.Tensor, preprocessing: Preprocessing, seed: tf.Tensor) -> tf.Tensor:
        """Decodes and augments an image.

        Only the crop of a JPEG is decoded, smaller if it is much larger than the result; see
        `Preprocessing.resize_bytes`.

        Args:
            encoded: string scalar, an image that `decode_pixels` decodes.
            preprocessing: size of the result, and the steps after the augmentation.
            seed: int32 or int64 `(2,)`, seed of all random numbers.

        Returns:
            float32 `(height, width, channels)`, the model's input.
        """
        if self.crop == "center":
            return self._finish(preprocessing.resize_bytes(encoded), preprocessing, seed)

        def other(encoded, seed):
            return with_box(self._crop(decode_other(encoded), preprocessing, seed))

        # Eagerly it would be traced for every image.
        if not tf.executing_eagerly():
            other = rare(tf.TensorSpec([], tf.string), tf.TensorSpec([2], tf.int64))(other)
        pixels, box = tf.cond(
            tf.io.is_jpeg(encoded),
            lambda: self._jpeg_crop(encoded, preprocessing, seed),
            lambda: other(encoded, tf.cast(seed, tf.int64)),
        )
        return self._finish(_resized(preprocessing, pixels, box), preprocessing, seed)

    def from_pixels(self, pixels: tf.Tensor | np.ndarray, preprocessing: Preprocessing, seed: tf.Tensor) -> tf.Tensor:
        """Augments a uint8 image `(h, w, channels)`, see `from_bytes`.

        Raises:
            ValueError: floating-point numbers.
        """
        pixels = checked_pixels(pixels)
        if self.crop == "center":
            return self._finish(preprocessing.resize_pixels(pixels), preprocessing, seed)
        crop = self._crop(pixels, preprocessing, seed)
        return self._finish(_resized(preprocessing, crop), preprocessing, seed)

    def crop_window(
        self, height: tf.Tensor, width: tf.Tensor, preprocessing: Preprocessing, seed: tf.Tensor
    ) -> tf.Tensor:
        """Draws the crop of an image of `height` x `width` pixels.

        Args:
            height, width: int32 scalars.
            preprocessing: its size and `resize_size` set the size of a "random" crop.
            seed: see `from_bytes`.

        Returns:
            int32 `[top, left, height, width]`.
        """
        draws = tf.random.stateless_uniform([_ATTEMPTS, 4], _sub_seed(seed, 0))
        if self.crop == "random":
            window_height, window_width = preprocessing.crop_size(height, width)
            return _placed(height, width, window_height, window_width, draws[0, 2:])
        h, w = tf.cast(height, tf.float32), tf.cast(width, tf.float32)
        least, most = tf.math.log(self.ratio[0]), tf.math.log(self.ratio[1])
        area = h * w * (self.scale[0] + draws[:, 0] * (self.scale[1] - self.scale[0]))
        ratio = tf.exp(least + draws[:, 1] * (most - least))
        heights = tf.cast(tf.round(tf.sqrt(area / ratio)), tf.int32)
        widths = tf.cast(tf.round(tf.sqrt(area * ratio)), tf.int32)
        fits = (heights >= 1) & (heights <= height) & (widths >= 1) & (widths <= width)
        first = tf.argmax(tf.cast(fits, tf.int32))
        # If no crop fits: the largest centre crop with an allowed ratio.
        middle_height = tf.where(w / h < self.ratio[0], tf.cast(tf.round(w / self.ratio[0]), tf.int32), height)
        middle_width = tf.where(w / h > self.ratio[1], tf.cast(tf.round(h * self.ratio[1]), tf.int32), width)
        middle_height, middle_width = tf.minimum(middle_height, height), tf.minimum(middle_width, width)
        centre = tf.stack([(height - middle_height) // 2, (width - middle_width) // 2, middle_height, middle_width])
        chosen = _placed(height, width, heights[first], widths[first], draws[first, 2:])
        return tf.where(tf.reduce_any(fits), chosen, centre)

    def _jpeg_crop(self, encoded, preprocessing, seed):
        height, width, orientation = jpeg_shape(encoded)
        window = self.crop_window(height, width, preprocessing, seed)
        reduction = jpeg_reduction(tf.unstack(window[2:]), preprocessing.output_shape[:2])
        return decode_jpeg_window(encoded, window, height, width, orientation, reduction)

    def _crop(self, image, preprocessing, seed):
        shape = tf.shape(image)
        window = self.crop_window(shape[0], shape[1], preprocessing, seed)
        end = window[:2] + window[2:]
        return image[window[0] : end[0], window[1] : end[1]]

    def _finish(self, image, preprocessing, seed):
        """Flips, colours and normalises a crop, float `(height, width, c)` in [0, 1]."""
        draws = tf.unstack(tf.random.stateless_uniform([6], _sub_seed(seed, 1)))
        if self.flip:
            # tf.where takes twenty times as long.
            image = tf.cond(draws[0] < self.flip, lambda image=image: tf.reverse(image, [1]), lambda image=image: image)
        if self.changes_colors:
            image = self._colored(with_channels(image, 3), draws, seed)
        return preprocessing.normalize(with_channels(image, preprocessing.channels))

    def _colored(self, image, draws, seed):
        if self._jitters:
            image = self._jittered(image, [2.0 * draw - 1.0 for draw in draws[1:5]])
        if self.grayscale:
            image = tf.cond(
                draws[5] < self.grayscale,
                lambda image=image: tf.image.grayscale_to_rgb(to_grayscale(image)),
                lambda image=image: image,
            )
        if self._operations:
            images = _rand_augmented(255.0 * image[None], self._operations, self.rand_augment, _sub_seed(seed, 2))
            image = images[0] / 255.0
        return image

    def _jittered(self, image, strengths):
        brightness, contrast, saturation, hue = strengths
        # One plane a channel: TensorFlow is several times slower on triples.
        planes = tf.transpose(tf.reshape(image, [-1, 3]))
        if self.brightness:
            planes = tf.clip_by_value(planes + self.brightness * brightness, 0.0, 1.0)
        if self.contrast:
            factor = 1.0 + self.contrast * contrast
            means = tf.reduce_mean(planes, axis=1, keepdims=True)
            planes = tf.clip_by_value(factor * planes + (1.0 - factor) * means, 0.0, 1.0)
        if self.saturation or self.hue:
            planes = _turned(planes, 1.0 + self.saturation * saturation, self.hue * hue)
        return tf.reshape(tf.transpose(planes), tf.shape(image))


# The augmentations of the published code, and "mild", "rand" and "flip".
PRESETS: dict[str, dict[str, Any]] = {
    "base": {},
    "adv": {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.2, "grayscale": 0.2},
    "big": {},
    "red": {"crop": "random"},
    "mild": {"scale": (0.4, 1.0)},
    "rand": {"rand_augment": 2, "magnitude": 0.5},
    "flip": {"crop": "center"},
}
# The input size of the presets that override `config.data.image_size`.
PRESET_SIZES = {"big": 256}


def preset(name: str) -> dict[str, Any]:
    """Returns the settings of an `Augmentation` by name.

    Args:
        name: "base" (random resized crop and flip), "adv" (base, grayscale and colours), "big" (base for inputs of
            256 x 256) or "red" (random crop of the image scaled to `resize_size`, and flip), all from the published
            code; or "mild" (base with crops of at least 40% of the area), "rand" (base and two RandAugment operations)
            or "flip" (flip only).

    Raises:
        ValueError: an unknown name.
    """
    if name not in PRESETS:
        raise ValueError(f"augmentation: expected one of {sorted(PRESETS)}. Received: {name!r}")
    return copy.deepcopy(PRESETS[name])


def _check_range(argument, value, most):
    fits = isinstance(value, (tuple, list)) and len(value) == 2 and all(_is_number(bound) for bound in value)
    if not fits or not 0 < value[0] <= value[1] <= most:
        raise ValueError(f"{argument}: expected two numbers, 0 < least <= greatest <= {most:g}. Received: {value!r}")


def _is_number(value):
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _sub_seed(seed, stream):
    return tf.random.experimental.stateless_fold_in(seed, stream)


def _placed(height, width, window_height, window_width, draws):
    """A window of that size at a uniformly drawn position."""
    room = tf.stack([height - window_height, width - window_width])
    corner = tf.minimum(tf.cast(tf.floor(draws * tf.cast(room + 1, tf.float32)), tf.int32), room)
    return tf.concat([tf.maximum(corner, 0), [window_height, window_width]], axis=0)


def _resized(preprocessing, image, box=None):
    image = resize_antialiased(image, preprocessing.height, preprocessing.width, box) / 255.0
    image.set_shape([preprocessing.height, preprocessing.width, image.shape[-1]])
    return image


def _turned(planes, factor, turn):
    """Multiplies the saturation of RGB planes `(3, pixels)` by `factor` and turns the hue by `turn` of the circle.

    As through HSV, where the saturation is at most 1: the largest channel stays, and the chroma, the difference to the
    smallest, is multiplied. A channel's distance from the largest is the chroma times a ramp of the angle between the
    hue and the channel's own colour, from 0 at 60 degrees to 1 at 120.
    """
    red, green, blue = tf.unstack(planes)
    most, least = tf.reduce_max(planes, axis=0), tf.reduce_min(planes, axis=0)
    chroma = most - least
    scale = 1.0 / tf.maximum(chroma, 1e-20)
    # In sixths of the circle, from red.
    hue = tf.where(
        red == most,
        (green - blue) * scale,
        tf.where(green == most, (blue - red) * scale + 2.0, (red - green) * scale + 4.0),
    )
    hue += 6.0 * turn
    chroma = tf.minimum(factor * chroma, most)
    turned = []
    for own in (0.0, 2.0, 4.0):
        angle = hue - own
        angle = tf.abs(angle - 6.0 * tf.round(angle / 6.0))
        turned.append(most - chroma * tf.clip_by_value(angle - 1.0, 0.0, 1.0))
    return tf.stack(turned)


def _rand_augment_operations(magnitude, deviation=0.15):
    """The operations of keras-cv's `RandAugment`, with the same distributions of their strengths.

    Returns:
        Functions of `(images, draws)`: images `(1, h, w, 3)` in [0, 255], and draws `(normal, uniform)`, one number
        each.
    """
    # Imported late, because it takes seconds.
    import keras_cv

    # The layers request the global generator, although nothing is drawn from it here. In deterministic runs it does not
    # exist until it is set.
    try:
        tf.random.get_global_generator()
    except RuntimeError:
        tf.random.set_global_generator(tf.random.Generator.from_seed(0))
    layers = keras_cv.layers
    pixels = (0, 255)
    auto_contrast = layers.AutoContrast(pixels)
    equalization = layers.Equalization(pixels)
    # It has Python's `and` and `if` on tensors, so it needs AutoGraph, which the datasets switch off.
    equalize = tf.autograph.to_graph(equalization.augment_images)
    solarization = layers.Solarization(pixels)
    # The factors are not used: `augment_images` gets the strength.
    colors = layers.RandomColorDegeneration(0.5)
    contrast = layers.RandomContrast(pixels, 0.5)
    brightness = layers.RandomBrightness(0.5, pixels)
    shearing = layers.RandomShear(0.5, 0.5)
    translation = layers.RandomTranslation(0.5, 0.5)

    def strength(draws):
        return tf.clip_by_value(magnitude + deviation * draws[0], 0.0, 1.0)

    def signed(draws):
        return 2.0 * draws[1] - 1.0

    def pixelwise(layer, transformations):
        return lambda images, draws: layer.augment_images(
            images, transformations=tf.nest.map_structure(lambda v: tf.reshape(v, [1, 1, 1, 1]), transformations(draws))
        )

    def shear(axis):
        def apply(images, draws):
            amount = tf.reshape(strength(draws) * tf.sign(signed(draws)), [1, 1])
            return shearing.augment_images(images, transformations={"shear_x": None, "shear_y": None, axis: amount})

        return apply

    def move(axis):
        def apply(images, draws):
            zero = tf.zeros([1, 1])
            amounts = {"height_translations": zero, "width_translations": zero}
            amounts[axis] = tf.reshape(magnitude * signed(draws), [1, 1])
            return translation.augment_images(images, transformations=amounts)

        return apply

    return [
        lambda images, draws: auto_contrast.augment_images(images, transformations=None),
        lambda images, draws: equalize(equalization, images, transformations=None),
        pixelwise(
            solarization,
            lambda draws: {"additions": 110.0 * strength(draws), "thresholds": 255.0 * (1.0 - strength(draws))},
        ),
        pixelwise(colors, strength),
        pixelwise(contrast, lambda draws: 1.0 + magnitude * signed(draws)),
        pixelwise(brightness, lambda draws: 255.0 * magnitude * signed(draws)),
        shear("shear_x"),
        shear("shear_y"),
        move("width_translations"),
        move("height_translations"),
    ]


def _rand_augmented(images, operations, count, seed):
    """Applies `count` random operations in sequence. Each is the identity with probability 1 / 11."""
    shape = images.shape
    for position in range(count):
        own = _sub_seed(seed, position)
        uniform = tf.random.stateless_uniform([2], _sub_seed(own, 0))
        draws = tf.random.stateless_normal([], _sub_seed(own, 1)), uniform[1]
        choice = tf.cast(uniform[0] * (len(operations) + 1), tf.int32)

        def branch(operation, images=images, draws=draws):
            return lambda: tf.ensure_shape(tf.cast(operation(images, draws), tf.float32), shape)

        branches = [branch(operation) for operation in operations] + [lambda images=images: images]
        images = tf.switch_case(tf.minimum(choice, len(operations)), branches)
    return tf.clip_by_value(images, 0.0, 255.0)
