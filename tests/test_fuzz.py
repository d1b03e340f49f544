"""Random input gives a clear error or a result, never a traceback from deep inside a library or a partial output.

The examples are the same in every run. `S2SD_TF_FUZZ=20` runs twenty times as many.
"""

import contextlib
import json
import os
import pathlib
import shutil
import traceback
import warnings

import numpy as np
import pytest
import tensorflow as tf
from conftest import METHODS
from dataset_layouts import LAYOUTS, write, write_image
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

import s2sd_tf
from s2sd_tf import data, evaluation, export, mining, objectives, reporting, serving, training
from s2sd_tf.data import samplers
from s2sd_tf.evaluation.embeddings import write_shard
from s2sd_tf.files import write_json
from s2sd_tf.keras_compat import keras
from s2sd_tf.models.backbones.state_dict import read_state_dict
from s2sd_tf.training.build import build_model
from s2sd_tf.training.datasets import load_data

PACKAGE = str(pathlib.Path(s2sd_tf.__file__).parent)
CLEAR = (ValueError, TypeError, FileNotFoundError, ImportError, NotImplementedError)
# Numbers that no argument accepts, and numbers that some accept.
BAD_NUMBERS = (float("nan"), float("inf"), float("-inf"))
NUMBERS = (0, -1, 1, 2, 3, 7, -(10**9), 0.0, -1.0, 1e-3, 0.3, 0.5, 1.0, 2.5, 50.0)
IDS = ("query_ids", "gallery_ids")
OTHERS = ("", " ", "x", "../x", "all", None, True, (), (1,), (0, 1), (-1.0,), ("x",), (0.5,) * 20, {}, {"x": 1})


def examples(count):
    """Settings of a test with `count` examples."""
    return settings(
        max_examples=count * int(os.environ.get("S2SD_TF_FUZZ", "1")),
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@contextlib.contextmanager
def clear_errors(*names):
    """Accepts an error if this package raises it with its own message, which contains one of `names`.

    Yields a list that holds the error afterwards, if there was one.
    """
    raised = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield raised
    except CLEAR as error:
        raised.append(error)
    for error in raised:
        last = traceback.extract_tb(error.__traceback__)[-1].filename
        # ml_collections itself reports values of the wrong type.
        of_config = "ml_collections" in last
        assert of_config or last.startswith(PACKAGE), f"raised in {last}: {error!r}"
        assert of_config or any(words in str(error) for words in ("expected", "are not readable images")), repr(error)
        assert not names or any(name in str(error) for name in names), f"none of {names} in {error!r}"


@contextlib.contextmanager
def working_in(folder):
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


class TestConfigs:
    """Random values for random keys, up to building a model."""

    # Valid at any size, but not to be built if they are large.
    SIZES = (
        "embedding_dim", "target_dims", "filters", "pools", "proxies_per_class", "memory_size", "bins", "image_size",
        "resize_size", "hidden_dim", "ks", "classes_per_batch", "samples_per_class",
    )  # fmt: skip

    @staticmethod
    def small():
        config = training.default_config()
        config.model.filters, config.model.pools, config.model.embedding_dim = (4,), 1, 4
        config.s2sd.target_dims = (6,)
        config.train.deterministic = False
        return config

    @staticmethod
    def leaves():
        def walk(section, path):
            for key, value in section.items():
                yield from walk(value, [*path, key]) if isinstance(value, ConfigDict) else [([*path, key], value)]

        found = list(walk(training.default_config(), []))
        # Sections that a run does not use are not checked.
        unused = [n for n in objectives.names() if n != "multi_similarity"]
        return [
            (path, value)
            for path, value in found
            if not (path[0] == "objective" and path[1] in unused)
            and path[0] != "miner"
            and not (path[0] in ("data", "sampler") and len(path) == 3)
            and path[0] not in ("train", "eval")
        ]

    @staticmethod
    def values(default):
        if isinstance(default, bool):
            return [True, False, 1, "x"]
        if isinstance(default, int):
            return [0, 1, 2, 8, -1, 10**9, -(10**12), 0.5, float("nan"), "x", True]
        if isinstance(default, float):
            return [*BAD_NUMBERS, 0.0, 1.0, -1.0, 0.5, 1e-30, 1e30, 2, "x"]
        if isinstance(default, str):
            return ["", " ", "x", "X" * 300, "../x", "é", "a\0b", "all", "margin", "gem", "adam", "sgd", "avg", 3]
        return [(), (0,), (-1,), (1,), (1, 1), (4,) * 3, (10**9,), (float("nan"),), ("x",), ("conv*=0.1",), (2.5,), "x"]

    @examples(150)
    @given(st.data())
    def test_a_config_is_built_or_its_key_is_named(self, tmp_path_factory, draw):
        workdir = tmp_path_factory.mktemp("work")
        config, names, large = self.small(), [], False
        leaves = self.leaves()
        for at in draw.draw(st.lists(st.integers(0, len(leaves) - 1), min_size=1, max_size=2, unique=True), "keys"):
            path, default = leaves[at]
            value = draw.draw(st.sampled_from(self.values(default)), ".".join(path))
            names += [path[-1], *self.ALIASES.get(path[-1], ())]
            with clear_errors() as raised:
                config.update_from_flattened_dict({".".join(path): value})
            if raised:
                return
            numbers = [v for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, (int, float))]
            large |= path[-1] in self.SIZES and max(numbers, default=0) > 64
        with working_in(workdir), clear_errors(*names):
            resolved = training.resolve(config)
            if not large:
                build_model(resolved, load_data(resolved))
        assert os.listdir(workdir) == []

    # The argument that an error names, if its name differs from the key's.
    ALIASES = {
        "root": ("data_dir", "config.data"),
        "name": ("objective", "sampler", "optimizer", "config.data.name", "data_dir", "root", "config.data"),
        "augmentation": ("resize_size",),
        **dict.fromkeys(("backbone", "heads", "embedding_head", "objectives"), ("learning_rate_multipliers",)),
        "target_objective": ("objective",),
        "feature_distill": ("target_dims",),
    }


class TestObjectives:
    """Random settings and random batches."""

    @staticmethod
    def names():
        return [name for kind in ("pair", "tuple", "proxy") for name in objectives.names(kind)]

    @staticmethod
    def batch(draw):
        """Draws `(embeddings, labels)`: odd shapes, equal rows, huge, tiny and missing numbers."""
        size, dim = draw(st.sampled_from([1, 2, 3, 5, 8])), draw(st.sampled_from([1, 2, 5]))
        generator = np.random.default_rng(draw(st.integers(0, 99)))
        rows = generator.normal(size=(size, dim)).astype(np.float32)
        kind = draw(st.sampled_from(["normal", "equal", "zero", "huge", "tiny", "nan", "inf", "pairs", "integers"]))
        if kind == "equal":
            rows[:] = rows[0]
        elif kind == "pairs":
            rows[size // 2 :] = rows[: size - size // 2]
        elif kind == "integers":
            rows = np.round(rows)
        elif kind in ("nan", "inf"):
            rows[0, 0] = float(kind)
        else:
            rows *= {"zero": 0.0, "huge": 1e15, "tiny": 1e-25}.get(kind, 1.0)
        labels = generator.integers(0, draw(st.sampled_from([1, 2, 4])), size)
        if draw(st.booleans()):
            labels = np.arange(size) % 8
        return rows, labels

    @staticmethod
    def settings(draw, registry, name, left_out=()):
        """Draws some of the settings of a class, with valid or invalid values."""
        known = {
            key: value for key, value in registry.settings(name).items() if key not in ("name", "dtype", *left_out)
        }
        keys = draw(st.lists(st.sampled_from(sorted(known)), max_size=2, unique=True)) if known else []
        return {key: draw(st.sampled_from([known[key], *BAD_NUMBERS, *NUMBERS, *OTHERS])) for key in keys}

    @examples(250)
    @given(st.data())
    def test_objectives(self, draw):
        name = draw.draw(st.sampled_from(self.names()), "objective")
        chosen = self.settings(draw.draw, objectives, name, ("num_classes",))
        rows, labels = self.batch(draw.draw)
        with clear_errors(*chosen) as raised:
            objective = objectives.get(
                name, **chosen, **({"num_classes": 8} if objectives.lookup(name).uses_classes else {})
            )
        if raised:
            assert chosen
            return
        with tf.GradientTape() as tape:
            embeddings = tf.constant(rows)
            tape.watch(embeddings)
            loss = objective(embeddings, tf.constant(labels), training=True)
        if not np.isfinite(rows).all():
            assert np.isnan(loss)
            return
        gradient = tape.gradient(loss, embeddings, unconnected_gradients="zero")
        assert np.isfinite(loss), (name, chosen, float(loss))
        assert np.isfinite(gradient).all(), (name, chosen)
        if len(rows) == 1 and objective.kind in ("pair", "tuple") and chosen.get("normalize", True):
            assert not gradient.numpy().any(), (name, chosen)

    @examples(100)
    @given(st.data())
    def test_miners(self, draw):
        name = draw.draw(st.sampled_from(mining.names()), "miner")
        chosen = self.settings(draw.draw, mining, name)
        with clear_errors(*chosen, "weights", "bins") as raised:
            miner = mining.get(name, **chosen)
        if raised:
            return
        rows, labels = self.batch(draw.draw)
        rows = objectives.base.unit_rows(np.nan_to_num(rows))
        distances, labels = objectives.base.euclidean_distances(rows), tf.constant(labels, tf.int32)
        pairs = miner.pairs(distances, labels, dim=rows.shape[1], seed=tf.constant([0, 1]))
        same = labels.numpy()[:, None] == labels.numpy()[None]
        assert not (pairs.positive.numpy() & ~same).any()
        assert not pairs.positive.numpy().diagonal().any()
        assert miner.negatives_in_class or not (pairs.negative.numpy() & same).any()

    @examples(100)
    @given(st.data())
    def test_samplers(self, draw):
        name = draw.draw(st.sampled_from(samplers.names()), "sampler")
        sizes = {"classes_per_batch": 2, "samples_per_class": 2, "batch_size": 4}
        given_sizes = {key: value for key, value in sizes.items() if key in samplers.settings(name)}
        chosen = {**given_sizes, **self.settings(draw.draw, samplers, name, ("max_mib",))}
        labels = draw.draw(
            st.one_of(
                st.lists(st.integers(0, 3), max_size=12),
                st.sampled_from([[-1, 0], [0.5], [[0, 1]], ["a", "b"], [0] * 9, list(range(9)), None, [10**6, 3]]),
            ),
            "labels",
        )
        names = (*chosen, "labels", "expected batches")
        with clear_errors(*names) as raised:
            sampler = samplers.get(name, **chosen)
        if raised or sampler.batch_size > 1000:
            return
        with clear_errors(*names):
            checked = samplers.base.checked_labels(labels)
            if sampler.storage is not None and len(checked):
                positions = sampler.images_to_store(checked, 3, 0, 0)
                sampler.storage.refill(positions, 3, [np.eye(3, dtype=np.float32)[positions % 3]])
            elif sampler.storage is not None:
                return
            batches = sampler.epoch(labels, 3, 0, 0)
            assert batches.shape == (3, sampler.batch_size)
            assert batches.min() >= 0
            assert batches.max() < len(labels)


class Computing(keras.Model):
    """A backbone without a known shape, whose output is a function of feature maps `(batch, 6, 6, 4)`."""

    def __init__(self, output):
        super().__init__()
        self.convolution, self.output_of = keras.layers.Conv2D(4, 3), output

    def call(self, images, training=None):
        return self.output_of(self.convolution(images))


class TestBackbones:
    """Any Keras model with one output works like the same network as a functional model, or is refused."""

    IMAGES = np.random.default_rng(0).normal(size=(6, 8, 8, 1)).astype(np.float32)
    LABELS = np.arange(6) // 2
    OUTPUTS = {
        "maps": lambda maps: maps,
        "pooled": lambda maps: tf.reduce_mean(maps, [1, 2]),
        "free": lambda maps: tf.reshape(maps, tf.stack([tf.shape(maps)[0], 9, -1, 4])),
        "[maps]": lambda maps: [maps],
        "[maps, maps]": lambda maps: [maps, maps],
        "[[maps]]": lambda maps: [[maps]],
        "{maps}": lambda maps: {"a": maps},
        "rank 0": tf.reduce_sum,
        "rank 1": lambda maps: tf.reduce_sum(maps, [1, 2, 3]),
        "rank 3": lambda maps: tf.reshape(maps, [-1, 36, 4]),
        "rank 5": lambda maps: maps[..., None],
        "no features": lambda maps: maps[..., :0],
        "integers": lambda maps: tf.cast(maps, tf.int32),
        "None": lambda maps: None,
        "text": lambda maps: "maps",
        "array": lambda maps: np.zeros((6, 4)),
        "error": lambda maps: {}["x"],
        "shapes that do not fit": lambda maps: maps + tf.zeros([1, 5, 1, 1]),
    }
    GOOD = ("maps", "pooled", "free")
    NO_MODELS = ("resnet50", b"x", None, 5, [], keras.Model, lambda images: images, IMAGES)
    # What they mean, or None for a refusal.
    SIZES = (
        *((size, 4) for size in (4, np.int64(4), np.uint8(4))),
        *((size, None) for size in (
            4.0, True, "4", b"4", None, 0, -1, float("nan"), 4j, [4], np.array(4), np.array([4]), {},
        )),
    )  # fmt: skip
    DIMS = (
        *((dims, (6,)) for dims in ((6,), [6], np.array([6]))),
        (range(6, 8), (6, 7)),
        ((), ()),
        *((dims, None) for dims in (
            6, "6", b"6", None, (6.0,), (True,), (0,), ((6,),), [None], ("6",), np.array(6), np.array([6.0]), True,
        )),
    )  # fmt: skip

    @classmethod
    def backbone(cls, kind, output):
        """`(backbone, its convolution)`."""
        if kind in ("unbuilt", "called"):
            model = Computing(output)
            if kind == "called":
                model(cls.IMAGES)
            return model, model.convolution
        layers = [keras.layers.Conv2D(4, 3)]
        if output is not cls.OUTPUTS["maps"]:
            layers.append(keras.layers.GlobalAveragePooling2D())
        if kind == "functional":
            images = maps = keras.Input((8, 8, 1))
            for layer in layers:
                maps = layer(maps)
            return keras.Model(images, maps), layers[0]
        return keras.Sequential([keras.Input((8, 8, 1))] * (kind == "sequential") + layers), layers[0]

    @classmethod
    def model(cls, kind, output="maps", embedding_dim=4, target_dims=(6,)):
        backbone, convolution = cls.backbone(kind, cls.OUTPUTS[output])
        model = s2sd_tf.S2SDModel(backbone, embedding_dim, target_dims=target_dims)
        model.build((None, 8, 8, 1))
        convolution.set_weights([np.linspace(-1, 1, 36).reshape(3, 3, 1, 4), np.zeros(4)])
        for number, variable in enumerate(model.embedding_head.weights):
            variable.assign(np.linspace(-1, number, variable.shape.num_elements()).reshape(variable.shape))
        return model

    @examples(40)
    @given(st.data())
    def test_a_backbone_works_or_is_named(self, draw):
        kind = draw.draw(st.sampled_from(["functional", "sequential", "lazy sequential", "unbuilt", "called"]), "kind")
        outputs = sorted(self.OUTPUTS) if kind == "unbuilt" else ["maps", "pooled"]
        output = draw.draw(st.sampled_from(outputs), "output")
        with clear_errors("backbone") as raised:
            model = self.model(kind, output)
        assert bool(raised) == (output not in self.GOOD)
        if raised:
            assert "\n" not in str(raised[0])
            return
        clean = self.model("functional", "maps")
        np.testing.assert_allclose(model(self.IMAGES), clean(self.IMAGES), atol=1e-5)
        assert np.isfinite(model.compute_losses(tf.constant(self.IMAGES), self.LABELS, training=True)["loss"])

    @pytest.mark.parametrize("backbone", NO_MODELS)
    def test_what_is_no_model(self, backbone):
        with clear_errors("backbone") as raised:
            s2sd_tf.S2SDModel(backbone, 4)
        assert raised

    @examples(60)
    @given(st.sampled_from(SIZES), st.sampled_from(DIMS))
    def test_sizes(self, size, dims):
        (size, its_value), (dims, its_dims) = size, dims
        with clear_errors("embedding_dim" if its_value is None else "target_dims") as raised:
            model = s2sd_tf.S2SDModel(self.backbone("functional", self.OUTPUTS["maps"])[0], size, target_dims=dims)
        assert bool(raised) == (its_value is None or its_dims is None)
        if not raised:
            assert (model.embedding_dim, model.s2sd_loss.target_dims) == (its_value, its_dims)

    def test_several_inputs(self):
        images = [keras.Input((8, 8, 1)), keras.Input((8, 8, 1))]
        with clear_errors("backbone") as raised:
            s2sd_tf.S2SDModel(keras.Model(images, keras.layers.Add()(images)), 4)
        assert raised


def changed(draw, content):
    """The content with some bytes flipped, left out, repeated or replaced."""
    kind = draw(st.sampled_from(["flip", "cut", "insert", "drop", "repeat", "all", "line", "number"]))
    at = draw(st.integers(0, max(0, len(content) - 1)))
    piece = draw(
        st.sampled_from([b"\0", b"\xff\xfe", b"\n", b"-1", b"../", b"9" * 5000, b"{}", b'"', b" x y z ", b"nan"])
    )
    if kind == "flip":
        flipped = bytearray(content)
        for offset in range(at, min(len(content), at + draw(st.integers(1, 3)))):
            flipped[offset] ^= draw(st.integers(1, 255))
        return bytes(flipped)
    if kind == "cut":
        return content[:at]
    if kind == "insert":
        return content[:at] + piece + content[at:]
    if kind == "drop":
        return content[:at] + content[at + draw(st.integers(1, 20)) :]
    if kind == "repeat":
        return content[:at] + content[max(0, at - 30) :]
    if kind == "line":
        lines = content.split(b"\n")
        lines[at % len(lines)] = draw(st.sampled_from([b"", piece, lines[0], lines[at % len(lines)].split(b" ")[0]]))
        return b"\n".join(lines)
    if kind == "number":
        digits = [place for place, byte in enumerate(content) if 48 <= byte <= 57]
        at = digits[at % len(digits)] if digits else 0
        return (
            content[:at] + draw(st.sampled_from([b"-1", b"null", b"1e99", b"99999", b'"a"', b"[]"])) + content[at + 1 :]
        )
    return draw(st.binary(max_size=60))


@contextlib.contextmanager
def replaced(path, content):
    """Replaces the content of a file within the block."""
    whole = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(whole)


def listing(root):
    return sorted(str(path) for path in root.rglob("*"))


class TestDataSets:
    """Randomly damaged annotations, lists and images."""

    @pytest.fixture(scope="class")
    def root(self, tmp_path_factory):
        root = tmp_path_factory.mktemp("sets")
        sizes = {"classes": 4, "images_per_class": 2, "size": (6, 5)}
        for name in (*LAYOUTS, "lists"):
            write(name, root / name, **sizes)
        (root / "omniglot").mkdir()
        write_image(root / "parts" / "drawing.png")
        for number, alphabet in enumerate(("Greek", "Sanskrit"), 1):
            folder = root / "parts" / f"images_background_small{number}"
            for name in (alphabet, "Tagalog", "Japanese_(katakana)"):
                (folder / name / "character01").mkdir(parents=True)
                shutil.copy(root / "parts" / "drawing.png", folder / name / "character01" / "0.png")
            shutil.make_archive(root / "omniglot" / folder.name, "zip", root / "parts", folder.name)
        return root

    @staticmethod
    def load(name, root):
        folder = root / name
        lists = {f"{part}_list": str(folder / f"{part}.txt") for part in ("train", "test")} if name == "lists" else {}
        return data.datasets.load(name, str(folder), **lists)

    @examples(300)
    @given(st.data())
    def test_annotations(self, root, draw):
        files = {}
        for path in sorted(root.rglob("*")):
            if path.suffix in (".txt", ".mat", ".zip"):
                files.setdefault(path.relative_to(root).parts[0], []).append(path)
        # Reading a MATLAB file starts a process, so draw it less often.
        names = [*files, *(name for name in files if files[name][0].suffix != ".mat")]
        name = draw.draw(st.sampled_from(names), "data set")
        path = draw.draw(st.sampled_from(files[name]), "file")
        file = path.name
        before = listing(root)
        with replaced(path, changed(draw.draw, path.read_bytes())):
            # The list may then name missing files, or too few.
            with clear_errors(
                file, "are not readable images", "root: expected", "split_classes", "class_names", "_list"
            ):
                self.load(name, root)
            assert listing(root) == before

    @examples(100)
    @given(st.data())
    def test_images(self, root, draw):
        paths = sorted(path for path in (root / "cub200").rglob("*") if path.suffix.lower() == ".jpg")
        path = draw.draw(st.sampled_from(paths), "image")
        check = draw.draw(st.sampled_from(["files", "decode"]), "check")
        with replaced(path, changed(draw.draw, path.read_bytes())), clear_errors(path.name):
            data.load_cub200(str(root / "cub200"), check=check)

    def test_undamaged_data_sets_load(self, root):
        for name in (*LAYOUTS, "lists", "omniglot"):
            assert self.load(name, root)


class TestSavedSets:
    """Randomly damaged embeddings, indexes, shards and settings."""

    @pytest.fixture(scope="class")
    def root(self, tmp_path_factory):
        root = tmp_path_factory.mktemp("saved")
        rows = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
        ids, labels = [f"{i}.png" for i in range(6)], list("aabbcc")
        write_shard(str(root / "embeddings" / "shard-00000"), rows[:4], ids[:4], labels[:4])
        write_shard(str(root / "embeddings" / "shard-00001"), rows[4:], ids[4:], labels[4:])
        np.save(root / "rows.npy", rows)
        np.savez(root / "rows.npz", embeddings=rows, ids=ids, labels=labels)
        feature = {
            "embedding": tf.train.Feature(float_list=tf.train.FloatList(value=rows[0])),
            "id": tf.train.Feature(bytes_list=tf.train.BytesList(value=[b"0.png"])),
        }
        with tf.io.TFRecordWriter(str(root / "rows.tfrecord")) as writer:
            writer.write(tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString())
        for method in METHODS:
            evaluation.build_index(rows, ids, labels, method).save(root / method)
        images = data.ImageSet(np.zeros((4, 4, 4, 3), np.uint8), np.array([0, 0, 1, 1], np.int32), ("a", "b"))
        data.write_shards(data.RetrievalSplit(images, images), str(root / "shards"))
        header = json.dumps({"w": {"dtype": "F32", "shape": [6, 3], "data_offsets": [0, 72]}}).encode()
        (root / "weights.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + rows.tobytes())
        np.savez(root / "weights.npz", w=rows)
        write_json(str(root / "preprocessing.json"), data.Preprocessing(8, 8, 3).get_config())
        (root / "run").mkdir()
        write_json(str(root / "run" / "config.json"), training.resolve(training.default_config()).to_dict())
        shutil.copy(root / "preprocessing.json", root / "run")
        backbone = s2sd_tf.models.backbones.conv_blocks((8, 8, 3), filters=(4,), pools=1)
        model = s2sd_tf.S2SDModel(backbone, 4, target_dims=(6,))
        model.compile(optimizer="adam")
        model.save(root / "run" / "best.keras")
        return root

    READ = {
        "embeddings": evaluation.read_embeddings,
        "rows.npy": evaluation.read_embeddings,
        "rows.npz": evaluation.read_embeddings,
        "rows.tfrecord": evaluation.read_embeddings,
        **dict.fromkeys(METHODS, evaluation.load_index),
        "shards": data.read_shards,
        "preprocessing.json": data.Preprocessing.load,
        "run": training.load_run,
        "weights.safetensors": read_state_dict,
        "weights.npz": read_state_dict,
    }

    @examples(200)
    @given(st.data())
    def test_files(self, root, draw):
        name = draw.draw(st.sampled_from(sorted(self.READ)), "name")
        files = sorted(path for path in (root / name).rglob("*") if path.is_file()) or [root / name]
        path = draw.draw(st.sampled_from([file for file in files if file.suffix != ".pkl"]), "file")
        before = listing(root)
        with replaced(path, changed(draw.draw, path.read_bytes())):
            # Errors about sizes name the folder, and errors about ScaNN's files name their folder.
            with clear_errors(path.name, str(path.parent), name):
                found = self.READ[name](str(root / name))
                if hasattr(found, "search"):
                    with clear_errors("gallery: expected finite"):
                        found.search(np.eye(3, dtype=np.float32), 2)
            assert listing(root) == before

    def test_undamaged_files_are_read(self, root):
        for name, read in self.READ.items():
            assert read(str(root / name))


class TestEvaluation:
    """Unusual arguments for metrics and search."""

    ROWS = st.sampled_from(["good", "empty", "flat", "int", "nan", "huge", "one", "text", "wide", "zero"])

    @staticmethod
    def rows(kind):
        good = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
        return {
            "good": good, "empty": good[:0], "flat": good[0], "int": np.arange(18).reshape(6, 3),
            "nan": np.where(good > 1, np.nan, good), "huge": good * np.float32(1e30), "one": good[:1],
            "text": [["a"] * 3] * 6, "wide": good[:, :2], "zero": good * 0,
        }[kind]  # fmt: skip

    LABELS = st.sampled_from(
        [[0, 0, 1, 1, 2, 2], [0] * 6, list(range(6)), [0, 1], [], [0.5] * 6, ["a"] * 6, [-1] * 6, [0]]
    )
    ODD = st.sampled_from([1, 2, 0, -1, 10**9, 1.5, None, "x", (), True])

    @examples(120)
    @given(st.data())
    def test_metrics(self, draw):
        queries, labels = self.rows(draw.draw(self.ROWS, "queries")), draw.draw(self.LABELS, "labels")
        chosen = {}
        for name in draw.draw(
            st.lists(
                st.sampled_from(["ks", "map_ks", "mrr_depth", "memory_mib", "query_ids", "metric", "gallery"]),
                max_size=2, unique=True,
            )
        ):  # fmt: skip
            chosen[name] = draw.draw(self.ODD, name)
        if "gallery" in chosen:
            chosen["gallery"] = self.rows(draw.draw(self.ROWS, "gallery"))
            chosen["gallery_labels"] = draw.draw(self.LABELS, "gallery_labels")
        names = (*chosen, "queries", "query_labels", "gallery_labels", "gallery", "ids")
        with clear_errors(*names):
            found = evaluation.retrieval_metrics(queries, labels, **chosen)
            assert all(0 <= value <= 1 for value in found.values() if isinstance(value, float))

    @examples(120)
    @given(st.data())
    def test_neighbors(self, draw):
        queries, gallery = (self.rows(draw.draw(self.ROWS, name)) for name in ("queries", "gallery"))
        k, metric = draw.draw(st.sampled_from([1, 2, 7, 0, -1, 1.5, None, "x", True]), "k"), draw.draw(
            st.sampled_from(["cosine", "euclidean", "", None, 1]), "metric"
        )  # fmt: skip
        zeros = [0] * 6
        ids = [{}, {"query_ids": zeros}, {"query_ids": zeros, "gallery_ids": range(6)}, dict.fromkeys(IDS, 0)]
        ids = draw.draw(st.sampled_from(ids), "ids")
        with clear_errors("k", "metric", "queries", "gallery", "ids"):
            found = evaluation.find_neighbors(queries, gallery, k, **ids, metric=metric)
            assert found.indices.shape == (len(queries), k)
            assert found.indices.max(initial=-1) < len(gallery)

    @examples(60)
    @given(st.data())
    def test_geometry_and_clusters(self, draw):
        rows, labels = self.rows(draw.draw(self.ROWS, "embeddings")), draw.draw(self.LABELS, "labels")
        odd = draw.draw(self.ODD, "num_clusters")
        with clear_errors("embeddings", "labels"):
            evaluation.embedding_geometry(rows, labels)
        if odd != 10**9:
            with clear_errors("embeddings", "labels", "num_clusters"):
                evaluation.clustering_metrics(rows, labels, num_clusters=odd, iterations=2)

    @examples(60)
    @given(st.data())
    def test_an_evaluation_of_a_model(self, draw):
        labels = draw.draw(self.LABELS, "labels")
        every, ks = (
            draw.draw(self.ODD, "every"),
            draw.draw(st.sampled_from([(1,), (), (0,), 3, "x", None, (1.5,)]), "ks"),
        )
        rows = self.rows(draw.draw(self.ROWS, "rows"))

        class Model:
            @staticmethod
            def predict(images, verbose):
                return images

        with clear_errors("every", "ks", "queries", "labels"):
            callback = evaluation.RetrievalEvaluation(rows, labels, every=every, ks=ks)
            callback.set_model(Model())
            callback.set_params({"epochs": 1})
            callback.on_epoch_end(0, {})


def test_items_of_an_index_are_read_back(tmp_path):
    odd = ["", "\0", "a\nb", "é", "\udcff", "../x", "<b>", "x" * 5000]
    index = evaluation.build_index(np.eye(len(odd)), odd, odd, "exact")
    index.save(tmp_path / "index")
    assert evaluation.load_index(tmp_path / "index").ids == odd
    assert json.loads((tmp_path / "index" / "items.json").read_text())["labels"] == odd
    assert all(serving.encoder.read_image_under(str(tmp_path), name) is None for name in odd)


class OwnPath(os.PathLike):
    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return self.path

    def __repr__(self):
        # The names of tests have it, and must be the same in every process.
        return f"OwnPath({os.fspath(self)!r})"


class TestPaths:
    """Every function that takes a path takes it in any form, or names the argument."""

    NO_PATHS = (
        None, b"x", 5, 0.5, True, "", "a\0b", "\ud800", [], ["x"], {}, np.array(["x"]), OwnPath(b"x"), OwnPath("a\0b"),
        "gs://bucket/x", "s3://bucket/x", "http://host/x.zip", "file:///x", "hdfs:/x", pathlib.Path("gs://bucket/x"),
    )  # fmt: skip

    @pytest.fixture(scope="class")
    def home(self, tmp_path_factory):
        home = tmp_path_factory.mktemp("home")
        sizes = {"classes": 4, "images_per_class": 2, "size": (6, 5)}
        for name in ("cub200", "cars196", "sop", "inshop", "lists"):
            write(name, home / name, **sizes)
        for name in "abcd":
            for at in range(2):
                (home / "folders" / name).mkdir(parents=True, exist_ok=True)
                write_image(home / "folders" / name / f"{at}.png")
        rows = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
        ids, labels = [f"{i}.png" for i in range(4)], list("aabb")
        write_shard(str(home / "embeddings" / "shard-00000"), rows, ids, labels)
        np.savez(home / "weights.npz", w=rows)
        (home / "exclude.txt").write_text("a/1.png\n")
        (home / "labels.txt").write_text("a\na\nb\nb\n")
        evaluation.build_index(rows, ids, labels, "exact").save(home / "index")
        data.write_shards(data.load_folder(str(home / "folders")), str(home / "shards"))
        backbone = s2sd_tf.models.backbones.conv_blocks((8, 8, 3), filters=(4,), pools=1)
        model = s2sd_tf.S2SDModel(backbone, 4, target_dims=(6,))
        preprocessing = data.Preprocessing(8, 8, 3)
        (home / "run").mkdir()
        model.save(home / "run" / "best.keras")
        backbone.save_weights(home / "backbone.weights.h5")
        write_json(home / "run" / "preprocessing.json", preprocessing.get_config())
        write_json(home / "run" / "config.json", training.resolve(training.default_config()).to_dict())
        export.export_encoder(model, preprocessing, home / "encoder")
        return home

    @pytest.fixture(scope="class")
    @staticmethod
    def reading(home):
        """By `(function, argument)`: the path under `home`, and a function from a path to what is read."""

        def images(split):
            parts = split.parts().values() if isinstance(split, data.RetrievalSplit) else [split]
            return [(part.labels.tolist(), part.class_names, len(part.encoded(0))) for part in parts]

        def listed(**changed):
            paths = {"root": "lists", "train_list": "lists/train.txt", "test_list": "lists/test.txt"}
            return images(data.load_lists(**{**{name: home / path for name, path in paths.items()}, **changed}))

        def encoder(path):
            return serving.Encoder(path).fingerprint()

        def weights(path):
            model = s2sd_tf.models.backbones.get("conv_blocks", (8, 8, 3), path, filters=(4,), pools=1)
            return [array.tolist() for array in model.get_weights()]

        train_list = home / "lists" / "train.txt"
        return {
            ("load_image_folder", "root"): ("folders", lambda path: images(data.load_image_folder(path))),
            ("load_folder", "root"): ("folders", lambda path: images(data.load_folder(path))),
            ("load_cub200", "root"): ("cub200", lambda path: images(data.load_cub200(path))),
            ("load_cars196", "root"): ("cars196", lambda path: images(data.load_cars196(path))),
            ("load_sop", "root"): ("sop", lambda path: images(data.load_sop(path))),
            ("load_inshop", "root"): ("inshop", lambda path: images(data.load_inshop(path))),
            ("load_image_list", "root"): ("lists", lambda path: images(data.load_image_list(path, train_list))),
            ("load_image_list", "image_list"): (
                "lists/train.txt", lambda path: images(data.load_image_list(home / "lists", path)),
            ),
            ("load_lists", "root"): ("lists", lambda path: listed(root=path)),
            ("load_lists", "train_list"): ("lists/train.txt", lambda path: listed(train_list=path)),
            ("load_lists", "test_list"): ("lists/test.txt", lambda path: listed(test_list=path)),
            ("datasets.load", "root"): ("folders", lambda path: images(data.datasets.load("folder", path))),
            ("exclude_images", "exclude"): (
                "exclude.txt", lambda path: images(data.exclude_images(data.load_folder(home / "folders"), path)),
            ),
            ("read_shards", "folder"): ("shards", lambda path: images(data.read_shards(path))),
            ("ImageSet", "images"): (
                "folders/a/0.png", lambda path: data.ImageSet([path, str(train_list)], [0, 1]).encoded(0),
            ),
            ("image_slices", "paths"): (
                "folders/a/0.png", lambda path: data.ImageSet(data.image_slices([path], [0], [9]), [0]).encoded(0),
            ),
            ("Preprocessing.load", "path"): (
                "run/preprocessing.json", lambda path: data.Preprocessing.load(path).get_config(),
            ),
            ("list_images", "root"): ("folders", lambda path: [item.id for item in serving.list_images(path)]),
            ("Encoder", "path"): ("encoder", encoder),
            ("read_embeddings", "path"): ("embeddings", lambda path: evaluation.read_embeddings(path).rows[:].tolist()),
            ("read_labels", "labels"): (
                "labels.txt", lambda path: evaluation.embeddings.read_labels("labels", path, 4),
            ),
            ("load_index", "folder"): ("index", lambda path: evaluation.load_index(path).rows().tolist()),
            ("load_model", "path"): ("run/best.keras", lambda path: export.load_model(path).embedding_dim),
            ("load_run", "workdir"): ("run", lambda path: training.load_run(path)[1].to_dict()),
            ("read_state_dict", "path"): ("weights.npz", lambda path: read_state_dict(path)["w"].tolist()),
            ("backbones.get", "weights"): ("backbone.weights.h5", weights),
            ("embed_images", "items"): (
                "folders/a/0.png",
                lambda path: serving.embed_images(
                    [serving.Item("0", path, "")], serving.Encoder(home / "encoder"), home / "embedded", progress=False
                ),
            ),
        }  # fmt: skip

    @pytest.fixture(scope="class")
    @staticmethod
    def writing(home):
        """By `(function, argument)`: a file that a function from a path writes there."""
        split, rows = data.load_folder(str(home / "folders")), np.eye(3)
        model = export.load_model(home / "run" / "best.keras")
        items = serving.list_images(home / "folders")[:1]
        encoder = serving.Encoder(home / "encoder")
        return {
            ("write_shards", "folder"): ("s2sd_shards.json", lambda path: data.write_shards(split, path)),
            ("Index.save", "folder"): (
                "index.json", lambda path: evaluation.build_index(rows, method="exact").save(path),
            ),
            ("export_encoder", "path"): (
                "saved_model.pb", lambda path: export.export_encoder(model, data.Preprocessing(8, 8, 3), path),
            ),
            ("save_projector", "folder"): (
                "projector_config.pbtxt", lambda path: reporting.save_projector(path, rows),
            ),
            ("save_audit", "folder"): (
                "audit.json",
                lambda path: reporting.save_audit(
                    path, evaluation.audit(rows, [0, 0, 1]), reporting.EmbeddedImages(rows, np.array([0, 0, 1]))
                ),
            ),
            ("embed_images", "folder"): (
                "summary.json", lambda path: serving.embed_images(items, encoder, path, progress=False),
            ),
            ("save_curves", "path"): ("", lambda path: reporting.save_curves(path, {"x": {"y": ([1, 2], [1, 2])}})),
            ("save_matches", "path"): ("", lambda path: reporting.save_matches(path, [[(np.ones((4, 4)), "x", None)]])),
            ("write_json", "path"): ("", lambda path: write_json(path, 1)),
        }  # fmt: skip

    @staticmethod
    def forms(home, path):
        """Forms of a path under `home`, which is also the user's home and the current folder."""
        full = str(home / path)
        return (
            full, pathlib.Path(full), f"~/{path}", pathlib.Path("~") / path, path, f"./{path}", OwnPath(full),
            np.str_(full), f"{home}//{path}",
        )  # fmt: skip

    @pytest.fixture
    def at_home(self, home, monkeypatch):
        monkeypatch.setenv("HOME", str(home))
        monkeypatch.chdir(home)
        shutil.rmtree(home / "embedded", ignore_errors=True)
        return home

    @examples(60)
    @given(st.data())
    def test_read(self, at_home, reading, draw):
        door = draw.draw(st.sampled_from(sorted(reading)), "door")
        path, read = reading[door]
        if draw.draw(st.booleans(), "is a path"):
            form = draw.draw(st.sampled_from(self.forms(at_home, path)), "path")
            assert read(form) == read(str(at_home / path))
            return
        before = listing(at_home)
        with clear_errors(door[1]) as raised:
            read(draw.draw(st.sampled_from(self.NO_PATHS), "no path"))
        assert raised
        assert "\n" not in str(raised[0])
        assert listing(at_home) == before

    @examples(40)
    @given(st.data())
    def test_written(self, at_home, writing, draw):
        door = draw.draw(st.sampled_from(sorted(writing)), "door")
        inside, write_there = writing[door]
        before = listing(at_home)
        if draw.draw(st.booleans(), "is a path"):
            write_there(draw.draw(st.sampled_from(self.forms(at_home, "written/here")), "path"))
            new = set(listing(at_home)) - set(before)
            assert str(at_home / "written" / "here" / inside) in new
            assert all(path.startswith(str(at_home / "written")) for path in new)
            shutil.rmtree(at_home / "written")
            return
        with clear_errors(door[1]) as raised:
            write_there(draw.draw(st.sampled_from(self.NO_PATHS), "no path"))
        assert raised
        assert "\n" not in str(raised[0])
        assert listing(at_home) == before

    @pytest.mark.parametrize("path", NO_PATHS, ids=repr)
    def test_settings_of_data_sets_and_runs(self, at_home, path):
        for argument, call in (
            ("train_list", lambda: data.datasets.load("lists", "lists", train_list=path, test_list="lists/test.txt")),
            ("workdir", lambda: training.train(training.default_config(), path)),
        ):
            with clear_errors(argument) as raised:
                call()
            assert raised
        assert not (at_home / "gs:").exists()
