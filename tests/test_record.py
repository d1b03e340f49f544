"""The record of a run, and reproducibility: the same config gives the same run."""

import json
import os
import shutil
import subprocess

import conftest
import numpy as np
import pytest

import s2sd_tf
from s2sd_tf import data
from s2sd_tf.files import read_json, write_json
from s2sd_tf.training import record, train
from s2sd_tf.training import run as run_module
from s2sd_tf.training.record import fingerprint

PIXELS = np.arange(4 * 2 * 2, dtype=np.uint8).reshape(4, 2, 2, 1)
LABELS = np.array([0, 0, 1, 1], np.int32)
NAMES = ("a", "b")


def small_config():
    return conftest.small_config(**{
        "model.filters": (6,), "model.pools": 1, "s2sd.target_dims": (), "s2sd.feature_distill": False,
        "train.epochs": 1, "train.steps_per_epoch": 2,
    })  # fmt: skip


class TestFingerprint:
    def test_covers_pixels_labels_and_names(self):
        images = data.ImageSet(PIXELS, LABELS, NAMES)
        others = [
            data.ImageSet(PIXELS + 1, LABELS, NAMES),
            data.ImageSet(PIXELS.reshape(4, 4, 1, 1), LABELS, NAMES),
            data.ImageSet(PIXELS, LABELS[::-1].copy(), NAMES),
            data.ImageSet(PIXELS, LABELS, ("a", "c")),
            data.ImageSet(PIXELS, LABELS, ("a", "b", "c")),
            data.ImageSet(PIXELS, LABELS, NAMES, ("x", "x")),
            images.select_images([1, 0, 2, 3]),
            images.select_images([0, 1, 2]),
        ]
        assert fingerprint(data.ImageSet(PIXELS.copy(), LABELS.copy(), NAMES)) == fingerprint(images)
        assert len({fingerprint(images), *map(fingerprint, others)}) == 1 + len(others)

    def test_of_encoded_images_depends_on_where_each_ends(self):
        def of(*encoded):
            array = np.empty(4, object)
            array[:] = encoded
            return fingerprint(data.ImageSet(array, LABELS, NAMES))

        assert of(b"ab", b"c", b"d", b"e") == of(b"ab", b"c", b"d", b"e")
        assert of(b"ab", b"c", b"d", b"e") != of(b"a", b"bc", b"d", b"e")

    @pytest.mark.parametrize("kind", ["paths", "slices"])
    def test_of_files_allows_moving_but_not_changing_them(self, tmp_path, kind):
        def of(root, sizes=(5, 6, 7, 8), names=("x/0", "x/1", "y/2", "y/3"), offset=0):
            for name, size in zip(names, sizes):
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_bytes(bytes(size))
            paths = np.array([str(root / name) for name in names])
            images = paths if kind == "paths" else data.image_slices(paths, [offset, 0, 0, 0], [2, 2, 2, 2])
            return fingerprint(data.ImageSet(images, LABELS, NAMES))

        one = of(tmp_path / "one")
        assert of(tmp_path / "elsewhere" / "two") == one
        assert of(tmp_path / "three", sizes=(5, 6, 7, 9)) != one
        assert of(tmp_path / "four", names=("x/0", "x/1", "y/2", "y/4")) != one
        assert (of(tmp_path / "five", offset=1) != one) == (kind == "slices")
        (tmp_path / "one" / "x" / "0").unlink()
        with pytest.raises(FileNotFoundError):
            fingerprint(data.ImageSet(np.array([str(tmp_path / "one" / "x" / "0")]), LABELS[:1], NAMES))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "finish", lambda *_: {})
        train(small_config(), str(workdir))
    return workdir


@pytest.fixture
def unfinished(trained, tmp_path, monkeypatch):
    """Work directory of a run that finished training but has no results yet."""
    monkeypatch.setattr(run_module, "finish", lambda *_: {})
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


class TestRecord:
    def test_describes_the_run(self, unfinished):
        found = read_json(unfinished / "run.json")
        assert set(found) == {
            "command", "versions", "source", "machine", "strategy", "similarity_kl", "seed", "data", "config",
            "sessions",
        }  # fmt: skip
        assert found["config"] == read_json(unfinished / "config.json")
        assert found["seed"] == 0
        assert found["versions"]["s2sd_tf"] == s2sd_tf.__version__
        assert all(found["versions"][name] for name in ("python", "tensorflow", "keras", "numpy", "scann"))
        assert found["machine"]["cpu"]
        assert found["machine"]["threads"] == os.cpu_count()
        train_images, test_images, _ = data.load_digits()
        assert found["data"]["train"] == {
            "classes": 5, "images": len(train_images), "sha256": fingerprint(train_images)
        }  # fmt: skip
        assert found["data"]["test"]["sha256"] == fingerprint(test_images)
        (session,) = found["sessions"]
        assert (session["epoch"], session["step_in_epoch"]) == (0, 0)
        assert session["time"].endswith("+00:00")

    def test_gets_a_session_for_every_start(self, unfinished, monkeypatch):
        versions = record._versions()
        monkeypatch.setattr(record, "_versions", lambda: {**versions, "numpy": "9.9"})
        before = read_json(unfinished / "run.json")
        train(small_config(), str(unfinished))
        after = read_json(unfinished / "run.json")
        assert {**after, "sessions": after["sessions"][:1]} == before
        assert after["sessions"][1]["epoch"] == 1
        assert after["sessions"][1]["versions"] == {"numpy": "9.9"}
        # A change is recorded once.
        train(small_config(), str(unfinished))
        assert "versions" not in read_json(unfinished / "run.json")["sessions"][2]

    def test_refuses_other_data(self, unfinished):
        found = read_json(unfinished / "run.json")
        found["data"]["test"]["sha256"] = "0" * 64
        write_json(unfinished / "run.json", found)
        with pytest.raises(ValueError, match=r"config.data: expected the test images .*000000000000.*Received: others"):
            train(small_config(), str(unfinished))
        found["data"].pop("test")
        write_json(unfinished / "run.json", found)
        with pytest.raises(ValueError, match=r"the test images that .* was started with \(none\)"):
            train(small_config(), str(unfinished))

    def test_names_an_unreadable_record(self, unfinished):
        (unfinished / "run.json").write_text('{"data"')
        with pytest.raises(ValueError, match=r"run.json: expected the record of the run.*Delete it"):
            train(small_config(), str(unfinished))

    def test_of_a_run_without_a_record(self, unfinished):
        (unfinished / "run.json").unlink()
        train(small_config(), str(unfinished))
        assert read_json(unfinished / "run.json")["sessions"][0]["epoch"] == 1

    def test_without_git(self, monkeypatch):
        def missing(*_, **__):
            raise FileNotFoundError("git")

        monkeypatch.setattr(subprocess, "run", missing)
        assert record._source() is None

    def test_of_a_package_inside_the_checkout_of_another_project(self, tmp_path, monkeypatch):
        subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
        (tmp_path / "site" / "s2sd_tf").mkdir(parents=True)
        (tmp_path / "site" / "s2sd_tf" / "__init__.py").write_text("")
        monkeypatch.setattr(s2sd_tf, "__file__", str(tmp_path / "site" / "s2sd_tf" / "__init__.py"))
        assert record._source() is None
        git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.example"]
        subprocess.run([*git, "add", "-A"], check=True)
        subprocess.run([*git, "commit", "-q", "-m", "all"], check=True)
        found = record._source()
        assert len(found["revision"]) == 40
        assert found["uncommitted"] is False
        (tmp_path / "site" / "s2sd_tf" / "other.py").write_text("")
        assert record._source() == {**found, "uncommitted": True}


SCRIPT = """
import hashlib, json
from s2sd_tf.training import default_config, run

found = {}

def finish(run):
    weights = hashlib.sha256(b"".join(weight.tobytes() for weight in run.model.get_weights())).hexdigest()
    found[run.config.sampler.name] = [weights, run.state.history[-1]["loss"]]

run.finish = finish
# One that draws by chance alone, and one that draws by what the model makes of the images.
for name in ("class_balanced", "d2_coreset"):
    config = default_config()
    config.model.filters = (6,)
    config.model.pools = 1
    config.model.embedding_dim = 8
    config.s2sd.target_dims = (12,)
    config.objective.name = "margin"
    config.data.classes_per_batch = 3
    config.data.samples_per_class = 2
    config.data.augmentation = "base"
    config.train.epochs = 2
    config.train.steps_per_epoch = 2
    config.train.threads = 1
    config.eval.every = 0
    config.sampler.name = name
    run.train(config, name)
print("found " + json.dumps(found))
"""


def test_the_same_seed_gives_the_same_run_in_every_process(tmp_path, run_python):
    found = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        output = run_python("-c", SCRIPT, cwd=tmp_path / name).stdout
        found.append(json.loads(output[output.index("found ") + 6 :]))
    assert len(found[0]) == 2
    assert found[0] == found[1]
