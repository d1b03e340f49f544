"""`S2SDModel`: golden values, training, saving, learning-rate groups, L2, schedules, errors."""

import numpy as np
import pytest
import tensorflow as tf
from conftest import GOLDENS, golden_loss, objective_names

import s2sd_tf
from s2sd_tf.keras_compat import IS_KERAS_3, keras

HEAD_WEIGHTS = ("kernel1", "bias1", "kernel2", "bias2")


def identity_backbone(shape, dtype="float32"):
    features = keras.Input(shape, dtype=dtype)
    return keras.Model(features, keras.layers.Activation("linear", dtype=dtype)(features))


def golden_model(values, dtype):
    model = s2sd_tf.S2SDModel(
        identity_backbone(values["features"].shape[1:], dtype),
        values["embed_bias"].shape[0],
        golden_loss(values, dtype),
        target_pooling="avg+max" if values["pool_avg_plus_max"] else "avg",
        dtype=dtype,
    )
    model.embedding_head.set_weights([values["embed_kernel"], values["embed_bias"]])
    for k, head in enumerate(model.target_heads):
        head.set_weights([values[f"head{k}_{name}"] for name in HEAD_WEIGHTS])
    return model


@pytest.mark.parametrize("variant", GOLDENS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-6), ("float32", 1e-4)])
def test_golden_loss_and_every_gradient(golden, variant, dtype, tolerance):
    values = golden(variant)
    model = golden_model(values, dtype)
    features = tf.constant(values["features"], dtype)
    with tf.GradientTape() as tape:
        tape.watch(features)
        loss = model.compute_losses(features, values["labels"], training=True)["loss"]
    assert loss.dtype == dtype
    np.testing.assert_allclose(loss, values["loss"], atol=tolerance, rtol=0)

    wanted = {"features": features}
    wanted.update(zip(("embed_kernel", "embed_bias"), model.embedding_head.trainable_variables))
    for k, head in enumerate(model.target_heads):
        wanted.update(zip((f"head{k}_{name}" for name in HEAD_WEIGHTS), head.trainable_variables))
    assert {f"grad_{name}" for name in wanted} == {name for name in values.files if name.startswith("grad_")}
    for name, gradient in tape.gradient(loss, wanted).items():
        np.testing.assert_allclose(gradient, values[f"grad_{name}"], atol=tolerance, rtol=0, err_msg=name)


def images_and_labels(batch=12, classes=3, seed=0):
    generator = np.random.default_rng(seed)
    return generator.normal(size=(batch, 8, 8, 1)).astype(np.float32), np.arange(batch) % classes


def test_prediction_is_the_normalised_base_embedding(small_model):
    model = small_model(embedding_dim=5)
    images, _ = images_and_labels()
    embeddings = model.predict(images, verbose=0)
    assert embeddings.shape == (12, 5)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1.0, atol=1e-6)
    np.testing.assert_allclose(model(images, training=False), embeddings, atol=1e-6)


@pytest.mark.parametrize("objective", objective_names())
def test_every_objective_has_its_terms_and_gradients(small_model, objective):
    model = small_model(objective=objective, num_classes=3, feature_distill_delay=0)
    images, labels = images_and_labels()
    weights = model.trainable_variables
    with tf.GradientTape() as tape:
        terms = model.compute_losses(images, labels, training=False)
    gradients = tape.gradient(terms["loss"], weights)
    assert all(np.isfinite(tf.convert_to_tensor(gradient)).all() for gradient in gradients)
    expected = model.s2sd_loss.objective(model(images), labels, training=False)
    np.testing.assert_allclose(terms["objective"], expected, rtol=1e-5)
    loss = (terms["objective"] + tf.reduce_mean(terms["target_objectives"])) / 2
    loss += 50 * (tf.reduce_mean(terms["distill_kls"]) + terms["feature_kl"])
    np.testing.assert_allclose(terms["loss"], loss, rtol=1e-5)


# One of each kind.
@pytest.mark.parametrize("objective", ["multi_similarity", "margin", "proxy_anchor"])
def test_fit_lowers_the_loss_and_logs_every_term(small_model, objective):
    model = small_model(objective=objective, num_classes=3, log_per_target=True, feature_distill_delay=0)
    model.compile(optimizer=keras.optimizers.Adam(1e-2))
    images, labels = images_and_labels()
    dataset = tf.data.Dataset.from_tensors((images, labels)).repeat()
    history = model.fit(dataset, epochs=15, steps_per_epoch=3, verbose=0).history
    assert set(history) == {
        "loss", "objective", "target_objective", "distill_kl", "feature_kl",
        "target0_8_objective", "target1_12_objective", "target0_8_kl", "target1_12_kl",
    }  # fmt: skip
    assert np.isfinite(list(history.values())).all()
    assert history["objective"][-1] < history["objective"][0]
    assert int(tf.convert_to_tensor(model.s2sd_loss.step)) == 45
    logs = model.evaluate(dataset, steps=1, verbose=0, return_dict=True)
    assert logs["target_objective"] == pytest.approx(
        (logs["target0_8_objective"] + logs["target1_12_objective"]) / 2, abs=1e-6
    )
    loss = (logs["objective"] + logs["target_objective"]) / 2 + 50 * (logs["distill_kl"] + logs["feature_kl"])
    assert logs["loss"] == pytest.approx(loss, rel=1e-5)


def test_a_step_is_traced_once(small_model, monkeypatch):
    model = small_model()
    model.compile(optimizer="adam")
    step, traced = model.train_step, []
    monkeypatch.setattr(model, "train_step", lambda data: traced.append(data) or step(data))
    images, labels = images_and_labels()
    model.fit(images, labels, batch_size=12, epochs=3, verbose=0)
    assert len(traced) == 1


def test_without_teachers_the_loss_is_the_plain_objective(small_model):
    model = small_model(target_dims=(), feature_distill=False)
    images, labels = images_and_labels()
    losses = model.compute_losses(images, labels)
    assert set(losses) == {"loss", "objective"}
    plain = s2sd_tf.objectives.get("multi_similarity")(model(images), labels)
    np.testing.assert_allclose(losses["loss"], plain, rtol=1e-6)
    assert not model.target_heads
    model.compile(optimizer="sgd")
    assert set(model.fit(images, labels, batch_size=12, verbose=0).history) == {"loss", "objective"}


def test_the_batch_order_does_not_matter(small_model):
    model = small_model(feature_distill_delay=0, target_pooling="avg+max")
    images, labels = images_and_labels()
    order = np.random.default_rng(1).permutation(len(labels))
    one, other = model.compute_losses(images, labels), model.compute_losses(images[order], labels[order])
    for name in one:
        np.testing.assert_allclose(one[name], other[name], atol=1e-5)


def test_divergences_have_no_gradient_into_the_teachers(small_model):
    model = small_model(feature_distill_delay=0)
    images, labels = images_and_labels(classes=12)  # without positives every objective is 0
    with tf.GradientTape() as tape:
        losses = model.compute_losses(images, labels, training=True)
    variables = {"heads": [v for h in model.target_heads for v in h.trainable_variables]}
    variables["embedding"] = model.embedding_head.trainable_variables
    gradients = tape.gradient(losses["loss"], variables, unconnected_gradients="zero")
    assert float(losses["loss"]) > 0
    assert all(np.all(g.numpy() == 0) for g in gradients["heads"])
    assert any(np.any(g.numpy() != 0) for g in gradients["embedding"])


def settings_of(model):
    """The config without the backbone, for which Keras also records how it was built."""
    config = model.get_config()
    loss = config.pop("loss")["config"]
    for key in ("objective", "target_objective"):
        loss[key] = loss[key]["config"]
    return {**{key: value for key, value in config.items() if key != "backbone"}, **loss}


@pytest.mark.parametrize("objective", ["multi_similarity", "margin", "proxy_anchor"])
def test_saved_model_keeps_its_class_and_resumes_training(small_model, tmp_path, objective):
    model = small_model(
        objective=objective, target_objective="margin", num_classes=3, target_pooling="avg+max", l2=1e-3,
        learning_rate_multipliers={"heads": 2.0}, distill_warmup_steps=3, name="encoder",
    )  # fmt: skip
    # One of them as a graph: for a few steps, tracing takes most of the time.
    model.compile(optimizer=keras.optimizers.Adam(1e-2), run_eagerly=objective != "multi_similarity")
    images, labels = images_and_labels()
    model.fit(images, labels, batch_size=12, shuffle=False, epochs=3, verbose=0)
    path = str(tmp_path / "model.keras")
    model.save(path)
    loaded = keras.models.load_model(path)
    assert type(loaded) is s2sd_tf.S2SDModel
    assert settings_of(loaded) == settings_of(model)
    assert int(tf.convert_to_tensor(loaded.s2sd_loss.step)) == 3
    np.testing.assert_allclose(loaded.predict(images, verbose=0), model.predict(images, verbose=0), atol=1e-6)
    # Optimizer state, draws of the miners and the step are saved too, so both continue in the same way.
    for which in (model, loaded):
        which.fit(images, labels, batch_size=12, shuffle=False, epochs=3, verbose=0)
    for one, other in zip(model.get_weights(), loaded.get_weights()):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_config_round_trip(small_model):
    model = small_model(**s2sd_tf.preset("MSDFA"), objective=s2sd_tf.objectives.Triplet(margin=0.4, miner="semi_hard"))
    copy = s2sd_tf.S2SDModel.from_config(model.get_config())
    assert settings_of(copy) == settings_of(model)
    assert copy.s2sd_loss.objective.margin == 0.4
    assert [o.margin for o in copy.s2sd_loss.target_objectives] == [0.4] * 4
    assert len({o.seed for o in (copy.s2sd_loss.objective, *copy.s2sd_loss.target_objectives)}) == 5


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW"])
def test_learning_rate_multipliers_scale_the_updates(small_model, optimizer):
    images, labels = images_and_labels()

    def updates(multipliers):
        keras.utils.set_random_seed(0)
        objective = s2sd_tf.objectives.ProxyAnchor(num_classes=3, learning_rate_multiplier=2.0)
        model = small_model(objective=objective, learning_rate_multipliers=multipliers)
        # One of them as a graph: for one step, tracing takes most of the time.
        model.compile(optimizer=getattr(keras.optimizers, optimizer)(1e-2), run_eagerly=optimizer != "Adam")
        groups = {
            "backbone": model.backbone.trainable_variables,
            "heads": [v for h in (model.embedding_head, *model.target_heads) for v in h.trainable_variables],
            "objectives": [o.proxies for o in (model.s2sd_loss.objective, *model.s2sd_loss.target_objectives)],
        }
        before = {name: [v.numpy() for v in variables] for name, variables in groups.items()}
        model.train_on_batch(images, labels)
        return {n: [v.numpy() - old for v, old in zip(vs, before[n])] for n, vs in groups.items()}

    plain = updates(None)
    scaled = updates({"backbone": 0.0, "heads": 3.0, "objectives": 0.5})
    assert all(np.any(change != 0) for change in plain["backbone"])
    assert all(np.all(change == 0) for change in scaled["backbone"])
    for group, factor in (("heads", 3.0), ("objectives", 0.5)):
        for one, other in zip(plain[group], scaled[group]):
            np.testing.assert_allclose(other, factor * one, atol=2e-6, err_msg=group)


@pytest.mark.parametrize(
    "make", [keras.optimizers.Ftrl, lambda: keras.optimizers.Adam(use_ema=True, ema_overwrite_frequency=20)]
)
def test_factors_are_refused_where_no_step_can_be_scaled(small_model, make):
    small_model(learning_rate_multipliers={"backbone": 0.0}).compile(make())
    for settings in (
        {"learning_rate_multipliers": {"heads": 10.0}},
        {"objective": s2sd_tf.objectives.ProxyAnchor(num_classes=3, learning_rate_multiplier=100.0)},
    ):
        with pytest.raises(ValueError, match=r"learning_rate_multipliers: expected factors of 0 or 1 with (Ftrl|Adam)"):
            small_model(**settings).compile(make())


def test_backbone_layers_can_have_their_own_multipliers(small_model):
    images, labels = images_and_labels()

    def updates(multipliers):
        keras.utils.set_random_seed(0)
        model = small_model(learning_rate_multipliers=multipliers)
        model.compile(optimizer=keras.optimizers.Adam(1e-2), run_eagerly=True)
        layers = [layer for layer in model.backbone.layers if layer.trainable_variables]
        before = [[v.numpy() for v in layer.trainable_variables] for layer in layers]
        model.train_on_batch(images, labels)
        changes = [
            [v.numpy() - w for v, w in zip(layer.trainable_variables, old)] for layer, old in zip(layers, before)
        ]
        return [layer.name for layer in layers], changes, model

    names, plain, _ = updates(None)
    _, scaled, model = updates({"backbone": 0.5, f"backbone/{names[0]}": 0.0, f"backbone/{names[1][:-1]}*": 4.0})
    for name, one, other in zip(names, plain, scaled):
        factor = 0.0 if name == names[0] else 2.0 if name.startswith(names[1][:-1]) else 0.5
        for a, b in zip(one, other):
            np.testing.assert_allclose(b, factor * a, atol=2e-6, err_msg=name)
    counted = [v for name, variables, _ in model.weight_updates.groups() if name != "objectives" for v in variables]
    heads = [v for head in (model.embedding_head, *model.target_heads) for v in head.trainable_variables]
    assert sorted(map(id, counted)) == sorted(map(id, [*model.backbone.trainable_variables, *heads]))
    with pytest.raises(ValueError, match=r"learning_rate_multipliers: .*Received: \['backbone/none'\]"):
        small_model(learning_rate_multipliers={"backbone/none": 2.0})


def test_adam_moves_each_beta_by_the_learning_rate(small_model):
    objective = s2sd_tf.objectives.Margin(num_classes=3, miner="all", learning_rate_multiplier=1.0)
    model = small_model(objective=objective, target_dims=(), feature_distill=False)
    model.compile(optimizer=keras.optimizers.Adam(1e-3), run_eagerly=True)
    before = tf.convert_to_tensor(objective.betas).numpy()
    model.train_on_batch(*images_and_labels())
    # Adam's first step equals the learning rate for any gradient, also for betas that a batch gathers repeatedly.
    np.testing.assert_allclose(np.abs(tf.convert_to_tensor(objective.betas) - before), 1e-3, rtol=1e-3)


@pytest.mark.parametrize("policy", ["float64", "mixed_bfloat16"])
def test_the_dtype_policy_is_saved(tmp_path, policy):
    model = s2sd_tf.S2SDModel(identity_backbone((3, 3, 4)), 2, target_dims=(5,), dtype=policy)
    model.save(str(tmp_path / "model.keras"))
    loaded = keras.models.load_model(str(tmp_path / "model.keras"))
    for layer in (loaded, loaded.embedding_head, *loaded.target_heads):
        assert layer.compute_dtype == model.compute_dtype
        assert layer.dtype_policy.name == policy


def test_coupled_l2_adds_to_the_gradient_of_backbone_and_heads_only(small_model):
    images, labels = images_and_labels()
    changes, logged = {}, {}
    for l2 in (0.0, 0.1):
        keras.utils.set_random_seed(0)
        model = small_model(objective="proxy_anchor", num_classes=3, l2=l2, l2_on_targets=True)
        before = [v.numpy() for v in model.trainable_variables]
        model.compile(optimizer=keras.optimizers.SGD(1.0), run_eagerly=True)
        logged[l2] = model.train_on_batch(images, labels, return_dict=True)["loss"]
        changes[l2] = [v.numpy() - old for v, old in zip(model.trainable_variables, before)]
    proxies = {id(o.proxies) for o in (model.s2sd_loss.objective, *model.s2sd_loss.target_objectives)}
    for variable, old, without, with_l2 in zip(model.trainable_variables, before, changes[0.0], changes[0.1]):
        decay = 0.0 if id(variable) in proxies else -0.1 * old
        np.testing.assert_allclose(with_l2 - without, decay, atol=1e-5)
    assert logged[0.1] == pytest.approx(logged[0.0], abs=1e-6)


def test_coupled_l2_without_the_target_heads(small_model):
    changes = {}
    for l2 in (0.0, 0.1):
        keras.utils.set_random_seed(0)
        model = small_model(l2=l2)
        before = [v.numpy() for v in model.trainable_variables]
        model.compile(optimizer=keras.optimizers.SGD(1.0), run_eagerly=True)
        model.train_on_batch(*images_and_labels())
        changes[l2] = [v.numpy() - old for v, old in zip(model.trainable_variables, before)]
    of_targets = {id(v) for head in model.target_heads for v in head.trainable_variables}
    assert len(of_targets) == 8
    for variable, old, without, with_l2 in zip(model.trainable_variables, before, changes[0.0], changes[0.1]):
        decay = 0.0 if id(variable) in of_targets else -0.1 * old
        np.testing.assert_allclose(with_l2 - without, decay, atol=1e-5)


def test_the_embedding_head_can_have_its_own_multiplier(small_model):
    def updates(multipliers):
        keras.utils.set_random_seed(0)
        model = small_model(learning_rate_multipliers=multipliers)
        model.compile(optimizer=keras.optimizers.Adam(1e-2), run_eagerly=True)
        before = [v.numpy() for v in model.trainable_variables]
        model.train_on_batch(*images_and_labels())
        return model, [v.numpy() - old for v, old in zip(model.trainable_variables, before)]

    _, plain = updates(None)
    model, scaled = updates({"heads": 0.5, "embedding_head": 4.0})
    factors = dict.fromkeys(map(id, model.embedding_head.trainable_variables), 2.0)
    factors |= {id(v): 0.5 for head in model.target_heads for v in head.trainable_variables}
    for variable, one, other in zip(model.trainable_variables, plain, scaled):
        np.testing.assert_allclose(other, factors.get(id(variable), 1.0) * one, atol=2e-6)


def test_uniform_biases():
    model = s2sd_tf.S2SDModel(identity_backbone((3, 3, 16)), 500, target_dims=(400,), uniform_biases=True)
    head = model.target_heads[0]
    for dense, inputs in ((model.embedding_head.linear, 16), (head.hidden, 16), (head.linear, 400)):
        bias, limit = tf.convert_to_tensor(dense.bias).numpy(), inputs**-0.5
        # Mean and variance of a uniform distribution, within five standard deviations of 400 draws.
        assert 0.98 * limit < np.abs(bias).max() <= limit
        assert abs(bias.mean()) < 5 * limit / np.sqrt(3 * 400)
        np.testing.assert_allclose(bias.var(), limit**2 / 3, rtol=5 * 0.9 / np.sqrt(400))
    zero = s2sd_tf.S2SDModel(identity_backbone((3, 3, 16)), 5, target_dims=(4,))
    assert not np.any(tf.convert_to_tensor(zero.embedding_head.linear.bias))


def test_delay_and_ramps_follow_the_step(small_model):
    model = small_model(
        feature_distill_delay=3, feature_distill_warmup_steps=2, feature_distill_weight=10.0,
        distill_weight=8.0, distill_warmup_steps=4,
    )  # fmt: skip
    images, labels = images_and_labels()
    for step, w, w_f in [(0, 2, 0), (1, 4, 0), (2, 6, 0), (3, 8, 5), (4, 8, 10), (100, 8, 10)]:
        model.s2sd_loss.step.assign(step)
        losses = {name: np.asarray(value) for name, value in model.compute_losses(images, labels).items()}
        expected = (losses["objective"] + losses["target_objectives"].mean()) / 2
        expected += w * losses["distill_kls"].mean() + w_f * losses["feature_kl"]
        np.testing.assert_allclose(losses["loss"], expected, rtol=1e-5)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_trains(policy):
    previous = keras.mixed_precision.global_policy() if not IS_KERAS_3 else keras.mixed_precision.dtype_policy()
    keras.mixed_precision.set_global_policy(policy)
    try:
        backbone = s2sd_tf.models.backbones.conv_blocks((8, 8, 1), filters=(6, 8))
        model = s2sd_tf.S2SDModel(backbone, 4, target_dims=(8,), feature_distill_delay=0, l2=1e-4)
        model.compile(optimizer=keras.optimizers.Adam(1e-3))
        images, labels = images_and_labels()
        history = model.fit(images, labels, batch_size=12, epochs=5, verbose=0).history
        assert np.isfinite(history["loss"]).all()
        embeddings = model.predict(images, verbose=0)
        assert embeddings.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1.0, atol=1e-5)
    finally:
        keras.mixed_precision.set_global_policy(previous)


# One that draws and one with proxies. test_objectives.py compiles every objective.
@pytest.mark.parametrize("objective", ["margin", "proxy_anchor"])
def test_jitted_training(small_model, objective):
    model = small_model(objective=objective, num_classes=3)
    model.compile(optimizer="adam", jit_compile=True)
    images, labels = images_and_labels()
    assert model.jit_compile
    history = model.fit(images, labels, batch_size=12, epochs=2, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert int(tf.convert_to_tensor(model.s2sd_loss.step)) == 2


def test_without_a_gpu_nothing_is_jitted_by_default(small_model):
    model = small_model()
    model.compile(optimizer="adam")
    assert not model.jit_compile


def trained(small_model, implementation, steps, learning_rate=0.05, **compile_settings):
    """The losses of every step, and the weights after the first."""
    keras.utils.set_random_seed(3)
    model = small_model(feature_distill_delay=10, similarity_kl_implementation=implementation)
    model.compile(optimizer=keras.optimizers.SGD(learning_rate), **compile_settings)
    labels = np.repeat(np.arange(12), 4)
    images = np.random.default_rng(0).normal(size=(48, 8, 8, 1)).astype(np.float32)
    losses, weights = [], None
    for _ in range(steps):
        model.reset_metrics()  # the logged loss is a running mean
        losses.append(model.train_on_batch(images, labels, return_dict=True)["loss"])
        weights = weights or [weight.numpy() for weight in model.trainable_variables]
    return np.array(losses), weights


def test_fused_and_composed_training_agree(small_model):
    fused, composed = (trained(small_model, implementation, 50)[0] for implementation in ("fused", "composed"))
    assert composed[-1] < composed[0]
    np.testing.assert_allclose(fused, composed, rtol=1e-4)


@pytest.mark.parametrize("compile_settings", [{}, {"jit_compile": True}, {"run_eagerly": True}], ids=str)
@pytest.mark.parametrize("implementation", ["fused", "composed"])
def test_every_kernel_trains_the_same_with_every_way_of_compiling(small_model, implementation, compile_settings):
    """Compares the losses, and the gradients through the weights after one step at learning rate 1."""
    losses, weights = trained(small_model, implementation, 2, 1.0, **compile_settings)
    expected_losses, expected = trained(small_model, "composed", 1, 1.0, run_eagerly=True)
    np.testing.assert_allclose(losses[:1], expected_losses, atol=1e-5)
    for one, other in zip(expected, weights):
        np.testing.assert_allclose(other, one, atol=1e-5)
    assert np.isfinite(losses[1])


def test_pooled_features_and_unbuilt_backbones():
    images = np.random.default_rng(0).normal(size=(6, 10)).astype(np.float32)
    backbone = keras.Sequential([keras.layers.Dense(7, activation="relu")])
    model = s2sd_tf.S2SDModel(backbone, 3, target_dims=(4,))
    model.compile(optimizer="adam")
    model.fit(images, np.arange(6) % 2, batch_size=6, verbose=0)
    assert model.built
    assert model(images).shape == (6, 3)
    assert s2sd_tf.S2SDModel(keras.Sequential([keras.layers.Dense(7)]), 3, target_dims=(4,))(images).shape == (6, 3)
    with pytest.raises(ValueError, match=r"avg\+max"):
        s2sd_tf.S2SDModel(identity_backbone((7,)), 3, target_pooling="avg+max")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"embedding_dim": 0}, "embedding_dim.*Received: 0"),
        ({"temperature": 0.0}, "temperature.*Received: 0"),
        ({"target_dims": (8, 0)}, "target_dims.*Received: 0"),
        ({"objective": "nonsense"}, "objective: expected one of .*multi_similarity.*Received: 'nonsense'"),
        ({"objective": "proxy_anchor"}, "num_classes"),
        ({"pooling": "sum"}, "pooling.*Received: 'sum'"),
        ({"target_pooling": "sum"}, "target_pooling"),
        ({"distill_weight": -1.0}, "distill_weight"),
        ({"feature_distill_delay": -1}, "feature_distill_delay"),
        ({"l2": -1e-4}, "l2"),
        ({"learning_rate_multipliers": {"tail": 1.0}}, "tail"),
        ({"learning_rate_multipliers": {"heads": -1.0}}, "heads"),
        ({"l2_on_targets": 1}, "l2_on_targets: expected a bool. Received: 1"),
        ({"uniform_biases": "yes"}, "uniform_biases: expected a bool. Received: 'yes'"),
    ],
)
def test_errors_name_the_argument(small_model, change, words):
    with pytest.raises(ValueError, match=words):
        small_model(**change)


def test_labels_out_of_range_are_refused(small_model):
    model = small_model(objective="proxy_anchor", num_classes=3)
    model.compile(optimizer="adam")
    images, labels = images_and_labels(classes=4)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"labels: expected integers in \[0, 3\)"):
        model.fit(images, labels, batch_size=12, verbose=0)


def test_missing_labels_and_sample_weights_are_refused(small_model):
    model = small_model()
    model.compile(optimizer="adam")
    images, labels = images_and_labels()
    with pytest.raises(ValueError, match="without labels"):
        model.train_step((images,))
    with pytest.raises(ValueError, match="sample weights"):
        model.train_step((images, labels, np.ones(12)))


def test_presets():
    assert s2sd_tf.preset("dsd")["target_dims"] == (2048,)
    assert s2sd_tf.preset("msdfa")["feature_distill"]
    assert s2sd_tf.preset("MSDA")["target_pooling"] == "avg+max"
    assert not s2sd_tf.preset("plain")["target_dims"]
    with pytest.raises(ValueError, match="preset"):
        s2sd_tf.preset("xyz")


@keras.utils.register_keras_serializable("test_s2sd_model")
class Subclassed(keras.Model):
    """A backbone without a known input shape."""

    def __init__(self, outputs="one", **kwargs):
        super().__init__(**kwargs)
        self.form = outputs
        self.convolution = keras.layers.Conv2D(4, 3)

    def call(self, images, training=None):
        features = self.convolution(images)
        return {"one": features, "list": [features, features], "dict": {"a": features}}[self.form]

    def get_config(self):
        return {"outputs": self.form}


class TestBackbones:
    """Any Keras model with one output is a backbone."""

    images, labels = np.random.default_rng(0).normal(size=(8, 8, 8, 1)).astype(np.float32), np.arange(8) // 2

    @staticmethod
    def functional(outputs):
        inputs = keras.Input((8, 8, 1))
        return keras.Model(inputs, outputs(keras.layers.Conv2D(4, 3)(inputs)))

    @pytest.mark.parametrize("kind", ["unbuilt", "called", "sequential"])
    def test_is_built_at_the_first_batch(self, kind, tmp_path):
        backbone = keras.Sequential([keras.layers.Conv2D(4, 3)]) if kind == "sequential" else Subclassed()
        if kind == "called":
            backbone(self.images)
        settings = {"micro_batch_size": 4} if kind == "unbuilt" else {}
        model = s2sd_tf.S2SDModel(backbone, 4, target_dims=(6,), **settings)
        model.compile(optimizer="adam")
        model.fit(self.images, self.labels, batch_size=8, verbose=0)
        assert len(model.trainable_variables) == 8
        embeddings = model.predict(self.images, verbose=0)
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        np.testing.assert_allclose(loaded.predict(self.images, verbose=0), embeddings, atol=1e-6)
        first, second = (
            each.train_on_batch(self.images, self.labels, return_dict=True)["loss"] for each in (model, loaded)
        )
        assert np.isfinite([first, second]).all()

    def test_other_outputs_are_refused(self):
        for outputs in (lambda features: [features, features], lambda features: {"a": features}):
            with pytest.raises(ValueError, match=r"^backbone: expected one output.*Received: a model with"):
                s2sd_tf.S2SDModel(self.functional(outputs), 4)
        for form in ("list", "dict"):
            model = s2sd_tf.S2SDModel(Subclassed(form), 4)
            with pytest.raises(ValueError, match=r"^backbone: expected one output.*Received: a model with"):
                model.build((None, 8, 8, 1))

    @pytest.mark.parametrize("backbone", ["resnet50", None, 5])
    def test_what_is_no_model_is_refused(self, backbone):
        with pytest.raises(ValueError, match=r"^backbone: expected a Keras model.*Received: "):
            s2sd_tf.S2SDModel(backbone, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"embedding_dim": 4.7}, "embedding_dim: expected an int >= 1. Received: 4.7"),
        ({"target_dims": (8.9,)}, "target_dims: expected an int >= 1. Received: 8.9"),
        ({"target_dims": 16}, "target_dims: expected a sequence of ints >= 1.* Received: 16"),
        ({"target_dims": "16"}, "target_dims: expected a sequence of ints >= 1.* Received: '16'"),
        ({"num_classes": 4.5}, "num_classes: expected an int >= 1. Received: 4.5"),
    ],
)
def test_sizes_are_ints(settings, message, small_model):
    with pytest.raises(ValueError, match=rf"^{message}$"):
        small_model(**settings)


def test_a_loss_in_compile_is_refused(small_model):
    model = small_model(target_dims=())
    for name, value in (("loss", "mse"), ("metrics", ["mse"]), ("weighted_metrics", ["mse"]), ("loss_weights", [2.0])):
        with pytest.raises(ValueError, match=rf"^{name}: expected none in compile"):
            model.compile("adam", **{name: value})
    with pytest.raises(ValueError, match=r"metrics.*: expected none in compile"):
        model.compile("adam", None, ["mse"], ["mse"])
    model.compile("adam", None)


def test_a_frozen_model_is_refused(small_model):
    model = small_model(target_dims=())
    model.trainable = False
    model.compile(optimizer="adam")
    with pytest.raises(ValueError, match=r"^trainable: expected at least one weight"):
        model.fit(TestBackbones.images, TestBackbones.labels, verbose=0)


def test_hdf5_is_refused(small_model, tmp_path):
    with pytest.raises(ValueError, match=r"^filepath: expected a file that ends in '\.keras'"):
        small_model(target_dims=()).save(tmp_path / "model.h5")
    assert not list(tmp_path.iterdir())


def test_keras_exports_the_encoder(small_model, tmp_path):
    model = small_model(target_dims=())
    model.export(str(tmp_path / "encoder"))
    encoder = tf.saved_model.load(str(tmp_path / "encoder"))
    images = TestBackbones.images
    np.testing.assert_allclose(encoder.serve(images), model.predict(images, verbose=0), atol=1e-6)


class Stop(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        self.model.stop_training = epoch == 1


def test_an_evaluation_is_made_when_training_stops_early(small_model):
    images, labels = TestBackbones.images, TestBackbones.labels
    model = small_model(target_dims=())
    model.compile(optimizer="adam")
    evaluation = s2sd_tf.evaluation.RetrievalEvaluation(images, labels, every=5, ks=(1,))
    history = model.fit(images, labels, epochs=10, verbose=0, callbacks=[evaluation, Stop()]).history
    expected = s2sd_tf.evaluation.retrieval_metrics(model.predict(images, verbose=0), labels, ks=(1,))
    assert len(history["loss"]) == 2
    assert history["val_map@r"] == [evaluation.latest["map@r"]] == [pytest.approx(expected["map@r"])]
