"""Training on several devices: virtual CPUs under MirroredStrategy, and workers on this machine."""

import json

import numpy as np
import pytest

# Trains cases on a number of virtual CPUs. TensorFlow's collectives allow one group size per process.
SCRIPT = """
import json, sys
import numpy as np, tensorflow as tf
import s2sd_tf
keras = tf.keras
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 4
)
images = np.random.default_rng(0).normal(size=(10, 16, 8, 8, 1)).astype(np.float32)
labels = np.tile(np.arange(16) // 4, (10, 1)).astype(np.int32)

def strategy_of(devices):
    if devices == 1:
        return tf.distribute.get_strategy()
    return tf.distribute.MirroredStrategy([f"CPU:{k}" for k in range(devices)])

def train(case, strategy):
    devices = strategy.num_replicas_in_sync
    x, y = images, labels
    if case.get("tile"):
        x, y = np.tile(x[:, :8], (1, devices, 1, 1, 1)), np.tile(y[:, :8], (1, devices))
    size = x.shape[1]
    with strategy.scope():
        keras.utils.set_random_seed(0)
        inputs = keras.Input((8, 8, 1))
        features = keras.layers.Conv2D(6, 3, activation="relu")(inputs)
        features = keras.layers.Conv2D(8, 3)(features)
        if case.get("norm"):
            features = keras.layers.BatchNormalization()(features)
        features = keras.layers.ReLU()(features)
        settings = {"target_dims": (8, 12), "feature_distill_delay": 2, "num_classes": 4, **case["model"]}
        settings["target_objective"] = None
        objective = s2sd_tf.objectives.get(**case["objective"])
        model = s2sd_tf.S2SDModel(keras.Model(inputs, features), 4, objective=objective, **settings)
        optimizer = getattr(keras.optimizers, case.get("optimizer", "SGD"))(**case["settings"])
        if case.get("overflow"):
            scaling = getattr(keras.optimizers, "LossScaleOptimizer", None) or keras.mixed_precision.LossScaleOptimizer
            optimizer = scaling(optimizer)
        model.compile(optimizer=optimizer)
    if case.get("overflow"):
        x = x.copy()
        x[3, -1, 0, 0] = np.inf  # an image of the last replica
    if not s2sd_tf.objectives.lookup(case["objective"]["identifier"]).uses_classes:
        y = y.astype(np.int64) << 33  # beyond int32
    # The last batch is a small one; Keras 3 wants the first to divide.
    x, y = x.reshape((-1, 8, 8, 1)), y.reshape(-1)
    if "relevance" in case["objective"]:
        y = np.stack([y >> 34, y], axis=1)  # super-class and class
    x, y = x[: len(x) - case.get("missing", 0)], y[: len(y) - case.get("missing", 0)]
    if settings.get("external_teachers"):
        y = {"labels": y, "teachers": (x.reshape((len(x), -1)), x[:, :2, :, 0].reshape((len(x), -1)))}
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(size)
    history = model.fit(dataset, epochs=1, shuffle=False, verbose=0).history
    sums = {id(v) for metric in model.metrics for v in metric.variables}  # replicas add up theirs
    state = [v for v in model.non_trainable_variables if id(v) not in sums]
    state = [tf.convert_to_tensor(v).numpy().tolist() for v in state]
    weights = [tf.convert_to_tensor(v).numpy().tolist() for v in model.trainable_variables]
    result = {"weights": weights, "history": history, "state": state}
    if case.get("overflow"):
        result["scale"] = float(s2sd_tf.keras_compat.scale_loss(optimizer, tf.ones([])))
    if case.get("evaluate"):
        dataset = tf.data.Dataset.from_tensor_slices((x, y)).take(2 * size - 3).batch(size)
        result["evaluated"] = model.evaluate(dataset, verbose=0, return_dict=True)
    return result

def memory_per_replica(strategy):
    with strategy.scope():
        backbone = s2sd_tf.models.backbones.conv_blocks((8, 8, 1), filters=(4, 6), pools=1)
        objective = s2sd_tf.objectives.get("contrastive", memory_size=10, memory_start=0)
        model = s2sd_tf.S2SDModel(backbone, 4, objective=objective, target_dims=(8,), gather_replicas=False)
        model.compile(optimizer=keras.optimizers.SGD(0.01))
    model.fit(tf.data.Dataset.from_tensors((images[0], np.arange(16) // 2)), epochs=3, verbose=0)
    values = (objective.memory, objective.memory_labels, objective.draws)
    return [tf.convert_to_tensor(value).numpy().tolist() for value in values]

def mean_over_replicas(strategy):
    labels = np.arange(16) % 8 // 3
    with strategy.scope():
        inputs = keras.Input((8, 8, 1))
        backbone = keras.Model(inputs, keras.layers.Conv2D(6, 3, activation="relu")(inputs))
        model = s2sd_tf.S2SDModel(backbone, 4, target_dims=(8,), feature_distill_delay=0, gather_replicas=False)
        model.compile(optimizer=keras.optimizers.SGD(1.0))
    before = [tf.convert_to_tensor(v).numpy() for v in model.trainable_variables]
    # By hand: the mean over the parts of what each has for itself.
    single = s2sd_tf.S2SDModel.from_config(model.get_config())
    single.set_weights(model.get_weights())
    losses, gradients = [], []
    for part in (slice(0, 8), slice(8, 16)):
        with tf.GradientTape() as tape:
            losses.append(single.compute_losses(images[0, part], labels[part], training=True)["loss"])
        gradients.append([np.asarray(g) for g in tape.gradient(losses[-1], single.trainable_variables)])
    history = model.fit(tf.data.Dataset.from_tensors((images[0], labels)), verbose=0).history
    return {
        "loss": history["loss"], "mean_loss": float(np.mean(losses)),
        "weights": [tf.convert_to_tensor(variable).numpy().tolist() for variable in model.trainable_variables],
        "by_hand": [(old - np.mean(parts, axis=0)).tolist() for old, *parts in zip(before, *gradients)],
        "difference": max(float(np.abs(one - other).max()) for one, other in zip(*gradients)),
    }

found = {}
for devices, cases in json.loads(sys.argv[1]).items():
    strategy = strategy_of(int(devices))
    found[devices] = {name: train(case, strategy) for name, case in cases.items()}
    if devices == "2":
        found["memory"], found["mean"] = memory_per_replica(strategy), mean_over_replicas(strategy)
print(json.dumps(found))
"""

SGD = {"settings": {"learning_rate": 0.004, "momentum": 0.9}}
OBJECTIVES = {
    "multi_similarity": {"identifier": "multi_similarity"},
    "margin": {"identifier": "margin", "num_classes": 4, "beta": 0.6},
    "proxy_anchor": {"identifier": "proxy_anchor", "num_classes": 4},
}
GLOBAL = {
    "margin, a batch that does not divide": {
        "objective": OBJECTIVES["margin"],
        "model": {"similarity_kl_implementation": "fused", "external_teachers": 2},
        "missing": 2, "evaluate": True, **SGD,
    },
    "adam, each gradient clipped, multipliers, l2, gem": {
        "objective": OBJECTIVES["proxy_anchor"],
        "model": {
            "l2": 0.01, "pooling": "gem", "learning_rate_multipliers": {"heads": 0.5, "objectives": 10.0},
            "log_per_target": True,
        },
        "optimizer": "Adam", "settings": {"learning_rate": 0.001, "epsilon": 1e-2, "clipnorm": 0.02},
    },
    "nested, clipped by the norm of all": {
        "objective": OBJECTIVES["multi_similarity"],
        "model": {
            "diagnostics": True, "similarity_kl_implementation": "composed", "nested_dims": (2, 4),
            "log_per_target": True,
        },
        "settings": {"learning_rate": 0.1, "global_clipnorm": 0.05},
    },
    "an overflow, the loss scaled": {"objective": OBJECTIVES["multi_similarity"], "model": {}, "overflow": True, **SGD},
    "in parts": {
        "objective": OBJECTIVES["margin"],
        "model": {"micro_batch_size": 3, "diagnostics": True, "external_teachers": 2}, **SGD,
    },
    "a memory of past batches": {
        "objective": {"identifier": "contrastive", "memory_size": 20, "memory_start": 2}, "model": {}, **SGD,
    },
    "super-classes, and a memory of them": {
        "objective": {
            "identifier": "supcon", "relevance": (0.3, 1.0), "memory_size": 20, "memory_start": 2,
        }, "model": {}, **SGD,
    },
}  # fmt: skip


TILED = {
    "objective": OBJECTIVES["proxy_anchor"], "model": {"gather_replicas": False}, "tile": True, **SGD
}  # fmt: skip


# Four devices take twice as long as two. These two cases suffice to test the order of gathering, and the means.
ON_FOUR = ["margin, a batch that does not divide", "tiled"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, run_python):
    """The results of every case, by the number of devices, and those of two more functions on two devices."""
    folder = tmp_path_factory.mktemp("distribution")
    (folder / "script.py").write_text(SCRIPT)
    cases = {**GLOBAL, "tiled": TILED}
    found = {}
    for jobs in ({1: cases, 2: cases}, {4: {name: cases[name] for name in ON_FOUR}}):
        output = run_python("script.py", json.dumps(jobs), cwd=folder, timeout=900).stdout
        found |= json.loads(output.splitlines()[-1])
    return found


def assert_same_training(trained, name, devices, state_within=1e-5):
    one, other = trained["1"][name], trained[str(devices)][name]
    for key in {"history", "evaluated"} & one.keys():
        assert one[key].keys() == other[key].keys()
        for metric, expected in one[key].items():
            np.testing.assert_allclose(other[key][metric], expected, rtol=1e-5, atol=1e-5, err_msg=metric)
    for kind, within in (("weights", 1e-5), ("state", state_within)):
        assert len(one[kind]) == len(other[kind])
        for expected, values in zip(one[kind], other[kind]):
            np.testing.assert_allclose(values, expected, rtol=1e-5, atol=within)


@pytest.mark.parametrize(
    ("devices", "name"), [(2, name) for name in GLOBAL] + [(4, name) for name in ON_FOUR if name in GLOBAL]
)
def test_training_on_several_devices_equals_one_device(trained, name, devices):
    # The rows of a memory are embeddings, and some come from features with small norms.
    assert_same_training(trained, name, devices, state_within=1e-3 if "memory" in name else 1e-5)


@pytest.mark.parametrize("devices", [1, 2])
def test_an_overflow_on_one_device_is_skipped_by_all(trained, devices):
    result = trained[str(devices)]["an overflow, the loss scaled"]
    assert all(np.isfinite(weight).all() for weight in result["weights"])
    assert result["scale"] == 2**14  # half of what it was


@pytest.mark.parametrize("devices", [2, 4])
def test_replicas_with_the_same_images_train_like_one(trained, devices):
    assert_same_training(trained, "tiled", devices)


def test_a_cross_batch_memory_per_replica_holds_embeddings_of_one_replica(trained):
    memory, labels, draws = trained["memory"]
    np.testing.assert_allclose(np.linalg.norm(memory, axis=1), 1.0, atol=1e-5)
    # Newest first: eight images of this replica, then two of the previous step.
    assert labels == [0, 0, 1, 1, 2, 2, 3, 3, 0, 0]
    assert draws == 3


def test_without_gathering_the_loss_is_the_mean_over_replicas(trained):
    found = trained["mean"]
    np.testing.assert_allclose(found["loss"], [found["mean_loss"]], rtol=1e-5)
    for value, expected in zip(found["weights"], found["by_hand"]):
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)
    assert found["difference"] > 1e-2
