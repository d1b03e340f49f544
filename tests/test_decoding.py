"""Decoding: every format and orientation like Pillow, palettes, limits, and what is read beyond the image's end."""

import io
import struct
import zlib

import numpy as np
import pytest
import tensorflow as tf
from conftest import small_config
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from test_fuzz import clear_errors, examples

from s2sd_tf import data, export, serving, training
from s2sd_tf.data.decoding import decode_pixels, decodes_webp
from s2sd_tf.data.image_files import unreadable
from s2sd_tf.training.dry_run import dry_run
from s2sd_tf.untrusted import MAX_PIXELS

COLORS = np.kron(np.random.default_rng(0).integers(0, 256, (4, 6, 3)), np.ones((8, 8, 1))).astype(np.uint8)


def encoded(image, kind, **settings):
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def oriented(orientation, kind, endian="<"):
    """The encoded `COLORS`, with an orientation."""
    exif = Image.Exif()
    exif.endian = endian
    exif[0x10F], exif[0x112] = "maker", orientation
    lossless = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    return encoded(Image.fromarray(COLORS), kind, exif=exif.tobytes(), **lossless)


def upright(content):
    """What Pillow decodes."""
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))


def empty_png(width, height):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = zlib.compress(bytes((width + 1) * height))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def with_size(kind, width, height):
    """An image of one pixel whose header says another size."""
    content = bytearray(encoded(Image.new("RGB", (1, 1)), kind))
    places = {"PNG": (">I", 16, 20), "GIF": ("<H", 6, 8), "BMP": ("<I", 18, 22), "JPEG": (">H", 0, 0)}
    form, of_width, of_height = places[kind]
    if kind == "JPEG":
        of_height = content.index(b"\xff\xc0") + 5
        of_width = of_height + 2
    struct.pack_into(form, content, of_width, width)
    struct.pack_into(form, content, of_height, height)
    return bytes(content)


def test_a_run_names_what_it_cannot_decode(tmp_path):
    for number in range(8):
        (tmp_path / "x" / f"class{number // 2}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / f"class{number // 2}" / f"{number}.png").write_bytes(empty_png(8, 8))
    config = {"data.name": "folder", "data.root": str(tmp_path / "x"), "data.folder.check": "none"}
    config = small_config(**config, **{"data.classes_per_batch": 2, "data.image_size": 8, "data.validation_classes": 0})
    for begin, path, content, reason in (
        (lambda: training.train(config, tmp_path / "run"), "class0/0.png", with_size("PNG", 30_000, 30_000), "30000 x"),
        (lambda: dry_run(config), "class3/7.png", b"no image", "[Uu]nknown image|PNG"),
    ):
        whole = (tmp_path / "x" / path).read_bytes()
        (tmp_path / "x" / path).write_bytes(content)
        with pytest.raises(ValueError, match=rf"^images: expected images that .* Received: \S*/{path}: .*({reason})"):
            begin()
        (tmp_path / "x" / path).write_bytes(whole)


class TestFormats:
    @pytest.mark.parametrize(
        ("kind", "modes"),
        [("BMP", "1 L P RGB RGBA"), ("PNG", "1 L P RGB RGBA"), ("GIF", "P"), ("JPEG", "L RGB CMYK"), ("WEBP", "RGB")],
    )
    def test_like_pillow(self, kind, modes):
        if kind == "WEBP" and not decodes_webp():
            pytest.skip("this version of TensorFlow does not decode WebP")
        for mode in modes.split():
            content = encoded(
                Image.fromarray(COLORS).convert(mode), kind, **({"lossless": True} if kind == "WEBP" else {})
            )
            np.testing.assert_allclose(decode_pixels(content), upright(content), atol=2 if kind == "JPEG" else 0)

    def test_a_bmp_of_four_bits_from_top_to_bottom(self):
        palette = bytes([0, 0, 255, 0, 255, 0, 0, 0, 0, 255, 0, 0])
        head = struct.pack("<IiiHHIIiiII", 40, 3, -2, 1, 4, 0, 0, 0, 0, 3, 0)
        content = b"BM" + struct.pack("<IHHI", 74, 0, 0, 66) + head + palette + bytes.fromhex("0120000021000000")
        red, blue, green = [255, 0, 0], [0, 0, 255], [0, 255, 0]
        expected = [[red, blue, green], [green, blue, red]]
        np.testing.assert_array_equal(decode_pixels(content), expected)

    @pytest.mark.parametrize("compression", [1, 3, 4])
    def test_compressed_bmps_are_refused(self, compression, tmp_path):
        content = bytearray(encoded(Image.fromarray(COLORS).convert("P"), "BMP"))
        content[30] = compression
        (tmp_path / "a.bmp").write_bytes(content)
        ((path, reason),) = unreadable([str(tmp_path / "a.bmp")], "decode")
        assert path.endswith("a.bmp")
        assert reason == "image: expected a BMP without compression. Received: another kind of BMP"

    def test_only_the_first_frame_of_a_gif_is_decoded(self):
        frames = [Image.fromarray(COLORS).rotate(90 * k).quantize(16) for k in range(3)]
        content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
        np.testing.assert_array_equal(decode_pixels(content), upright(content))
        # A later frame of 65,535 x 65,535 pixels.
        at = content.index(b"\x2c", content.index(b"\x2c\0\0\0\0") + 20)
        at = content.index(b"\x2c\0\0\0\0", at)
        huge = content[: at + 5] + b"\xff\xff\xff\xff" + content[at + 9 :]
        np.testing.assert_array_equal(decode_pixels(huge), upright(content))
        first = content.index(b"\x2c\0\0\0\0")
        with pytest.raises(tf.errors.InvalidArgumentError, match="65535 x 65535"):
            decode_pixels(content[: first + 5] + b"\xff\xff\xff\xff" + content[first + 9 :])


class TestOrientation:
    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
    def test_like_pillow(self, kind):
        if kind == "WEBP" and not decodes_webp():
            pytest.skip("this version of TensorFlow does not decode WebP")
        for orientation in range(10):
            for endian in "<>":
                content = oriented(orientation, kind, endian)
                np.testing.assert_allclose(decode_pixels(content), upright(content), atol=4 if kind == "JPEG" else 0)

    def test_crops_and_batches_are_those_of_the_upright_image(self):
        """For training, where only the crop of a JPEG is decoded, and evaluation."""
        preprocessing = data.Preprocessing(12, 10, resize_size=16)
        augment = data.Augmentation(flip=0.0)
        seed = tf.constant([3, 5])
        train = tf.function(
            lambda image: augment.from_bytes(image, preprocessing, seed), input_signature=[tf.TensorSpec([], tf.string)]
        )
        for orientation in range(1, 9):
            content = oriented(orientation, "JPEG")
            pixels = upright(content)
            np.testing.assert_allclose(train(content), augment.from_pixels(pixels, preprocessing, seed), atol=0.03)
        images = data.ImageSet(np.array([content, content], object), np.array([0, 1], np.int32), ("a", "b"))
        batch = next(iter(data.evaluation_batches(images, preprocessing)))
        np.testing.assert_allclose(batch[1], preprocessing.from_pixels(pixels), atol=0.03)

    @pytest.mark.parametrize(
        "exif", [b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"]
    )
    def test_broken_exif_is_ignored(self, exif):
        content = encoded(Image.fromarray(COLORS), "JPEG")
        broken = content[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + content[2:]
        np.testing.assert_array_equal(decode_pixels(broken), decode_pixels(content))


# The check of the header takes long. The images cannot be decoded: where that did not wait, its error would come first.
SLOW_CHECK = """
import sys, time
import tensorflow as tf

to_number = tf.strings.to_number
def slowly(text, dtype):
    wait = lambda text: [time.sleep(0.2), text][1]
    return to_number(tf.ensure_shape(tf.numpy_function(wait, [text], tf.string, stateful=False), []), dtype)
tf.strings.to_number = slowly

from s2sd_tf import data
preprocessing, augment, seed = data.Preprocessing(8, 8), data.Augmentation(), tf.constant([1, 2])
evaluate = tf.function(preprocessing.from_bytes)
train = tf.function(lambda encoded: augment.from_bytes(encoded, preprocessing, seed))
for path in sys.argv[1:]:
    for decode in (data.decoding.decode_pixels, evaluate, train):
        try:
            decode(tf.io.read_file(path))
        except tf.errors.InvalidArgumentError as error:
            print(data.decoding.first_line(error))
"""


class TestSizes:
    @pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "JPEG"])
    def test_too_many_pixels_are_refused_by_the_header(self, kind):
        for width, height in ((13_000, 14_000), (60_000, 60_000)):
            with pytest.raises(tf.errors.InvalidArgumentError) as refused:
                decode_pixels(with_size(kind, width, height))
            expected = f"image: expected at most {MAX_PIXELS} pixels. Received: {height} x {width}"
            assert data.decoding.first_line(refused.value) == expected

    def test_nothing_is_decoded_before_the_check(self, tmp_path, run_python):
        for kind in ("PNG", "GIF", "BMP", "JPEG"):
            (tmp_path / kind).write_bytes(with_size(kind, 13_000, 14_000))
        output = run_python("-c", SLOW_CHECK, *tmp_path.iterdir()).stdout
        assert output.splitlines() == 12 * [f"image: expected at most {MAX_PIXELS} pixels. Received: 14000 x 13000"]

    @pytest.mark.parametrize("shape", [(1500, 1), (1, 1500), (30_000, 1), (1, 30_000), (1, 1)])
    @pytest.mark.parametrize("resize_size", [256, None])
    def test_long_strips_are_resized_at_the_size_of_the_crop(self, shape, resize_size, monkeypatch):
        sizes = []
        scale = tf.raw_ops.ScaleAndTranslate
        monkeypatch.setattr(tf.raw_ops, "ScaleAndTranslate", lambda **of: sizes.append(scale(**of)) or sizes[-1])
        out = data.Preprocessing(224, 200, resize_size=resize_size).from_bytes(empty_png(*shape[::-1]))
        assert out.shape == (224, 200, 3)
        assert max(int(tf.size(image)) for image in sizes) <= 3 * 2**22
        np.testing.assert_array_equal(out, np.zeros(out.shape))

    @pytest.mark.parametrize("shape", [(300, 400), (90, 61), (224, 1000), (1, 7), (40, 3000)])
    def test_the_crop_of_the_resized_image(self, shape):
        """The same pixels as those of the whole image, resized and then cropped."""
        pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
        scale = 72 / min(shape)
        scaled = [max(64, round(side * scale)) for side in shape]
        whole = tf.image.resize(pixels / np.float32(255), scaled, antialias=True)
        top, left = (scaled[0] - 64) // 2, (scaled[1] - 60) // 2
        found = data.Preprocessing(64, 60, resize_size=72).from_pixels(pixels)
        np.testing.assert_allclose(found, whole[top : top + 64, left : left + 60], atol=2e-4)


class TestReducedJpegs:
    """A JPEG of at least four times the size of the result is decoded smaller, to almost the same result."""

    # Fine lines and a slope, so that a shift of a fraction of a pixel shows.
    rows, columns = np.mgrid[:517, :803]
    pixels = np.stack(
        [rows * 255 / 516, columns * 255 / 802, 128 + 90 * np.sin(rows / 9) * np.cos(columns / 7)], axis=-1
    ).astype(np.uint8)

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize(
        "preprocessing",
        [
            data.Preprocessing(56, 48, resize_size=64),  # decoded at a quarter
            data.Preprocessing(130, 100),  # at a half, or not reduced
            data.Preprocessing(24, 24, channels=1, resize_size=32, mean=0.5, std=0.5),  # at an eighth
        ],
    )
    def test_like_the_whole_image(self, orientation, preprocessing):
        exif = Image.Exif()
        exif[0x112] = orientation
        content = encoded(Image.fromarray(self.pixels), "JPEG", exif=exif.tobytes(), quality=95)
        whole = decode_pixels(content)
        augments = [data.Augmentation(crop=crop, scale=(0.5, 1.0)) for crop in ("resized", "random", "center")]
        pairs = [(preprocessing.from_bytes(content), preprocessing.from_pixels(whole))]
        for augment in augments:
            for number in range(4):
                seed = tf.constant([5, number])
                pairs.append(
                    [
                        f(i, preprocessing, seed)
                        for f, i in ((augment.from_bytes, content), (augment.from_pixels, whole))
                    ]
                )
        for found, expected in pairs:
            differences = 255 * preprocessing.std * np.abs(np.subtract(found, expected))
            assert differences.mean() < 1.5
            assert np.quantile(differences, 0.99) < 6

    def test_smaller_jpegs_are_decoded_whole(self):
        content = encoded(Image.fromarray(self.pixels), "JPEG", quality=95)
        for height, width, same in ((130, 201, True), (130, 200, True), (129, 200, False)):
            preprocessing = data.Preprocessing(height, width)
            found, expected = preprocessing.from_bytes(content), preprocessing.from_pixels(decode_pixels(content))
            assert (found.numpy() == expected.numpy()).all() == same


def test_data_after_the_end_of_an_image_are_allowed(tmp_path):
    thumbnail = encoded(Image.fromarray(COLORS), "JPEG")
    whole = encoded(Image.fromarray(COLORS), "JPEG", exif=b"Exif\0\0" + thumbnail)
    png = encoded(Image.fromarray(COLORS), "PNG")
    contents = {"motion.jpg": whole + bytes(9000), "long.png": png + bytes(9000), "cut.jpg": whole[:-2] + bytes(9000)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    paths = [str(tmp_path / name) for name in contents]
    assert unreadable(paths, "files") == [(paths[2], "truncated: its end is missing")]
    assert unreadable(paths[:2], "decode") == []


def test_reasons_are_words_for_people(tmp_path):
    contents = {
        "a.png": b"\x89PNG\r\n\x1a\n and nothing more",
        "b.jpg": b"no image",
        "c.jpg": encoded(Image.fromarray(COLORS), "JPEG")[:400],
        "d.bmp": encoded(Image.fromarray(COLORS), "BMP")[:400],
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    found = dict(unreadable([str(tmp_path / name) for name in contents], "decode"))
    assert len(found) == 4
    for reason in found.values():
        assert not any(word in reason for word in ("{{", "[[", "Op:", "Graph", "node", "assertion")), reason


class TestImageSets:
    PIXELS = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 3), dtype=np.uint8)

    def batch(self, images, labels=(0, 0, 1, 1), **names):
        images = data.ImageSet(images, labels, **names)
        assert images.labels.dtype == np.int32
        return next(iter(data.evaluation_batches(images, data.Preprocessing(6, 5)))).numpy()

    def test_arrays_lists_and_tensors_of_every_kind(self):
        expected = self.PIXELS / np.float32(255)
        alpha = np.concatenate([self.PIXELS, self.PIXELS[..., :1]], axis=-1)
        floats = self.PIXELS / 255.0
        for images in (self.PIXELS, alpha, floats, self.PIXELS.tolist(), list(self.PIXELS), tf.constant(self.PIXELS)):
            np.testing.assert_allclose(self.batch(images), expected, atol=1e-6)
        grays = np.repeat(expected[..., :1], 3, axis=-1)
        for images in (self.PIXELS[..., 0], self.PIXELS[..., :1], floats.astype(np.float32)[..., 0]):
            np.testing.assert_allclose(self.batch(images), grays, atol=1e-6)
        content = [encoded(Image.fromarray(image), "PNG") for image in self.PIXELS]
        for images in (content, tf.constant(content), np.array(content, object)):
            np.testing.assert_allclose(self.batch(images), expected, atol=1e-6)

    def test_paths_of_every_kind(self, tmp_path):
        paths = [tmp_path / f"{k}.png" for k in range(2)]
        for images in (paths, [str(path) for path in paths], np.array([str(path) for path in paths], object)):
            made = data.ImageSet(images, [0, 1])
            assert made.kind == "paths"
            assert made.images.tolist() == [str(path) for path in paths]

    def test_labels(self):
        for labels in (["b", "b", "a", "a"], np.array(["b", "b", "a", "a"]), tf.constant(["b", "b", "a", "a"])):
            images = data.ImageSet(self.PIXELS, labels)
            assert images.class_names == ("a", "b")
            assert images.labels.tolist() == [1, 1, 0, 0]
        assert data.ImageSet(self.PIXELS, ["b", "b", "a", "a"], ["b", "a"]).labels.tolist() == [0, 0, 1, 1]
        for labels in ([0, 0, 2, 2], tf.constant([0, 0, 2, 2]), np.array([[0], [0], [2], [2]], np.uint8)):
            images = data.ImageSet(self.PIXELS, labels)
            assert images.class_names == ("0", "1", "2")
            assert images.labels.tolist() == [0, 0, 2, 2]

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"images": np.zeros((4, 6))}, "images: expected pixels"),
            ({"images": np.zeros((4, 6, 5, 2))}, "images: expected pixels"),
            ({"images": np.full((4, 6, 5), 255.0)}, r"images: expected floats in \[0, 1\]. Received: 255"),
            ({"images": np.full((4, 6, 5), np.nan)}, r"images: expected floats in \[0, 1\]. Received: nan"),
            ({"images": np.full((4, 6, 5), -1)}, r"images: expected integers in \[0, 255\]"),
            ({"images": [b"x", "x", b"x", b"x"]}, "images: expected pixels"),
            ({"images": [np.zeros((2, 2)), np.zeros((3, 2))] * 2}, "images: expected pixels"),
            ({"images": None}, "images: expected pixels"),
            ({"images": np.array([b"a\0"] * 4)}, "images: expected pixels"),
            ({"labels": [0.0, 0.0, 1.0, 1.0]}, "labels: expected integers or class names"),
            ({"labels": [True, False, True, True]}, "labels: expected integers or class names"),
            ({"labels": "aabb"}, "labels: expected integers or class names"),
            ({"labels": ["a", "a", "b", "c"], "class_names": ("a", "b")}, r"labels: expected names .*\['c'\]"),
            ({"labels": [0, 0, -1, 1]}, "labels: expected integers in"),
            ({"class_names": (1, 2)}, "class_names: expected names"),
        ],
    )
    def test_others_are_refused_by_name(self, arguments, words):
        with pytest.raises(ValueError, match=words) as refused:
            data.ImageSet(**{"images": self.PIXELS, "labels": [0, 0, 1, 1], **arguments})
        assert "\n" not in str(refused.value)

    @examples(60)
    @given(st.data())
    def test_random_arguments(self, draw):
        """A data set that can be read, or one line that names the argument."""
        images = draw.draw(st.sampled_from(self.ODD_IMAGES), "images")
        arguments = {"labels": draw.draw(st.sampled_from(self.ODD_LABELS), "labels")}
        arguments["class_names"] = draw.draw(
            st.sampled_from([(), ("a", "b"), ["b", "a", "c"], (1,), None, "ab"]), "names"
        )
        with clear_errors("images", *arguments):
            made = data.ImageSet(images, **arguments)
            assert made.kind in ("pixels", "bytes", "paths")
            assert len(made.images) == len(made.labels) == made.class_counts().sum()
            assert made.kind != "pixels" or (made.images.dtype == np.uint8 and made.images.shape[-1] in (1, 3))

    ODD_IMAGES = (
        PIXELS[:3],
        PIXELS[:3, ..., 0] / 255,
        PIXELS[:3].astype(int),
        PIXELS[0],
        PIXELS[:3, ..., :2],
        PIXELS[:3, :0],
        PIXELS[:0],
        [],
        (),
        [[]],
        [1, 2, 3],
        [1.5] * 3,
        ["a", "b", "c"],
        [b"a", b"b", b"c"],
        ["a", b"b", "c"],
        [None] * 3,
        [{}] * 3,
        "abc",
        b"abc",
        None,
        3,
        {},
        object(),
        np.array(["a"] * 3),
        np.array([b"a"] * 3),
        np.array([1j] * 3),
        np.zeros((3, 2, 2), bool),
        tf.zeros([3, 2, 2]),
        tf.ragged.constant([[1], [2, 3], []]),
        tf.constant(["a"] * 3),
        np.full((3, 2, 2), np.inf),
        range(3),
    )
    ODD_LABELS = (
        [0, 0, 1],
        [1, 0, -1],
        [0, 10**12, 1],
        ["a", "b", "a"],
        ["a", 1, "b"],
        [0.5] * 3,
        [],
        None,
        "aab",
        {0: 1},
        [[0, 0, 1]],
        [[0], [0], [1]],
        [b"a", b"b", b"a"],
        np.uint64([0, 0, 1]),
        tf.constant([0, 0, 1]),
        [None] * 3,
        [True] * 3,
        range(3),
        3,
    )


@examples(30)
@given(st.data())
def test_random_changes_of_images(tmp_path_factory, draw):
    """An image, or one line for people."""
    kind = draw.draw(st.sampled_from(["BMP", "PNG", "GIF", "JPEG"]), "kind")
    content = bytearray(
        oriented(6, kind) if kind in ("PNG", "JPEG") else encoded(Image.fromarray(COLORS).quantize(16), kind)
    )
    for _ in range(draw.draw(st.integers(1, 3), "changes")):
        content[draw.draw(st.integers(0, min(len(content), 120) - 1), "at")] = draw.draw(st.integers(0, 255), "byte")
    content = bytes(content[: draw.draw(st.integers(0, len(content)), "length")])
    path = tmp_path_factory.getbasetemp() / "changed.jpg"
    path.write_bytes(content)
    for _, reason in unreadable([str(path)], "decode"):
        assert "\n" not in reason
        assert not any(word in reason for word in ("{{", "[[", "Op:", "Graph", "node", "assertion", "File ")), reason


def test_an_exported_encoder_turns_images_and_limits_their_pixels(small_model, tmp_path):
    preprocessing = data.Preprocessing(8, 8, 1, resize_size=10)
    export.export_encoder(small_model(embedding_dim=6), preprocessing, str(tmp_path / "encoder"))
    encoder = serving.Encoder(tmp_path / "encoder")
    content = oriented(6, "JPEG")
    rows = encoder([content, encoded(Image.fromarray(decode_pixels(content).numpy()), "PNG"), empty_png(1500, 1)])
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-4)
    assert np.isfinite(rows).all()
    with pytest.raises(tf.errors.InvalidArgumentError) as refused:
        encoder([with_size("PNG", 13_000, 14_000)])
    expected = f"image: expected at most {MAX_PIXELS} pixels. Received: 14000 x 13000"
    assert data.decoding.first_line(refused.value) == expected
