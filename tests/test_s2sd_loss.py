"""`S2SDLoss` on plain arrays: golden values, a custom loop, its counters and saving, errors."""

import pathlib
import re

import numpy as np
import pytest
import tensorflow as tf
from conftest import GOLDENS, golden_loss

import s2sd_tf
from s2sd_tf.keras_compat import keras
from s2sd_tf.models.pooling import pool

DOCS = pathlib.Path(__file__).parent.parent / "docs"


def golden_heads(values, dtype):
    """`(weights by name, heads)` of a golden file; heads maps feature maps to `(embedding, targets, features)`."""
    weights = {
        name: tf.Variable(values[name].astype(dtype))
        for name in values.files
        if name.startswith(("embed_", "head")) and not name.startswith("grad_")
    }

    def heads(maps):
        pooled = pool(maps, "avg")
        both = pool(maps, "avg+max") if values["pool_avg_plus_max"] else pooled
        targets = []
        for k in range(len(values["dims"])):
            hidden = tf.nn.relu(both @ weights[f"head{k}_kernel1"] + weights[f"head{k}_bias1"])
            targets.append(hidden @ weights[f"head{k}_kernel2"] + weights[f"head{k}_bias2"])
        return pooled @ weights["embed_kernel"] + weights["embed_bias"], targets, both

    return weights, heads


@pytest.mark.parametrize("variant", GOLDENS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-6), ("float32", 1e-4)])
def test_golden_loss_and_every_gradient(golden, variant, dtype, tolerance):
    values = golden(variant)
    loss = golden_loss(values, dtype)
    weights, heads = golden_heads(values, dtype)
    maps = tf.constant(values["features"], dtype)
    with tf.GradientTape() as tape:
        tape.watch(maps)
        # Like the published code, the loss normalises the embeddings.
        total = loss(*heads(maps), values["labels"], training=True)["loss"]
    assert total.dtype == dtype
    np.testing.assert_allclose(total, values["loss"], atol=tolerance, rtol=0)
    wanted = {"features": maps, **weights}
    assert {f"grad_{name}" for name in wanted} == {name for name in values.files if name.startswith("grad_")}
    for name, gradient in tape.gradient(total, wanted).items():
        np.testing.assert_allclose(gradient, values[f"grad_{name}"], atol=tolerance, rtol=0, err_msg=name)


def batch(unit_rows, dims=(8, 12), size=12, classes=3):
    """Makes float32 `(embedding, targets, features, labels)`."""
    embedding, features, *targets = (
        tf.constant(unit_rows(size, dim, seed), tf.float32) for seed, dim in enumerate((4, 10, *dims))
    )
    return embedding, targets, features, np.arange(size) % classes


def small_loss(**settings):
    given = {"target_dims": (8, 12), "target_objective": None, "feature_distill_delay": 0, **settings}
    return s2sd_tf.S2SDLoss(**given)


def test_terms_add_up_and_lengths_do_not_matter(unit_rows):
    embedding, targets, features, labels = batch(unit_rows)
    terms = small_loss(distill_weight=3.0, feature_distill_weight=5.0)(embedding, targets, features, labels)
    expected = (terms["objective"] + tf.reduce_mean(terms["target_objectives"])) / 2
    expected += 3.0 * tf.reduce_mean(terms["distill_kls"]) + 5.0 * terms["feature_kl"]
    np.testing.assert_allclose(terms["loss"], expected, rtol=1e-5)
    _, kls = s2sd_tf.similarity_kl(embedding, [*targets, features], implementation="composed")
    np.testing.assert_allclose([*terms["distill_kls"], terms["feature_kl"]], kls, rtol=1e-5)
    longer = small_loss(distill_weight=3.0, feature_distill_weight=5.0)(
        2.0 * embedding, [3.0 * target for target in targets], 7.0 * features, labels
    )
    np.testing.assert_allclose(longer["loss"], terms["loss"], rtol=1e-5)


def test_without_teachers_it_equals_the_objective(unit_rows):
    embedding, _, _, labels = batch(unit_rows)
    terms = s2sd_tf.S2SDLoss("triplet", target_dims=(), feature_distill=False)(embedding, [], None, labels)
    assert set(terms) == {"loss", "objective"}
    np.testing.assert_allclose(terms["loss"], s2sd_tf.objectives.get("triplet")(embedding, labels), rtol=1e-6)


def test_training_counts_steps_and_records_the_first_non_finite_loss(unit_rows):
    loss = small_loss(diagnostics=True)
    good = batch(unit_rows)
    bad = (good[0] * float("nan"), *good[1:])
    for terms, training in ((good, False), (good, True), (bad, True), (bad, True), (bad, False)):
        found = loss(*terms, training=training)
        assert ("embedding_rank" in found) == training
    assert int(tf.convert_to_tensor(loss.step)) == 3
    assert int(tf.convert_to_tensor(loss.first_nonfinite_step)) == 1


def test_every_target_has_its_own_objective(unit_rows):
    loss = small_loss(objective="multi_similarity", target_objective="margin", num_classes=3)
    loss(*batch(unit_rows), training=True)
    assert [type(objective).__name__ for objective in (loss.objective, *loss.target_objectives)] == [
        "MultiSimilarity", "Margin", "Margin",
    ]  # fmt: skip
    assert len({objective.seed for objective in loss.target_objectives}) == 2
    assert len(loss.trainable_variables) == 2


@pytest.mark.parametrize("name", ["contrastive", "fast_ap", "margin", "proxy_anchor", "triplet"])
def test_targets_have_multi_similarity_by_default(unit_rows, name):
    objectives = s2sd_tf.objectives
    settings = {"num_classes": 3} if objectives.lookup(name).uses_classes else {}
    loss = s2sd_tf.S2SDLoss(objectives.get(name, **settings), target_dims=(8, 12), feature_distill_delay=0)
    embedding, targets, features, labels = batch(unit_rows)
    terms = loss(embedding, targets, features, labels)
    plain = [objectives.get("multi_similarity")(target, labels) for target in targets]
    np.testing.assert_allclose(terms["target_objectives"], plain, rtol=1e-5)


def test_a_target_objective_that_names_the_base_has_its_settings(unit_rows):
    embedding, targets, features, labels = batch(unit_rows)
    base = s2sd_tf.objectives.MultiSimilarity(alpha=5.0)
    for given in ({}, {"target_objective": "multi_similarity"}, {"target_objective": None}):
        loss = s2sd_tf.S2SDLoss(base, target_dims=(8, 12), **given)
        terms = loss(embedding, targets, features, labels)
        np.testing.assert_allclose(terms["target_objectives"], [base(target, labels) for target in targets], rtol=1e-5)
    with pytest.raises(ValueError, match="Received: 'multisimilarity'"):
        s2sd_tf.S2SDLoss(base, target_objective="multisimilarity")


def test_config_round_trip(unit_rows):
    loss = small_loss(
        objective=s2sd_tf.objectives.Triplet(margin=0.4, miner="semi_hard"), temperature=0.5, distill_warmup_steps=7,
        gather_replicas=False, diagnostics=True, name="loss",
    )  # fmt: skip
    copy = s2sd_tf.S2SDLoss.from_config(loss.get_config())
    assert copy.objective.margin == copy.target_objectives[1].margin == 0.4
    for key in ("temperature", "distill_warmup_steps", "gather_replicas", "diagnostics", "target_dims", "name"):
        assert getattr(copy, key) == getattr(loss, key), key
    arguments = batch(unit_rows)
    np.testing.assert_allclose(copy(*arguments)["loss"], loss(*arguments)["loss"], rtol=1e-6)


def test_a_model_takes_a_loss_or_its_settings():
    loss = s2sd_tf.S2SDLoss("triplet", target_dims=(6,))
    backbone = s2sd_tf.models.backbones.conv_blocks((8, 8, 1), filters=(6, 8), pools=1)
    model = s2sd_tf.S2SDModel(backbone, 4, loss)
    assert model.s2sd_loss is loss
    assert [head.dim for head in model.target_heads] == [6]
    with pytest.raises(ValueError, match=r"loss: expected an S2SDLoss or its settings, not both.*'temperature'"):
        s2sd_tf.S2SDModel(backbone, 4, loss, temperature=2.0)
    with pytest.raises(ValueError, match=r"loss: expected an S2SDLoss, .*Received: 'triplet'"):
        s2sd_tf.S2SDModel(backbone, 4, "triplet")
    with pytest.raises(TypeError, match=r"S2SDModel: .*Received: \['temprature'\]"):
        s2sd_tf.S2SDModel(backbone, 4, temprature=2.0)


def test_a_model_in_another_format_is_refused(small_model):
    config = {**small_model().get_config(), "format": 1}
    with pytest.raises(ValueError, match=r"S2SDModel: expected a saved model of format 2\. Received: format 1"):
        s2sd_tf.S2SDModel.from_config(config)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"targets": lambda targets: targets[:1]}, r"targets: expected .*\[8, 12\].*Received: \[8\]"),
        ({"targets": lambda targets: targets[::-1]}, r"targets: .*Received: \[12, 8\]"),
        ({"features": lambda _: None}, "features: expected .*Received: None"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(unit_rows, change, words):
    arguments = dict(zip(("embedding", "targets", "features", "labels"), batch(unit_rows)))
    ((name, edit),) = change.items()
    arguments[name] = edit(arguments[name])
    with pytest.raises(ValueError, match=words):
        small_loss()(*arguments.values())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": 0.0}, "temperature.*Received: 0"),
        ({"target_dims": (8, 0)}, "target_dims.*Received: 0"),
        ({"objective": "proxy_anchor"}, "num_classes"),
        ({"distill_weight": -1.0}, "distill_weight"),
        ({"feature_distill_delay": 1.5}, "feature_distill_delay"),
        ({"feature_distill": 1}, "feature_distill: expected a bool"),
    ],
)
def test_errors_name_the_argument(settings, words):
    with pytest.raises(ValueError, match=words):
        small_loss(**settings)


def test_the_loop_in_the_docs(monkeypatch, tmp_path):
    """Runs the custom loop in the docs unchanged; it has at most 25 lines."""
    text = (DOCS / "training.md").read_text()
    code = re.search(r"## A loop of your own\n.*?```python\n(.*?)```", text, re.DOTALL)[1]
    assert len(code.splitlines()) <= 25
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code, "docs/training.md", "exec"), names)
    loss = names["loss"]
    assert int(tf.convert_to_tensor(loss.step)) == names["steps"]
    assert np.isfinite(float(names["terms"]["loss"]))
    assert isinstance(names["backbone"], keras.Model)
