"""Runs on several devices and in several processes: the training program under strategies."""

import contextlib
import json
import pathlib
import signal
import socket
import time

import numpy as np
import pytest
import tensorflow as tf
from processes import start_python

from s2sd_tf import data
from s2sd_tf.export import load_model
from s2sd_tf.files import read_json
from s2sd_tf.training import strategies

DIGITS = pathlib.Path(__file__).parent.parent / "configs" / "digits.py"
RUN = (
    f"--config={DIGITS}",
    "--config.model.filters=(8,8)",
    # The statistics of part of a batch differ from the whole batch's.
    "--config.model.frozen_bn=all",
    "--config.s2sd.target_dims=(16,)",
    "--config.data.classes_per_batch=4",
    "--config.data.samples_per_class=4",
    "--config.data.validation_fraction=0.2",
    "--config.optimizer.name=sgd",
    "--config.optimizer.learning_rate=0.004",
    "--config.optimizer.settings.momentum=0.9",
    "--config.train.epochs=4",
    "--config.train.steps_per_epoch=6",
    "--config.train.checkpoint_every=1",
    "--config.train.threads=2",
    "--config.eval.every=2",
)


def start(workdir, *arguments, tf_config=None):
    environment = {} if tf_config is None else {"TF_CONFIG": json.dumps(tf_config)}
    return start_python("-m", "s2sd_tf.cli.train", *RUN, f"--workdir={workdir}", *arguments, environment=environment)


@contextlib.contextmanager
def start_workers(workdir, count=2):
    sockets = [socket.create_server(("localhost", 0)) for _ in range(count)]
    cluster = {"worker": [f"localhost:{s.getsockname()[1]}" for s in sockets]}
    for free in sockets:
        free.close()
    with contextlib.ExitStack() as workers:
        tasks = [{"type": "worker", "index": k} for k in range(count)]
        yield [
            workers.enter_context(
                start(workdir, "--strategy=multiworker", tf_config={"cluster": cluster, "task": task})
            )
            for task in tasks
        ]


def end(process, status=0):
    done = process.wait(240)
    output = done.stdout + done.stderr
    assert done.returncode == status, output
    return output


def assert_same_run(one, other):
    first, second = (read_json(folder / "results.json") for folder in (one, other))
    assert (first["steps"], first["best_epoch"]) == (second["steps"], second["best_epoch"])
    models = [load_model(folder / "best.keras") for folder in (one, other)]
    for expected, weight in zip(*(model.trainable_variables for model in models)):
        np.testing.assert_allclose(tf.convert_to_tensor(weight), tf.convert_to_tensor(expected), atol=1e-5)
    # Equally near neighbours may be swapped.
    for name, expected in first["test"]["exact"].items():
        np.testing.assert_allclose(second["test"]["exact"][name], expected, atol=0.02)


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory, call):
    workdir = tmp_path_factory.mktemp("strategies") / "one"
    call("train", *RUN, f"--workdir={workdir}")
    return workdir


def test_two_devices_train_the_same_as_one(on_one_device, tmp_path, call):
    devices = ("--strategy=mirrored", "--devices=CPU:0,CPU:1")
    uneven = call("train", *RUN, *devices, "--config.data.classes_per_batch=3", "--config.data.samples_per_class=3",
                  f"--workdir={tmp_path / 'two'}", status=2).stderr  # fmt: skip
    assert "expected a batch that the 2 replicas share equally. Received: 3 x 3 = 9 images" in uneven
    assert not list(tmp_path.glob("two/*.json"))
    with start(tmp_path / "two", *devices) as process:
        while not (tmp_path / "two" / "checkpoints" / "epoch_000001").exists() and process.is_alive():
            time.sleep(0.01)
        # In the middle of an epoch, where it then resumes.
        process.send_signal(signal.SIGTERM)
        assert "the same command resumes from there" in end(process, 75)
    call("train", *RUN, *devices, f"--workdir={tmp_path / 'two'}")
    assert_same_run(on_one_device, tmp_path / "two")
    assert read_json(tmp_path / "two" / "run.json")["strategy"] == {"name": "MirroredStrategy", "replicas": 2}
    histories = [(folder / "history.csv").read_text().splitlines() for folder in (on_one_device, tmp_path / "two")]
    for one, other in zip(*histories):
        assert len(one.split(",")) == len(other.split(","))
    column = histories[0][0].split(",").index("loss")
    losses = [[float(line.split(",")[column]) for line in history[1:]] for history in histories]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


def test_workers_train_the_same_as_one_process_although_one_is_killed(on_one_device, tmp_path):
    workdir = tmp_path / "workers"
    with start_workers(workdir) as (chief, other):
        while not (workdir / "checkpoints" / "epoch_000001").exists() and chief.is_alive():
            time.sleep(0.01)
        other.send_signal(signal.SIGKILL)
        assert "lost a worker" in end(chief, 75)
        end(other, -signal.SIGKILL)
    assert not (workdir / "results.json").exists()
    # Restart all workers.
    with start_workers(workdir) as workers:
        for worker in workers:
            end(worker)
    assert_same_run(on_one_device, workdir)
    assert read_json(workdir / "run.json")["strategy"]["replicas"] == 2
    assert not list(workdir.rglob(".writing-*"))


class TestPipelines:
    @pytest.mark.parametrize("augmentation", [None, data.Augmentation(**data.augmentation.preset("flip"))])
    @pytest.mark.parametrize("pipelines", [1, 2, 4])
    def test_replicas_share_every_batch(self, pipelines, augmentation):
        train, _, preprocessing = data.load_digits()
        sampler = data.samplers.get("class_balanced", classes_per_batch=4, samples_per_class=3)

        def batches(context=None):
            return data.training_batches(
                train, preprocessing, sampler, 3, seed=1, augmentation=augmentation, input_context=context
            )

        whole = [images.numpy() for images, _ in batches()]
        parts = []
        for k in range(pipelines):
            context = tf.distribute.InputContext(pipelines, k, num_replicas_in_sync=4)
            dataset = batches(context)
            assert int(dataset.cardinality()) == 3 * 4 // pipelines
            parts.append(np.stack([images for images, _ in dataset]).reshape(3, -1, *whole[0].shape[1:]))
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), np.stack(whole))

    def test_a_batch_that_cannot_be_shared_is_refused(self):
        train, _, preprocessing = data.load_digits()
        sampler = data.samplers.get("class_balanced", classes_per_batch=3, samples_per_class=3)
        context = tf.distribute.InputContext(1, 0, num_replicas_in_sync=2)
        with pytest.raises(
            ValueError, match=r"sampler: expected a batch size that is a multiple of the 2 replicas\. Received: 9"
        ):
            data.training_batches(train, preprocessing, sampler, input_context=context)


class TestNames:
    @pytest.mark.parametrize(
        ("name", "devices", "words"),
        [
            ("mirror", [], "strategy: expected one of"),
            ("none", ["GPU:0"], "devices: expected none without a strategy"),
            ("mirrored", ["TPU:0"], "devices: expected names such as"),
            ("mirrored", ["GPU:zero"], "devices: expected names such as"),
            ("mirrored", ["CPU:0", "CPU:0"], "devices: expected distinct names"),
            ("mirrored", ["GPU:99"], "devices: expected distinct names; this machine has"),
            ("multiworker", [], "strategy: expected the environment variable TF_CONFIG"),
        ],
    )
    def test_unknown_names_are_refused(self, name, devices, words, monkeypatch):
        monkeypatch.delenv("TF_CONFIG", raising=False)
        with pytest.raises(ValueError, match=words):
            strategies.get(name, devices)

    def test_no_strategy(self):
        strategy = strategies.get("none")
        assert strategy is tf.distribute.get_strategy()
        assert strategies.is_chief(strategy)
        assert not strategies.has_workers(strategy)
        assert strategies.broadcast_from_chief(strategy, True)
        assert strategies.describe(strategy) is None
