"""tensorflow-addons: its losses as objectives, its optimizers in models and runs, and the errors if it is missing."""

import importlib.util
import os

import ml_collections
import numpy as np
import pytest
import tensorflow as tf

import s2sd_tf
from s2sd_tf import mining, objectives
from s2sd_tf.files import read_json
from s2sd_tf.keras_compat import IS_KERAS_3, import_addons, keras
from s2sd_tf.objectives import addons
from s2sd_tf.training import default_config, optimizers, resolve

CONFIGS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "configs")
HAS_ADDONS = not IS_KERAS_3 and importlib.util.find_spec("tensorflow_addons") is not None
with_addons = pytest.mark.skipif(not HAS_ADDONS, reason="tensorflow-addons is not installed: the classic stack has it")
without_addons = pytest.mark.skipif(HAS_ADDONS, reason="tensorflow-addons is installed")

CLASSES = {
    "addons/triplet_semihard": addons.AddonsTripletSemiHard,
    "addons/triplet_hard": addons.AddonsTripletHard,
    "addons/lifted_struct": addons.AddonsLiftedStruct,
    "addons/npairs": addons.AddonsNpairs,
    "addons/contrastive": addons.AddonsContrastive,
}
# Every optimizer, with settings for which its state and decay matter.
OPTIMIZERS = {
    "addons/adabelief": {"weight_decay": 0.01},
    "addons/adamw": {"weight_decay": 0.001, "exclude_from_weight_decay": ("bias",)},
    "addons/cocob": {},
    "addons/conditionalgradient": {"lambda_": 1.0},
    "addons/lamb": {"weight_decay": 0.01},
    "addons/lazyadam": {},
    "addons/lookahead": {"optimizer": "addons/rectifiedadam", "sync_period": 2, "total_steps": 10},
    "addons/novograd": {"weight_decay": 0.01},
    "addons/proximaladagrad": {},
    "addons/rectifiedadam": {"total_steps": 10, "clipnorm": 1.0},
    "addons/sgdw": {"weight_decay": 0.001, "momentum": 0.9, "nesterov": True},
    "addons/yogi": {},
}
EVEN = np.repeat(np.arange(4), 3)
UNEVEN = np.array([0, 1, 1, 2, 2, 2, 2, 0, 0])
DEGENERATE = {"no positives": np.arange(4), "no negatives": np.full(5, 2), "one image": np.array([1])}


@pytest.fixture(scope="module")
def finished(call, tmp_path_factory):
    """Work directory and messages of a small run, with an optimizer of tensorflow-addons if it is installed."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    arguments = (
        f"--config={CONFIGS}/digits.py", f"--workdir={workdir}",
        "--config.model.filters=(8,8)", "--config.s2sd.target_dims=(16,)", "--config.eval.every=0",
        "--config.train.epochs=3", "--config.train.steps_per_epoch=3", "--config.train.checkpoint_every=1",
        "--config.train.threads=1", f"--config.optimizer.name={'addons/lamb' if HAS_ADDONS else 'adamw'}",
        "--config.optimizer.settings.weight_decay=0.01", "--config.optimizer.settings.beta_1=0.8",
    )  # fmt: skip
    return workdir, call("train", *arguments).stderr


def value_and_gradient(loss, embeddings, labels):
    embeddings = tf.constant(embeddings)
    with tf.GradientTape() as tape:
        tape.watch(embeddings)
        value = loss(embeddings, tf.constant(labels))
    return value.numpy(), tape.gradient(value, embeddings).numpy()


def their_loss(make):
    """A function of embeddings, which it normalises, and labels that calls a loss of tensorflow-addons."""
    loss = make(import_addons("test", "").losses)
    return lambda embeddings, labels: loss(labels, tf.math.l2_normalize(embeddings, axis=1))


def assert_same(one, other, embeddings, labels, factor=1.0):
    """Checks that values and gradients of `one` are `factor` times those of `other`."""
    value, gradient = value_and_gradient(one, embeddings, labels)
    expected, expected_gradient = value_and_gradient(other, embeddings, labels)
    assert expected > 0.01
    np.testing.assert_allclose(value, factor * expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, factor * expected_gradient, atol=2e-5 * np.abs(expected_gradient).max())


def softmax_of_pairs(x, labels):
    """The cross entropy of `addons/npairs`, one anchor at a time."""
    pairs = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        half = len(members) // 2
        pairs += zip(members[:half], members[half : 2 * half])
    losses = []
    for anchor, _ in pairs:
        logits = np.array([x[anchor] @ x[positive] for _, positive in pairs])
        own = np.array([labels[anchor] == labels[positive] for _, positive in pairs])
        losses.append(np.log(np.sum(np.exp(logits))) - logits[own].mean())
    return np.mean(losses)


def contrastive_of_pairs(x, labels, margin):
    losses = []
    for i in range(len(labels)):
        for j in range(i):
            distance = np.linalg.norm(x[i] - x[j])
            losses.append(distance**2 if labels[i] == labels[j] else max(0.0, margin - distance) ** 2)
    return np.mean(losses)


class TestOnBothStacks:
    def test_names(self):
        for name, cls in CLASSES.items():
            assert objectives.lookup(name) is cls
            assert cls.kind == "addons"
            assert all((cls.formula, cls.paper, cls.cost, cls.instead))
        assert set(CLASSES) == {name for name in objectives.names() if name.startswith("addons/")}
        assert objectives.settings("addons/triplet_hard")["soft"] is False

    def test_settings_of_keras_optimizers(self):
        optimizer = optimizers.get("SGD", 0.1, {"momentum": 0.9, "nesterov": True})
        assert isinstance(optimizer, keras.optimizers.Optimizer)
        assert optimizer.get_config()["momentum"] == 0.9
        assert optimizer.get_config()["nesterov"] is True
        assert float(tf.convert_to_tensor(optimizers.get("adamw", 0.1).learning_rate)) == pytest.approx(0.1)
        assert optimizers.get("adam", 0.1, {"weight_decay": None}).get_config()["weight_decay"] is None
        if hasattr(keras.optimizers, "Muon"):
            muon = optimizers.get("muon", 0.1, {"exclude_embeddings": False, "exclude_layers": ["head"]})
            assert muon.get_config()["exclude_embeddings"] is False

    @pytest.mark.parametrize(
        ("name", "settings", "words"),
        [
            ("nonsense", {}, r"config.optimizer.name: expected one of .*'adam'.*'addons/lamb'.*Received: 'nonsense'"),
            ("addons/nonsense", {}, r"config.optimizer.name: expected one of .*'addons/lamb'.*'addons/nonsense'"),
            ("addons/swa", {}, r"config.optimizer.name: .*'addons/swa'.*use_ema"),
            ("adam", {"beta1": 0.9}, r"config.optimizer.settings: .*'adam' out of .*'beta_1'.*Received: \['beta1'\]"),
            ("adam", {"beta_1": "0.9"}, r"config.optimizer.settings.beta_1: expected a number. Received: '0.9'"),
            ("sgd", {"nesterov": 1}, r"config.optimizer.settings.nesterov: expected a bool. Received: 1"),
            ("sgd", {"momentum": -1.0}, r"config.optimizer.settings: expected what 'sgd' takes.*momentum"),
            ("sgd", {"learning_rate": 1.0}, r"Received: \['learning_rate'\]"),
        ],
    )
    def test_errors_name_the_key(self, name, settings, words):
        with pytest.raises(ValueError, match=words):
            optimizers.get(name, 0.01, settings)

    def test_settings_are_the_only_free_keys_of_a_config(self):
        config = default_config()
        config.optimizer.settings.weight_decay = 0.1
        config.optimizer.settings["exclude_from_weight_decay"] = ("bias",)
        assert resolve(config).optimizer.settings.to_dict() == {
            "weight_decay": 0.1,
            "exclude_from_weight_decay": ("bias",),
        }
        with pytest.raises((AttributeError, KeyError)):
            config.optimizer.momentum = 0.9
        unlocked = ml_collections.ConfigDict(config.to_dict())
        unlocked.optimizer.momentum = 0.9
        with pytest.raises(ValueError, match=r"config.optimizer: expected keys .*Received: 'momentum'"):
            resolve(unlocked)

    def test_a_run_with_settings_from_the_command_line(self, finished):
        workdir, messages = finished
        assert "has ended development" not in messages
        assert read_json(workdir / "config.json")["optimizer"]["settings"] == {"weight_decay": 0.01, "beta_1": 0.8}
        assert read_json(workdir / "results.json")["steps"] == 9
        optimizer = keras.models.load_model(workdir / "best.keras").optimizer
        assert type(optimizer).__name__ == ("LAMB" if HAS_ADDONS else "AdamW")
        assert optimizer.get_config()["weight_decay"] == pytest.approx(0.01)
        assert int(tf.convert_to_tensor(optimizer.iterations)) == 9


@without_addons
class TestWithoutAddons:
    @pytest.mark.parametrize("name", CLASSES)
    def test_objectives_say_what_to_install_and_what_to_use(self, small_model, name):
        words = rf"(?s)objective '{name}'.*pip install 's2sd_tf\[addons\]'.*3\.10 or 3\.11.*Alternative: objective"
        with pytest.raises(ImportError, match=words):
            objectives.get(name)
        with pytest.raises(ImportError, match=words):
            small_model(objective=name)

    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_optimizers_say_what_to_install_and_what_to_use(self, name):
        words = rf"(?s)config.optimizer.name='{name}'.*pip install 's2sd_tf\[addons\]'.*Alternative: "
        with pytest.raises(ImportError, match=words):
            optimizers.get(name, 0.01, OPTIMIZERS[name])

    def test_suggested_replacements_exist(self):
        for cls in CLASSES.values():
            name = cls.instead.split('"')[1]
            assert name in objectives.names()
        for hint in optimizers._INSTEAD.values():
            if hint.startswith("'"):
                assert optimizers.get(hint.split("'")[1], 0.01)

    def test_the_command_line_reports_one_line(self, tmp_path, call):
        arguments = (f"--config={CONFIGS}/digits.py", "--config.optimizer.name=addons/lamb")
        done = call("train", *arguments, f"--workdir={tmp_path / 'run'}", status=2)
        assert "pip install 's2sd_tf[addons]'" in done.stderr.splitlines()[-1]
        assert not (tmp_path / "run").exists()


@with_addons
class TestObjectives:
    @pytest.mark.parametrize("labels", [EVEN, UNEVEN], ids=["even", "uneven"])
    @pytest.mark.parametrize(
        ("name", "settings", "make"),
        [
            *(
                ("triplet_semihard", {"distance_metric": m}, lambda tfa, m=m: tfa.TripletSemiHardLoss(1.0, m))
                for m in addons.DISTANCE_METRICS
            ),
            *(
                ("triplet_hard", {"distance_metric": m}, lambda tfa, m=m: tfa.TripletHardLoss(1.0, False, m))
                for m in addons.DISTANCE_METRICS
            ),
            ("triplet_semihard", {"margin": 0.2}, lambda tfa: tfa.TripletSemiHardLoss(margin=0.2)),
            ("triplet_hard", {"soft": True}, lambda tfa: tfa.TripletHardLoss(soft=True)),
            ("lifted_struct", {"margin": 0.5}, lambda tfa: tfa.LiftedStructLoss(margin=0.5)),
        ],
    )
    def test_equal_the_losses_of_addons(self, unit_rows, name, settings, make, labels):
        objective = objectives.get(f"addons/{name}", **settings)
        rows = 3.0 * unit_rows(len(labels), 6).astype(np.float32)
        assert_same(objective, their_loss(make), rows, labels)

    @pytest.mark.parametrize("labels", [EVEN, UNEVEN, np.repeat([7, 3], 2)], ids=["even", "uneven", "two each"])
    def test_pairs_of_a_batch(self, unit_rows, labels):
        rows = unit_rows(len(labels), 6)
        for name, expected in [
            ("addons/npairs", softmax_of_pairs(rows, labels)),
            ("addons/contrastive", contrastive_of_pairs(rows, labels, 1.2)),
        ]:
            objective = objectives.get(name, dtype="float64", **({"margin": 1.2} if "contrastive" in name else {}))
            assert objective(rows, labels).dtype == tf.float64
            np.testing.assert_allclose(objective(rows, labels), expected, rtol=1e-5)

    @pytest.mark.parametrize("name", CLASSES)
    @pytest.mark.parametrize("pattern", DEGENERATE)
    def test_undefined_losses_are_zero(self, unit_rows, name, pattern):
        labels = DEGENERATE[pattern]
        value, gradient = value_and_gradient(objectives.get(name), unit_rows(len(labels), 6).astype(np.float32), labels)
        assert value == 0
        np.testing.assert_array_equal(gradient, 0.0)

    @pytest.mark.parametrize("name", CLASSES)
    def test_duplicates_and_zero_rows_are_finite(self, name):
        for rows in (np.ones((8, 6)), np.zeros((8, 6)), np.repeat(np.eye(6)[:4], 2, axis=0)):
            value, gradient = value_and_gradient(
                objectives.get(name), rows.astype(np.float32), np.repeat(np.arange(4), 2)
            )
            assert np.isfinite(value)
            assert np.isfinite(gradient).all()

    @pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
    @pytest.mark.parametrize("name", CLASSES)
    def test_compiled_equals_eager_without_retracing(self, unit_rows, name, jit):
        objective = objectives.get(name)

        @tf.function(jit_compile=jit)
        def call(embeddings, labels):
            loss = objective(embeddings, labels, training=True)
            return loss, tf.gradients(loss, embeddings)[0]

        for step, labels in enumerate([EVEN, np.resize(UNEVEN, 12), np.arange(12), np.zeros(12, np.int64)]):
            rows = unit_rows(12, 6, seed=step).astype(np.float32)
            loss, gradient = call(tf.constant(rows), tf.constant(labels))
            expected, expected_gradient = value_and_gradient(objective, rows, labels)
            np.testing.assert_allclose(loss, expected, atol=1e-5)
            np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5)
        assert call.experimental_get_tracing_count() == 1

    @pytest.mark.parametrize("name", CLASSES)
    def test_in_a_model_as_base_and_as_target(self, small_model, tmp_path, unit_rows, name):
        settings = {} if name == "addons/npairs" else {"margin": 0.7}
        model = small_model(objective=objectives.get(name, **settings), target_objective=name, target_dims=(8,))
        model.compile(optimizer="adam", run_eagerly=True)
        images = np.random.default_rng(0).random((12, 8, 8, 1), dtype=np.float32)
        for labels in (EVEN, np.arange(12)):
            assert np.isfinite(model.train_on_batch(images, labels, return_dict=True)["loss"])
        assert all(np.isfinite(weight).all() for weight in model.get_weights())
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        assert type(loaded.s2sd_loss.objective) is type(loaded.s2sd_loss.target_objectives[0]) is CLASSES[name]
        assert loaded.s2sd_loss.objective.get_config() == model.s2sd_loss.objective.get_config()
        rows = unit_rows(12, 4).astype(np.float32)
        np.testing.assert_array_equal(loaded.s2sd_loss.objective(rows, EVEN), model.s2sd_loss.objective(rows, EVEN))

    @pytest.mark.parametrize(
        ("name", "settings", "words"),
        [
            ("triplet_hard", {"margin": -1.0}, "margin: expected a number >= 0. Received: -1.0"),
            ("triplet_semihard", {"distance_metric": "L1"}, "distance_metric: expected one of .*'L2'.*Received: 'L1'"),
            ("contrastive", {"margins": 1.0}, "expected settings from .*'margin'.*Received: .*margins"),
        ],
    )
    def test_errors_name_the_argument(self, name, settings, words):
        with pytest.raises(ValueError, match=words):
            objectives.get(f"addons/{name}", **settings)


class EvenWithOdd(mining.PairMiner):
    """Pairs of the images 2k and 2k + 1, and the odd images of the other pairs as negatives."""

    registered_name = "even_with_odd"

    def pairs(self, distances, labels, *, dim, seed):
        rows, columns = np.indices((len(labels), len(labels)))
        across = (rows % 2 == 0) & (columns % 2 == 1)
        return mining.Pairs(tf.constant(across & (columns == rows + 1)), tf.constant(across & (columns != rows + 1)))


@with_addons
class TestOursAndTheirs:
    """Where both libraries define the same loss, the results agree."""

    @pytest.mark.parametrize("margin", [1.0, 0.2])
    def test_semi_hard_triplets_on_squared_distances(self, unit_rows, margin):
        for labels in (EVEN, UNEVEN):
            ours = objectives.get("triplet", margin=margin, miner="semi_hard")
            ours.build((None, 6))
            other = their_loss(lambda tfa: tfa.TripletSemiHardLoss(margin, "squared-L2"))
            assert_same(ours, other, unit_rows(len(labels), 6).astype(np.float32), labels)

    def test_hard_triplets_on_squared_distances(self, unit_rows):
        ours = objectives.get("triplet", margin=1.0, miner="hard")
        ours.build((None, 6))
        other = their_loss(lambda tfa: tfa.TripletHardLoss(1.0, False, "squared-L2"))
        assert_same(ours, other, unit_rows(len(EVEN), 6).astype(np.float32), EVEN)

    def test_lifted_structure_over_all_pairs(self, unit_rows):
        for labels in (EVEN, UNEVEN):
            ours = objectives.get("lifted_structure", margin=0.5, miner="all")
            ours.build((None, 6))
            other = their_loss(lambda tfa: tfa.LiftedStructLoss(0.5))
            assert_same(ours, other, unit_rows(len(labels), 6).astype(np.float32), labels)

    def test_contrastive_with_as_many_positives_as_negatives(self, unit_rows):
        # Ours averages positives and negatives separately, theirs averages over all pairs.
        labels = np.repeat([0, 1], [6, 3])
        ours = objectives.get("contrastive", positive_margin=0.0, negative_margin=1.2, squared=True, miner="all")
        ours.build((None, 6))
        other = objectives.get("addons/contrastive", margin=1.2)
        assert_same(ours, other, unit_rows(len(labels), 6).astype(np.float32), labels, factor=2.0)

    def test_n_pair_with_one_pair_per_class(self, unit_rows):
        labels = np.repeat(np.arange(5), 2)
        ours = objectives.get("n_pair", miner=EvenWithOdd())
        ours.build((None, 6))
        rows = unit_rows(len(labels), 6).astype(np.float32)
        assert_same(ours, objectives.get("addons/npairs"), rows, labels)

        def pairs_alone(losses):
            loss = losses.NpairsLoss()
            return lambda labels, x: loss(labels[::2], tf.matmul(x[::2], x[1::2], transpose_b=True))

        assert_same(ours, their_loss(pairs_alone), rows, labels)


@with_addons
class TestOptimizers:
    images = np.random.default_rng(0).random((12, 8, 8, 1), dtype=np.float32)

    def fitted(self, small_model, optimizer, steps, **settings):
        keras.utils.set_random_seed(1)
        model = small_model(target_dims=(8,), **settings)
        model.compile(optimizer=optimizer, run_eagerly=True)
        self.fit(model, steps)
        return model

    def fit(self, model, steps):
        for _ in range(steps):
            model.train_step((tf.constant(self.images), tf.constant(EVEN)))

    def test_every_optimizer_is_covered(self):
        assert {name.removeprefix("addons/") for name in OPTIMIZERS} == set(optimizers._INSTEAD)

    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_a_saved_model_resumes_as_if_never_saved(self, small_model, tmp_path, name):
        model = self.fitted(small_model, optimizers.get(name, 0.01, OPTIMIZERS[name]), 3)
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        assert type(loaded.optimizer).__name__.lower() == name.removeprefix("addons/")
        assert loaded.optimizer.get_config() == model.optimizer.get_config()
        for one in (model, loaded):
            self.fit(one, 2)
        assert int(loaded.optimizer.iterations) == 5
        for a, b in zip(model.get_weights(), loaded.get_weights()):
            np.testing.assert_array_equal(a, b)
        for a, b in zip(model.optimizer.get_weights(), loaded.optimizer.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)

    def test_legacy_optimizers_of_keras_and_averages_of_addons_are_saved(self, small_model, tmp_path):
        averages = import_addons("test", "").optimizers.SWA(keras.optimizers.legacy.Adam(), 0, 2)
        for optimizer in (keras.optimizers.legacy.Adam(), averages):
            model = self.fitted(small_model, optimizer, 3)
            model.save(tmp_path / "model.keras")
            loaded = keras.models.load_model(tmp_path / "model.keras")
            for a, b in zip(model.optimizer.get_weights(), loaded.optimizer.get_weights(), strict=True):
                np.testing.assert_array_equal(a, b)

    def test_a_saved_model_loads_without_its_optimizer_or_with_another(self, small_model, tmp_path):
        model = self.fitted(small_model, optimizers.get("addons/lamb", 0.01), 1)
        model.save(tmp_path / "model.keras")
        bare = keras.models.load_model(tmp_path / "model.keras", compile=False)
        other = self.fitted(small_model, optimizers.get("addons/sgdw", 0.01, {"weight_decay": 0.1}), 1)
        with pytest.warns(UserWarning, match="saved state is of another optimizer"):
            other.load_weights(tmp_path / "model.keras")
        for one in (bare, other):
            for a, b in zip(model.get_weights(), one.get_weights()):
                np.testing.assert_array_equal(a, b)

    def test_learning_rate_multipliers(self, small_model):
        def moved(**multipliers):
            model = self.fitted(
                small_model, optimizers.get("addons/lamb", 0.01), 0, learning_rate_multipliers=multipliers
            )
            before = [layer.get_weights() for layer in (model.backbone, model.embedding_head)]
            self.fit(model, 1)
            after = [layer.get_weights() for layer in (model.backbone, model.embedding_head)]
            return [[b - a for a, b in zip(*pair)] for pair in zip(before, after)]

        plain, scaled = moved(), moved(heads=0.5, backbone=0.0)
        trainable = [np.abs(change).max() for change in scaled[0]]
        assert min(np.abs(change).max() for change in plain[1]) > 0
        for one, other in zip(plain[1], scaled[1]):
            np.testing.assert_allclose(other, 0.5 * one, atol=1e-7)
        # Only the batch normalisation statistics of the backbone still change.
        assert sorted(trainable)[: len(trainable) // 3] == [0.0] * (len(trainable) // 3)

    def test_mixed_precision(self, tmp_path):
        keras.utils.set_random_seed(1)
        backbone = s2sd_tf.models.backbones.conv_blocks((8, 8, 1), filters=(6, 8), pools=1)
        model = s2sd_tf.S2SDModel(backbone, 4, target_dims=(8,), dtype="mixed_float16")
        model.compile(optimizer=optimizers.get("addons/lamb", 0.01), run_eagerly=True)
        assert isinstance(model.optimizer, keras.mixed_precision.LossScaleOptimizer)
        self.fit(model, 2)
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        assert int(loaded.optimizer.iterations) == 2
        assert float(loaded.optimizer.loss_scale) == float(model.optimizer.loss_scale)
        for a, b in zip(model.optimizer.get_weights(), loaded.optimizer.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)

    @pytest.mark.parametrize(
        ("name", "settings", "words"),
        [
            ("adamw", {}, r"expected a value for \['weight_decay'\].*'addons/adamw'"),
            ("lamb", {"weight_decay": "much"}, "settings.weight_decay: expected a number. Received: 'much'"),
            ("lamb", {"exclude_from_weight_decay": "bias"}, "expected a list of patterns. Received: 'bias'"),
            ("lookahead", {"period": 3}, r"out of .*'optimizer'.*'sync_period'.*Received: \['period'\]"),
            ("lookahead", {"optimizer": "lion"}, r"config.optimizer.name: expected one of .*Received: 'lion'"),
        ],
    )
    def test_errors_name_the_key(self, name, settings, words):
        with pytest.raises(ValueError, match=words):
            optimizers.get(f"addons/{name}", 0.01, settings)


@with_addons
def test_an_interrupted_run_ends_with_the_same_weights(finished, tmp_path, run_python):
    script = """
import sys
import ml_collections
from s2sd_tf.files import read_json
from s2sd_tf.training import run
from s2sd_tf.training.checkpoints import Checkpoints

config = ml_collections.ConfigDict(read_json(sys.argv[1]))
save = Checkpoints.save

def killed(checkpoints, model, state):
    save(checkpoints, model, state)
    if state.epoch == 2:
        raise KeyboardInterrupt

Checkpoints.save = killed
try:
    run.train(config, "resumed")
except KeyboardInterrupt:
    Checkpoints.save = save
run.train(config, "resumed")
"""
    run_python("-c", script, finished[0] / "config.json", cwd=tmp_path)
    one, other = (keras.models.load_model(path / "best.keras") for path in (finished[0], tmp_path / "resumed"))
    assert one.optimizer.iterations == other.optimizer.iterations == 9
    for a, b in zip(one.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(one.optimizer.get_weights(), other.optimizer.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
