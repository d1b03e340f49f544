"""Data: image sets and splits, folders with bad files, P x M batches, preprocessing, Omniglot's archives."""

import io
import os
import zipfile

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from s2sd_tf import data
from s2sd_tf.data.decoding import decodes_webp
from s2sd_tf.data.preprocessing import resize_antialiased
from s2sd_tf.keras_compat import keras
from s2sd_tf.serving import list_images


def write_image(path, seed=0, size=(9, 7), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two plain and two nested classes, 3 images each, in several formats and cases."""
    for c, name in enumerate(["cat", "dog", "birds/crow", "birds/owl"]):
        for k, extension in enumerate(["png", "JPG", "bmp"]):
            write_image(tmp_path / name / f"image {k}.{extension}", seed=10 * c + k)
    write_image(tmp_path / "dog" / "gray.jpeg", mode="L")
    return tmp_path


class TestImageFolder:
    def test_classes_are_folders_that_hold_images(self, folder):
        images = data.load_image_folder(str(folder))
        assert images.class_names == ("birds/crow", "birds/owl", "cat", "dog")
        assert images.class_counts().tolist() == [3, 3, 3, 4]
        assert images.kind == "paths"
        assert images.labels.dtype == np.int32

    def test_bad_files_are_named_and_skipped_or_refused(self, folder):
        (folder / "cat" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and nothing more")
        whole = (folder / "cat" / "image 1.JPG").read_bytes()
        (folder / "cat" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
        (folder / "cat" / "empty.jpg").write_bytes(b"")
        (folder / "cat" / "notes.txt").write_text("no image")
        (folder / "stray.png").write_bytes(b"")
        (folder / "cat" / ".DS_Store").write_bytes(b"")
        bad = ["broken.png", "cut.jpg", "empty.jpg", "notes.txt", "stray.png"]
        with pytest.raises(ValueError, match="5 files under") as refused:
            data.load_image_folder(str(folder))
        assert all(name in str(refused.value) for name in bad)
        assert ".DS_Store" not in str(refused.value)
        images = data.load_image_folder(str(folder), on_corrupt="skip")
        assert images.class_counts().tolist() == [3, 3, 3, 4]
        assert not any(path.endswith(name) for path in images.images for name in bad)

    def test_missing_or_empty_folders(self, tmp_path):
        with pytest.raises(ValueError, match="expected images as <class>"):
            data.load_image_folder(str(tmp_path))
        with pytest.raises(FileNotFoundError, match="root"):
            data.load_image_folder(str(tmp_path / "missing"))
        with pytest.raises(ValueError, match="on_corrupt"):
            data.load_image_folder(str(tmp_path), on_corrupt="ignore")


class TestParts:
    @pytest.mark.parametrize(
        ("names", "parts"),
        [
            (["train/cat", "test/cat"], ("train", "test")),
            (["images/Training/cat", "images/validation/dog"], ("images/Training", "images/validation")),
            (["train_images/cat", "test_images/dog", "extra/dog"], ("train_images", "test_images")),
        ],
    )
    def test_a_root_divided_into_parts_is_refused(self, names, parts, tmp_path):
        for name in names:
            write_image(tmp_path / name / "0.png")
        with pytest.raises(ValueError, match="root: expected class folders") as refused:
            data.load_image_folder(str(tmp_path))
        train, test = (tmp_path / part for part in parts)
        assert f"config.data.root={train} and config.data.folder.test_root={test}" in str(refused.value)
        assert data.load_image_folder(train).num_classes == 1

    def test_classes_of_these_names_are_classes(self, tmp_path):
        names = ["test/strip", "train", "vehicles/bus", "vehicles/test", "vehicles/train"]
        for name in names:
            write_image(tmp_path / name / "0.png")
        assert data.load_image_folder(tmp_path).class_names == tuple(names)


class TestSkippedFiles:
    def test_the_programs_know_the_same_extensions(self, tmp_path):
        for name in ("a.jfif", "b.jpe", "c.JPG"):
            write_image(tmp_path / "cat" / "jpg.jpg")
            (tmp_path / "cat" / "jpg.jpg").rename(tmp_path / "cat" / name)
        Image.new("RGB", (4, 4)).save(tmp_path / "cat" / "d.webp")
        assert [item.id[4:] for item in list_images(tmp_path)] == ["a.jfif", "b.jpe", "c.JPG", "d.webp"]
        images = data.load_image_folder(tmp_path, on_corrupt="skip")
        assert len(images) == 3 + decodes_webp()
        if not decodes_webp():
            with pytest.raises(ValueError, match=r"d\.webp: WebP, which this version of TensorFlow does not decode"):
                data.load_image_folder(tmp_path)

    def test_folders_that_cannot_be_listed_are_named(self, folder, monkeypatch, caplog):
        whole, scandir = str(folder / "cat"), os.scandir

        def failing(path):
            if path == whole:
                raise PermissionError(13, "Permission denied", path)
            return scandir(path)

        monkeypatch.setattr(os, "scandir", failing)
        with pytest.raises(ValueError, match=r"1 files .*\n.*cat: a folder that cannot be listed: Permission denied"):
            data.load_image_folder(folder)
        (folder / "dog" / "notes.txt").write_text("no image")
        with caplog.at_level("WARNING"):
            assert len(list_images(folder)) == 10
        assert "2 files or folders under" in caplog.text
        assert "notes.txt: not an image file by its extension" in caplog.text
        assert "cat: a folder that cannot be listed" in caplog.text


class TestSplits:
    @pytest.fixture
    def images(self):
        labels = np.repeat(np.arange(6), 4).astype(np.int32)
        pixels = np.arange(24, dtype=np.uint8).reshape(24, 1, 1, 1)
        return data.ImageSet(pixels, labels, ("a/x", "a/y", "b/x", "b/y", "c[1]", "d"))

    def check(self, images, train, test, names):
        assert test.class_names == names
        assert set(train.class_names) | set(test.class_names) == set(images.class_names)
        assert not set(train.class_names) & set(test.class_names)
        for part in (train, test):
            for pixel, label in zip(part.images.ravel(), part.labels):
                assert images.class_names[images.labels[pixel]] == part.class_names[label]

    def test_by_names_and_patterns(self, images):
        self.check(images, *data.split_classes(images, test_classes=["b/*", "c[1]"]), ("b/x", "b/y", "c[1]"))

    def test_by_fraction_takes_the_last(self, images):
        self.check(images, *data.split_classes(images, test_fraction=0.5), ("b/y", "c[1]", "d"))
        self.check(images, *data.split_classes(images, test_fraction=0.01), ("d",))

    def test_hold_out(self, images):
        train, held_out = data.hold_out_classes(images, 2, seed=1)
        self.check(images, train, held_out, held_out.class_names)
        assert held_out.num_classes == 2
        assert data.hold_out_classes(images, 2, seed=1)[1].class_names == held_out.class_names
        with pytest.raises(ValueError, match="at least 2 classes held out and 2 left"):
            data.hold_out_classes(images, 5)

    def test_errors(self, images):
        for arguments, words in [
            ({}, "exactly one"),
            ({"test_classes": ["d"], "test_fraction": 0.5}, "exactly one"),
            ({"test_classes": ["zebra"]}, "zebra"),
            ({"test_classes": ["*"]}, "at least one class to train"),
            ({"test_fraction": 1.0}, "test_fraction"),
        ]:
            with pytest.raises(ValueError, match=words):
                data.split_classes(images, **arguments)

    def test_an_image_set_checks_its_labels(self, images):
        with pytest.raises(ValueError, match="one for each"):
            data.ImageSet(images.images, images.labels[:-1], images.class_names)
        with pytest.raises(ValueError, match=r"\[0, 5\)"):
            data.ImageSet(images.images, images.labels, images.class_names[:-1])


def indices(labels, p, m, steps, seed, epoch):
    return data.samplers.ClassBalanced(p, m).epoch(labels, steps, seed, epoch)


class TestBatches:
    labels = np.repeat(np.arange(7), [3, 9, 4, 5, 3, 8, 6])

    @pytest.mark.parametrize(("p", "m"), [(3, 2), (7, 3), (1, 1), (4, 3)])
    def test_p_classes_with_m_samples_without_repeats(self, p, m):
        for epoch in range(20):
            for batch in indices(self.labels, p, m, 11, seed=3, epoch=epoch):
                assert len(np.unique(batch)) == p * m
                classes, counts = np.unique(self.labels[batch], return_counts=True)
                assert len(classes) == p
                assert set(counts) == {m}

    def test_all_images_are_seen_about_equally_often(self):
        labels = np.repeat(np.arange(6), 8)
        batches = indices(labels, 3, 4, 12, seed=0, epoch=0)
        assert np.bincount(batches.ravel(), minlength=48).tolist() == [3] * 48

    def test_batches_depend_only_on_seed_and_epoch(self):
        def draw(seed, epoch):
            return indices(self.labels, 3, 2, 5, seed, epoch).tolist()

        assert draw(0, 1) == draw(0, 1)
        assert draw(0, 1) != draw(0, 2) != draw(1, 2)

    @pytest.mark.parametrize(
        ("p", "m", "words"),
        [
            (3, 4, "samples_per_class: expected at least 4.*class 0 with 3"),
            (8, 1, "classes_per_batch: expected at most 7"),
            (0, 1, "classes_per_batch: expected an int >= 1"),
        ],
    )
    def test_errors(self, p, m, words):
        with pytest.raises(ValueError, match=words):
            indices(self.labels, p, m, 1, 0, 0)

    @pytest.mark.parametrize("cache", [True, False])
    def test_resuming_gives_the_remaining_batches(self, cache):
        train, _, preprocessing = data.load_digits()

        def passes(start, count):
            batches = data.class_balanced_batches(
                train, preprocessing, 3, 4, steps_per_epoch=5, seed=2, start_epoch=start, cache=cache
            )
            return [batch for _ in range(count) for batch in batches.as_numpy_iterator()]

        whole, resumed = passes(0, 4), passes(2, 2)
        assert len(whole) == 20
        for (images, labels), (others, other_labels) in zip(whole[10:], resumed):
            np.testing.assert_array_equal(images, others)
            np.testing.assert_array_equal(labels, other_labels)
            assert images.shape == (12, 8, 8, 1)

    def test_caching_changes_nothing(self, folder):
        images, preprocessing = data.load_image_folder(str(folder)), data.Preprocessing(6, 5, 3, resize_size=8)
        one, other = (
            next(iter(data.class_balanced_batches(images, preprocessing, 4, 3, seed=1, cache=cache)))
            for cache in (True, False)
        )
        np.testing.assert_allclose(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])

    def test_every_pass_of_fit_is_an_epoch(self):
        train, _, preprocessing = data.load_digits()
        with pytest.raises(ValueError, match="short_classes='repeat' or 'skip'"):
            data.class_balanced_batches(train, preprocessing, 3, 400)
        repeated = data.class_balanced_batches(train, preprocessing, 3, 400, steps_per_epoch=1, short_classes="repeat")
        assert next(iter(repeated))[1].shape == [1200]
        batches = data.class_balanced_batches(train, preprocessing, 3, 4, steps_per_epoch=5)
        assert batches.cardinality() == 5
        assert data.class_balanced_batches(train, preprocessing, 3, 4).cardinality() == 901 // 12
        model = keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(5)])
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        model.fit(batches, epochs=3, verbose=0)
        assert int(tf.convert_to_tensor(model.optimizer.iterations)) == 15

    def test_evaluation_batches_keep_the_order(self):
        _, test, preprocessing = data.load_digits()
        batches = list(data.evaluation_batches(test, preprocessing, 100).as_numpy_iterator())
        assert [len(batch) for batch in batches] == [100] * 8 + [96]
        np.testing.assert_allclose(np.concatenate(batches), test.images / 255.0, atol=1e-6)


class TestPreprocessing:
    @pytest.mark.parametrize("bad", [0.6, -200.0, np.nan, np.inf])
    def test_numbers_out_of_range_are_refused(self, bad):
        preprocessing = data.Preprocessing(4, 4, 1)
        images = np.full((2, 6, 5, 1), 0.5, np.float32)
        assert preprocessing(images).shape == (2, 4, 4, 1)
        images[1, 2, 3] = bad + 1 if bad == 0.6 else bad
        with pytest.raises(ValueError, match=r"^images: expected numbers in \[0, 1\].* Received: numbers from"):
            preprocessing(images)
        with pytest.raises(tf.errors.InvalidArgumentError, match=r"images: expected numbers in \[0, 1\]"):
            tf.function(preprocessing)(tf.constant(images))
        with pytest.raises(ValueError, match=r"use from_pixels .* Received: uint8$"):
            preprocessing(np.zeros((6, 5, 1), np.uint8))

    def test_floats_are_no_pixels(self):
        pixels = np.ones((6, 5, 1), np.float32)
        with pytest.raises(ValueError, match=r"^pixels: expected integers in \[0, 255\].* Received: float32$"):
            data.Preprocessing(4, 4, 1).from_pixels(pixels)
        with pytest.raises(ValueError, match=r"^pixels: expected integers in \[0, 255\]"):
            data.Augmentation().from_pixels(pixels, data.Preprocessing(4, 4, 1), [0, 1])

    def test_bytes_paths_and_pixels_agree(self, folder):
        preprocessing = data.Preprocessing(6, 5, 3, mean=(0.5, 0.4, 0.3), std=0.2)
        path = str(folder / "cat" / "image 0.png")
        pixels = np.array(Image.open(path))
        expected = preprocessing.from_pixels(pixels)
        assert expected.shape == (6, 5, 3)
        with open(path, "rb") as file:
            np.testing.assert_allclose(preprocessing.from_bytes(file.read()), expected)

    @pytest.mark.parametrize("dtype", [np.uint8, np.float32])
    @pytest.mark.parametrize(
        ("shape", "size"),
        [
            ((9, 13, 3), (5, 4)),
            ((7, 5, 1), (11, 20)),
            ((2, 33, 20, 3), (8, 32)),
            ((1, 1, 3), (4, 3)),
            ((6, 8, 3), (1, 1)),
        ],
    )
    def test_resizing_matches_tensorflow(self, shape, size, dtype):
        images = (255 * np.random.default_rng(0).random(shape)).astype(dtype)
        expected = tf.image.resize(images, size, antialias=True)
        dynamic = tf.TensorSpec([*[None] * (len(shape) - 1), shape[-1]], dtype)
        resize = tf.function(lambda images, size: resize_antialiased(images, size[0], size[1]))
        np.testing.assert_array_equal(resize_antialiased(tf.constant(images), *size), expected)
        resize = resize.get_concrete_function(dynamic, tf.TensorSpec([2], tf.int32))
        np.testing.assert_array_equal(resize(tf.constant(images), tf.constant(size)), expected)

    def test_images_of_the_right_size_are_only_normalised(self):
        pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 1), dtype=np.uint8)
        preprocessing = data.Preprocessing(4, 5, 1, invert=True, mean=0.25, std=0.5)
        np.testing.assert_allclose(preprocessing.from_pixels(pixels), (0.75 - pixels / 255.0) / 0.5, atol=1e-6)

    def test_shorter_side_and_centre_crop(self):
        image = np.zeros((20, 40, 1), np.float32)
        image[:, 20:] = 1.0
        out = data.Preprocessing(8, 8, 1, resize_size=10)(image).numpy()
        assert out.shape == (8, 8, 1)
        np.testing.assert_allclose(out, out[:, ::-1] * -1 + 1, atol=1e-6)
        assert data.Preprocessing(8, 8, 1, resize_size=10)(image.transpose(1, 0, 2)).shape == (8, 8, 1)

    def test_channels(self):
        gray = np.random.default_rng(0).integers(0, 256, (4, 4, 1), dtype=np.uint8)
        assert data.Preprocessing(4, 4, 3).from_pixels(gray).shape == (4, 4, 3)
        assert data.Preprocessing(4, 4, 1).from_pixels(np.repeat(gray, 3, -1)).shape == (4, 4, 1)

    @pytest.mark.parametrize(
        ("kind", "mode"), [("PNG", "1"), ("PNG", "RGBA"), ("BMP", "RGB"), ("GIF", "P"), ("JPEG", "CMYK")]
    )
    @pytest.mark.parametrize("channels", [1, 3])
    def test_every_format_that_passes_the_check_can_be_read(self, tmp_path, kind, mode, channels):
        for k in range(2):
            write_image(tmp_path / "class" / f"{k}.{kind.lower()}", seed=k, mode=mode)
        images = data.load_image_folder(str(tmp_path))
        batch = next(iter(data.evaluation_batches(images, data.Preprocessing(6, 5, channels))))
        assert batch.shape == (2, 6, 5, channels)
        assert np.isfinite(batch).all()

    def test_gray_stays_unchanged(self):
        gray = np.random.default_rng(0).integers(0, 256, (4, 5, 1), dtype=np.uint8)
        preprocessing = data.Preprocessing(4, 5, 1)
        buffer = io.BytesIO()
        Image.fromarray(gray[..., 0]).save(buffer, "PNG")
        np.testing.assert_allclose(preprocessing.from_bytes(buffer.getvalue()), gray / 255.0, atol=1e-6)
        rgb = np.repeat(gray, 3, axis=-1)
        np.testing.assert_allclose(preprocessing.from_pixels(rgb), gray / 255.0, atol=1e-6)

    def test_config_and_errors(self):
        preprocessing = data.Preprocessing(8, 6, 1, resize_size=9, invert=True, mean=0.1, std=0.2)
        assert data.Preprocessing(**preprocessing.get_config()).get_config() == preprocessing.get_config()
        for arguments in ({"channels": 2}, {"height": 0}, {"resize_size": 5}):
            with pytest.raises(ValueError, match="expected"):
                data.Preprocessing(**{"height": 8, "width": 6, **arguments})


def test_digits():
    train, test, preprocessing = data.load_digits()
    assert train.class_names == ("0", "1", "2", "3", "4")
    assert test.class_names == ("5", "6", "7", "8", "9")
    assert len(train) + len(test) == 1797
    assert preprocessing.output_shape == train.images.shape[1:]


def test_omniglot_comes_with_the_package():
    train, test, preprocessing = data.load_omniglot()
    assert (len(train), train.num_classes, len(test), test.num_classes) == (2720, 136, 2120, 106)
    assert not set(train.class_names) & set(test.class_names)
    assert set(test.super_classes) == set(data.omniglot.TEST_ALPHABETS)
    assert set(train.class_counts()) | set(test.class_counts()) == {20}
    assert preprocessing.output_shape == (28, 28, 1)
    split = data.datasets.load("omniglot")
    assert split.test.class_names == test.class_names


def test_omniglot_archives(tmp_path):
    def drawing(seed):
        buffer = io.BytesIO()
        pixels = np.random.default_rng(seed).random((105, 105)) > 0.1
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue()

    for number, alphabets in ((1, ["Greek", "Latin"]), (2, ["Greek", "Sanskrit", "Tagalog", "Japanese_(katakana)"])):
        root = f"images_background_small{number}"
        with zipfile.ZipFile(tmp_path / f"{root}.zip", "w") as archive:
            for alphabet in alphabets:
                for character in (1, 2):
                    for k in range(3):
                        name = f"{root}/{alphabet}/character{character:02d}/0{character}_{k:02d}.png"
                        archive.writestr(name, drawing(character * 10 + k))
    train, test, preprocessing = data.load_omniglot(str(tmp_path), size=14)
    assert train.class_names == tuple(f"{a}/character0{c}" for a in ("Greek", "Latin") for c in (1, 2))
    assert {name.split("/")[0] for name in test.class_names} == {"Sanskrit", "Tagalog", "Japanese_(katakana)"}
    assert len(train) == 12
    assert len(test) == 18
    batch, _ = next(iter(data.class_balanced_batches(train, preprocessing, 4, 3)))
    assert batch.shape == (12, 14, 14, 1)
    assert 0.02 < float(tf.reduce_mean(batch)) < 0.3  # ink is 1
    with pytest.raises(FileNotFoundError, match="images_background_small1"):
        data.load_omniglot(str(tmp_path / "nowhere"))


# Reads images from shards, in a process of its own, as determinism cannot be ended.
AHEAD = """
import io, sys, time
import numpy as np, tensorflow as tf
from PIL import Image
from s2sd_tf import data
from s2sd_tf.data import batches
from s2sd_tf.data.augmentation import preset

tf.config.experimental.enable_op_determinism()
tf.random.set_seed(0)
def encoded(kind, seed):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()
images = np.array([encoded(kind, k) for k in range(16) for kind in ("JPEG", "PNG", "BMP", "GIF")], object)
train = data.ImageSet(images, np.arange(64) // 8, tuple("abcdefgh"))
data.write_shards(data.RetrievalSplit(train, train), sys.argv[1])
train = data.read_shards(sys.argv[1]).train

count, read = 0, batches.read_slice
def counted(*arguments):
    global count
    count += 1
    return read(*arguments)
batches.read_slice = counted
preprocessing = data.Preprocessing(24, 24)
sampler = data.samplers.get("class_balanced", classes_per_batch=2, samples_per_class=4)
for name in ("adv", "rand"):
    augmentation = data.Augmentation(**preset(name))
    for dataset in (
        data.EpochBatches(train, preprocessing, sampler, augmentation=augmentation)(0),
        data.training_batches(train, preprocessing, sampler, augmentation=augmentation),
        data.evaluation_batches(train, preprocessing, 8),
        batches.batches_at(lambda: np.arange(64), train, preprocessing, 8),
    ):
        count, iterator = 0, iter(dataset)
        next(iterator)
        end = time.monotonic() + 60
        while count <= 8 and time.monotonic() < end:
            time.sleep(0.01)
        print(name, count > 8)
"""


def test_deterministic_runs_load_images_ahead(run_python, tmp_path):
    (tmp_path / "script.py").write_text(AHEAD)
    output = run_python("script.py", str(tmp_path / "shards"), cwd=tmp_path, timeout=600).stdout
    lines = [line for line in output.splitlines() if line.endswith(("True", "False"))]
    assert lines == [f"{name} True" for name in ("adv", "rand") for _ in range(4)]
