"""Runs: their output, resuming after a kill, choosing on held-out classes, the programs, errors."""

import csv
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import ml_collections
import numpy as np
import pytest
import tensorflow as tf
from absl import flags
from conftest import METHODS
from PIL import Image

import s2sd_tf
from s2sd_tf import data, mining, objectives
from s2sd_tf.files import read_json, write_json
from s2sd_tf.keras_compat import keras
from s2sd_tf.models import backbones
from s2sd_tf.training import Interrupted, default_config, preset_config, resolve, train
from s2sd_tf.training.build import build_model
from s2sd_tf.training.compare import RunFailed, run_all, summarize
from s2sd_tf.training.config_help import explain
from s2sd_tf.training.datasets import load_data

CONFIGS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "configs")
DIGITS = f"--config={CONFIGS}/digits.py"
SMALL = (
    DIGITS,
    "--config.model.filters=(8,8)",
    "--config.s2sd.target_dims=(16,)",
    "--config.data.classes_per_batch=3",
    "--config.data.samples_per_class=4",
)


@pytest.fixture(scope="module")
def finished(call, tmp_path_factory):
    """Work directory and output of a small finished run that chose its checkpoint on held-out classes."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    arguments = (
        *SMALL,
        "--config.data.validation_classes=2",
        "--config.train.epochs=4",
        "--config.train.steps_per_epoch=5",
        "--config.eval.every=2",
        f"--workdir={workdir}",
    )
    return workdir, arguments, call("train", *arguments).stdout


class TestARun:
    def test_writes_its_output(self, finished):
        workdir, _, output = finished
        assert {path.name for path in workdir.iterdir()} == {
            "config.json", "run.json", "preprocessing.json", "checkpoints", "best.keras", "history.csv", "tensorboard",
            "results.json", "curves.png", "gallery.png", "saved_model",
        }  # fmt: skip
        results = read_json(workdir / "results.json")
        assert results["steps"] == 20
        assert results["counts"] == {
            "train": {"classes": 3, "images": results["counts"]["train"]["images"]},
            "validation": {"classes": 2, "images": 901 - results["counts"]["train"]["images"]},
            "test": {"classes": 5, "images": 896},
        }
        assert set(results["test"]) == set(METHODS)
        assert results["test"]["exact"] == pytest.approx(results["test"][METHODS[-1]], abs=1e-4)
        assert f"{100 * results['test']['exact']['recall@1']:.1f}" in output
        for name in ("curves.png", "gallery.png"):
            assert np.array(Image.open(workdir / name)).std() > 1
        assert any(name.startswith("events") for _, _, names in os.walk(workdir / "tensorboard") for name in names)

    def test_history_has_every_epoch(self, finished):
        with open(finished[0] / "history.csv") as file:
            rows = list(csv.DictReader(file))
        assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
        assert [bool(row["val_map@r"]) for row in rows] == [False, True, False, True]
        assert {"loss", "objective", "target_objective", "distill_kl", "feature_kl", "test_recall@1"} <= set(rows[0])

    def test_chooses_on_held_out_training_classes(self, finished):
        workdir = finished[0]
        results = read_json(workdir / "results.json")
        with open(workdir / "history.csv") as file:
            values = {int(row["epoch"]): float(row["val_map@r"]) for row in csv.DictReader(file) if row["val_map@r"]}
        assert results["best_epoch"] == max(values, key=values.get)
        best = keras.models.load_model(workdir / "best.keras")
        assert int(tf.convert_to_tensor(best.s2sd_loss.step)) == 5 * results["best_epoch"]

    def test_the_same_command_again_reads_the_results(self, call, finished):
        workdir, arguments, output = finished
        before = os.stat(workdir / "results.json").st_mtime_ns
        again = call("train", *arguments).stdout
        assert again.splitlines()[-3 - len(METHODS) :] == output.splitlines()[-3 - len(METHODS) :]
        assert os.stat(workdir / "results.json").st_mtime_ns == before

    def test_another_config_is_refused(self, call, finished):
        _, arguments, _ = finished
        done = call("train", *arguments, "--config.optimizer.learning_rate=0.5", status=2)
        assert "workdir" in done.stderr
        assert "optimizer.learning_rate (0.0003 there, 0.5 here)" in done.stderr
        assert "Traceback" not in done.stderr

    def test_resumes_if_new_keys_have_their_defaults(self, call, finished, tmp_path):
        workdir, arguments, output = finished
        copy = tmp_path / "old"
        shutil.copytree(workdir, copy)
        config = read_json(copy / "config.json")
        del config["data"]["augmentation"], config["optimizer"]["schedule"]
        write_json(copy / "config.json", config)
        again = call("train", *arguments[:-1], f"--workdir={copy}").stdout
        assert again.splitlines()[-4:-1] == output.splitlines()[-4:-1]

    def test_evaluate_and_export(self, call, finished, tmp_path):
        workdir = finished[0]
        files = (f"--output={tmp_path / 'metrics.json'}", f"--report={tmp_path / 'report.html'}")
        output = call("evaluate", f"--workdir={workdir}", "--ks=1,3", *files).stdout
        page = (tmp_path / "report.html").read_text()
        config = read_json(workdir / "config.json")
        assert f"<dt>model</dt><dd>conv_blocks, {config['model']['embedding_dim']} dimensions</dd>" in page
        assert "<dt>data.name</dt><dd>digits</dd>" in page
        # Only what the run used, and no paths.
        assert "data.folder" not in page
        assert str(workdir.parent) not in page
        assert "rho: how unevenly" in output
        found = read_json(tmp_path / "metrics.json")
        exact = read_json(workdir / "results.json")["test"]["exact"]
        assert found["exact"]["recall@1"] == pytest.approx(exact["recall@1"])
        assert "recall@3" in output
        call("export", f"--workdir={workdir}", f"--output={tmp_path / 'encoder'}")
        output = call(
            "export", f"--workdir={workdir}", f"--output={tmp_path / 'encoder.onnx'}", "--format=onnx", "--whiten=4"
        ).stdout
        assert "onnx file of" in output
        assert tf.saved_model.contains_saved_model(str(tmp_path / "encoder"))
        assert "finished run" in call("export", f"--workdir={tmp_path}", status=2).stderr


def test_compare_prints_a_table_and_writes_pictures(call, tmp_path):
    arguments = (
        *SMALL,
        "--config.train.epochs=2",
        "--config.train.steps_per_epoch=3",
        "--config.eval.every=1",
        "--noconfig.s2sd.feature_distill",
        "--config.model.log_per_target",
        f"--workdir={tmp_path / 'both'}",
        "--seeds=1",
    )
    output = call("compare", *arguments).stdout
    results = read_json(tmp_path / "both" / "results.json")
    assert set(results) == {"plain objective", "with S2SD"}
    for name, row in results.items():
        values = [run["recall@1"] for run in row["runs"].values()]
        assert [row["mean"]["recall@1"]] == pytest.approx(values)
        assert row["standard_deviation"]["recall@1"] == 0.0
        line = next(line for line in output.splitlines() if line.startswith(name))
        assert line.split()[2] == f"{100 * values[0]:.1f}"
    gained = next(line for line in output.splitlines() if line.startswith("gained"))
    first, second = (row["mean"]["recall@1"] for row in results.values())
    assert gained.split()[1] == f"{100 * (second - first):.1f}"
    assert "seed 1," in output
    names = {path.name for path in (tmp_path / "both").iterdir()}
    assert {"results.json", "curves.png", "gallery.png", "saved_model", "runs"} <= names
    plain = read_json(tmp_path / "both" / "runs" / "plain_seed1" / "config.json")
    assert (plain["s2sd"]["target_dims"], plain["s2sd"]["feature_distill"]) == ([], False)
    assert read_json(tmp_path / "both" / "runs" / "plain_seed1" / "results.json")["steps"] == 6
    # However a flag is written, the runs get it.
    options = read_json(tmp_path / "both" / "runs" / "s2sd_seed1" / "config.json")
    assert (options["s2sd"]["feature_distill"], options["model"]["log_per_target"]) == (False, True)
    # Finished runs of another config are not accepted.
    other = call("compare", *arguments, "--config.model.embedding_dim", "5", status=2)
    assert "model.embedding_dim (8 there, 5 here)" in other.stderr
    failed = call("compare", *SMALL, "--config.data.samples_per_class=1000", f"--workdir={tmp_path / 'no'}", status=2)
    assert "samples_per_class" in failed.stderr


@pytest.mark.parametrize("of_all", [False, True])
def test_compare_that_is_terminated_stops_its_runs(tmp_path, monkeypatch, of_all):
    """With a program in place of `s2sd-train` that ends as that does."""
    began = tmp_path / "began"
    script = ["#!/bin/sh", "sleep 100 &", 'trap "kill $!; exit 75" TERM', f"echo $$ > {began}.part"]
    (tmp_path / "train").write_text("\n".join([*script, f"mv {began}.part {began}", "wait", ""]))
    (tmp_path / "train").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "train"))

    def stop():
        while not began.exists():
            time.sleep(0.02)
        # As a scheduler does it to one process or to all.
        os.kill(os.getpid(), signal.SIGTERM)
        if of_all:
            os.kill(int(began.read_text()), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(Interrupted, match="SIGTERM; the runs stop too, and the same command resumes them"):
        run_all({str(tmp_path / name): [] for name in "ab"}, jobs=1)
    thread.join()
    (first,) = began.read_text().split()
    with pytest.raises(ProcessLookupError):
        os.kill(int(first), 0)
    assert not (tmp_path / "b.log.txt").exists()


@pytest.mark.parametrize("jobs", [1, 2])
def test_compare_begins_no_run_after_one_failed(tmp_path, monkeypatch, jobs):
    """With a program in place of `s2sd-train` that fails."""
    (tmp_path / "train").write_text("#!/bin/sh\necho train: error: no luck\nexit 1\n")
    (tmp_path / "train").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "train"))
    names = [f"run{number}" for number in range(6)]
    with pytest.raises(RunFailed, match=r"run[01] failed with status 1.*\n.*no luck"):
        run_all({str(tmp_path / name): [] for name in names}, jobs)
    begun = {path.name for path in tmp_path.glob("*.log.txt")}
    assert begun <= {f"{name}.log.txt" for name in names[:jobs]}


def test_summarize():
    runs = [{"test": {"exact": {"recall@1": value, "queries": 3}}} for value in (0.5, 0.7)]
    assert summarize(runs)["recall@1"] == pytest.approx((0.6, np.std([0.5, 0.7], ddof=1)))
    assert summarize(runs[:1]) == {"recall@1": (0.5, 0.0)}


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ((DIGITS, "--config.embedding_dim=8", "--workdir=never"), "did you mean config.model.embedding_dim?"),
            ((DIGITS, "--config.model.embeding_dim=8", "--workdir=never"), "did you mean embedding_dim"),
            ((DIGITS, "--epochs=8", "--workdir=never"), "did you mean config.train.epochs?"),
            ((DIGITS, "--config.objective.name=triplets", "--workdir=never"), "did you mean triplet"),
            (("--config=missing.py", "--config.seed=1"), "'missing.py', which does not exist"),
            (("--config.seed=1", "--workdir=never"), "--config.seed: expected --config=<file> before it"),
            ((DIGITS,), "workdir"),
            ((DIGITS, "--config.objective.name=nonsense", "--workdir=never"), "config.objective.name: expected one of"),
            ((DIGITS, "--config.sampler.name=nonsense", "--workdir=never"), "config.sampler.name: expected one of"),
        ],
    )
    def test_are_one_line_on_the_command_line(self, call, tmp_path, monkeypatch, arguments, words):
        monkeypatch.chdir(tmp_path)
        done = call("train", *arguments, status=2)
        assert "Traceback" not in done.stderr
        message = [line for line in done.stderr.splitlines() if line.startswith("train.py: error:")]
        assert len(message) == 1
        assert words in message[0]
        assert not os.path.exists("never")

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"model.embedding_dim": 0}, "embedding_dim: expected an int >= 1. Received: 0"),
            ({"s2sd.temperature": 0.0}, "temperature"),
            ({"objective.name": "nonsense"}, "config.objective.name: expected one of"),
            ({"s2sd.target_objective": "nonsense"}, "config.s2sd.target_objective: expected one of"),
            ({"data.name": "nonsense"}, "config.data.name"),
            (
                {"data.samples_per_class": 200},
                "config.data.samples_per_class: expected at least 200 images in every class",
            ),
            ({"data.classes_per_batch": 6}, "config.data.classes_per_batch: expected at most 5"),
            ({"data.validation_classes": 4}, "config.data.validation_classes: expected 0, or 2 to 3, as there are 5"),
            ({"data.validation_classes": 2, "data.validation_fraction": 0.5}, "config.data.validation_fraction"),
            ({"data.augmentation": "loud"}, "config.data.augmentation: expected one of"),
            ({"data.augmentation_settings": {"flip": 1.0}}, "config.data.augmentation_settings: expected none"),
            (
                {"data.augmentation": "base", "data.augmentation_settings": {"flip": 7}},
                "config.data.augmentation_settings: expected settings of Augmentation",
            ),
            ({"data.name": "folder", "data.root": ".", "data.folder.check": "twice"}, "check: expected one of"),
            ({"data.name": "folder"}, "config.data.root: expected the folder with the data of 'folder'"),
            ({"model.frozen_bn": "half"}, "config.model.frozen_bn: expected one of"),
            ({"model.learning_rate_multipliers.backbone/conv9*": 0.5}, "learning_rate_multipliers: expected patterns"),
            ({"model.learning_rate_multipliers.conv0": 0.5}, "learning_rate_multipliers: expected 'backbone'"),
            ({"optimizer.schedule.name": "steps"}, "config.optimizer.schedule.name: expected one of"),
            ({"optimizer.schedule.name": "multi_step"}, "config.optimizer.schedule.milestones"),
            ({"optimizer.schedule.warmup_epochs": 99.0}, "config.optimizer.schedule.warmup_epochs"),
            ({"model.backbone": "nonsense"}, "backbone"),
            ({"optimizer.name": "nonsense"}, "config.optimizer.name"),
            ({"train.epochs": 0}, "config.train.epochs"),
            ({"train.checkpoints_kept": 0}, "config.train.checkpoints_kept: expected an int >= 1. Received: 0"),
            ({"model.micro_batch_size": -1}, "micro_batch_size: expected an int >= 0"),
            ({"train.precision": "half"}, "config.train.precision: expected one of"),
            ({"s2sd.temperature": 0.0}, "temperature: expected a number > 0"),
            ({"train.profile": (3,)}, r"config.train.profile: expected \(first, last\).* Received: \(3,\)"),
            ({"train.profile": (3, 2)}, "config.train.profile: expected"),
            ({"train.profile": (0, 2)}, "config.train.profile: expected"),
            ({"eval.select_by": "luck"}, "config.eval.select_by"),
        ],
    )
    def test_name_the_key_and_leave_nothing_behind(self, tmp_path, change, words):
        config = default_config()
        config.train.deterministic = False  # it would apply to the whole process, which other tests share
        for key, value in change.items():
            config.update_from_flattened_dict({key: value})
        with pytest.raises(ValueError, match=words):
            train(config, str(tmp_path / "run"))
        assert not (tmp_path / "run").exists()

    def test_another_config_differs_in_the_keys_it_uses(self, tmp_path):
        config = default_config()
        config.train.deterministic = False
        there = config.to_dict()
        there["objective"]["multi_similarity"]["alpha"] = 7.0
        # Keys that this run does not use, or that the other version does not have.
        there["objective"]["margin"]["beta"] = 7.0
        there["objective"].pop("circle")
        there["miner"].pop("hard")
        there["data"]["folder"]["test_fraction"] = 0.7
        there["data"].pop("sop")
        there["data"]["not_known_here"] = {"check": "files"}
        write_json(tmp_path / "config.json", there)
        with pytest.raises(ValueError, match=r"differs in objective.multi_similarity.alpha \(7.0 there, 2.0 here\)$"):
            train(config, str(tmp_path))

    def test_the_chosen_data_set_counts(self, tmp_path):
        config = default_config()
        config.data.name = "folder"
        write_json(tmp_path / "config.json", config.to_dict())
        config.data.folder.test_classes = "a"
        with pytest.raises(ValueError, match=r"differs in data.folder.test_classes \('' there, 'a' here\)$"):
            train(config, str(tmp_path))

    def test_a_run_with_an_older_layout_is_reported_in_one_line(self, call, tmp_path):
        there = default_config().to_dict()
        there["data"].update(source="auto", test_root="")
        there["optimizer"]["settings"]["any_key"] = 1
        write_json(tmp_path / "config.json", there)
        (tmp_path / "best.keras").touch()
        (tmp_path / "preprocessing.json").touch()
        for program, *arguments in (("train", DIGITS), ("evaluate",)):
            done = call(program, *arguments, f"--workdir={tmp_path}", status=2)
            (line,) = [line for line in done.stderr.splitlines() if f"{program}.py: error:" in line]
            assert "config.json: expected the keys of this version's configs." in line
            assert "Received: data.source, data.test_root, from a run of an older version" in line

    def test_a_name_in_place_of_a_section(self):
        config = ml_collections.ConfigDict({**default_config().to_dict(), "objective": "margin"})
        with pytest.raises(ValueError, match=r"config.objective: expected a section with keys .* Received: 'margin'"):
            resolve(config)

    def test_folders(self, tmp_path):
        config = default_config()
        config.train.deterministic = False
        config.data.name, config.data.root = "folder", str(tmp_path / "images")
        (tmp_path / "images").mkdir()
        with pytest.raises(ValueError, match="expected images as <class>"):
            train(config, str(tmp_path / "run"))
        config.data.root = str(tmp_path / "nowhere")
        with pytest.raises(FileNotFoundError, match="root"):
            train(config, str(tmp_path / "run"))
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "file").write_text("not of a run")
        with pytest.raises(ValueError, match="new or empty folder"):
            train(config, str(tmp_path / "other"))

    def test_unknown_keys(self):
        config = ml_collections.ConfigDict(default_config().to_dict())
        config.model.depth = 3
        with pytest.raises(ValueError, match=r"config.model: expected keys out of .* Received: 'depth'"):
            resolve(config)
        with pytest.raises(AttributeError, match="embeding_dim"):
            default_config().model.embeding_dim = 3


def test_settings_of_objective_and_miner_reach_the_model():
    config = default_config()
    config.objective.name = "margin"
    config.objective.margin.update(miner="rho_distance", beta=0.6)
    config.miner.rho_distance.rho = 0.5
    config.s2sd.update(target_dims=(8,), target_objective="")
    config.data.image_size = 8
    config = resolve(config)
    model = build_model(config, load_data(config))
    for objective in (model.s2sd_loss.objective, *model.s2sd_loss.target_objectives):
        assert objective.beta == 0.6
        assert objective.num_classes == 5
        assert (objective.miner.registered_name, objective.miner.rho) == ("rho_distance", 0.5)


def test_folders_of_images_with_two_roots(tmp_path):
    for root, names in (("a", ["x", "y", "z"]), ("b", ["z", "p/q", "p/r"])):
        for name in names:
            (tmp_path / root / name).mkdir(parents=True)
            for k in range(4):
                pixels = np.random.default_rng(k).integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / root / name / f"{k}.jpg")
    (tmp_path / "b" / "p" / "q" / "broken.jpg").write_bytes(b"nothing")
    config = default_config()
    config.data.update(name="folder", root=str(tmp_path / "a"))
    config.data.folder.test_root = str(tmp_path / "b")
    with pytest.raises(ValueError, match=r"broken.jpg"):
        load_data(resolve(config))
    config.data.folder.on_corrupt = "skip"
    with pytest.raises(
        ValueError,
        match=r"test_root: expected classes that are not in root.* Received: 1 classes that are in both, \['z'\]",
    ):
        load_data(resolve(config))
    config.data.folder.test_classes = "p/*"
    parts = load_data(resolve(config))
    assert (parts.train.class_names, len(parts.train)) == (("x", "y", "z"), 12)
    assert (parts.test.class_names, len(parts.test)) == (("p/q", "p/r"), 8)
    # The class names differ, the images are the same.
    config.data.folder.update(test_root=str(tmp_path / "a" / "x"), test_classes="")
    (tmp_path / "a" / "x" / "deeper").mkdir()
    shutil.copy(tmp_path / "a" / "x" / "0.jpg", tmp_path / "a" / "x" / "deeper")
    with pytest.raises(ValueError, match=r"test_root: expected images that are not in root.* 1 images .*0\.jpg"):
        load_data(resolve(config))


def test_variants_of_a_config():
    for name, targets, features, pooling in [
        ("dsd", 1, False, "avg"),
        ("msd", 4, False, "avg"),
        ("msda", 4, False, "avg+max"),
        ("msdf", 4, True, "avg"),
        ("msdfa", 4, True, "avg+max"),
        ("DSD", 1, False, "avg"),
        ("Plain", 0, False, "avg"),
    ]:
        config = preset_config(default_config(), name)
        assert len(config.s2sd.target_dims) == targets
        assert config.s2sd.feature_distill == features
        assert config.model.target_pooling == pooling
    with pytest.raises(ValueError, match="preset"):
        preset_config(default_config(), "xyz")


PROGRAMS = (
    *("train", "compare", "evaluate", "export", "convert", "embed"),
    *("index", "search", "beam", "shards", "serve", "audit"),
)


class TestHelp:
    @pytest.mark.parametrize("program", PROGRAMS)
    def test_is_short_and_needs_no_tensorflow(self, program, tmp_path):
        # `-c` would not be recognised as the program.
        (tmp_path / f"s2sd-{program}").write_text(
            f"import sys\nfrom s2sd_tf.cli.{program} import main\ntry:\n    main()\nfinally:\n"
            "    assert 'tensorflow' not in sys.modules\n"
        )
        command = [sys.executable, tmp_path / f"s2sd-{program}"]
        done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
        assert done.stderr == ""
        assert done.stdout.startswith(f"s2sd-{program}: ")
        assert done.stdout.count(f"  s2sd-{program} --") >= 2
        assert "helpfull" not in done.stdout
        assert "repeat this option" not in done.stdout
        assert ("  --config\n" in done.stdout) == (program in ("train", "compare"))
        assert ("  --register\n" in done.stdout) == (program in ("evaluate", "export"))
        assert max(map(len, done.stdout.splitlines())) <= 120
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout.startswith(f"s2sd_tf {s2sd_tf.__version__} (tensorflow {tf.__version__}")

    def test_names_to_choose_from_are_the_librarys(self):
        """The flags repeat them, as importing the library takes seconds."""
        from s2sd_tf.cli import shards
        from s2sd_tf.cli import train as program
        from s2sd_tf.data import image_files, sources
        from s2sd_tf.training import strategies

        for flag, expected in (
            (program._STRATEGY, strategies.STRATEGIES),
            (shards._SOURCE, sources.SOURCES),
            (shards._ON_CORRUPT, image_files.ON_CORRUPT),
            (shards._CHECK, image_files.CHECKS),
        ):
            assert tuple(flags.FLAGS[flag.name].parser.enum_values) == expected

    def test_print_config_prints_a_config_file(self, call):
        output = call("train", *SMALL, "--config.optimizer.settings.beta_1=0.5", "--print_config").stdout
        config = default_config()
        exec(output, {"config": config})
        assert (config.model.filters, config.optimizer.settings.beta_1, config.train.epochs) == ((8, 8), 0.5, 120)

    @pytest.mark.parametrize(
        ("section", "registry"),
        [("data", data.datasets), ("sampler", data.samplers), ("objective", objectives), ("miner", mining)],
    )
    def test_every_key_is_explained(self, section, registry):
        for name in registry.names():
            config = default_config()
            if section == "miner":
                config.objective.triplet.miner = name
                config.objective.name = "triplet"
            else:
                config[section].name = name
            text = explain(config)
            copy = default_config()
            exec(text, {"config": copy})
            assert copy.to_dict() == config.to_dict()
            lines = text.splitlines()
            for before, line in itertools.pairwise(lines):
                if line.startswith("config.") and not line.startswith("config.model.learning_rate_multipliers"):
                    assert before.startswith("# "), line
            place = f"config.{section}.{name}." if name.isidentifier() else f"config.{section}[{name!r}]."
            assert place in text or not config[section][name]

    @pytest.mark.parametrize("kind", ["objectives", "miners", "samplers", "backbones", "datasets"])
    def test_lists(self, call, kind):
        registries = {"objectives": objectives, "miners": mining, "samplers": data.samplers, "datasets": data.datasets}
        names = registries.get(kind, backbones).names()
        lines = call("train", f"--list={kind}").stdout.splitlines()
        assert [line.split()[0] for line in lines] == names
        assert all(len(line.split()) > 2 for line in lines)
