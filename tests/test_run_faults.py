"""What runs survive: signals at any place, damaged checkpoints, full disks, losses that are not finite, kills."""

import errno
import logging
import os
import resource
import signal

import numpy as np
import pytest
import tensorflow as tf
from conftest import REPOSITORY

from s2sd_tf import data
from s2sd_tf.cli import app
from s2sd_tf.files import LEFTOVER, OutOfSpace, read_json, replacing, write_json
from s2sd_tf.keras_compat import keras
from s2sd_tf.training import Interrupted, NonFiniteLoss, default_config, train
from s2sd_tf.training import run as run_module
from s2sd_tf.training.callbacks import Refresh
from s2sd_tf.training.checkpoints import Checkpoints, RunState
from s2sd_tf.training.finite_loss import FiniteLoss
from s2sd_tf.training.history import TIMES, read_history
from s2sd_tf.training.interruption import Interruption
from s2sd_tf.training.progress import Progress

STEPS, EPOCHS = 4, 3


def small_config(**changes):
    """Whatever has a state is in it: a miner that draws, augmentation, a schedule, averages, a best checkpoint."""
    config = default_config()
    config.train.deterministic = False  # a setting of the process, which other tests share
    config.model.filters = (6, 8)
    config.model.embedding_dim = 8
    config.s2sd.target_dims = (12,)
    config.objective.name = "margin"
    config.data.classes_per_batch = 3
    config.data.samples_per_class = 2
    config.data.augmentation = "base"
    config.data.validation_classes = 2
    config.optimizer.schedule.name = "cosine"
    config.optimizer.settings = {"use_ema": True}
    config.train.epochs = EPOCHS
    config.train.steps_per_epoch = STEPS
    config.train.checkpoint_every = 2
    config.eval.every = 2
    config.update_from_flattened_dict(changes)
    return config


def left(workdir):
    """`(weights, optimizer's variables, history without times)` of a finished run."""
    model = keras.models.load_model(workdir / "best.keras")
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


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    train(small_config(), str(workdir))
    return left(workdir)


class At:
    """Does something at a place of a run, once."""

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
    """Does something while step `count` of the run (from 1) ends."""
    return At(
        monkeypatch,
        FiniteLoss,
        "on_train_batch_end",
        lambda callback, *_: int(tf.convert_to_tensor(callback.model.step)) == count,
        action,
    )


def term():
    signal.raise_signal(signal.SIGTERM)


class TestInterruption:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    @pytest.mark.parametrize("step", [1, STEPS + 2, 2 * STEPS, 3 * STEPS])
    def test_in_any_step_the_run_goes_on_to_the_same_weights(self, tmp_path, monkeypatch, whole, step, number):
        if number == signal.SIGINT and step != STEPS + 2:
            pytest.skip("one place is enough for the other signal")
        before = [signal.getsignal(known) for known in (signal.SIGTERM, signal.SIGINT)]
        workdir = tmp_path / "run"
        after_steps(monkeypatch, step, lambda: signal.raise_signal(number))
        with pytest.raises(Interrupted) as caught:
            train(small_config(), str(workdir))
        assert caught.value.code == 75
        epoch, within = divmod(step - 1, STEPS)
        assert str(caught.value) == (
            f"{signal.Signals(number).name}: stopped at epoch {epoch + 1}, step {within + 1}; the same command goes on "
            "from there"
        )
        assert [signal.getsignal(known) for known in (signal.SIGTERM, signal.SIGINT)] == before
        state = read_json(workdir / "checkpoints" / f"epoch_{epoch:06d}_step_{within + 1:06d}" / "state.json")
        assert (state["epoch"], state["step_in_epoch"]) == (epoch, within + 1)
        train(small_config(), str(workdir))
        assert_the_same(left(workdir), whole)
        assert not list(workdir.rglob(f"{LEFTOVER}*"))

    def test_again_and_again(self, tmp_path, monkeypatch, whole):
        workdir = tmp_path / "run"
        stopped = 0
        for step in (2, 3, STEPS, STEPS + 1, 2 * STEPS + 3):
            at = after_steps(monkeypatch, step, term)
            with pytest.raises(Interrupted):
                train(small_config(), str(workdir))
            stopped += at.done
        assert stopped == 5
        train(small_config(), str(workdir))
        assert_the_same(left(workdir), whole)
        assert [session["epoch"] for session in read_json(workdir / "run.json")["sessions"]] == [0, 0, 0, 0, 1, 2]

    @pytest.mark.parametrize("epoch", [1, EPOCHS - 1])
    def test_in_an_evaluation_no_step_is_lost(self, tmp_path, monkeypatch, whole, epoch):
        workdir = tmp_path / "run"
        # Within it, so that it is not the averages that are saved.
        monkeypatch.setattr("s2sd_tf.evaluation.callback.retrieval_metrics", self._then(term, epoch))
        with pytest.raises(Interrupted):
            train(small_config(), str(workdir))
        monkeypatch.undo()
        assert (workdir / "checkpoints" / f"epoch_{epoch:06d}_step_{STEPS:06d}").exists()
        steps = []
        At(monkeypatch, Progress, "on_train_batch_end", lambda *_: steps.append(1), None)
        train(small_config(), str(workdir))
        assert len(steps) == STEPS * (EPOCHS - 1 - epoch)
        assert_the_same(left(workdir), whole)

    def _then(self, action, epoch):
        from s2sd_tf.evaluation.callback import retrieval_metrics

        calls = []

        def metrics(*arguments, **keywords):
            calls.append(1)
            # Two parts an evaluation, in the epochs 1 and EPOCHS - 1.
            if len(calls) == (1 if epoch == 1 else 4):
                action()
            return retrieval_metrics(*arguments, **keywords)

        return metrics

    @pytest.mark.parametrize("place", ["load_data", "finish"])
    def test_at_the_start_and_at_the_end(self, tmp_path, monkeypatch, whole, place):
        workdir = tmp_path / "run"
        original = getattr(run_module, place)

        def signalled(*arguments):
            term()
            return original(*arguments)

        monkeypatch.setattr(run_module, place, signalled)
        with pytest.raises(Interrupted, match="the start" if place == "load_data" else f"epoch {EPOCHS};"):
            train(small_config(), str(workdir))
        assert workdir.exists() == (place == "finish")
        monkeypatch.undo()
        train(small_config(), str(workdir))
        assert_the_same(left(workdir), whole)

    def test_while_a_checkpoint_is_saved_it_is_saved(self, tmp_path, monkeypatch, whole):
        workdir = tmp_path / "run"
        At(monkeypatch, Checkpoints, "save", lambda _, model, state: state.epoch == 2, term)
        with pytest.raises(Interrupted, match="epoch 2;"):
            train(small_config(), str(workdir))
        assert (workdir / "checkpoints" / "epoch_000002" / "sha256.json").exists()
        train(small_config(), str(workdir))
        assert_the_same(left(workdir), whole)

    def test_a_second_ctrl_c_is_immediate(self, tmp_path, monkeypatch):
        def twice():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

        after_steps(monkeypatch, 2, twice)
        with pytest.raises(KeyboardInterrupt):
            train(small_config(), str(tmp_path / "run"))
        assert not (tmp_path / "run" / "checkpoints").exists()

    def test_what_is_ignored_stays_ignored(self):
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            with Interruption() as interruption:
                signal.raise_signal(signal.SIGINT)
                interruption.check()
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        finally:
            signal.signal(signal.SIGINT, before)

    def test_an_error_that_a_signal_became_is_an_interruption(self):
        def wrap():
            try:
                term()
            except Interrupted:
                raise RuntimeError("what TensorFlow makes of it") from None

        with Interruption() as interruption, pytest.raises(Interrupted, match="SIGTERM"), interruption.prompt():
            wrap()

    def test_the_program_says_so_in_one_line(self, capsys):
        def main(_):
            raise Interrupted("SIGTERM: stopped at epoch 3; the same command goes on from there")

        with pytest.raises(SystemExit) as caught:
            app._told(main, "s2sd-train")([""])
        assert caught.value.code == 75
        assert capsys.readouterr().err.splitlines() == [
            "s2sd-train: SIGTERM: stopped at epoch 3; the same command goes on from there"
        ]


class TestStoredEmbeddings:
    changes = {
        "sampler.name": "greedy_coreset", "data.augmentation": "", "data.validation_classes": 0,
        "train.checkpoint_every": 1,
    }  # fmt: skip

    @pytest.fixture(scope="class")
    def whole(self, tmp_path_factory):
        workdir = tmp_path_factory.mktemp("whole") / "run"
        train(small_config(**self.changes), str(workdir))
        return left(workdir)

    @pytest.mark.parametrize("step", [2 * STEPS - 1, 2 * STEPS])
    def test_go_on_to_the_same_weights(self, tmp_path, monkeypatch, whole, step):
        workdir = tmp_path / "run"
        after_steps(monkeypatch, step, term)
        with pytest.raises(Interrupted):
            train(small_config(**self.changes), str(workdir))
        # What is drawn takes the model of the epoch's begin; after its last step nothing is drawn any more.
        last = {2 * STEPS - 1: "epoch_000001", 2 * STEPS: f"epoch_000001_step_{STEPS:06d}"}[step]
        assert max(os.listdir(workdir / "checkpoints")) == last
        train(small_config(**self.changes), str(workdir))
        assert_the_same(left(workdir), whole)

    def test_in_a_refresh(self, tmp_path, monkeypatch, whole):
        workdir = tmp_path / "run"
        At(monkeypatch, Refresh, "refresh", lambda callback, *_: callback.epoch == 1, term)
        with pytest.raises(Interrupted):
            train(small_config(**self.changes), str(workdir))
        train(small_config(**self.changes), str(workdir))
        assert_the_same(left(workdir), whole)


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
        for where in ({"start_epoch": 1, "start_step": 3}, {"position": iter([(1, 3), (2, 0)]).__next__}):
            rest = passes(2, **where)
            assert [len(batches) for batches in rest] == [1, 4]
            for wanted, got in zip([epochs[0][3:], epochs[1]], rest):
                for (a, x), (b, y) in zip(wanted, got):
                    np.testing.assert_array_equal(a, b)
                    np.testing.assert_array_equal(x, y)

    def test_a_step_that_there_is_not(self):
        images, _, preprocessing = data.load_digits()
        sampler = data.samplers.get("class_balanced", classes_per_batch=3, samples_per_class=2)
        with pytest.raises(ValueError, match=r"start_step: expected an int below the 4 steps .*Received: 4"):
            data.training_batches(images, preprocessing, sampler, 4, start_step=4)


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
    """Function to the messages in the log."""
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
        """Function that saves checkpoints of some epochs, with a value to choose by, and returns their folder."""
        model = small_model(objective="multi_similarity")
        model.compile("sgd")

        def save(values, kept=9, **checkpoint):
            checkpoints = Checkpoints(str(tmp_path), kept, "val_map@r")
            state = RunState()
            for epoch, value in values.items():
                model.step.assign(10 * epoch)
                state.epoch = epoch
                state.history.append({"epoch": epoch, "val_map@r": value})
                if state.best_value is None or value > state.best_value:
                    state.best_epoch, state.best_value = epoch, value
                checkpoints.save(model, state)
            return tmp_path / "checkpoints"

        return save

    @pytest.mark.parametrize("damage", DAMAGES)
    def test_a_damaged_one_is_moved_aside(self, saved, damage, log):
        folder = saved({1: 0.1, 2: 0.2, 3: 0.3})
        DAMAGES[damage](folder / "epoch_000003")
        model, state = Checkpoints(str(folder.parent), 2, "val_map@r").restore()
        assert state.epoch == 2
        assert int(tf.convert_to_tensor(model.step)) == 20
        assert set(os.listdir(folder)) == {"epoch_000001", "epoch_000002", "unreadable_epoch_000003"}
        (told,) = [message for message in log() if "cannot be read" in message]
        assert "epoch_000003" in told
        assert "\n" not in told
        # It is not taken again, and another one of its name neither takes its place.
        saved({3: 0.3})
        DAMAGES[damage](folder / "epoch_000003")
        assert Checkpoints(str(folder.parent), 2, "val_map@r").restore()[1].epoch == 2
        assert "unreadable_epoch_000003_2" in os.listdir(folder)

    def test_every_flipped_bit_is_found(self, saved):
        folder = saved({1: 0.1, 2: 0.2})
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
                    # White space alone can be other white space.
                    assert name == "sha256.json"
                    assert bytes(content).split() == whole.split()
                    continue
                aside = [other for other in folder.iterdir() if other.name.startswith("unreadable_")]
                assert len(aside) == 1
                aside[0].rename(folder / "epoch_000002")
            path.write_bytes(whole)

    def test_none_that_can_be_read(self, saved):
        folder = saved({1: 0.1, 2: 0.2})
        for name in ("epoch_000001", "epoch_000002"):
            truncated(folder / name / "model.keras")
        for _ in range(2):
            with pytest.raises(ValueError, match=r"epoch_000002 .*epoch_000001 .*delete the folder to train anew"):
                Checkpoints(str(folder.parent), 2).restore()
        for name in ("epoch_000001", "epoch_000002"):
            (folder / name).rename(folder / f"unreadable_{name}")
        with pytest.raises(ValueError, match="unreadable_epoch_000001"):
            Checkpoints(str(folder.parent), 2).restore()

    @pytest.mark.parametrize("when", ["before it goes on", "before the end"])
    def test_the_best_one_is_damaged(self, saved, log, when):
        folder = saved({1: 0.1, 2: 0.9, 3: 0.3, 4: 0.2})
        checkpoints = Checkpoints(str(folder.parent), 2, "val_map@r")
        if when == "before it goes on":
            flipped(folder / "epoch_000002" / "model.keras")
        _, state = checkpoints.restore()
        if when == "before the end":
            assert (state.best_epoch, state.best_value) == (2, 0.9)
            flipped(folder / "epoch_000002" / "model.keras")
        best = checkpoints.load_best(state)
        assert (state.epoch, state.best_epoch, state.best_value) == (4, 3, 0.3)
        assert int(tf.convert_to_tensor(best.step)) == 30
        assert any("the best checkpoint is now that of epoch 3" in message for message in log())

    def test_keeps_the_last_and_the_best(self, saved):
        folder = saved({1: 0.1, 2: 0.9, 3: 0.3, 4: 0.2, 5: 0.1}, kept=2)
        assert set(os.listdir(folder)) == {"epoch_000002", "epoch_000004", "epoch_000005"}
        folder = saved({6: 0.1, 7: 0.05}, kept=1)
        assert set(os.listdir(folder)) == {"epoch_000006", "epoch_000007"}

    def test_of_a_run_before_there_were_digests(self, saved):
        folder = saved({1: 0.1, 2: 0.2})
        for name in ("epoch_000001", "epoch_000002"):
            (folder / name / "sha256.json").unlink()
            state = read_json(folder / name / "state.json")
            del state["step_in_epoch"], state["metrics"]
            write_json(folder / name / "state.json", state)
        assert Checkpoints(str(folder.parent)).restore()[1].position() == (2, 0)
        truncated(folder / "epoch_000002" / "model.keras")
        assert Checkpoints(str(folder.parent)).restore()[1].position() == (1, 0)

    def test_a_run_goes_on_from_the_one_before(self, tmp_path, monkeypatch, whole):
        workdir = tmp_path / "run"
        after_steps(monkeypatch, 2 * STEPS + 1, term)
        with pytest.raises(Interrupted):
            train(small_config(), str(workdir))
        flipped(workdir / "checkpoints" / f"epoch_000002_step_{1:06d}" / "model.keras")
        train(small_config(), str(workdir))
        assert_the_same(left(workdir), whole)


FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    OSError("Unable to synchronously create dataset (file write failed: errno = 28, No space left on device)"),
    RuntimeError("Can't decrement id ref count (file write failed: errno = 27, error message = 'File too large')"),
    tf.errors.ResourceExhaustedError(None, None, "x.data-00000; No space left on device"),
]


class TestNoRoom:
    @pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
    def test_whatever_says_so_is_one_error(self, tmp_path, error):
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

    def test_another_error_stays_what_it_is(self, tmp_path):
        with pytest.raises(OSError, match="other") as caught, replacing(tmp_path / "file"):
            raise OSError(errno.EACCES, "other")
        assert not isinstance(caught.value, OutOfSpace)

    @pytest.mark.parametrize("method", ["checkpoint", "history", "finish"])
    def test_a_run_goes_on_once_there_is_some(self, tmp_path, monkeypatch, whole, method):
        workdir = tmp_path / "run"
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)

        def limit(size):
            # Python has SIGXFSZ ignored, so that writing on is EFBIG.
            return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))

        if method == "checkpoint":
            At(monkeypatch, Checkpoints, "save", lambda _, model, state: state.epoch == EPOCHS, limit(30_000))
        elif method == "history":
            original = run_module.Progress.on_epoch_end.__globals__["write_history"]

            def write(workdir, history):
                if len(history) == EPOCHS:
                    limit(100)()
                original(workdir, history)

            monkeypatch.setattr("s2sd_tf.training.progress.write_history", write)
        else:
            original = run_module.finish

            def finish(*arguments):
                limit(30_000)()
                return original(*arguments)

            monkeypatch.setattr(run_module, "finish", finish)
        try:
            with pytest.raises(OutOfSpace) as caught:
                train(small_config(), str(workdir))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        monkeypatch.undo()
        where = {"checkpoint": "epoch 2", "history": f"epoch {EPOCHS}", "finish": f"epoch {EPOCHS}"}[method]
        told = str(caught.value)
        assert f"Nothing is lost before {where}; the same command goes on once there is room" in told
        assert "File too large" in told
        assert str(workdir) in told
        assert LEFTOVER not in told
        assert not list(workdir.rglob(f"{LEFTOVER}*"))
        train(small_config(), str(workdir))
        assert_the_same(left(workdir), whole)


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

    def test_everything_is_on_the_disk_before_its_name_is(self, tmp_path, monkeypatch):
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

    def test_json_that_is_none_is_named(self, tmp_path):
        (tmp_path / "broken.json").write_text('{"a": ')
        with pytest.raises(ValueError, match=r"broken.json: expected JSON. Received: "):
            read_json(tmp_path / "broken.json")


class TestLossesThatAreNotFinite:
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
        # A signal changes nothing about that.
        with pytest.raises(FloatingPointError):
            train(small_config(**self.changes), str(workdir))

    def test_are_found_within_the_epoch(self, tmp_path):
        steps = []
        config = small_config(**{**self.changes, "train.steps_per_epoch": 70})
        with pytest.MonkeyPatch.context() as patch:
            At(patch, Progress, "on_train_batch_end", lambda *_: steps.append(1), None)
            with pytest.raises(NonFiniteLoss):
                train(config, str(tmp_path / "run"))
        assert len(steps) == 49

    def test_a_signal_saves_none_of_it(self, tmp_path, monkeypatch):
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
            callback = FiniteLoss(data.ImageSet(images, labels, ("a", "b", "c")), sampler, 5, 0, lambda: "epoch 1")
            model = small_model()
            model.first_nonfinite_step.assign(7)
            callback.set_model(model)
            with pytest.raises(
                NonFiniteLoss, match=r"epoch 2, its step 2\).* (a|b|c) \(2\), .*last checkpoint .* epoch 1"
            ) as caught:
                callback.check()
            assert caught.value.images == named


def test_killed_at_random(tmp_path, run_python):
    done = run_python(
        REPOSITORY / "benchmarks" / "soak.py", "--runs=1", "--kills=3", "--seed=5", f"--output={tmp_path / 'soak.json'}"
    )
    assert "All equal to the run that was left alone" in done.stdout
    kills = read_json(tmp_path / "soak.json")["runs"][0]
    assert kills
    assert (tmp_path / "soak.md").read_text().count("SIG") >= len({kill["signal"] for kill in kills})
