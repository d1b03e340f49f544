"""Labels at every public door: the same result as with the classes 0, 1, 2, or one line that names the argument."""

import numpy as np
import pytest
import tensorflow as tf
from conftest import objective_names
from hypothesis import given
from hypothesis import strategies as st
from test_fuzz import clear_errors, examples

import s2sd_tf
from s2sd_tf import evaluation, mining, objectives
from s2sd_tf.keras_compat import keras

CLASSES = np.array([0, 2, 1, 0, 1, 2, 0, 1])
ROWS = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
SEED = (3, 4)
# The same classes in other forms. Hashes differ in their high bits only.
SAME = {
    "high": CLASSES << 32, "hash": CLASSES - 2**62, "unsigned": np.uint64(2**63) + CLASSES.astype(np.uint64),
    "int8": CLASSES.astype(np.int8), "uint8": CLASSES.astype(np.uint8) + np.uint8(250),
    "column": CLASSES[:, None] << 32,
    "float": CLASSES.astype(np.float32), "double": CLASSES + 2.0**40, "half": CLASSES.astype(np.float16),
    "list": [int(label) << 40 for label in CLASSES], "tensor": tf.constant(CLASSES << 32),
    "small": tf.constant(CLASSES, tf.int16), "variable": tf.Variable(CLASSES << 32),
}  # fmt: skip
# Refused, with what the message says.
BAD = {
    "one_hot": (np.eye(3, dtype=np.int64)[CLASSES], r"argmax\(axis=-1\). Received: int64 of shape \(8, 3\)"),
    "one_hot_floats": (np.eye(3, dtype=np.float32)[CLASSES], "argmax"),
    "fractions": (CLASSES / 3 + 1, r"whole numbers below 2\^\d+ if floating-point. Received: float\d\d 1.[36]"),
    "large_floats": (np.float32(CLASSES + 2**24), r"below 2\^24 if floating-point. Received: float32 16777216.0"),
    "nan": (CLASSES * np.nan, "Received: float.* nan"),
    "strings": (np.array(["a", "c", "b", "a", "b", "c", "a", "b"]), "return_inverse. Received: strings"),
    "names": (["a", "c", "b", "a", "b", "c", "a", "b"], "return_inverse. Received: strings"),
    "scalar": (3, r"Received: int64 of shape \(\)"),
    "few": (CLASSES[:1], "Received: 1"),
    "nothing": (None, "Received"),
    "ragged": ([[0], [1, 2]] * 4, "not an array of numbers"),
    "huge": ([2**70] * 8, "not an array of numbers"),
}


def one_line(error, argument, words):
    """Whether the error is one line that names the argument."""
    text = str(error.value)
    assert text.startswith(argument), text
    assert "\n" not in text
    assert len(text) < 300
    assert error.match(words)


def loss_of(name, labels, **settings):
    objective = objectives.get(name, **({"num_classes": 3} if objectives.lookup(name).uses_classes else {}), **settings)
    keras.utils.set_random_seed(0)
    return float(objective(ROWS, labels, training=True))


@pytest.mark.parametrize("name", [*objective_names(), "memory"])
def test_objectives(name):
    settings = {}
    if name == "memory":
        name, settings = "contrastive", {"memory_size": 20, "memory_start": 0}
    expected = loss_of(name, CLASSES, **settings)
    weights = name != "margin" and objectives.lookup(name).uses_classes
    for form in ("float", "int8") if weights or name == "margin" else ("high", "unsigned"):
        assert loss_of(name, SAME[form], **settings) == expected, form
    if name == "margin":
        plain = {"num_classes": None}
        assert float(objectives.get(name, **plain)(ROWS, SAME["high"])) == float(
            objectives.get(name, **plain)(ROWS, CLASSES)
        )


def test_labels_of_weights_are_in_range():
    objective = objectives.get("proxy_anchor", num_classes=3)
    jit = tf.function(objective, jit_compile=True)
    for labels in (CLASSES << 32, CLASSES - 2**32):
        with pytest.raises(tf.errors.InvalidArgumentError, match=r"labels: expected integers in \[0, 3\)"):
            objective(ROWS, labels)
        assert np.isnan(jit(tf.constant(ROWS), tf.constant(labels)))


def test_the_memory_keeps_labels_apart():
    objective = objectives.get("contrastive", memory_size=8, memory_start=0, miner="all")
    for labels in (CLASSES, CLASSES + 2**40):
        first = float(objective(ROWS, labels, training=True))
    alone = objectives.get("contrastive", miner="all")(ROWS, CLASSES)
    negatives = 1.0 - np.linalg.norm(objective.memory[:, None] - objective.memory[None], axis=-1)
    # No row of the memory is of a class of the second batch: all pairs with it are negative.
    # In float32, the distance of a row from itself is up to 3e-4.
    assert first == pytest.approx(float(alone) + np.maximum(negatives, 0).mean(), rel=1e-4)


@pytest.mark.parametrize("name", mining.names())
def test_miners(name):
    distances = objectives.base.euclidean_distances(objectives.base.unit_rows(ROWS))
    miner = mining.get(name)

    def chosen(labels):
        return np.stack(miner.pairs(distances, labels, dim=6, seed=tf.constant(SEED)))

    np.testing.assert_array_equal(chosen(SAME["high"]), chosen(CLASSES))
    with pytest.raises(ValueError, match="Received") as error:
        chosen(BAD["one_hot"][0])
    one_line(error, "labels: ", "argmax")


@pytest.fixture(scope="module")
def doors():
    """Functions from labels to a result, by name, with the argument that their messages name."""
    backbone = s2sd_tf.models.backbones.conv_blocks((8, 8, 1), filters=(6, 8), pools=1)
    model = s2sd_tf.S2SDModel(backbone, 4, target_dims=(8,))
    images = np.random.default_rng(1).normal(size=(8, 8, 8, 1)).astype(np.float32)
    loss = s2sd_tf.S2SDLoss(target_dims=(), feature_distill=False)
    keras_loss = objectives.as_keras_loss("multi_similarity")
    triplet = objectives.get("triplet", miner="all")

    def evaluated(labels):
        callback = evaluation.RetrievalEvaluation(images, labels, ks=(1,))
        return callback.evaluate(lambda _: ROWS)["val_map@r"]

    def test_step(labels):
        model.reset_metrics()
        return model.test_step((images, labels))["loss"]

    return {
        "triplet": ("labels", lambda labels: triplet(ROWS, labels)),
        "S2SDLoss": ("labels", lambda labels: loss(ROWS, [], None, labels)["loss"]),
        "compute_losses": ("labels", lambda labels: model.compute_losses(images, labels)["loss"]),
        "test_step": ("labels", test_step),
        "as_keras_loss": ("y_true", lambda labels: keras_loss(labels, ROWS)),
        "retrieval_metrics": ("query_labels", lambda labels: evaluation.retrieval_metrics(ROWS, labels)["map@r"]),
        "gallery": ("gallery_labels", lambda labels: evaluation.retrieval_metrics(ROWS, CLASSES, ROWS, labels)["mrr"]),
        "RetrievalEvaluation": ("labels", evaluated),
        "embedding_geometry": ("labels", lambda labels: evaluation.embedding_geometry(ROWS, labels)["intra"]),
    }


def test_the_same_classes_in_other_forms(doors):
    for door, (_, call) in doors.items():
        expected = float(call(CLASSES))
        for form, labels in SAME.items() if door != "gallery" else ():
            if form == "unsigned" and door in ("retrieval_metrics", "RetrievalEvaluation", "embedding_geometry"):
                with pytest.raises(ValueError, match=r"labels: expected integers below 2\^63; .*Received: 922337\d+"):
                    call(labels)
            else:
                assert float(call(labels)) == pytest.approx(expected, rel=1e-6), (door, form)


@pytest.mark.parametrize("kind", BAD)
def test_what_is_refused(kind, doors):
    labels, words = BAD[kind]
    for door, (argument, call) in doors.items():
        # These are refused for another reason.
        if (kind, door) in {("few", "test_step"), ("nothing", "test_step"), ("nothing", "gallery")}:
            continue
        with pytest.raises(ValueError, match="Received") as error:
            call(labels)
        one_line(error, f"{argument}: expected", "Received" if kind == "few" else words)


@examples(40)
@given(st.data())
def test_any_labels(doors, draw):
    """A result that equals that of the same classes as 0, 1, ..., or one line."""
    door = draw.draw(st.sampled_from(sorted(doors.keys() - {"gallery"})), "door")
    argument, call = doors[door]
    numbers = st.one_of(st.integers(0, 3), st.integers(-(2**70), 2**70), st.floats(-4, 4), st.booleans(), st.text())
    values = draw.draw(st.lists(st.sampled_from(draw.draw(st.lists(numbers, min_size=1, max_size=4))), min_size=8,
                                max_size=draw.draw(st.sampled_from([8, 8, 9]))), "labels")  # fmt: skip
    as_array = draw.draw(st.sampled_from([list, np.array, tf.constant, lambda values: np.array(values)[:, None]]), "as")
    try:
        labels = as_array(values)
    except (TypeError, ValueError):
        return
    found, expected = np.asarray(labels).reshape(-1), None
    if found.dtype.kind in "iub" or (found.dtype.kind == "f" and np.all(found == np.floor(found))):
        expected = np.unique(found, return_inverse=True)[1]
    with clear_errors(argument) as raised:
        found = float(call(labels))
        assert expected is not None
        assert len(expected) == 8
        np.testing.assert_allclose(found, float(call(expected)), rtol=1e-5)
    assert not raised or "\n" not in str(raised[0])


def test_graphs_and_xla():
    objective = objectives.get("triplet", miner="all")
    expected = float(objective(ROWS, CLASSES))
    for labels in ("high", "float"):
        for jit in (False, True):
            call = tf.function(objective, jit_compile=jit)
            assert float(call(ROWS, tf.constant(SAME[labels]))) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match=r"labels: expected integers .*argmax"):
        tf.function(objective)(ROWS, BAD["one_hot"][0])
    fractions = tf.constant(BAD["fractions"][0], tf.float32)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"labels: expected integers; or whole numbers"):
        tf.function(objective)(ROWS, fractions)
    assert np.isnan(tf.function(objective, jit_compile=True)(ROWS, fractions))


def test_fit(small_model):
    images = np.random.default_rng(1).normal(size=(8, 8, 8, 1)).astype(np.float32)

    def losses(labels):
        keras.utils.set_random_seed(0)
        model = small_model(target_dims=(), feature_distill=False)
        model.compile(optimizer="sgd")
        return model.fit(images, labels, batch_size=8, shuffle=False, verbose=0).history["loss"]

    np.testing.assert_allclose(losses(CLASSES << 32), losses(CLASSES), rtol=1e-6)
    with pytest.raises(ValueError, match=r"labels: expected integers .*argmax"):
        losses(BAD["one_hot"][0])


def test_labels_per_class():
    found = evaluation.evaluate_retrieval(ROWS, CLASSES << 32)
    classes, counts, _ = found.per_class()
    np.testing.assert_array_equal(classes, np.arange(3) << 32)
    np.testing.assert_array_equal(counts, np.bincount(CLASSES))
