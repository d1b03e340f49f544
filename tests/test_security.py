"""Hostile input runs nothing, reads and writes nowhere else, and is refused with an error that names it."""

import ast
import base64
import contextlib
import hashlib
import html
import html.parser
import importlib.util
import io
import json
import os
import pickle
import struct
import warnings
import zipfile
import zlib

import numpy as np
import pytest
import tensorflow as tf
from conftest import REPOSITORY
from dataset_layouts import write_annotations, write_image

from s2sd_tf import data, evaluation, export, serving
from s2sd_tf.data import annotations
from s2sd_tf.evaluation.embeddings import write_shard
from s2sd_tf.keras_compat import keras
from s2sd_tf.models.backbones.state_dict import read_state_dict
from s2sd_tf.reporting import EmbeddedImages, save_curves, save_matches, save_projector, save_report
from s2sd_tf.serving.encoder import read_image, read_image_under
from s2sd_tf.untrusted import MAX_PIXELS, check_layers, image_excess


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def png(width, height):
    """A PNG file that claims a size but has almost no data."""

    def chunk(kind, content):
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


class TestTheSources:
    """The package never calls functions that could run code from a file."""

    NEVER = {
        "eval", "exec", "compile", "os.system", "os.popen", "pickle.load", "pickle.loads", "torch.load", "joblib.load",
        "marshal.loads", "yaml.load", "yaml.unsafe_load", "shelve.open", "shutil.unpack_archive",
    }  # fmt: skip

    def calls(self):
        for path in sorted((REPOSITORY / "s2sd_tf").rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    yield path.relative_to(REPOSITORY), ast.unparse(node.func), node

    def test_no_code_is_loaded(self):
        for path, name, node in self.calls():
            assert name not in self.NEVER, f"{path}:{node.lineno}"
            assert not name.endswith((".extractall", ".extract")), f"{path}:{node.lineno}"
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert keywords.get("shell", "False") == "False", f"{path}:{node.lineno}"
            if name in ("np.load", "np.save"):
                assert keywords.get("allow_pickle") == "False", f"{path}:{node.lineno}"

    def test_a_state_dict_with_other_objects_than_tensors_is_refused(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "weights.pth", "w") as archive:
            archive.writestr("weights/data.pkl", pickle.dumps({"w": Payload(tmp_path / "run")}))
        with pytest.raises(ValueError, match=r"weights\.pth.*not a tensor"):
            read_state_dict(tmp_path / "weights.pth")
        assert not (tmp_path / "run").exists()


class TestModels:
    def test_a_lambda_layer_is_refused_and_not_run(self, tmp_path):
        ran, path = tmp_path / "ran", tmp_path / "model.keras"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code = keras.layers.Lambda(lambda x, path=str(ran): (open(path, "w").close(), x)[1])
            keras.Sequential([keras.layers.InputLayer((2,)), code]).save(path)
        ran.unlink()
        with pytest.raises(ValueError, match=r"model\.keras: expected .*Lambda, which can run any code"):
            export.load_model(path)
        assert not ran.exists()

    @pytest.mark.parametrize(
        "changed",
        [
            {"module": "os", "class_name": "function", "config": "system", "registered_name": "function"},
            {"module": "os", "class_name": "function", "config": "system", "registered_name": "s2sd_tf>S2SDModel"},
            {"module": "builtins", "class_name": "function", "config": "exec", "registered_name": "function"},
            {"module": "keras.src.utils.file_utils", "class_name": "function", "config": "get_file"},
            {"module": "keras.src.utils.file_utils", "class_name": "function", "config": "os.system"},
            {"module": "keras.src.activations", "class_name": "function", "config": "os.system"},
            {"module": "subprocess", "class_name": "Popen", "config": {"args": ["true"]}, "registered_name": None},
            {"module": "keras.layers", "class_name": "TFSMLayer", "config": {"filepath": "x"}, "registered_name": None},
            {"module": "keras", "class_name": "TFOpLambda", "config": {"function": "io.write_file"}},
        ],
    )
    def test_classes_outside_keras_are_refused(self, changed, tmp_path):
        path = tmp_path / "model.keras"
        keras.Sequential([keras.layers.InputLayer((2,)), keras.layers.Dense(1, activation="relu")]).save(path)
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        config = json.loads(members["config.json"])
        config["config"]["layers"][-1]["config"]["activation"] = changed
        members["config.json"] = json.dumps(config)
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        words = "(which can run any code|the TensorFlow function|register your own classes)"
        with pytest.raises(ValueError, match=rf"model\.keras: expected a model with only layers of Keras.*{words}"):
            export.load_model(path)

    def test_a_model_of_keras_hub_without_it_is_refused(self, monkeypatch):
        config = {"module": "keras_hub.src.models.vit.vit_backbone", "class_name": "ViTBackbone", "config": {}}
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ValueError, match=r"keras-hub, which is not installed: pip install 's2sd_tf\[hub\]'"):
            check_layers([config])

    def test_other_kinds_of_models_are_refused_by_name(self, tmp_path):
        (tmp_path / "folder.keras").mkdir()
        (tmp_path / "text.keras").write_text("no model")
        for name, words in [
            ("model.h5", "expected a .keras file"),
            ("saved_model", "expected a .keras file"),
            ("folder.keras", "expected a .keras file"),
            ("text.keras", "expected a zip archive"),
        ]:
            with pytest.raises(ValueError, match=f"{words}.*"):
                export.load_model(tmp_path / name)
        with pytest.raises(FileNotFoundError, match=r"none\.keras"):
            export.load_model(tmp_path / "none.keras")

    def test_a_model_of_this_package_loads(self, small_model, tmp_path):
        model = small_model()
        model.compile(optimizer="adam")
        model.save(tmp_path / "model.keras")
        images = np.random.default_rng(0).random((2, 8, 8, 1), np.float32)
        loaded = export.load_model(tmp_path / "model.keras")
        np.testing.assert_allclose(loaded(images), model(images), atol=1e-6)

    @pytest.mark.parametrize("writes", ["when called", "when loaded", "checkpoints"])
    def test_a_saved_model_that_does_more_than_compute_is_refused(self, writes, tmp_path):
        target = str(tmp_path / "written")

        class Module(tf.Module):
            @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
            def encode(self, encoded_images):
                if writes == "when called":
                    tf.io.write_file(target, "x")
                if writes == "checkpoints":
                    tf.raw_ops.SaveV2(prefix=target, tensor_names=["x"], shape_and_slices=[""], tensors=[tf.zeros(1)])
                return {"embedding": tf.zeros([tf.size(encoded_images), 4])}

        module = Module()
        if writes == "when loaded":
            (tmp_path / "words.txt").write_text("a\n")
            line, number = tf.lookup.TextFileIndex.WHOLE_LINE, tf.lookup.TextFileIndex.LINE_NUMBER
            words = tf.lookup.TextFileInitializer(str(tmp_path / "words.txt"), tf.string, line, tf.int64, number)
            module.table = tf.lookup.StaticHashTable(words, -1)
            module.look = tf.function(lambda x: module.table.lookup(x), [tf.TensorSpec([None], tf.string)])
        tf.saved_model.save(module, str(tmp_path / "model"), signatures={"encoded_images": module.encode})
        with pytest.raises(ValueError, match="encoder: expected a model that only computes"):
            serving.Encoder(tmp_path / "model")
        assert not [name for name in os.listdir(tmp_path) if name.startswith("written")]

    @pytest.mark.parametrize("name", ["saved_model.pb", "variables/variables.index"])
    def test_a_broken_saved_model_is_reported(self, name, encoder_path, tmp_path):
        with pytest.raises(FileNotFoundError, match="encoder"):
            serving.Encoder(tmp_path)
        path = encoder_path / name
        whole = path.read_bytes()
        try:
            path.write_bytes(whole[: len(whole) // 2])
            with pytest.raises(ValueError, match="encoder: expected an undamaged SavedModel"):
                serving.Encoder(encoder_path)
        finally:
            path.write_bytes(whole)


@pytest.fixture(scope="module")
def encoder_path(tmp_path_factory):
    """A SavedModel with an encoder's signatures that returns the mean colours of an image."""

    class Encoder(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "encoded_images")])
        def encode(self, encoded_images):
            def one(image):
                return tf.reduce_mean(data.preprocessing.decode_rgb(image), axis=[0, 1])

            return {"embedding": tf.map_fn(one, encoded_images, fn_output_signature=tf.TensorSpec([3])) + self.bias}

    module = Encoder()
    module.bias = tf.Variable(tf.zeros([3]))
    path = tmp_path_factory.mktemp("encoder")
    tf.saved_model.save(module, str(path), signatures={"encoded_images": module.encode})
    return path


class TestArchivesAndImages:
    def omniglot(self, folder, members):
        for name in data.omniglot.ARCHIVES:
            with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as archive:
                for member, content in members.items():
                    archive.writestr(member, content)
        return str(folder)

    @pytest.mark.parametrize(
        ("member", "words"),
        [
            ("../../a/b/evil.png", "expected a path under"),
            ("/etc/a/b/evil.png", "expected a path under"),
            ("C:/a/b/evil.png", "expected a path under"),
            ("a/..\\..\\b/c/evil.png", "expected a path under"),
            ("evil.png", "expected images <folder>"),
        ],
    )
    def test_members_stay_inside(self, member, words, tmp_path):
        root = self.omniglot(tmp_path, {member: png(2, 2)})
        with pytest.raises(ValueError, match=rf"small1\.zip: {words}"):
            data.load_omniglot(root)

    def test_an_archive_that_inflates_too_far_is_refused(self, tmp_path):
        root = self.omniglot(tmp_path, {"a/b/c/d.png": bytes(80 * 2**20)})
        with pytest.raises(ValueError, match=r"small1\.zip: expected a zip archive\. Received: 83,886,080 bytes"):
            data.load_omniglot(root)
        np.savez_compressed(tmp_path / "rows.npz", embeddings=np.zeros((2**20, 20), np.float32))
        with pytest.raises(ValueError, match=r"rows\.npz.* bytes out of"):
            evaluation.read_embeddings(tmp_path / "rows.npz")

    def test_images_of_enormous_dimensions_are_refused_before_they_are_decoded(
        self, tmp_path, encoder_path, monkeypatch
    ):
        bomb = png(60_000, 60_000)
        for name, content in (("a", bomb), ("b", png(10_000, 10_000))):
            (tmp_path / "images" / name).mkdir(parents=True)
            (tmp_path / "images" / name / "x.png").write_bytes(content)
        encoder = serving.Encoder(encoder_path)
        monkeypatch.setattr(tf.io, "decode_image", lambda *_, **__: pytest.fail("decoded"))
        for check in ("files", "decode"):
            with pytest.raises(ValueError, match=r"2 files under") as refused:
                data.load_image_folder(str(tmp_path / "images"), check=check)
            assert "a/x.png: " in str(refused.value)
            assert f"b/x.png: 10000 x 10000, more than {MAX_PIXELS:,} pixels" in str(refused.value)
        rows, errors = encoder.embed([bomb])
        assert "pixels" in errors[0]
        assert np.isnan(rows).all()
        assert read_image(str(tmp_path / "images" / "a" / "x.png")) is None
        with pytest.raises(ValueError, match=r"small1\.zip: .*'x/y/z/0\.png' of more than"):
            data.load_omniglot(self.omniglot(tmp_path, {"x/y/z/0.png": bomb}))

    def test_files_that_are_too_large_or_endless_are_not_read(self, tmp_path):
        (tmp_path / "a").mkdir()
        with open(tmp_path / "a" / "large.png", "wb") as file:
            file.truncate(2**40)
        os.mkfifo(tmp_path / "a" / "pipe.png")
        for check in ("files", "decode"):
            with pytest.raises(ValueError, match="2 files under") as refused:
                data.load_image_folder(str(tmp_path), check=check)
            assert "1,099,511,627,776 bytes, more than" in str(refused.value)
            assert "not a regular file" in str(refused.value)
        found = [serving.embed.read_item(item)[1] for item in serving.list_images(tmp_path)]
        assert [bool(error) for error in found] == [True, True]

    @pytest.mark.parametrize("offset", [377, 441, 841])
    def test_a_matlab_file_that_crashes_its_reader_is_reported(self, offset, tmp_path):
        # With a byte changed at these offsets of a file from its current writer, scipy reads out of bounds.
        records = [(f"car_ims/{i}.jpg", i % 4 + 1) for i in range(8)]
        write_annotations(tmp_path / "cars_annos.mat", "relative_im_path", records, class_names=list("abcd"))
        content = bytearray((tmp_path / "cars_annos.mat").read_bytes())
        content[offset] ^= 0x87
        (tmp_path / "cars_annos.mat").write_bytes(content)
        with contextlib.suppress(ValueError):
            data.load_cars196(str(tmp_path), check="none")

    def test_a_killed_reader_is_reported(self, tmp_path, monkeypatch):
        (tmp_path / "reader.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
        monkeypatch.setattr(annotations.matlab_reader, "__file__", str(tmp_path / "reader.py"))
        (tmp_path / "cars_annos.mat").write_bytes(bytes(200))
        with pytest.raises(ValueError, match=r"cars_annos\.mat: expected a MATLAB file .*crashes its reader"):
            data.load_cars196(str(tmp_path))

    def test_a_matlab_file_that_inflates_too_far_is_refused(self, tmp_path):
        element = zlib.compress(bytes(80 * 2**20))
        head = bytes(124) + b"\x00\x01IM"
        (tmp_path / "cars_annos.mat").write_bytes(head + struct.pack("<II", 15, len(element)) + element)
        with pytest.raises(ValueError, match=r"cars_annos\.mat: .*more than 67,108,864 bytes"):
            data.load_cars196(str(tmp_path))

    def test_intact_images_pass(self, tmp_path):
        for name in ("a.png", "b.jpg", "c.bmp", "d.gif"):
            write_image(tmp_path / name)
            assert image_excess(tmp_path / name) is None
            assert image_excess((tmp_path / name).read_bytes()) is None


class TestPaths:
    OUTSIDE = ("../secret.png", "a/../../secret.png", "/etc/secret.png", "C:\\secret.png", "\\\\host\\secret.png")

    @pytest.mark.parametrize("name", OUTSIDE)
    def test_names_in_files_stay_under_their_root(self, name, tmp_path):
        root = tmp_path / "root"
        write_image(root / "a" / "0.png")
        write_image(tmp_path / "secret.png")
        (tmp_path / "list.txt").write_text(f"a/0.png\n{name}\n" if "/" in name else f"a/0.png 1\n{name} 2\n")
        with pytest.raises(ValueError, match=r"list\.txt, line [12]: expected"):
            data.load_image_list(str(root), str(tmp_path / "list.txt"), check="none")
        assert read_image_under(str(root), name) is None
        assert read_image_under(str(root), "a/0.png") is not None

    def test_links_are_followed_and_loops_are_not(self, tmp_path):
        write_image(tmp_path / "disk" / "0.png")
        (tmp_path / "root" / "b").mkdir(parents=True)
        (tmp_path / "root" / "a").symlink_to(tmp_path / "disk")
        (tmp_path / "root" / "b" / "loop").symlink_to(tmp_path / "root")
        (tmp_path / "disk" / "loop").symlink_to(tmp_path / "root")
        assert data.load_image_folder(str(tmp_path / "root")).class_names == ("a",)
        assert [item.id for item in serving.list_images(tmp_path / "root")] == ["a/0.png"]
        assert read_image_under(str(tmp_path / "root"), "a/0.png") is not None

    @pytest.mark.parametrize("name", ["../shard.tfrecord", "/etc/passwd", ".."])
    def test_a_shard_stays_in_its_folder(self, name, tmp_path):
        pixels = np.zeros((4, 4, 4, 3), np.uint8)
        images = data.ImageSet(pixels, np.array([0, 0, 1, 1], np.int32), ("a", "b"))
        data.write_shards(data.RetrievalSplit(images, images), str(tmp_path / "shards"))
        path = tmp_path / "shards" / "s2sd_shards.json"
        description = json.loads(path.read_text())
        description["parts"]["test"]["shards"][0]["name"] = name
        path.write_text(json.dumps(description))
        with pytest.raises((ValueError, FileNotFoundError), match="expected"):
            data.read_shards(str(tmp_path / "shards"))

    def test_an_index_names_only_files_in_its_folder(self, tmp_path):
        evaluation.build_index(np.eye(3), method="exact").save(tmp_path / "index")
        for key, value in (("method", "../x"), ("dim", 2), ("size", 4), ("metric", None)):
            about = json.loads((tmp_path / "index" / "index.json").read_text())
            (tmp_path / "broken").mkdir(exist_ok=True)
            for name in ("items.json", "embeddings.npy"):
                (tmp_path / "broken" / name).write_bytes((tmp_path / "index" / name).read_bytes())
            (tmp_path / "broken" / "index.json").write_text(json.dumps({**about, key: value}))
            with pytest.raises(ValueError, match="broken"):
                evaluation.load_index(tmp_path / "broken")


class TestPages:
    EVIL = (
        "</script><script>alert(1)</script>",
        "<img src=x onerror='alert(\"1\")'>",
        'a" onload="x',
        "$\\frac{$\udcff",
    )

    def test_names_are_text_in_a_report(self, tmp_path):
        rows = np.random.default_rng(0).normal(size=(16, 4))
        labels = np.repeat(np.arange(4), 4)
        result = evaluation.evaluate_retrieval(rows, labels)
        found = evaluation.find_neighbors(rows, rows, 3)
        ids = [f"{self.EVIL[i % 4]}{i}" for i in range(16)]
        save_report(
            tmp_path / "report.html", result, found, EmbeddedImages(rows, labels, self.EVIL, ids),
            title=self.EVIL[0], about=self.EVIL[1], table={self.EVIL[0]: result.means()},
        )  # fmt: skip
        page = (tmp_path / "report.html").read_text(encoding="utf-8")
        found, scripts = [], []
        parser = html.parser.HTMLParser()
        parser.handle_starttag = lambda tag, attributes: found.extend([tag, *(name for name, _ in attributes)])
        parser.handle_data = lambda data: scripts.append(data) if parser.cdata_elem == "script" else None
        parser.feed(page)
        assert not [name for name in found if name.startswith("on")]
        shown = json.loads(scripts[0])
        assert (found.count("script"), len(scripts)) == (5, 5)
        # The policy for browsers: no scripts may run but these.
        digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts[1:]]
        allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
        assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}" in page
        plain = [text.encode(errors="backslashreplace").decode() for text in ids]
        assert shown["ids"] == plain
        assert shown["names"] == [text.encode(errors="backslashreplace").decode() for text in self.EVIL]

    def test_names_are_text_in_pictures_and_the_projector(self, tmp_path):
        save_matches(tmp_path / "found.png", [[(np.zeros((4, 4)), name, 0.5) for name in self.EVIL]])
        save_projector(
            tmp_path / "projector", np.eye(4, dtype=np.float32), list(self.EVIL), [f"{n}\t\n" for n in "abcd"]
        )
        lines = (tmp_path / "projector" / "metadata.tsv").read_text().splitlines()
        assert [line.count("\t") for line in lines] == [1] * 5


class TestOutputs:
    def test_a_folder_with_other_content_is_not_replaced(self, small_model, tmp_path):
        mine = tmp_path / "mine"
        mine.mkdir()
        (mine / "thesis.txt").write_text("years of work")
        rows = np.eye(4, dtype=np.float32)
        images = data.ImageSet(np.zeros((4, 4, 4, 3), np.uint8), np.array([0, 0, 1, 1], np.int32), ("a", "b"))
        result = evaluation.evaluate_retrieval(np.ones((4, 2)), [0, 0, 1, 1])
        found = evaluation.find_neighbors(rows, rows, 2)
        for write in (
            lambda: export.export_encoder(small_model(), data.Preprocessing(8, 8, 1), str(mine)),
            lambda: data.write_shards(data.RetrievalSplit(images, images), str(mine)),
            lambda: evaluation.build_index(rows, method="exact").save(mine),
            lambda: save_projector(mine, rows),
            lambda: save_report(mine, result, found, EmbeddedImages(rows, [0, 0, 1, 1])),
            lambda: save_curves(mine, {"a": {"b": ([1], [2])}}),
            lambda: save_matches(mine, [[(np.zeros((2, 2)), "a", None)]]),
        ):
            with pytest.raises(ValueError, match="expected"):
                write()
            assert os.listdir(tmp_path) == ["mine"]
            assert (mine / "thesis.txt").read_text() == "years of work"

    def test_nothing_is_written_beside_the_output(self, tmp_path):
        names = ("../../evil", "/evil", "a\0b")
        images = data.ImageSet(np.zeros((3, 4, 4, 3), np.uint8), np.arange(3, dtype=np.int32), names)
        data.write_shards(data.RetrievalSplit(images, images), str(tmp_path / "out" / "shards"), name="../evil")
        write_shard(str(tmp_path / "out" / "embeddings"), np.eye(3), names, names)
        evaluation.build_index(np.eye(3), names, names, "exact").save(tmp_path / "out" / "index")
        assert os.listdir(tmp_path) == ["out"]
        assert sorted(os.listdir(tmp_path / "out")) == ["embeddings", "index", "shards"]
        assert evaluation.load_index(tmp_path / "out" / "index").ids == list(names)
        assert data.read_shards(str(tmp_path / "out" / "shards")).train.class_names == names


def test_reading_names_the_file(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "height.json").write_text('{"height": 8, "width": 8, "mean": {}}')
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe{")
    for name in ("deep", "list", "height", "bytes"):
        with pytest.raises(ValueError, match=rf"{name}\.json: expected"):
            data.Preprocessing.load(tmp_path / f"{name}.json")
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    header = buffer.getvalue().replace(b"(3,), }", b"(3000000000000,), }")
    (tmp_path / "rows.npy").write_bytes(header)
    with pytest.raises(ValueError, match=r"rows\.npy"):
        evaluation.read_embeddings(tmp_path / "rows.npy")
