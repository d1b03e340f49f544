"""Augmentation: distributions, equality of its paths, determinism, and agreement with keras-cv's layers."""

import io

import numpy as np
import pytest
import scipy.stats
import tensorflow as tf
from PIL import Image

from s2sd_tf import data
from s2sd_tf.data import augmentation


def seeds(count):
    return np.stack([np.full(count, 3), np.arange(count)], axis=1).astype(np.int64)


def many(function, count):
    """`function(seed)` for many seeds, in a graph."""
    signature = tf.TensorSpec(None, tf.nest.map_structure(lambda t: t.dtype, function(seeds(1)[0])))
    mapped = tf.function(lambda all_seeds: tf.map_fn(function, all_seeds, fn_output_signature=signature.dtype))
    return mapped(tf.constant(seeds(count))).numpy()


def smooth(height, width, seed=0):
    """An image without fine detail, which survives JPEG and resizing."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.BICUBIC))


def encoded(pixels, kind="png", **settings):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **settings)
    return buffer.getvalue()


def loop_crop(rng, height, width, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    """The algorithm in plain Python, one crop at a time."""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = np.exp(rng.uniform(np.log(ratio[0]), np.log(ratio[1])))
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


class TestCrops:
    @pytest.mark.parametrize(
        ("height", "width", "settings"),
        [(375, 500, {}), (60, 40, {"scale": (0.3, 0.9)}), (30, 90, {}), (200, 200, {"ratio": (0.5, 2.0)})],
    )
    def test_resized_crops_match_the_distribution_of_the_loop(self, height, width, settings):
        preprocessing = data.Preprocessing(24, 24)
        augment = data.Augmentation(**settings)
        own = many(lambda seed: augment.crop_window(height, width, preprocessing, seed), 3000)
        rng = np.random.default_rng(1)
        expected = np.array([loop_crop(rng, height, width, **settings) for _ in range(3000)])
        assert (own[:, :2] >= 0).all()
        assert (own[:, :2] + own[:, 2:] <= [height, width]).all()
        for quantity in (
            lambda w: w[:, 2] * w[:, 3] / (height * width),
            lambda w: w[:, 3] / w[:, 2],
            lambda w: w[:, 0] / np.maximum(1, height - w[:, 2]),
            lambda w: w[:, 1] / np.maximum(1, width - w[:, 3]),
        ):
            assert scipy.stats.ks_2samp(quantity(own), quantity(expected)).pvalue > 1e-3

    def test_a_long_strip_gets_its_centre(self):
        augment = data.Augmentation(scale=(0.9, 1.0))
        windows = many(lambda seed: augment.crop_window(10, 400, data.Preprocessing(8, 8), seed), 50)
        assert {tuple(window) for window in windows.tolist()} == {(0, 193, 10, 13)}

    def test_random_crops_are_anywhere_and_have_one_size(self):
        preprocessing = data.Preprocessing(224, 224, resize_size=256)
        augment = data.Augmentation(**augmentation.preset("red"))
        windows = many(lambda seed: augment.crop_window(512, 700, preprocessing, seed), 4000)
        assert (windows[:, 2:] == 448).all()
        for places, most in ((windows[:, 0], 64), (windows[:, 1], 252)):
            counts = np.bincount(places, minlength=most + 1)
            assert len(counts) == most + 1
            assert scipy.stats.chisquare(counts).pvalue > 1e-3

    def test_an_image_of_one_pixel(self):
        for name in augmentation.PRESETS:
            augment = data.Augmentation(**augmentation.preset(name))
            out = augment.from_bytes(encoded(smooth(1, 1)), data.Preprocessing(5, 4, resize_size=6), seeds(1)[0])
            assert out.shape == (5, 4, 3)
            assert np.isfinite(out).all()


class TestPaths:
    @pytest.mark.parametrize("name", sorted(augmentation.PRESETS))
    def test_jpeg_png_and_pixels_agree(self, name):
        pixels = smooth(90, 120)
        preprocessing = data.Preprocessing(32, 32, resize_size=40, mean=0.5, std=0.25)
        augment = data.Augmentation(**augmentation.preset(name))
        for seed in seeds(4):
            from_pixels = augment.from_pixels(pixels, preprocessing, seed)
            np.testing.assert_allclose(augment.from_bytes(encoded(pixels), preprocessing, seed), from_pixels, atol=1e-5)
            jpeg = augment.from_bytes(encoded(pixels, "jpeg", quality=100, subsampling=0), preprocessing, seed)
            # Equalised histograms and thresholds amplify rounding.
            assert np.mean(np.abs(jpeg - from_pixels)) < (0.2 if name == "rand" else 0.03)

    @pytest.mark.parametrize("mode", ["L", "CMYK"])
    def test_gray_and_cmyk_jpegs(self, mode):
        buffer = io.BytesIO()
        Image.fromarray(smooth(60, 50)).convert(mode).save(buffer, "jpeg", quality=100)
        augment, preprocessing = data.Augmentation(), data.Preprocessing(16, 16)
        out = augment.from_bytes(buffer.getvalue(), preprocessing, seeds(1)[0]).numpy()
        whole = tf.io.decode_image(buffer.getvalue(), channels=3)
        np.testing.assert_allclose(out, augment.from_pixels(whole, preprocessing, seeds(1)[0]), atol=0.02)
        if mode == "L":
            np.testing.assert_allclose(out[..., 0], out[..., 1], atol=1e-6)

    def test_channels(self):
        pixels = smooth(20, 20)
        augment = data.Augmentation(crop="center", flip=0.0)
        gray = augment.from_bytes(encoded(pixels), data.Preprocessing(20, 20, channels=1), seeds(1)[0])
        np.testing.assert_allclose(gray, data.Preprocessing(20, 20, channels=1).from_pixels(pixels), atol=1e-6)
        for size in (20, 14):
            rgb = augment.from_pixels(pixels[..., :1], data.Preprocessing(size, size), seeds(1)[0])
            assert rgb.shape == (size, size, 3)
            np.testing.assert_allclose(rgb[..., 0], rgb[..., 2], atol=1e-6)
            gray = augment.from_pixels(pixels, data.Preprocessing(size, size, channels=1), seeds(1)[0])
            assert gray.shape == (size, size, 1)
        jittered = data.Augmentation(crop="center", brightness=0.3, grayscale=0.5)
        assert jittered.from_pixels(pixels[..., :1], data.Preprocessing(14, 14, channels=1), seeds(1)[0]).shape == (
            14,
            14,
            1,
        )
        bgr = augment.from_pixels(pixels, data.Preprocessing(20, 20, channel_order="bgr"), seeds(1)[0])
        np.testing.assert_allclose(bgr, pixels[..., ::-1] / np.float32(255), atol=1e-6)

    def test_normalisation_is_the_same_as_in_evaluation(self):
        pixels = smooth(30, 30)
        preprocessing = data.Preprocessing(
            24, 24, resize_size=26, invert=True, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), channel_order="bgr"
        )
        out = data.Augmentation(crop="center", flip=0.0).from_bytes(encoded(pixels), preprocessing, seeds(1)[0])
        np.testing.assert_allclose(out, preprocessing.from_pixels(pixels), atol=1e-6)
        plain = preprocessing.without_normalization().from_pixels(pixels).numpy()
        expected = ((1 - plain)[..., ::-1] - [0.4, 0.5, 0.6]) / [0.2, 0.3, 0.4]
        np.testing.assert_allclose(preprocessing.from_pixels(pixels), expected, atol=1e-5)


class TestFlipsAndColors:
    preprocessing = data.Preprocessing(8, 8)
    pixels = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)

    def outputs(self, count, **settings):
        augment = data.Augmentation(crop="center", **settings)
        return many(lambda seed: augment.from_pixels(self.pixels, self.preprocessing, seed), count)

    @pytest.mark.parametrize("flip", [0.0, 0.3, 0.5, 1.0])
    def test_flips(self, flip):
        plain = self.pixels / np.float32(255)
        out = self.outputs(1000, flip=flip)
        flipped = np.isclose(out, plain[:, ::-1], atol=1e-6).all((1, 2, 3))
        assert (flipped | np.isclose(out, plain, atol=1e-6).all((1, 2, 3))).all()
        assert scipy.stats.binomtest(int(flipped.sum()), 1000, flip).pvalue > 1e-3

    def test_grayscale(self):
        out = self.outputs(1000, flip=0.0, grayscale=0.2)
        gray = np.isclose(out[..., 0], out[..., 1], atol=1e-6).all((1, 2))
        assert scipy.stats.binomtest(int(gray.sum()), 1000, 0.2).pvalue > 1e-3

    def test_each_color_operation_does_what_it_says(self):
        plain = self.pixels / np.float32(255)
        out = self.outputs(300, flip=0.0, brightness=0.2)
        inside = (out > 0.0) & (out < 1.0)
        deltas = [np.median((one - plain)[mask]) for one, mask in zip(out, inside)]
        assert scipy.stats.kstest(deltas, scipy.stats.uniform(-0.2, 0.4).cdf).pvalue > 1e-3

        out = self.outputs(300, flip=0.0, contrast=0.2)
        means = plain.mean((0, 1))
        factors = [np.median(((one - means) / (plain - means))[2:5]) for one in out]
        assert scipy.stats.kstest(factors, scipy.stats.uniform(0.8, 0.4).cdf).pvalue > 1e-3

        pixel = tf.image.rgb_to_hsv(plain).numpy()[7, 0]
        out = tf.image.rgb_to_hsv(self.outputs(300, flip=0.0, saturation=0.2)).numpy()[:, 7, 0]
        np.testing.assert_allclose(out[:, [0, 2]], np.broadcast_to(pixel[[0, 2]], (300, 2)), atol=1e-5)
        assert scipy.stats.kstest(out[:, 1] / pixel[1], scipy.stats.uniform(0.8, 0.4).cdf).pvalue > 1e-3

        out = tf.image.rgb_to_hsv(self.outputs(300, flip=0.0, hue=0.2)).numpy()[:, 7, 0]
        turns = (out[:, 0] - pixel[0] + 0.5) % 1.0 - 0.5
        assert scipy.stats.kstest(turns, scipy.stats.uniform(-0.2, 0.4).cdf).pvalue > 1e-3

    @pytest.mark.parametrize("kind", ["noise", "smooth", "few colors", "gray"])
    def test_colors_match_keras_cv(self, kind):
        """The layers one after another, with the strengths that are drawn here."""
        from keras_cv import layers

        rng = np.random.default_rng(0)
        pixels = {
            "noise": rng.integers(0, 256, (24, 24, 3), dtype=np.uint8),
            "smooth": smooth(24, 24),
            "few colors": (rng.integers(0, 3, (24, 24, 3)) * 127).astype(np.uint8),
            "gray": np.repeat(rng.integers(0, 256, (24, 24, 1), dtype=np.uint8), 3, axis=2),
        }[kind]
        most = {"brightness": 0.4, "contrast": 0.6, "saturation": 0.9, "hue": 0.5}
        augment = data.Augmentation(crop="center", flip=0.0, **most)
        for seed in seeds(12):
            draws = tf.random.stateless_uniform([6], tf.random.experimental.stateless_fold_in(seed, 1))[1:5]
            brightness, contrast, saturation, hue = (
                strength * (2.0 * draw - 1.0) for strength, draw in zip(most.values(), draws)
            )
            images = tf.constant(pixels[None] / np.float32(255))
            for layer, strength, shape in (
                (layers.RandomBrightness(0.0, value_range=(0, 1)), brightness, [1, 1, 1, 1]),
                (layers.RandomContrast((0, 1), 0.5), 1.0 + contrast, [1, 1, 1, 1]),
                # The layer multiplies by t / (1 - t).
                (layers.RandomSaturation(0.5), (1.0 + saturation) / (2.0 + saturation), [1]),
                (layers.RandomHue(0.5, value_range=(0, 1)), hue, [1]),
            ):
                images = layer.augment_images(images, transformations=tf.reshape(strength, shape))
            found = augment.from_pixels(pixels, data.Preprocessing(24, 24), seed)
            np.testing.assert_allclose(found, images[0], atol=1e-3)

    def test_rand_augment_uses_every_operation_and_none(self):
        augment = data.Augmentation(crop="center", flip=0.0, rand_augment=1)
        pixels = smooth(24, 24)
        preprocessing = data.Preprocessing(24, 24)
        out = many(lambda seed: augment.from_pixels(pixels, preprocessing, seed), 330)
        assert ((out >= 0.0) & (out <= 1.0)).all()
        same = np.isclose(out, pixels / np.float32(255), atol=1e-5).all((1, 2, 3))
        # One of the eleven operations is the identity, and auto-contrast may be.
        assert 10 < same.sum() < 90
        assert len(np.unique(np.round(out[~same].reshape((~same).sum(), -1), 4), axis=0)) > 150

    def test_rand_augment_operations_match_keras_cv(self):
        """Compares every operation, at a fixed strength, with the layer's own call."""
        import keras_cv

        images = tf.constant(smooth(24, 24)[None], tf.float32)
        operations = augmentation._rand_augment_operations(0.5, 0.0)
        layers = keras_cv.layers.RandAugment.get_standard_policy((0, 255), 0.5, 0.0)
        assert len(operations) == len(layers) == 10
        # The operations with a fixed strength: auto-contrast, equalisation, solarisation and colour.
        for operation, layer in list(zip(operations, layers))[:4]:
            np.testing.assert_allclose(operation(images, (0.0, 0.7)), layer(images), atol=1e-3)
        # The others draw a sign or a factor; ours is one end of its range.
        for operation, layer in list(zip(operations, layers))[4:]:
            ends = [operation(images, (0.0, uniform)) for uniform in (0.0, 1.0)]
            distance = float(np.mean(np.abs(ends[0] - ends[1])))
            assert distance > 5.0
            theirs = layer(images)
            assert min(float(np.mean(np.abs(theirs - end))) for end in ends) <= distance


class TestBatches:
    def batches(self, images, **settings):
        preprocessing = data.Preprocessing(12, 12, resize_size=14)
        augment = data.Augmentation(**augmentation.preset("adv"))
        return data.class_balanced_batches(images, preprocessing, 2, 3, augmentation=augment, **settings)

    @pytest.fixture
    def images(self):
        pixels = np.stack([smooth(20, 26, seed) for seed in range(24)])
        return data.ImageSet(pixels, np.arange(24, dtype=np.int32) % 4, tuple("abcd"))

    def test_does_not_depend_on_threads_or_the_first_step(self, images):
        runs = []
        for start in (0, 0, 1):
            dataset = self.batches(images, seed=5, start_epoch=start)
            runs.append([[(x.numpy(), y.numpy()) for x, y in dataset] for _ in range(2)])
        for one, other in zip(runs[0], runs[1]):
            for (x, y), (x_again, y_again) in zip(one, other):
                np.testing.assert_array_equal(x, x_again)
                np.testing.assert_array_equal(y, y_again)
        for (x, y), (x_again, y_again) in zip(runs[0][1], runs[2][0]):
            np.testing.assert_array_equal(x, x_again)
            np.testing.assert_array_equal(y, y_again)

    def test_epochs_seeds_and_images_differ(self, images):
        one = data.ImageSet(images.images[:6], np.int32([0, 0, 0, 1, 1, 1]), ("a", "b"))
        one.images[:] = one.images[0]
        first, second = ([x.numpy() for x, _ in self.batches(one, seed=seed)] for seed in (0, 1))
        dataset = self.batches(one, seed=0)
        epochs = [[x.numpy() for x, _ in dataset] for _ in range(2)]
        np.testing.assert_array_equal(first[0], epochs[0][0])
        assert len(np.unique(np.concatenate([first[0], second[0], epochs[1][0]]).reshape(18, -1), axis=0)) == 18

    def test_a_cache_is_refused(self, images):
        with pytest.raises(ValueError, match=r"cache: .*Received: True"):
            self.batches(images, cache=True)


@pytest.mark.parametrize(
    "settings",
    [
        {"crop": "corner"},
        {"scale": (0.5, 0.2)},
        {"scale": (0.0, 1.0)},
        {"scale": 0.5},
        {"magnitude": "a"},
        {"ratio": (1.0,)},
        {"flip": 1.5},
        {"hue": 0.7},
        {"brightness": -0.1},
        {"rand_augment": -1},
        {"rand_augment": 1.5},
        {"magnitude": 2.0},
    ],
)
def test_errors_name_the_argument(settings):
    with pytest.raises(ValueError, match=rf"{next(iter(settings))}: expected .*Received: "):
        data.Augmentation(**settings)


def test_an_unknown_preset():
    with pytest.raises(ValueError, match=r"augmentation: expected one of .*Received: 'loud'"):
        augmentation.preset("loud")
