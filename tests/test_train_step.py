"""What a training step does besides the loss: gradients in parts, loss scaling, diagnostics."""

import functools

import numpy as np
import pytest
import tensorflow as tf

import s2sd_tf
from s2sd_tf.keras_compat import IS_KERAS_3, keras
from s2sd_tf.losses.diagnostics import effective_rank, mean_similarity

BATCH = 14
IMAGES = np.random.default_rng(0).normal(size=(BATCH, 8, 8, 1)).astype(np.float32)
LABELS = (np.arange(BATCH) // 4).astype(np.int32)


def small_backbone(*extra, norm=None, dtype=None):
    inputs = keras.Input((8, 8, 1))
    features = keras.layers.Conv2D(6, 3, activation="relu", dtype=dtype)(inputs)
    if norm is not None:
        features = norm(features)
    for layer in extra:
        features = layer(features)
    return keras.Model(inputs, keras.layers.Conv2D(8, 3, activation="relu", dtype=dtype)(features))


def trained(micro_batch_size, backbone=small_backbone, steps=3, batch=BATCH, unknown=False, jit=False, **settings):
    """The model after some steps, and the losses of the steps."""
    keras.utils.set_random_seed(0)
    settings = {"target_dims": (8, 12), "feature_distill_delay": 1, **settings}
    model = s2sd_tf.S2SDModel(backbone(), 4, micro_batch_size=micro_batch_size, diagnostics=True, **settings)
    model.compile(optimizer=keras.optimizers.SGD(0.01, momentum=0.9), jit_compile=jit)
    if unknown:
        data = tf.data.Dataset.from_tensor_slices((IMAGES, LABELS)).repeat(steps).batch(batch)
        history = model.fit(data, verbose=0).history
    else:
        images, labels = tf.constant(IMAGES[:batch]), tf.constant(LABELS[:batch])
        step = tf.function(lambda: model.train_step((images, labels)), jit_compile=jit)
        history = [{name: float(value) for name, value in step().items()} for _ in range(steps)][-1]
    return model, history


@functools.cache
def trained_at_once():
    return trained(0)


def assert_same(one, other, atol=1e-5):
    for name, expected in one[1].items():
        np.testing.assert_allclose(other[1][name], expected, rtol=1e-5, atol=atol, err_msg=name)
    for a, b in zip(one[0].get_weights(), other[0].get_weights()):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol)


class TestGradientCaching:
    @pytest.mark.parametrize("size", [1, 4, 7, 14, 100])
    def test_a_step_equals_a_step_on_the_whole_batch(self, size):
        assert_same(trained_at_once(), trained(size))

    @pytest.mark.parametrize(
        "settings",
        [
            {"objective": "margin", "num_classes": 4},
            {"pooling": "gem", "target_pooling": "avg+max", "l2": 0.01},
            {"target_dims": (), "feature_distill": False},
            {"unknown": True, "batch": 5, "steps": 1},
            {"learning_rate_multipliers": {"backbone": 0.1, "heads": 2.0}},
        ],
        ids=str,
    )
    def test_with_every_kind_of_term(self, settings):
        assert_same(trained(0, **settings), trained(3, **settings))

    def test_jitted(self):
        assert_same(trained_at_once(), trained(7, jit=True), atol=1e-4)

    def test_statistics_are_updated_once(self):
        def backbone():
            return small_backbone(norm=keras.layers.BatchNormalization(momentum=0.5, center=False, scale=False))

        model = trained(BATCH, backbone=backbone, steps=1)[0]
        expected = trained(0, backbone=backbone, steps=1)[0]
        for name in ("moving_mean", "moving_variance"):
            values = [
                tf.convert_to_tensor(getattr(layer, name)).numpy()
                for m in (model, expected)
                for layer in m.backbone.layers
                if hasattr(layer, name)
            ]
            np.testing.assert_allclose(*values, rtol=1e-5)

    def test_dropout_is_the_same_in_both_passes(self):
        def backbone():
            return small_backbone(keras.layers.Dropout(0.5, seed=3))

        if not IS_KERAS_3:
            with pytest.raises(ValueError, match=r"micro_batch_size: .* dropout .* Received: one with 'dropout"):
                trained(BATCH, backbone=backbone)
            return
        # With a single part the random numbers are the same as for the whole batch.
        assert_same(trained(0, backbone=backbone), trained(BATCH, backbone=backbone))

    def test_activity_regularizers_are_refused(self):
        layer = keras.layers.Dense(6, activity_regularizer="l2", name="active")
        with pytest.raises(ValueError, match=r"micro_batch_size: .* activity regularizers\. Received: .*'active'"):
            trained(4, backbone=lambda: small_backbone(layer))

    def test_in_low_precision(self):
        settings = {"dtype": "mixed_bfloat16", "backbone": lambda: small_backbone(dtype="mixed_bfloat16")}
        # The gradients of the parts are rounded separately.
        assert_same(trained(0, **settings), trained(7, **settings), atol=5e-2)

    def test_the_size_is_saved_and_checked(self):
        model = trained(4, steps=1)[0]
        assert type(model).from_config(model.get_config()).micro_batch_size == 4
        with pytest.raises(ValueError, match=r"micro_batch_size: expected an int >= 0\. Received: -1"):
            trained(-1)


@keras.utils.register_keras_serializable("tests")
class Overflow(keras.layers.Layer):
    """The identity, with an infinite gradient while `on`."""

    def build(self, input_shape):
        self.on = self.add_weight(name="on", shape=(), initializer="zeros", trainable=False, dtype="float32")

    def call(self, inputs):
        on = tf.convert_to_tensor(self.on) > 0

        @tf.custom_gradient
        def identity(x):
            return tf.identity(x), lambda dy: tf.where(on, tf.constant(np.inf, dy.dtype), dy)

        return identity(inputs)

    def compute_output_shape(self, input_shape):
        return input_shape


class TestPrecision:
    @pytest.mark.parametrize("size", [0, 7])
    @pytest.mark.parametrize("jit", [False, True])
    def test_an_overflow_skips_the_step_and_lowers_the_scale(self, size, jit):
        overflow = Overflow()
        model = s2sd_tf.S2SDModel(
            small_backbone(overflow, dtype="mixed_float16"),
            4,
            target_dims=(8,),
            dtype="mixed_float16",
            diagnostics=True,
            micro_batch_size=size,
            learning_rate_multipliers={"heads": 0.5},
        )
        model.compile(optimizer=keras.optimizers.SGD(0.01), jit_compile=jit)
        step = tf.function(lambda: model.train_step((tf.constant(IMAGES), tf.constant(LABELS))), jit_compile=jit)

        def scale():
            optimizer = model.optimizer
            return float(tf.convert_to_tensor(getattr(optimizer, "dynamic_scale" if IS_KERAS_3 else "loss_scale")))

        def weights():
            return [tf.convert_to_tensor(variable).numpy() for variable in model.trainable_variables]

        # The initial scale may already be too large.
        for _ in range(8):
            step()
        before, first = weights(), scale()
        step()
        assert any(np.any(a != b) for a, b in zip(before, weights()))
        overflow.on.assign(1.0)
        before = weights()
        assert np.isfinite(step()["gradient_norm"])
        for a, b in zip(before, weights()):
            np.testing.assert_array_equal(a, b)
        assert scale() == first / 2
        overflow.on.assign(0.0)
        step()
        assert any(np.any(a != b) for a, b in zip(before, weights()))
        assert all(np.isfinite(value).all() for value in weights())
        assert int(tf.convert_to_tensor(model.s2sd_loss.first_nonfinite_step)) == -1

    @pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
    @pytest.mark.parametrize("objective", ["multi_similarity", "margin", "proxy_anchor", "fast_ap", "circle"])
    def test_the_terms_match_float32(self, policy, objective):
        def losses(dtype):
            keras.utils.set_random_seed(0)
            model = s2sd_tf.S2SDModel(
                small_backbone(dtype=dtype), 4, objective=objective, num_classes=4, target_dims=(8,), dtype=dtype
            )
            found = model.compute_losses(IMAGES, LABELS, training=True)
            assert all(value.dtype == tf.float32 for value in found.values())
            return found

        low, full = losses(policy), losses("float32")
        for name, expected in full.items():
            np.testing.assert_allclose(low[name], expected, rtol=0.05, atol=0.01, err_msg=name)


class TestDiagnostics:
    def test_match_their_definitions(self, unit_rows):
        rows = unit_rows(20, 6)
        values = np.linalg.eigvalsh(np.cov(rows.T, bias=True))
        np.testing.assert_allclose(effective_rank(tf.constant(rows)), values.sum() ** 2 / (values**2).sum(), rtol=1e-6)
        similarities = rows @ rows.T
        expected = (similarities.sum() - 20) / (20 * 19)
        np.testing.assert_allclose(mean_similarity(tf.constant(rows)), expected, rtol=1e-6)
        # Now with fewer rows than dimensions.
        wide = unit_rows(5, 50)
        values = np.linalg.eigvalsh(np.cov(wide.T, bias=True))
        np.testing.assert_allclose(effective_rank(tf.constant(wide)), values.sum() ** 2 / (values**2).sum(), rtol=1e-6)

    def test_of_collapsed_embeddings(self, unit_rows):
        same = tf.constant(np.repeat(unit_rows(1, 8), 12, axis=0), tf.float32)
        np.testing.assert_allclose(mean_similarity(same), 1.0, rtol=1e-6)
        assert effective_rank(same) == 0
        assert mean_similarity(same[:1]) == effective_rank(same[:1]) == 0
        line = tf.constant(unit_rows(2, 8)[[0, 1] * 6], tf.float32)
        np.testing.assert_allclose(effective_rank(line), 1.0, rtol=1e-5)

    def test_many_rows_are_sampled_over_the_whole_batch(self, unit_rows):
        rows = tf.constant(np.repeat(unit_rows(6, 8), 500, axis=0), tf.float32)
        unknown = tf.function(effective_rank, input_signature=[tf.TensorSpec([None, None], tf.float32)])
        expected = effective_rank(rows[::500])
        np.testing.assert_allclose([effective_rank(rows), unknown(rows)], [expected] * 2, rtol=1e-2)

    def test_the_norm_is_over_all_gradients(self):
        model = s2sd_tf.S2SDModel(small_backbone(), 4, target_dims=(8,), diagnostics=True)
        model.compile(optimizer=keras.optimizers.SGD(1.0))
        before = [tf.convert_to_tensor(variable).numpy() for variable in model.trainable_variables]
        logs = model.train_step((tf.constant(IMAGES), tf.constant(LABELS)))
        moved = [np.sum((a - tf.convert_to_tensor(v)) ** 2) for a, v in zip(before, model.trainable_variables)]
        np.testing.assert_allclose(logs["gradient_norm"], np.sqrt(np.sum(moved)), rtol=1e-4)
        assert set(model.test_step((tf.constant(IMAGES), tf.constant(LABELS)))).isdisjoint({"gradient_norm"})

    def test_the_first_non_finite_loss_is_recorded(self):
        model = s2sd_tf.S2SDModel(small_backbone(), 4, target_dims=(8,))
        model.compile(optimizer=keras.optimizers.SGD(0.01))
        for images in (IMAGES, IMAGES, IMAGES * np.nan, IMAGES):
            model.train_step((tf.constant(images), tf.constant(LABELS)))
        assert int(tf.convert_to_tensor(model.s2sd_loss.first_nonfinite_step)) == 2
        assert int(tf.convert_to_tensor(model.s2sd_loss.step)) == 4
