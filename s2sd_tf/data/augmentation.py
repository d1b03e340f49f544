"""Random crops, flips and colours of training images.

What does what, on both stacks: the crop is TensorFlow's decode-and-crop, as only that leaves undecoded what is cropped
away; colours and RandAugment are the operations of keras-cv's layers, as Keras 2 has no layers for hue, saturation,
grayscale or RandAugment, and Keras 3's own are other ones. The draws are ours: those of the layers come from
a generator with a state, so that an image would get another augmentation in every order of threads, and a resumed run
others than one that was not interrupted.
"""

import copy
import numbers

import tensorflow as tf

from s2sd_tf.checks import checked_int
from s2sd_tf.data.preprocessing import resize_antialiased, to_grayscale, with_channels

# Draws of a crop before the centre one is taken, as torchvision has it.
_ATTEMPTS = 10
CROPS = ("resized", "random", "center")


class Augmentation:
    """Random crop, flip and colours of a training image; a function of the image and a seed.

    The steps: a crop, scaled to the size of the `Preprocessing`; a horizontal flip; brightness, contrast, saturation
    and hue, in this order, as in keras-cv's `RandomColorJitter`; grayscale; RandAugment (Cubuk et al., CVPR Workshops
    2020) with the operations of keras-cv's `RandAugment`, one after the other. Inversion, channel order and
    normalisation of the `Preprocessing` follow.

    Args:
        crop: "resized": a share of the area within `scale` and an aspect ratio within `ratio` are drawn, as Inception
            was trained (Szegedy et al., CVPR 2015); "random": a crop of the size of the `Preprocessing`, anywhere in
            the image whose shorter side is scaled to its `resize_size`; "center": as in evaluation.
        scale: two floats in (0, 1], least and greatest share of the image's area.
        ratio: two floats > 0, least and greatest width / height; its logarithm is uniform.
        flip: probability of a horizontal flip, in [0, 1].
        brightness: float in [0, 1]; up to this share of white is added or taken away.
        contrast: float in [0, 1]; distances from the mean of each channel times 1 +- so much.
        saturation: float in [0, 1]; saturation times 1 +- so much.
        hue: float in [0, 0.5]; the hue turns by up to this share of the circle.
        grayscale: probability of grayscale, in [0, 1].
        rand_augment: int >= 0, operations of RandAugment an image.
        magnitude: float in [0, 1], strength of these.

    Raises:
        ValueError: an argument out of its range; the message names it.
    """

    def __init__(
        self,
        crop="resized",
        scale=(0.08, 1.0),
        ratio=(3 / 4, 4 / 3),
        flip=0.5,
        brightness=0.0,
        contrast=0.0,
        saturation=0.0,
        hue=0.0,
        grayscale=0.0,
        rand_augment=0,
        magnitude=0.5,
    ):
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
        # Once, and not at every tracing: keras-cv's layers are Keras layers.
        self._jitter = _color_layers() if brightness or contrast or saturation or hue else None
        self._operations = _rand_augment_operations(magnitude) if rand_augment else []

    @property
    def changes_colors(self):
        """Whether it does more than crop and flip; grayscale images go through RGB then."""
        return bool(self._jitter or self.grayscale or self._operations)

    def from_bytes(self, encoded, preprocessing, seed):
        """An encoded image, a scalar string, to the model's input `(height, width, channels)`.

        Of a JPEG only the crop is decoded.

        Args:
            encoded: string scalar, PNG, JPEG, BMP or GIF.
            preprocessing: `Preprocessing`.
            seed: int32 or int64 `(2,)`, from which everything is drawn.
        """
        if self.crop == "center":
            return self._finish(preprocessing.decode(encoded), preprocessing, seed)
        return self._finish(
            tf.cond(
                tf.io.is_jpeg(encoded),
                lambda: self._cropped_jpeg(encoded, preprocessing, seed),
                lambda: self._cropped(
                    tf.io.decode_image(encoded, channels=3, expand_animations=False), preprocessing, seed
                ),
            ),
            preprocessing,
            seed,
        )

    def from_pixels(self, pixels, preprocessing, seed):
        """A uint8 image `(h, w, channels)` to the model's input; see `from_bytes`."""
        if self.crop != "center":
            return self._finish(self._cropped(pixels, preprocessing, seed), preprocessing, seed)
        return self._finish(tf.cast(pixels, tf.float32) / 255.0, preprocessing, seed)

    def crop_window(self, height, width, preprocessing, seed):
        """Crop of an image of `height` x `width` pixels: int32 `[top, left, height, width]`.

        Args:
            height, width: int32 scalars.
            preprocessing: `Preprocessing`, whose size and `resize_size` a "random" crop is made for.
            seed: as for `from_bytes`.
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
        # Where none fits: the largest centre crop whose ratio is allowed.
        middle_height = tf.where(w / h < self.ratio[0], tf.cast(tf.round(w / self.ratio[0]), tf.int32), height)
        middle_width = tf.where(w / h > self.ratio[1], tf.cast(tf.round(h * self.ratio[1]), tf.int32), width)
        middle_height, middle_width = tf.minimum(middle_height, height), tf.minimum(middle_width, width)
        centre = tf.stack([(height - middle_height) // 2, (width - middle_width) // 2, middle_height, middle_width])
        chosen = _placed(height, width, heights[first], widths[first], draws[first, 2:])
        return tf.where(tf.reduce_any(fits), chosen, centre)

    def _cropped_jpeg(self, encoded, preprocessing, seed):
        shape = tf.image.extract_jpeg_shape(encoded)
        window = self.crop_window(shape[0], shape[1], preprocessing, seed)
        return _resized(tf.image.decode_and_crop_jpeg(encoded, window, channels=3), preprocessing)

    def _cropped(self, image, preprocessing, seed):
        shape = tf.shape(image)
        window = self.crop_window(shape[0], shape[1], preprocessing, seed)
        end = window[:2] + window[2:]
        return _resized(image[window[0] : end[0], window[1] : end[1]], preprocessing)

    def _finish(self, image, preprocessing, seed):
        """Flip, colours and normalisation of a crop, float `(height, width, c)` up to 1."""
        if self.crop == "center":
            image = preprocessing.resize(with_channels(image, preprocessing.channels))
        draws = tf.unstack(tf.random.stateless_uniform([6], _sub_seed(seed, 1)))
        if self.flip:
            # Not tf.where, which takes twenty times as long.
            image = tf.cond(draws[0] < self.flip, lambda image=image: tf.reverse(image, [1]), lambda image=image: image)
        if self.changes_colors:
            image = self._colored(with_channels(image, 3), draws, seed)
        return preprocessing.normalize(with_channels(image, preprocessing.channels))

    def _colored(self, image, draws, seed):
        images = image[None]
        if self._jitter:
            brightness, contrast, saturation, hue = (2.0 * draw - 1.0 for draw in draws[1:5])
            layers = self._jitter
            if self.brightness:
                images = layers["brightness"].augment_images(
                    images, transformations=tf.reshape(self.brightness * brightness, [1, 1, 1, 1])
                )
            if self.contrast:
                images = layers["contrast"].augment_images(
                    images, transformations=tf.reshape(1.0 + self.contrast * contrast, [1, 1, 1, 1])
                )
            if self.saturation:
                factor = 1.0 + self.saturation * saturation
                # The layer multiplies by t / (1 - t).
                images = layers["saturation"].augment_images(
                    images, transformations=tf.reshape(factor / (1.0 + factor), [1])
                )
            if self.hue:
                images = layers["hue"].augment_images(images, transformations=tf.reshape(self.hue * hue, [1]))
        if self.grayscale:
            images = tf.cond(
                draws[5] < self.grayscale,
                lambda images=images: tf.image.grayscale_to_rgb(to_grayscale(images)),
                lambda images=images: images,
            )
        if self._operations:
            images = _rand_augmented(255.0 * images, self._operations, self.rand_augment, _sub_seed(seed, 2)) / 255.0
        return images[0]


# The published code's, and what RandAugment adds to the first. "big" is for inputs of 256 x 256 pixels.
PRESETS = {
    "base": {},
    "adv": {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.2, "grayscale": 0.2},
    "big": {},
    "red": {"crop": "random"},
    "rand": {"rand_augment": 2, "magnitude": 0.5},
    "flip": {"crop": "center"},
}
# Size of the model's input that a preset is made for, where it is not that of the config.
PRESET_SIZES = {"big": 256}


def preset(name):
    """Settings of `Augmentation` by name.

    Args:
        name: one of the published code's "base" (random resized crop and flip), "adv" (and grayscale and colours),
            "big" (base, for inputs of 256 x 256) and "red" (random crop of the image scaled to `resize_size`, and
            flip); or "rand" (base and two operations of RandAugment), or "flip" (the flip alone).

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
    """Window of that size at a uniform position."""
    room = tf.stack([height - window_height, width - window_width])
    corner = tf.minimum(tf.cast(tf.floor(draws * tf.cast(room + 1, tf.float32)), tf.int32), room)
    return tf.concat([tf.maximum(corner, 0), [window_height, window_width]], axis=0)


def _resized(image, preprocessing):
    image = resize_antialiased(image, preprocessing.height, preprocessing.width) / 255.0
    image.set_shape([preprocessing.height, preprocessing.width, image.shape[-1]])
    return image


def _keras_cv_layers():
    # Its import takes seconds.
    import keras_cv

    # The layers ask for the global generator, though nothing is drawn from it here; where runs are deterministic there
    # is none before it is set.
    try:
        tf.random.get_global_generator()
    except RuntimeError:
        tf.random.set_global_generator(tf.random.Generator.from_seed(0))
    return keras_cv.layers


def _color_layers():
    layers = _keras_cv_layers()
    return {
        "brightness": layers.RandomBrightness(0.0, value_range=(0, 1)),
        "contrast": layers.RandomContrast((0, 1), 0.5),
        "saturation": layers.RandomSaturation(0.5),
        "hue": layers.RandomHue(0.5, value_range=(0, 1)),
    }


def _rand_augment_operations(magnitude, deviation=0.15):
    """Functions of `(images, draws)`: images `(1, h, w, 3)` up to 255 and draws `(normal, uniform)`, one each.

    The operations and what their strengths are drawn from are those of keras-cv's `RandAugment`.
    """
    layers = _keras_cv_layers()
    pixels = (0, 255)
    auto_contrast = layers.AutoContrast(pixels)
    equalization = layers.Equalization(pixels)
    solarization = layers.Solarization(pixels)
    # Their factors are not used: `augment_images` is handed the strength.
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
        lambda images, draws: equalization.augment_images(images, transformations=None),
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
    """`count` operations one after the other, each drawn anew; one of eleven times it is the identity."""
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
