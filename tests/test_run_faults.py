"""What runs survive: signals at any point, damaged checkpoints, full disks, non-finite losses, kills."""

import errno
import logging
import os
import resource
import signal
import subprocess
import sys

import conftest
import numpy as np
import pytest
import tensorflow as tf
from conftest import REPOSITORY

from s2sd_tf import data
from s2sd_tf.cli import app
from s2sd_tf.evaluation import build_index
from s2sd_tf.evaluation.embeddings import write_shard
from s2sd_tf.files import LEFTOVER, OutOfSpace, read_json, replacing, write_json
from s2sd_tf.keras_compat import keras
from s2sd_tf.training import Interrupted, NonFiniteLoss, finishing, loop, resolve, train
from s2sd_tf.training import run as run_module
from s2sd_tf.training.checkpoints import Checkpoints, RunState
from s2sd_tf.training.finite_loss import FiniteLoss
from s2sd_tf.training.history import TIMES, read_history
from s2sd_tf.training.interruption import Interruption

STEPS, EPOCHS = 4, 3


def small_config(**changes):
    """A config with all kinds of state: a miner that draws, for every prefix too, augmentation, a schedule, averages, a
    best checkpoint.
    """
    config = conftest.small_config(**{
        "model.filters": (6,), "model.pools": 1, "s2sd.target_dims": (12,), "s2sd.feature_distill": False,
        "s2sd.nested_dims": (4, 8), "s2sd.diagnostics": False, "objective.name": "margin", "data.augmentation": "base",
        "data.validation_classes": 2, "optimizer.schedule.name": "cosine", "train.epochs": EPOCHS,
        "train.steps_per_epoch": STEPS, "train.checkpoint_every": 2, "eval.every": 2,
    })  # fmt: skip
    config.optimizer.settings = {"use_ema": True}
    config.update_from_flattened_dict(changes)
    return config


def plain_config(**changes):
    """A config with less state, whose step is traced in half the time: for tests that need no kind of it."""
    plain = {
        "s2sd.target_dims": (), "s2sd.nested_dims": (), "objective.name": "multi_similarity", "data.augmentation": "",
    }  # fmt: skip
    return small_config(**{**plain, **changes})


@pytest.fixture(autouse=True)
def _without_finishing(request, monkeypatch):
    """Skips evaluation, export and pictures at the end of runs, except in tests that request `whole_runs`."""
    if "whole_runs" not in request.fixturenames:
        monkeypatch.setattr(run_module, "finish", lambda *_: {})


@pytest.fixture
def whole_runs():
    """Requested by tests that need the end of a run."""


def left(workdir):
    """`(weights, optimizer variables, history without times)` of the last checkpoint of a run."""
    model = keras.models.load_model(workdir / "checkpoints" / f"epoch_{EPOCHS:06d}" / "model.keras")
    variables = model.optimizer.variables
    variables = variables() if callable(variables) else variables
    rows = [{key: value for key, value in row.items() if key not in TIMES} for row in read_history(workdir)]
    return model.get_weights(), [tf.convert_to_tensor(variable).numpy() for variable in variables], rows


def assert_the_same(one, other):
    for a, b in zip(one[:2], other[:2]):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            np.testing.assert_array_equal(x, y)
    assert one[2] == other[2]


def left_alone(tmp_path_factory, config):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "finish", lambda *_: {})
        train(config, str(workdir))
    return left(workdir)


@pytest.fixture(scope="module")
def plain_whole(tmp_path_factory):
    return left_alone(tmp_path_factory, plain_config())


class At:
    """Runs an action once, when `when` holds in a call of a method."""

    def __init__(self, monkeypatch, cls, method, when, action):
        original = getattr(cls, method)
        self.done = False

        def patched(callback, *arguments, **keywords):
            if not self.done and when(callback, *arguments):
                self.done = True
                action()
            return original(callback, *arguments, **keywords)

        monkeypatch.setattr(cls, method, patched)


def after_steps(monkeypatch, count, action):
    """Runs an action at the end of step `count` of the run (from 1)."""
    return At(
        monkeypatch, RunState, "end_step", lambda state: STEPS * state.epoch + state.step_in_epoch + 1 == count, action
    )


def term():
    signal.raise_signal(signal.SIGTERM)


class TestInterruption:
    def test_a_run_interrupted_repeatedly_ends_with_the_same_weights(self, tmp_path, monkeypatch, tmp_path_factory):
        workdir = tmp_path / "run"
        before = [signal.getsignal(known) for known in (signal.SIGTERM, signal.SIGINT)]
        # Within an epoch, twice within another, after the last step of one, and after the last step of all.
        for step, number in [
            (1, signal.SIGTERM), (STEPS, signal.SIGINT), (STEPS + 2, signal.SIGTERM), (STEPS + 3, signal.SIGTERM),
            (EPOCHS * STEPS, signal.SIGTERM),
        ]:  # fmt: skip
            after_steps(monkeypatch, step, lambda number=number: signal.raise_signal(number))
            with pytest.raises(Interrupted) as caught:
                train(small_config(), str(workdir))
            epoch, within = divmod(step - 1, STEPS)
            assert caught.value.code == 75
            place = f"epoch {epoch + 1}, step {within + 1}"
            expected = f"{signal.Signals(number).name}: stopped at {place}; the same command resumes from there"
            assert str(caught.value) == expected
            assert [signal.getsignal(known) for known in (signal.SIGTERM, signal.SIGINT)] == before
            state = read_json(workdir / "checkpoints" / f"epoch_{epoch:06d}_step_{within + 1:06d}" / "state.json")
            assert (state["epoch"], state["step_in_epoch"]) == (epoch, within + 1)
        # A damaged checkpoint costs only the steps since the one before it.
        flipped(workdir / "checkpoints" / f"epoch_{EPOCHS - 1:06d}_step_{STEPS:06d}" / "model.keras")
        # A leftover of a killed process.
        (workdir / f"{LEFTOVER}something").mkdir()
        train(small_config(), str(workdir))
        assert_the_same(left(workdir), left_alone(tmp_path_factory, small_config()))
        assert not list(workdir.rglob(f"{LEFTOVER}*"))
        sessions = read_json(workdir / "run.json")["sessions"]
        places = [(session["epoch"], session["step_in_epoch"]) for session in sessions]
        assert places == [(0, 0), (0, 1), (0, STEPS), (1, 2), (1, 3), (2, 0)]

    def test_in_an_evaluation_no_step_is_lost(self, tmp_path, monkeypatch, plain_whole):
        workdir = tmp_path / "run"
        with pytest.MonkeyPatch.context() as patch:
            # During the evaluation, to check that the averages are not saved instead.
            patch.setattr("s2sd_tf.evaluation.callback.retrieval_metrics", lambda *_, **__: term())
            with pytest.raises(Interrupted):
                train(plain_config(), str(workdir))
        assert (workdir / "checkpoints" / f"epoch_000001_step_{STEPS:06d}").exists()
        steps = []
        At(monkeypatch, RunState, "end_step", lambda *_: steps.append(1), None)
        train(plain_config(), str(workdir))
        assert len(steps) == STEPS * (EPOCHS - 2)
        assert_the_same(left(workdir), plain_whole)

    def test_trained_on_for_more_epochs(self, tmp_path, tmp_path_factory, monkeypatch):
        """A finished run gets more epochs: the same weights and logs as if it had had them from the start."""

        def finish(run):
            results = {"epochs": run.state.epoch}
            write_json(os.path.join(run.workdir, "results.json"), results)
            return results

        monkeypatch.setattr(run_module, "finish", finish)
        changes = {"optimizer.schedule.name": "constant", "eval.every": 1}
        whole = left_alone(tmp_path_factory, plain_config(**changes))
        workdir = str(tmp_path / "run")
        assert train(plain_config(**changes, **{"train.epochs": EPOCHS - 1}), workdir) == {"epochs": EPOCHS - 1}
        # A run that was stopped on the way to its new end does not take the old results for the new ones.
        after_steps(monkeypatch, (EPOCHS - 1) * STEPS + 1, term)
        with pytest.raises(Interrupted):
            train(plain_config(**changes), workdir)
        assert train(plain_config(**changes), workdir) == {"epochs": EPOCHS}
        assert read_json(tmp_path / "run" / "results.json") == {"epochs": EPOCHS}
        assert_the_same(left(tmp_path / "run"), whole)
        assert read_json(tmp_path / "run" / "config.json")["train"]["epochs"] == EPOCHS
        assert [s.get("epochs") for s in read_json(tmp_path / "run" / "run.json")["sessions"]] == [None, EPOCHS, None]
        with pytest.raises(ValueError, match=rf"differs in train.epochs \({EPOCHS} there, {EPOCHS - 1} here\)$"):
            train(plain_config(**changes, **{"train.epochs": EPOCHS - 1}), workdir)

    def test_a_cosine_schedule_needs_its_number_of_epochs(self, tmp_path):
        (tmp_path / "config.json").write_text(resolve(small_config()).to_json())
        with pytest.raises(
            ValueError, match=r"differs in train.epochs \(3 there, 4 here\), and the cosine schedule dep"
        ):
            train(small_config(**{"train.epochs": EPOCHS + 1}), tmp_path)

    def test_a_failed_evaluation_costs_no_step(self, tmp_path, plain_whole):
        workdir = tmp_path / "run"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("s2sd_tf.evaluation.callback.retrieval_metrics", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                train(plain_config(), str(workdir))
        assert (workdir / "checkpoints" / f"epoch_000001_step_{STEPS:06d}").exists()
        train(plain_config(), str(workdir))
        assert_the_same(left(workdir), plain_whole)

    def test_at_the_start(self, tmp_path, monkeypatch):
        monkeypatch.setattr(run_module, "load_split", lambda *_: term())
        with pytest.raises(Interrupted, match="SIGTERM: stopped at the start; "):
            train(small_config(), str(tmp_path / "run"))
        assert not (tmp_path / "run").exists()

    def test_at_the_end(self, tmp_path, whole_runs):
        workdir = tmp_path / "run"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("s2sd_tf.training.finishing.export_encoder", lambda *_: term())
            with pytest.raises(Interrupted, match=f"stopped at epoch {EPOCHS};"):
                train(plain_config(), str(workdir))
        assert not (workdir / "results.json").exists()
        results = train(plain_config(), str(workdir))
        assert results["steps"] == EPOCHS * STEPS
        assert read_json(workdir / "results.json") == results

    def test_saving_a_checkpoint_is_not_interrupted(self, tmp_path, monkeypatch):
        workdir = tmp_path / "run"
        At(monkeypatch, Checkpoints, "save", lambda _, model, state: state.epoch == 2, term)
        with pytest.raises(Interrupted, match="epoch 2;"):
            train(plain_config(), str(workdir))
        assert (workdir / "checkpoints" / "epoch_000002" / "sha256.json").exists()

    def test_a_second_ctrl_c_is_immediate(self, tmp_path, monkeypatch):
        def twice():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

        after_steps(monkeypatch, 2, twice)
        with pytest.raises(KeyboardInterrupt):
            train(plain_config(), str(tmp_path / "run"))
        assert not (tmp_path / "run" / "checkpoints").exists()

    def test_ignored_signals_stay_ignored(self):
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            with Interruption() as interruption:
                signal.raise_signal(signal.SIGINT)
                interruption.check()
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        finally:
            signal.signal(signal.SIGINT, before)

    def test_an_error_caused_by_a_signal_is_an_interruption(self):
        def wrap():
            try:
                term()
            except Interrupted:
                raise RuntimeError("what TensorFlow makes of it") from None

        with Interruption() as interruption, pytest.raises(Interrupted, match="SIGTERM"), interruption.interruptible():
            wrap()

    @pytest.mark.parametrize(
        ("error", "message"),
        [
            (IsADirectoryError(21, "Is a directory", "x/y"),
             "x/y: expected a path that can be read or written. Received: Is a directory"),
            (PermissionError("report: expected a path"), "report: expected a path"),
            (tf.errors.NotFoundError(None, None, "x; No such file"), "x; No such file"),
        ],
    )  # fmt: skip
    def test_errors_of_the_system_are_reported_in_one_line(self, error, message, capsys):
        def main(_):
            raise error

        with pytest.raises(SystemExit) as caught:
            app._reporting_errors(main, "s2sd-train")(["s2sd-train"])
        assert caught.value.code == 2
        assert capsys.readouterr().err == f"s2sd-train: error: {message}\n"

    @pytest.mark.parametrize("arguments", [["--help"], ["--list=objectives"]])
    def test_without_a_reader_the_program_ends_silently(self, arguments):
        command = [sys.executable, "-m", "s2sd_tf.cli.train", *arguments]
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
        os.close(writer)
        assert done.returncode == 128 + signal.SIGPIPE
        assert "Error" not in done.stderr

    def test_the_program_reports_it_in_one_line(self, capsys):
        def main(_):
            raise Interrupted("SIGTERM: stopped at epoch 3; the same command resumes from there")

        with pytest.raises(SystemExit) as caught:
            app._reporting_errors(main, "s2sd-train")([""])
        assert caught.value.code == 75
        assert capsys.readouterr().err.splitlines() == [
            "s2sd-train: SIGTERM: stopped at epoch 3; the same command resumes from there"
        ]


def test_with_stored_embeddings_an_epoch_restarts(tmp_path, monkeypatch, tmp_path_factory):
    changes = {"sampler.name": "greedy_coreset", "data.validation_classes": 0, "train.checkpoint_every": 1}
    workdir = tmp_path / "run"

    def interrupted():
        with pytest.raises(Interrupted):
            train(plain_config(**changes), str(workdir))
        return max(os.listdir(workdir / "checkpoints"))

    # The draws depend on the model at the start of the epoch.
    after_steps(monkeypatch, 2 * STEPS - 1, term)
    assert interrupted() == "epoch_000001"
    # After the last step of an epoch nothing more is drawn.
    after_steps(monkeypatch, 2 * STEPS, term)
    assert interrupted() == f"epoch_000001_step_{STEPS:06d}"
    At(monkeypatch, data.RefreshStorage, "refresh", lambda _, model, epoch: epoch == 2, term)
    assert interrupted() == "epoch_000002"
    train(plain_config(**changes), str(workdir))
    assert_the_same(left(workdir), left_alone(tmp_path_factory, plain_config(**changes)))


class TestBatches:
    @pytest.mark.parametrize("augmented", [False, True])
    def test_the_rest_of_an_epoch_and_the_ones_after_it(self, augmented):
        images, _, preprocessing = data.load_digits()
        sampler = data.samplers.get("class_balanced", classes_per_batch=3, samples_per_class=2)
        augmentation = data.Augmentation(**data.augmentation.preset("base")) if augmented else None
        arguments = (images, preprocessing, sampler, 4, 7)

        def passes(count, **where):
            batches = data.training_batches(*arguments, augmentation=augmentation, **where)
            return [list(batches.as_numpy_iterator()) for _ in range(count)]

        epochs = passes(3, start_epoch=1)
        batches = data.EpochBatches(*arguments, augmentation=augmentation)
        rest = [list(batches(*where).as_numpy_iterator()) for where in ((1, 3), (2, 0))]
        assert [len(batches) for batches in rest] == [1, 4]
        for wanted, got in zip([epochs[0][3:], epochs[1]], rest):
            for (a, x), (b, y) in zip(wanted, got):
                np.testing.assert_array_equal(a, b)
                np.testing.assert_array_equal(x, y)


def truncated(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


DAMAGES = {
    "truncated model": lambda folder: truncated(folder / "model.keras"),
    "flipped bit of the model": lambda folder: flipped(folder / "model.keras"),
    "empty model": lambda folder: (folder / "model.keras").write_bytes(b""),
    "no model": lambda folder: (folder / "model.keras").unlink(),
    "no state": lambda folder: (folder / "state.json").unlink(),
    "flipped bit of the state": lambda folder: flipped(folder / "state.json"),
    "flipped bit of the digests": lambda folder: flipped(folder / "sha256.json"),
    "empty digests": lambda folder: (folder / "sha256.json").write_bytes(b""),
    "empty folder": lambda folder: [path.unlink() for path in folder.iterdir()],
    "a file": lambda folder: ([path.unlink() for path in folder.iterdir()], folder.rmdir(), folder.write_bytes(b"")),
}


@pytest.fixture
def log():
    """Returns a function that returns the logged messages."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("absl")
    logger.addHandler(handler)
    yield lambda: messages
    logger.removeHandler(handler)


class TestCheckpoints:
    @pytest.fixture
    def saved(self, tmp_path, small_model):
        """Returns a function that saves a checkpoint for each `{epoch: value}` and returns their folder."""
        model = small_model(objective="multi_similarity")
        model.compile("sgd")

        def save(values, kept=9, **checkpoint):
            checkpoints = Checkpoints(str(tmp_path), kept, "val_map@r")
            state = RunState()
            for epoch, value in values.items():
                model.s2sd_loss.step.assign(10 * epoch)
                state.epoch = epoch
                state.history.append({"epoch": epoch, "val_map@r": value})
                if state.best_value is None or value > state.best_value:
                    state.best_epoch, state.best_value = epoch, value
                checkpoints.save(model, state)
            return tmp_path / "checkpoints"

        return save

    @pytest.mark.parametrize("damage", DAMAGES)
    def test_a_damaged_checkpoint_is_moved_aside(self, saved, damage, log):
        folder = saved({1: 0.1, 2: 0.2, 3: 0.3})
        DAMAGES[damage](folder / "epoch_000003")
        model, state = Checkpoints(str(folder.parent), 2, "val_map@r").restore()
        assert state.epoch == 2
        assert int(tf.convert_to_tensor(model.s2sd_loss.step)) == 20
        assert set(os.listdir(folder)) == {"epoch_000001", "epoch_000002", "unreadable_epoch_000003"}
        (message,) = [message for message in log() if "cannot be read" in message]
        assert "epoch_000003" in message
        assert "\n" not in message
        # It is not used again, and another one with the same name does not replace it.
        saved({3: 0.3})
        DAMAGES[damage](folder / "epoch_000003")
        assert Checkpoints(str(folder.parent), 2, "val_map@r").restore()[1].epoch == 2
        assert "unreadable_epoch_000003_2" in os.listdir(folder)

    def test_every_flipped_bit_is_detected(self, saved, monkeypatch):
        folder = saved({1: 0.1, 2: 0.2})
        # Only the digests may detect the damage.
        monkeypatch.setattr("s2sd_tf.training.checkpoints.load_model", lambda path: None)
        rng = np.random.default_rng(0)
        for name in ("model.keras", "state.json", "sha256.json"):
            path = folder / "epoch_000002" / name
            whole = path.read_bytes()
            for place in rng.choice(len(whole) - 2, 12, replace=False):
                content = bytearray(whole)
                content[place] ^= 1 << rng.integers(7)
                path.write_bytes(content)
                state = Checkpoints(str(folder.parent), 2, "val_map@r").restore()[1]
                if state.epoch == 2:
                    # Only a change between white space characters is harmless.
                    assert name == "sha256.json"
                    assert bytes(content).split() == whole.split()
                    continue
                aside = [other for other in folder.iterdir() if other.name.startswith("unreadable_")]
                assert len(aside) == 1
                aside[0].rename(folder / "epoch_000002")
            path.write_bytes(whole)

    def test_no_readable_checkpoint(self, saved):
        folder = saved({1: 0.1, 2: 0.2})
        for name in ("epoch_000001", "epoch_000002"):
            truncated(folder / name / "model.keras")
        for _ in range(2):
            with pytest.raises(
                ValueError, match=r"epoch_000002 .*epoch_000001 .*delete the folder to train from scratch"
            ):
                Checkpoints(str(folder.parent), 2).restore()
        for name in ("epoch_000001", "epoch_000002"):
            (folder / name).rename(folder / f"unreadable_{name}")
        with pytest.raises(ValueError, match="unreadable_epoch_000001"):
            Checkpoints(str(folder.parent), 2).restore()

    @pytest.mark.parametrize("when", ["before it resumes", "before the end"])
    def test_the_best_one_is_damaged(self, saved, log, when):
        folder = saved({1: 0.1, 2: 0.9, 3: 0.3, 4: 0.2})
        checkpoints = Checkpoints(str(folder.parent), 2, "val_map@r")
        if when == "before it resumes":
            flipped(folder / "epoch_000002" / "model.keras")
        _, state = checkpoints.restore()
        if when == "before the end":
            assert (state.best_epoch, state.best_value) == (2, 0.9)
            flipped(folder / "epoch_000002" / "model.keras")
        best = checkpoints.load_best(state)
        assert (state.epoch, state.best_epoch, state.best_value) == (4, 3, 0.3)
        assert int(tf.convert_to_tensor(best.s2sd_loss.step)) == 30
        assert any("the best checkpoint is now epoch 3" in message for message in log())

    def test_keeps_the_last_and_the_best(self, saved):
        folder = saved({1: 0.1, 2: 0.9, 3: 0.3, 4: 0.2, 5: 0.1}, kept=2)
        assert set(os.listdir(folder)) == {"epoch_000002", "epoch_000004", "epoch_000005"}
        folder = saved({6: 0.1, 7: 0.05}, kept=1)
        assert set(os.listdir(folder)) == {"epoch_000006", "epoch_000007"}

    def test_checkpoints_without_digests(self, saved):
        folder = saved({1: 0.1, 2: 0.2})
        for name in ("epoch_000001", "epoch_000002"):
            (folder / name / "sha256.json").unlink()
            state = read_json(folder / name / "state.json")
            del state["step_in_epoch"], state["metrics"]
            write_json(folder / name / "state.json", state)
        assert Checkpoints(str(folder.parent)).restore()[1].position() == (2, 0)
        truncated(folder / "epoch_000002" / "model.keras")
        assert Checkpoints(str(folder.parent)).restore()[1].position() == (1, 0)


FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    OSError("25600 requested and 968 written"),
    OSError("Unable to synchronously create dataset (file write failed: errno = 28, No space left on device)"),
    RuntimeError("Can't decrement id ref count (file write failed: errno = 27, error message = 'File too large')"),
    tf.errors.ResourceExhaustedError(None, None, "x.data-00000; No space left on device"),
]


class TestNoRoom:
    @pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
    def test_all_kinds_become_one_error(self, tmp_path, error):
        def write():
            with replacing(tmp_path / "file.json") as temporary:
                with open(temporary, "w") as file:
                    file.write("half")
                raise error

        write_json(tmp_path / "file.json", 1)
        with pytest.raises(OutOfSpace, match=r"file.json: expected room") as caught:
            write()
        assert caught.value.__cause__ is error
        assert os.listdir(tmp_path) == ["file.json"]
        assert read_json(tmp_path / "file.json") == 1

    @pytest.mark.parametrize(
        "write",
        [
            lambda path: write_shard(path, np.ones((8, 8)), list("abcdefgh")),
            build_index(np.eye(8, dtype=np.float32), method="funnel", dim=4).save,
        ],
        ids=["shard", "funnel"],
    )
    def test_the_end_of_the_room_in_the_last_bytes(self, tmp_path, write):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
        try:
            with pytest.raises(OutOfSpace, match="shard: expected room"):
                write(tmp_path / "shard")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert not list(tmp_path.iterdir())

    def test_other_errors_do_not_change(self, tmp_path):
        with pytest.raises(OSError, match="other") as caught, replacing(tmp_path / "file"):
            raise OSError(errno.EACCES, "other")
        assert not isinstance(caught.value, OutOfSpace)

    def test_a_run_resumes_once_there_is_room(self, tmp_path, plain_whole, whole_runs):
        workdir = tmp_path / "run"
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)

        def limit(size):
            # Python ignores SIGXFSZ, so writing beyond the limit raises EFBIG.
            return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))

        def run():
            try:
                train(plain_config(), str(workdir))
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)

        def full(cls, method, when, size):
            with pytest.MonkeyPatch.context() as patch:
                At(patch, cls, method, when, limit(size))
                with pytest.raises(OutOfSpace) as caught:
                    run()
            message = str(caught.value)
            assert "File too large" in message
            assert str(workdir) in message
            assert LEFTOVER not in message
            assert not list(workdir.rglob(f"{LEFTOVER}*"))
            return message

        again = ". Make room; the same command then resumes from"
        message = full(Checkpoints, "save", lambda _, model, state: state.epoch == EPOCHS, 30_000)
        assert f"{workdir}/checkpoints/epoch_{EPOCHS:06d}: expected room" in message
        assert f"{again} epoch {EPOCHS}, step {STEPS}" in message
        assert set(os.listdir(workdir / "checkpoints")) == {"epoch_000002", f"epoch_000002_step_{STEPS:06d}"}
        message = full(loop, "write_history", lambda _, history: len(history) == EPOCHS, 100)
        assert f"{workdir}/history.csv: expected room" in message
        assert len(read_history(workdir)) == 2
        message = full(finishing, "export_encoder", lambda *_: True, 30_000)
        assert f"{workdir}/saved_model: expected room" in message
        assert f"{again} epoch {EPOCHS}" in message
        assert train(plain_config(), str(workdir))["steps"] == EPOCHS * STEPS
        assert_the_same(left(workdir), plain_whole)


class TestReplacing:
    def test_keeps_a_folder_that_cannot_be_replaced(self, tmp_path, monkeypatch):
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "old").write_text("old")

        def replace(*_):
            raise OSError(errno.EIO, "broken")

        monkeypatch.setattr(os, "replace", replace)
        with pytest.raises(OSError, match="broken"), replacing(tmp_path / "folder") as temporary:
            os.makedirs(temporary)
        assert os.listdir(tmp_path) == ["folder"]
        assert (tmp_path / "folder" / "old").read_text() == "old"

    def test_content_is_on_disk_before_it_is_renamed(self, tmp_path, monkeypatch):
        synced, renamed = [], []
        fsync, replace = os.fsync, os.replace

        def note(descriptor):
            synced.append((os.readlink(f"/proc/self/fd/{descriptor}"), bool(renamed)))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", note)
        monkeypatch.setattr(os, "replace", lambda *names: (renamed.append(names), replace(*names)))
        with replacing(tmp_path / "folder") as temporary:
            os.makedirs(os.path.join(temporary, "inner"))
            for name in ("a", "inner/b"):
                with open(os.path.join(temporary, name), "w") as file:
                    file.write(name)
        before = {os.path.relpath(name, temporary) for name, after in synced if not after}
        assert before == {"a", "inner/b", "inner", "."}
        assert [name for name, after in synced if after] == [str(tmp_path)]

    def test_invalid_json_is_named(self, tmp_path):
        (tmp_path / "broken.json").write_text('{"a": ')
        with pytest.raises(ValueError, match=r"broken.json: expected JSON. Received: "):
            read_json(tmp_path / "broken.json")


class TestNonFiniteLosses:
    changes = {
        "objective.name": "multi_similarity", "optimizer.schedule.name": "constant", "optimizer.name": "sgd",
        "optimizer.settings": {}, "optimizer.learning_rate": 1e38, "data.validation_classes": 0,
        "train.checkpoint_every": 1,
    }  # fmt: skip

    def test_end_the_run_before_anything_is_saved(self, tmp_path):
        workdir = tmp_path / "run"
        with pytest.raises(NonFiniteLoss) as caught:
            train(small_config(**self.changes), str(workdir))
        error = caught.value
        assert not list((tmp_path / "run").rglob("model.keras"))
        assert 0 < error.step < STEPS
        assert (error.epoch, error.step_in_epoch) == (0, error.step)
        images = data.load_digits()[0]
        sampler = data.samplers.get("class_balanced", classes_per_batch=3, samples_per_class=2)
        chosen = sampler.epoch(images.labels, STEPS, 0, 0)[error.step]
        np.testing.assert_array_equal(error.labels, images.labels[chosen])
        assert error.images == chosen.tolist()
        for words in (f"step {error.step} (from 0; epoch 1, ", "classes ", "the start", "clipnorm", "learning_rate"):
            assert words in str(error)

    def test_are_found_within_the_epoch(self, tmp_path):
        steps = []
        config = small_config(**{**self.changes, "train.steps_per_epoch": 70})
        with pytest.MonkeyPatch.context() as patch:
            At(patch, RunState, "end_step", lambda *_: steps.append(1), None)
            with pytest.raises(NonFiniteLoss):
                train(config, str(tmp_path / "run"))
        assert len(steps) == 49

    def test_a_signal_does_not_save_them(self, tmp_path, monkeypatch):
        after_steps(monkeypatch, STEPS - 1, term)
        with pytest.raises(NonFiniteLoss):
            train(small_config(**self.changes), str(tmp_path / "run"))
        assert not list((tmp_path / "run").rglob("model.keras"))

    def test_images_of_files_are_named(self, small_model):
        paths = np.array([f"/images/{k}.png" for k in range(6)])
        slices = data.image_slices(paths, range(6), [10] * 6)
        labels = np.array([0, 0, 1, 1, 2, 2], np.int32)
        sampler = data.samplers.get("class_balanced", classes_per_batch=2, samples_per_class=2)
        chosen = sampler.epoch(labels, 5, 0, 1)[2]
        for images, named in (
            (paths, paths[chosen].tolist()),
            (slices, [f"/images/{k}.png[{k}:{k + 10}]" for k in chosen]),
        ):
            model = small_model()
            model.s2sd_loss.first_nonfinite_step.assign(7)
            images = data.ImageSet(images, labels, ("a", "b", "c"))
            finite_loss = FiniteLoss(model, images, sampler, 5, 0, lambda: "epoch 1")
            with pytest.raises(
                NonFiniteLoss, match=r"epoch 2, its step 2\).* (a|b|c) \(2\), .*last checkpoint .* epoch 1"
            ) as caught:
                finite_loss.check()
            assert caught.value.images == named


def test_killed_at_random(tmp_path, run_python):
    done = run_python(
        REPOSITORY / "benchmarks" / "soak.py", "--runs=1", "--kills=1", "--seed=5", f"--output={tmp_path / 'soak.json'}"
    )
    assert "All equal to the uninterrupted run" in done.stdout
    kills = read_json(tmp_path / "soak.json")["runs"][0]
    assert kills
    assert (tmp_path / "soak.md").read_text().count("SIG") >= len({kill["signal"] for kill in kills})
