"""The program's loop and `fit` in a script train the same weights from the same config."""

import time

import conftest
import numpy as np
import pytest
import tensorflow as tf

from s2sd_tf import data
from s2sd_tf.evaluation import RetrievalEvaluation
from s2sd_tf.keras_compat import keras
from s2sd_tf.training import CollapseAlarm, resolve, train
from s2sd_tf.training import run as run_module
from s2sd_tf.training.build import build_batches, build_model, build_sampler
from s2sd_tf.training.datasets import load_data
from s2sd_tf.training.history import TIMES, read_history
from s2sd_tf.training.loop import Loop

EPOCHS, STEPS = 2, 3


def small_config(**changes):
    return resolve(conftest.small_config(**{
        "model.filters": (6,), "model.pools": 1, "s2sd.target_dims": (12,), "objective.name": "margin",
        "data.validation_classes": 2, "train.epochs": EPOCHS, "train.steps_per_epoch": STEPS, "eval.every": 1,
        **changes,
    }))  # fmt: skip


@pytest.fixture(autouse=True)
def _without_finishing(monkeypatch):
    """Skips evaluation, export and pictures at the end of runs."""
    monkeypatch.setattr(run_module, "finish", lambda run: run)


@pytest.mark.parametrize(
    "changes", [{}, {"data.augmentation": "base"}, {"sampler.name": "greedy_coreset"}], ids=["", "augmented", "storage"]
)
def test_fit_in_a_script_trains_like_the_program(tmp_path, changes):
    config = small_config(**changes)
    run = train(config, str(tmp_path))
    keras.utils.set_random_seed(config.seed)
    run_data, sampler = load_data(config), build_sampler(config)
    model = build_model(config, run_data)
    images, preprocessing = run_data.train, run_data.preprocessing
    batches = data.training_batches(images, preprocessing, sampler, STEPS, augmentation=run_data.augmentation)
    callbacks = [
        RetrievalEvaluation(preprocessing.from_pixels(part.images), part.labels, prefix=prefix)
        for part, prefix in ((run_data.validation, "val_"), (run_data.test, "test_"))
    ]
    if sampler.storage is not None:
        callbacks.append(data.RefreshStorage(sampler, images, preprocessing))
    callbacks.append(CollapseAlarm())
    history = model.fit(batches, epochs=EPOCHS, shuffle=False, verbose=0, callbacks=callbacks).history
    for expected, weight in zip(model.get_weights(), run.model.get_weights()):
        np.testing.assert_array_equal(weight, expected)
    rows = read_history(tmp_path)
    assert {name for name in rows[0] if name not in TIMES} == {"epoch", *history}
    for epoch, row in enumerate(rows):
        for name, values in history.items():
            # The batches of the evaluation differ, and with them the last bits and the order of near neighbours.
            rel = 1e-3 if name.startswith(("val_", "test_")) else 1e-6
            assert row[name] == pytest.approx(values[epoch], rel=rel), name
    assert ("refresh_seconds" in rows[0]) == (sampler.storage is not None)


def test_waiting_for_images_counts_as_input_time(tmp_path, monkeypatch):
    iterate = Loop.iterate

    def slow(loop, *where):
        for batch in iterate(loop, *where):
            time.sleep(0.1)
            yield batch

    monkeypatch.setattr(Loop, "iterate", slow)
    train(small_config(**{"train.epochs": 1}), str(tmp_path))
    (row,) = read_history(tmp_path)
    assert row["input_seconds"] >= 0.1 * STEPS
    seconds = row["input_seconds"] + row["compute_seconds"]
    assert row["images_per_second"] == pytest.approx(6 * STEPS / seconds)


class TestEpochBatches:
    def test_the_epoch_must_match_the_stored_embeddings(self):
        config = small_config(**{"sampler.name": "d2_coreset"})
        run_data, sampler = load_data(config), build_sampler(config)
        batches = build_batches(config, run_data, sampler)
        with pytest.raises(RuntimeError, match="RefreshStorage"):
            batches(0)
        refresh = data.RefreshStorage(sampler, run_data.train, run_data.preprocessing)
        refresh.refresh(lambda images, training: tf.reshape(images, [-1, 64]), 3)
        assert len(list(batches(3, 1))) == STEPS - 1
        with pytest.raises(ValueError, match=r"epoch: expected the epoch of the stored embeddings, 3. Received: 2"):
            batches(2)

    def test_none_are_left_after_the_last_step(self):
        config = small_config()
        batches = build_batches(config, load_data(config), build_sampler(config))
        assert [int(batches(1, first).cardinality()) for first in range(STEPS + 1)] == [3, 2, 1, 0]
        assert not list(batches(1, STEPS))
