"""Adversarial separation: its value, its reversed gradients, its config and its errors."""

import numpy as np
import pytest
import tensorflow as tf

from s2sd_tf import models
from s2sd_tf.keras_compat import keras


def make(**settings):
    keras.utils.set_random_seed(3)
    separation = models.AdversarialSeparation(6, 4, hidden_dim=16, dtype="float64", **settings)
    separation.build((None, 6))
    return separation


def test_value_and_reversed_gradient(unit_rows):
    separation, x, y = make(weight=2.0), tf.constant(unit_rows(9, 6)), tf.constant(unit_rows(9, 4, 1))

    def agreement(x, y):
        a, b, c, d = separation.trainable_variables
        r = tf.nn.relu(tf.math.l2_normalize(y, 1) @ tf.convert_to_tensor(a) + b) @ tf.convert_to_tensor(c) + d
        product = tf.math.l2_normalize(x, 1) * tf.math.l2_normalize(r, 1)
        return 2.0 * tf.reduce_mean(tf.reduce_sum(product**2, axis=1))

    wanted = [x, y, *separation.trainable_variables]
    with tf.GradientTape(persistent=True) as tape:
        tape.watch([x, y])
        loss, plain = separation(x, y), agreement(x, y)
    np.testing.assert_allclose(loss, -plain, rtol=1e-10)
    ours, theirs = tape.gradient(loss, wanted), tape.gradient(plain, wanted)
    # Both embeddings minimise the agreement, the network maximises it.
    for gradient, expected, sign in zip(ours, theirs, [1, 1, -1, -1, -1, -1]):
        np.testing.assert_allclose(gradient, sign * expected, atol=1e-9)


def test_config_and_errors():
    separation = make()
    copy = models.AdversarialSeparation.from_config(separation.get_config())
    assert copy.get_config() == separation.get_config()
    with pytest.raises(ValueError, match=r"other_dim: expected an int >= 1\. Received: 0"):
        models.AdversarialSeparation(6, 0)
    with pytest.raises(ValueError, match="dtype: expected 'float32' or 'float64'"):
        models.AdversarialSeparation(6, 4, dtype="float16")
