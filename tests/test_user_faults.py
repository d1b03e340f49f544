"""Faults that users met, each through doors that an earlier version had too, where it behaves wrongly."""

import os
import re
import signal
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import tensorflow as tf
from conftest import REPOSITORY, small_config
from PIL import Image
from processes import start_python

import s2sd_tf
from s2sd_tf import data, evaluation, export, serving
from s2sd_tf.files import read_json
from s2sd_tf.training import train

RED = Image.new("RGB", (12, 8), "red")


def png(width, height):
    """A black PNG of one bit a pixel."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head, rows = (
        struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0),
        zlib.compress(bytes(((width + 7) // 8 + 1) * height)),
    )
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def batch(paths, height=8, width=12):
    """What training and evaluation read from image files."""
    images = data.ImageSet(np.array(list(map(str, paths))), np.zeros(len(paths), np.int32), ("a",))
    return next(iter(data.evaluation_batches(images, data.Preprocessing(height, width)))).numpy()


def small_colour_model():
    backbone = s2sd_tf.models.backbones.conv_blocks((8, 8, 3), filters=(4,), pools=1)
    return s2sd_tf.S2SDModel(backbone, 4, target_dims=())


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A SavedModel that scales the shorter side of images to 256 pixels."""
    folder = tmp_path_factory.mktemp("encoder") / "encoder"
    export.export_encoder(small_colour_model(), data.Preprocessing(8, 8, 3, resize_size=256), folder)
    return folder


class TestImages:
    def test_a_bmp_with_a_palette_keeps_its_colours(self, tmp_path):
        RED.quantize(4).save(tmp_path / "red.bmp")
        np.testing.assert_allclose(batch([tmp_path / "red.bmp"])[0, 4, 6], [1, 0, 0], atol=0.01)

    def test_a_photo_is_turned_as_its_camera_says(self, encoder, tmp_path):
        """A phone stores its orientation in the EXIF data. In training, and in an exported encoder."""
        upright = Image.fromarray(np.uint8([[[255] * 3] * 8] * 6 + [[[0] * 3] * 8] * 6))
        exif = Image.Exif()
        exif[0x112] = 6  # to be turned clockwise
        upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "phone.jpg", quality=95, exif=exif)
        (found,) = batch([tmp_path / "phone.jpg"], 12, 8)
        upright.save(tmp_path / "upright.png")
        rows = serving.Encoder(str(encoder))([(tmp_path / name).read_bytes() for name in ("phone.jpg", "upright.png")])
        np.testing.assert_allclose(rows[0], rows[1], atol=0.05)
        np.testing.assert_allclose(found[..., 0], np.asarray(upright)[..., 0] / 255, atol=0.05)

    def test_bytes_after_the_end_of_a_jpeg(self, tmp_path):
        (tmp_path / "cat").mkdir()
        RED.save(tmp_path / "cat" / "motion.jpg")
        with open(tmp_path / "cat" / "motion.jpg", "ab") as file:
            file.write(bytes(9000))
        assert len(data.load_image_folder(str(tmp_path), check="files")) == 1

    def test_why_an_image_cannot_be_decoded_is_said_in_words(self, tmp_path):
        (tmp_path / "cat").mkdir()
        (tmp_path / "cat" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and nothing more")
        with pytest.raises(ValueError, match=r"broken\.png: ") as refused:
            data.load_image_folder(str(tmp_path), check="decode")
        assert "{{" not in str(refused.value)

    @pytest.mark.parametrize(
        "images", [np.zeros((4, 28, 28), np.uint8), np.zeros((4, 5, 5, 4), np.uint8), np.zeros((4, 5, 5, 3)).tolist()]
    )
    def test_arrays_that_people_have(self, images):
        made = data.ImageSet(images, np.array([1, 1, 0, 0], np.int32), ("a", "b"))
        found = next(iter(data.evaluation_batches(made, data.Preprocessing(6, 5)))).numpy()
        np.testing.assert_array_equal(found, np.zeros((4, 6, 5, 3)))


# Prints how many KB the peak of memory grows by decoding images in one of three ways.
PEAK = """
import resource, sys
from s2sd_tf import data, serving
how, path, *images = sys.argv[1:]
if how == "training":
    decode = data.Preprocessing(8, 8, 3, resize_size=256).from_bytes
else:
    encoder = serving.Encoder(path)
    decode = lambda content: (encoder if how == "saved model" else encoder.embed)([content])
small, *strips = (open(name, "rb").read() for name in images)
decode(small)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for strip in strips:
    decode(strip)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


class TestMemory:
    @pytest.mark.parametrize("how", ["training", "saved model", "s2sd-embed"])
    def test_of_long_strips(self, how, encoder, tmp_path, run_python):
        """Scaled up whole, an image of 600 x 1 pixels takes 472 MB as float32, several times over."""
        images = [tmp_path / f"{number}.png" for number in range(3)]
        for path, shape in zip(images, ((9, 7), (600, 1), (1, 600))):
            path.write_bytes(png(*shape))
        assert int(run_python("-c", PEAK, how, encoder, *images).stdout) < 2e5

    def test_of_many_pixels_is_limited_in_the_saved_model(self, encoder):
        signature = tf.saved_model.load(str(encoder)).signatures["encoded_images"]
        with pytest.raises(tf.errors.InvalidArgumentError, match=r"at most \d+ pixels\. Received: 9500 x 9600"):
            signature(encoded_images=tf.constant([png(9600, 9500)]))


# Begins to write, and waits to be killed where what it wrote is flushed to the disk.
WRITER = """
import os, signal, sys
import numpy as np
from s2sd_tf import evaluation
def wait(_):
    open(sys.argv[2], "w").close()
    signal.pause()
os.fsync = wait
evaluation.build_index(np.eye(4), method="exact").save(sys.argv[1])
"""
# Embeds images, and waits to be killed with the first batch.
EMBEDDER = """
import signal, sys
from s2sd_tf import serving
class Encoder(serving.Encoder):
    def embed(self, encoded):
        open(sys.argv[4], "w").close()
        signal.pause()
serving.embed_images(serving.list_images(sys.argv[1]), Encoder(sys.argv[2]), sys.argv[3], progress=False)
"""


class TestProcesses:
    def test_what_a_killed_writer_leaves_is_removed_by_the_next(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        folder = tmp_path / "indices"
        with start_python("-c", WRITER, folder / "index", tmp_path / "pipe") as writer:
            open(tmp_path / "pipe").close()
            writer.send_signal(signal.SIGKILL)
            writer.wait()
        assert [name for name in os.listdir(folder) if name.startswith(".writing-")]
        evaluation.build_index(np.eye(4), method="exact").save(str(folder / "index"))
        assert os.listdir(folder) == ["index"]

    def test_a_second_process_in_one_output_is_refused_until_the_first_is_killed(self, encoder, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "images").mkdir()
        RED.save(tmp_path / "images" / "red.png")
        output = tmp_path / "output"
        items = serving.list_images(str(tmp_path / "images"))

        def embed():
            return serving.embed_images(items, serving.Encoder(str(encoder)), str(output), progress=False)

        with start_python("-c", EMBEDDER, tmp_path / "images", encoder, output, tmp_path / "pipe") as first:
            open(tmp_path / "pipe").close()
            with pytest.raises(ValueError, match=rf"process {first._process.pid} on \S+, since \S+, is writing"):
                embed()
            first.send_signal(signal.SIGKILL)
            first.wait()
        assert embed()["images"] == 1
        assert not [name for name in os.listdir(output) if name.startswith(".writing-")]

    @pytest.mark.parametrize("scheme", ["gs", "s3"])
    def test_a_url_is_no_folder(self, scheme, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match=f"'{scheme}://bucket/x'"):
            evaluation.build_index(np.eye(4), method="exact").save(f"{scheme}://bucket/x")
        assert not os.listdir()

    def test_the_home_folder_is_found(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        evaluation.build_index(np.eye(4), method="exact").save("~/index")
        assert os.listdir() == ["home"]


class TestLabels:
    ROWS = np.repeat(np.eye(3, 6), 4, axis=0) + np.arange(72).reshape(12, 6) / 500
    NAMES = np.repeat(["a", "b", "c"], 4)

    def test_bytes_are_names(self, tmp_path):
        np.savez(tmp_path / "rows.npz", embeddings=self.ROWS, labels=self.NAMES.astype(bytes))
        assert evaluation.read_embeddings(str(tmp_path / "rows.npz")).labels == self.NAMES.tolist()

    @pytest.mark.parametrize("case", ["marks and blanks", "one image without a label", "numbers of two types"])
    def test_of_files_do_not_change_the_result(self, case, tmp_path, call):
        flags, (labels, others) = [], (self.NAMES, None)
        if case == "one image without a label":
            labels = np.where(np.arange(12) == 5, "", self.NAMES)
        elif case == "numbers of two types":
            labels, others = np.arange(12) // 4, np.arange(12) // 4 * 1.0
            np.savez(tmp_path / "gallery.npz", embeddings=self.ROWS, labels=others)
            flags = [f"--gallery_embeddings={tmp_path}/gallery.npz"]
        else:
            text = "\ufeff" + "".join(f"{name}{' ' * (at % 2)}\n" for at, name in enumerate(labels))
            (tmp_path / "labels.txt").write_text(text, encoding="utf-8")
            flags = [f"--labels={tmp_path}/labels.txt"]
        np.savez(tmp_path / "rows.npz", embeddings=self.ROWS, labels=labels)
        output = f"--output={tmp_path}/out.json"
        call("evaluate", f"--embeddings={tmp_path}/rows.npz", *flags, "--methods=exact", "--noclustering", output)
        assert read_json(tmp_path / "out.json")["exact"]["recall@1"] == 1.0


class TestErrors:
    def test_a_file_in_the_place_of_a_work_directory(self, tmp_path, call):
        (tmp_path / "file").touch()
        config = REPOSITORY / "configs" / "digits.py"
        error = call("train", f"--config={config}", f"--workdir={tmp_path}/file/run", status=2).stderr.splitlines()[-1]
        assert re.match(r"\S+: error: .*/file/run", error)

    def test_test_classes_of_one_image_are_noticed_before_training(self, tmp_path):
        for name in "abcdefgh":
            (tmp_path / "data" / name).mkdir(parents=True)
            for number in range(1 if name > "d" else 4):
                RED.save(tmp_path / "data" / name / f"{number}.png")
        config = small_config(**{
            "data.name": "folder", "data.root": str(tmp_path / "data"), "data.image_size": 8, "train.epochs": 1,
            "train.steps_per_epoch": 1, "data.validation_classes": 0, "model.filters": (4,), "model.pools": 1,
        })  # fmt: skip
        with pytest.raises(ValueError, match="expected at least one") as refused:
            train(config, str(tmp_path / "run"))
        assert not (tmp_path / "run").exists()
        assert "the test classes: expected at least one class with two images" in str(refused.value)


class TestConsole:
    def test_the_start_is_silent(self):
        """A process that imports TensorFlow, whose own lines about the machine are of no use to a person."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TF_")}
        command = [sys.executable, "-m", "s2sd_tf.cli.train", f"--config={REPOSITORY}/configs/digits.py"]
        done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        (line,) = (done.stdout + done.stderr).splitlines()
        assert "error: --workdir: expected a folder for the run" in line

    def test_training_shows_a_short_line_per_epoch(self, tmp_path):
        arguments = {
            "workdir": tmp_path / "run", "config": f"{REPOSITORY}/configs/digits.py", "config.train.epochs": 1000000,
            "config.train.steps_per_epoch": 1, "config.model.filters": "(4,)", "config.s2sd.target_dims": "(8,)",
        }  # fmt: skip
        with start_python(
            "-m", "s2sd_tf.cli.train", *(f"--{name}={value}" for name, value in arguments.items())
        ) as run:
            while run.is_alive() and not (tmp_path / "run" / "checkpoints").exists():
                time.sleep(0.1)
            run.send_signal(signal.SIGTERM)
            done = run.wait()
        assert not re.search(r"_seconds|INFO|^I\d{4} |[Ss]aved", done.stdout + done.stderr, re.M)
        epochs = [line for line in done.stdout.splitlines() if line.startswith("epoch 1/")]
        assert len(epochs) == 1
        assert re.match(r"epoch 1/1000000  loss \S+  ", epochs[0])
        assert len(epochs[0]) <= 120
