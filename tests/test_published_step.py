"""Thirty training steps against the published rules in plain NumPy, forward and backward, in float64."""

import itertools

import numpy as np
import pytest
import tensorflow as tf

import s2sd_tf
from s2sd_tf import mining, objectives
from s2sd_tf.keras_compat import keras
from s2sd_tf.models.backbones import freeze_batch_norm
from s2sd_tf.training import optimizers, published_config

CLASSES, FEATURES, DIM, TARGETS, SIDE = 6, 16, 4, (5, 8), 3
# The features begin to teach within the steps.
STEPS, DELAY = 30, 10
# Keras keeps it in float32.
LEARNING_RATE = float(np.float32(1e-3))


def make_model(config, **changes):
    """The model of a published config, with a small backbone and small dimensions.

    `changes` are arguments of the model, and in "objective" settings of its objective.
    """
    keras.utils.set_random_seed(0)
    inputs = keras.Input((SIDE, SIDE, 3), dtype="float64")
    maps = keras.layers.Conv2D(FEATURES, 1, dtype="float64", name="conv")(inputs)
    maps = keras.layers.BatchNormalization(dtype="float64", name="norm")(maps)
    backbone = keras.Model(inputs, keras.layers.ReLU(dtype="float64")(maps))
    backbone = freeze_batch_norm(backbone, config.model.frozen_bn)
    name = config.objective.name
    settings = config.objective[name].to_dict()
    if name == "margin":
        settings["miner"] = mining.get(settings["miner"], **config.miner[settings["miner"]].to_dict())
        settings["num_classes"] = CLASSES
    s2sd = config.s2sd
    model = s2sd_tf.S2SDModel(
        backbone,
        DIM,
        objective=objectives.get(name, dtype="float64", **{**settings, **changes.pop("objective", {})}),
        target_objective=s2sd.target_objective or None,
        target_dims=TARGETS,
        temperature=s2sd.temperature,
        distill_weight=s2sd.distill_weight,
        feature_distill=s2sd.feature_distill,
        feature_distill_weight=s2sd.feature_distill_weight,
        feature_distill_delay=DELAY,
        pooling=config.model.pooling,
        target_pooling=config.model.target_pooling,
        dtype="float64",
        **{**{key: config.model[key] for key in ("l2", "l2_on_targets", "uniform_biases")}, **changes},
    )
    # The statistics of all batches, so that the embeddings are spread out, and weights unlike those of a new layer.
    norm, random = model.backbone.get_layer("norm"), np.random.default_rng(1)
    maps = np.concatenate([images for images, _ in batches()]) @ weights_of(model)["conv"][0, 0]
    norm.moving_mean.assign(maps.mean(axis=(0, 1, 2)))
    norm.moving_variance.assign(maps.var(axis=(0, 1, 2)))
    norm.gamma.assign(random.uniform(0.5, 1.5, FEATURES))
    norm.beta.assign(random.uniform(-0.8, 0.0, FEATURES))
    return model


def optimizer_of(config, name=None):
    return optimizers.get(name or config.optimizer.name, LEARNING_RATE, config.optimizer.settings.to_dict())


def weights_of(model):
    """The trainable weights by name, float64."""
    norm, linear = model.backbone.get_layer("norm"), model.embedding_head.linear
    variables = {
        **dict(zip(("conv", "conv_bias"), model.backbone.get_layer("conv").weights)),
        "gamma": norm.gamma,
        "beta": norm.beta,
        "embed": linear.kernel,
        "embed_bias": linear.bias,
    }
    for k, head in enumerate(model.target_heads):
        for number, dense in ((1, head.hidden), (2, head.linear)):
            variables |= {f"head{k}_{number}": dense.kernel, f"head{k}_bias{number}": dense.bias}
    for k, objective in enumerate((model.s2sd_loss.objective, *model.s2sd_loss.target_objectives)):
        if hasattr(objective, "betas"):
            variables[f"betas{k}"] = objective.betas
    assert {id(v) for v in variables.values()} == {id(v) for v in model.trainable_variables}
    return {name: tf.convert_to_tensor(v).numpy().astype(np.float64) for name, v in variables.items()}


def batches():
    """Images of 7 classes drawn with replacement, 2 images each: some classes have four images or more."""
    random = np.random.default_rng(2)
    centres = random.normal(size=(CLASSES, 1, 1, 3))
    for _ in range(STEPS):
        labels = np.repeat(random.integers(0, CLASSES, 7), 2)
        # Colours of a class, of an image and of a pixel.
        yield (
            centres[labels] + random.normal(size=(14, 1, 1, 3)) + 0.5 * random.normal(size=(14, SIDE, SIDE, 3)),
            labels,
        )


def multi_similarity(z, labels, o, **_):
    """Loss and its gradient in the embeddings."""
    s, same = z @ z.T, labels[:, None] == labels[None]
    total, slope, anchors = 0.0, np.zeros_like(s), 0
    for a in range(len(z)):
        positives, negatives = same[a] & (np.arange(len(z)) != a), ~same[a]
        if not positives.any() or not negatives.any():
            continue
        p = positives & (s[a] - o.epsilon < s[a, negatives].max())
        n = negatives & (s[a] + o.epsilon > s[a, positives].min())
        if not p.any() or not n.any():
            continue
        anchors += 1
        pull, push = np.exp(-o.alpha * (s[a] - o.lambda_)) * p, np.exp(o.beta * (s[a] - o.lambda_)) * n
        total += np.log(1 + pull.sum()) / o.alpha + np.log(1 + push.sum()) / o.beta
        slope[a] = push / (1 + push.sum()) - pull / (1 + pull.sum())
    anchors = max(anchors, 1)
    return total / anchors, (slope + slope.T) @ z / anchors, None


def margin(z, labels, o, betas, step):
    """Loss and its gradients in the embeddings and the betas, over the triplets of the objective's own miner."""
    distances = np.linalg.norm(z[:, None] - z[None], axis=-1)
    seed = tf.constant([o.seed, step])
    found = o.miner(tf.constant(distances), tf.constant(labels), dim=z.shape[1], seed=seed)
    total, active, gradient, of_betas = 0.0, 0, np.zeros_like(z), np.zeros_like(betas)

    def pull_apart(i, j, sign):
        if i != j:
            away = sign * (z[i] - z[j]) / distances[i, j]
            gradient[i] += away
            gradient[j] -= away

    for a, p, n, valid in zip(*(part.numpy() for part in found)):
        if not valid:
            continue
        beta = betas[labels[a]]
        hinges = o.margin + distances[a, p] - beta, o.margin - distances[a, n] + beta
        total += sum(max(0.0, hinge) for hinge in hinges)
        active += max(hinges) > 0
        if hinges[0] > 0:
            pull_apart(a, p, 1.0)
            of_betas[labels[a]] -= 1
        if hinges[1] > 0:
            pull_apart(a, n, -1.0)
            of_betas[labels[a]] += 1
    active = max(active, 1)
    return total / active, gradient / active, of_betas / active


def kl(student, teacher):
    """The divergence of the similarities at temperature 1, and its gradient in the student."""

    def softmax(rows):
        values = np.exp(rows @ rows.T)
        return values / values.sum(axis=1, keepdims=True)

    p, q = softmax(teacher), softmax(student)
    slope = (q - p) / len(student)
    return np.sum(p * (np.log(p) - np.log(q))) / len(student), (slope + slope.T) @ student


def unit(rows):
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / lengths, lambda up: (up - rows * np.sum(rows * up, axis=1, keepdims=True) / lengths**2) / lengths


def loss_and_gradients(w, images, labels, step, model, statistics, config):
    """The published loss of a batch, and the gradients of all weights `w`, with L2."""
    grads, s2sd, o = {}, config.s2sd, model.s2sd_loss
    objective = margin if "betas0" in w else multi_similarity
    mean, variance, epsilon = statistics
    linear = images @ w["conv"][0, 0] + w["conv_bias"]
    normal = (linear - mean) / np.sqrt(variance + epsilon)
    maps = np.maximum(normal * w["gamma"] + w["beta"], 0.0).reshape(len(images), -1, FEATURES)
    average, largest = maps.mean(axis=1), maps.max(axis=1)
    teacher = average + largest if config.model.target_pooling == "avg+max" else average

    def term(k, z):
        loss, up, of_betas = objective(
            z, labels, (o.objective, *o.target_objectives)[k], betas=w.get(f"betas{k}"), step=step
        )
        if of_betas is not None:
            grads[f"betas{k}"] = of_betas / 2 / (len(TARGETS) if k else 1)
        return loss, up

    z, to_base = unit(average @ w["embed"] + w["embed_bias"])
    loss, up = term(0, z)
    loss, up, up_teacher = loss / 2, up / 2, np.zeros_like(teacher)
    for k in range(len(TARGETS)):
        before = teacher @ w[f"head{k}_1"] + w[f"head{k}_bias1"]
        hidden = np.maximum(before, 0.0)
        q, to_target = unit(hidden @ w[f"head{k}_2"] + w[f"head{k}_bias2"])
        own, up_target = term(k + 1, q)
        divergence, of_student = kl(z, q)
        loss += (own / 2 + s2sd.distill_weight * divergence) / len(TARGETS)
        up = up + s2sd.distill_weight * of_student / len(TARGETS)
        down = to_target(up_target / 2 / len(TARGETS))
        grads[f"head{k}_2"], grads[f"head{k}_bias2"] = hidden.T @ down, down.sum(axis=0)
        down = (down @ w[f"head{k}_2"].T) * (before > 0)
        grads[f"head{k}_1"], grads[f"head{k}_bias1"] = teacher.T @ down, down.sum(axis=0)
        up_teacher += down @ w[f"head{k}_1"].T
    if s2sd.feature_distill and step >= DELAY:
        divergence, of_student = kl(z, unit(teacher)[0])
        loss += s2sd.feature_distill_weight * divergence
        up = up + s2sd.feature_distill_weight * of_student
    down = to_base(up)
    grads["embed"], grads["embed_bias"] = average.T @ down, down.sum(axis=0)
    up_average = down @ w["embed"].T + up_teacher
    down = np.repeat(up_average[:, None] / maps.shape[1], maps.shape[1], axis=1)
    if config.model.target_pooling == "avg+max":
        # Where several places share the maximum it is 0, and the gradient ends there.
        down += up_teacher[:, None] * (maps == largest[:, None])
    down = (down * (maps > 0)).reshape(normal.shape)
    grads["gamma"], grads["beta"] = np.sum(down * normal, axis=(0, 1, 2)), down.sum(axis=(0, 1, 2))
    down = down * w["gamma"] / np.sqrt(variance + epsilon)
    grads["conv"] = np.einsum("bhwi,bhwo->io", images, down)[None, None]
    grads["conv_bias"] = down.sum(axis=(0, 1, 2))
    # The weight decay of the published runs is coupled, and not on the target heads and the betas.
    for name in ("conv", "conv_bias", "gamma", "beta", "embed", "embed_bias"):
        grads[name] = grads[name] + 4e-4 * w[name]
    return loss, grads


def adam(w, grads, moments, step):
    """PyTorch's Adam; the betas of margin train at 50 times the learning rate, as the plain objective's."""
    for name, gradient in grads.items():
        m, v = moments.get(name, (0.0, 0.0))
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        moments[name] = m, v
        rate = LEARNING_RATE * (50.0 if name.startswith("betas") else 1.0) / (1 - 0.9**step)
        w[name] = w[name] - rate * m / (np.sqrt(v) / np.sqrt(1 - 0.999**step) + 1e-8)


@pytest.mark.parametrize("options", ["cub200", "sop,r_margin"])
def test_thirty_steps(options):
    config = published_config(options)
    model = make_model(config)
    model.compile(optimizer=optimizer_of(config))
    train_step = tf.function(model.train_step)
    norm = model.backbone.get_layer("norm")
    statistics = [tf.convert_to_tensor(v).numpy() for v in (norm.moving_mean, norm.moving_variance)] + [norm.epsilon]
    w, start, moments = weights_of(model), weights_of(model), {}
    for step, (images, labels) in enumerate(batches()):
        loss, grads = loss_and_gradients(w, images, labels, step, model, statistics, config)
        terms = model.compute_losses(images, labels) if step in (0, DELAY - 1, DELAY) else {"loss": loss}
        np.testing.assert_allclose(terms["loss"], loss, rtol=1e-10, err_msg=f"step {step}")
        adam(w, grads, moments, step + 1)
        train_step((tf.constant(images), tf.constant(labels)))
    for name, found in weights_of(model).items():
        assert np.any(np.abs(found - start[name]) > LEARNING_RATE), name
        np.testing.assert_allclose(found, w[name], rtol=0, atol=1e-9, err_msg=name)
    for variable, value in zip((norm.moving_mean, norm.moving_variance), statistics):
        np.testing.assert_array_equal(tf.convert_to_tensor(variable), value)


@pytest.mark.parametrize(
    "changes",
    [{"l2_on_targets": True}, {"objective": {"divisor": "hinges"}}, {"optimizer": "adam"}],
    ids=["decay of the targets", "hinges", "epsilon"],
)
def test_every_published_choice_counts(changes):
    assert max(np.abs(one - other).max() for one, other in zip(after_steps(), after_steps(**changes))) > 1e-7


def after_steps(optimizer=None, **changes):
    """The weights after a few steps of the published margin loss with changes."""
    config = published_config("sop")
    model = make_model(config, **changes)
    model.compile(optimizer=optimizer_of(config, optimizer))
    for images, labels in itertools.islice(batches(), 4):
        model.train_step((tf.constant(images), tf.constant(labels)))
    return weights_of(model).values()
