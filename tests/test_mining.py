"""Miners: validity, distribution, reproducibility, graphs."""

import numpy as np
import pytest
import tensorflow as tf

from s2sd_tf import mining
from s2sd_tf.mining.base import Triplets
from s2sd_tf.objectives.base import euclidean_distances


def mine(name, rows, labels, seed=(0, 0), jit=None, **settings):
    miner = mining.get(name, **settings)
    rows = tf.constant(rows)

    def call(distances, labels, seed):
        return miner(distances, labels, dim=rows.shape[1], seed=seed)

    if jit is not None:
        call = tf.function(call, jit_compile=jit)
    found = call(euclidean_distances(rows), tf.constant(labels, tf.int32), tf.constant(seed))
    return Triplets(*(part.numpy() for part in found))


def valid_triplets(found):
    return np.stack([found.anchor, found.positive, found.negative], axis=1)[found.valid]


@pytest.mark.parametrize("name", mining.names())
def test_no_invalid_triplet_over_random_labels(unit_rows, name):
    for seed in range(25):
        generator = np.random.default_rng(seed)
        batch = int(generator.integers(1, 14))
        labels = generator.integers(0, int(generator.integers(1, 6)), batch)
        found = valid_triplets(mine(name, unit_rows(batch, 5, seed), labels, (seed, 1)))
        anchor, positive, negative = found.T
        assert np.all(anchor != positive)
        assert np.all(labels[anchor] == labels[positive])
        assert np.all(labels[anchor] != labels[negative])
        same = labels[:, None] == labels[None, :]
        pairs = (same.sum(axis=1) - 1) * (same.sum(axis=1) < batch)
        if name == "all":
            assert len(found) == len(np.unique(found, axis=0)) == np.sum((same.sum(1) - 1) * (~same).sum(1))
        else:
            assert len(found) == pairs.sum()


def test_semi_hard_is_the_nearest_farther_negative(unit_rows):
    rows, labels = unit_rows(14, 3), np.arange(14) % 4
    distances = np.linalg.norm(rows[:, None] - rows[None], axis=-1)
    for a, p, n in valid_triplets(mine("semi_hard", rows, labels)):
        negatives = [j for j in range(14) if labels[j] != labels[a]]
        farther = [j for j in negatives if distances[a, j] > distances[a, p]]
        expected = (
            min(farther, key=lambda j: distances[a, j]) if farther else max(negatives, key=lambda j: distances[a, j])
        )
        assert n == expected


def test_distance_weighted_draws_follow_the_exact_distribution(unit_rows):
    dim, labels = 5, np.array([0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
    rows = unit_rows(10, dim)
    miner = mining.get("distance_weighted", lower_cutoff=0.5, upper_cutoff=1.4)
    d = np.linalg.norm(rows[:, None] - rows[None], axis=-1)
    clipped = np.maximum(d, 0.5)
    weights = 1.0 / (clipped ** (dim - 2) * (1 - clipped**2 / 4) ** ((dim - 3) / 2))
    weights = np.where((labels[:, None] != labels[None]) & (d < 1.4), weights, 0.0)
    expected = weights / weights.sum(axis=1, keepdims=True)
    exact = miner.probabilities(tf.constant(d), tf.constant(labels, tf.int32), dim)
    np.testing.assert_allclose(exact, expected, atol=1e-9)

    draws = 6000
    call = tf.function(lambda seed: miner(tf.constant(d), tf.constant(labels, tf.int32), dim=dim, seed=seed))
    counts = np.zeros((10, 10))
    for draw in range(draws):
        found = call(tf.constant([7, draw]))
        valid = found.valid.numpy()
        np.add.at(counts, (found.anchor.numpy()[valid], found.negative.numpy()[valid]), 1)
    assert np.all(counts[expected == 0] == 0)
    for a in range(10):
        possible = expected[a] > 0
        wanted = draws * expected[a, possible]
        chi_square = np.sum((counts[a, possible] - wanted) ** 2 / wanted)
        freedom = possible.sum() - 1
        # Mean and four standard deviations of the chi-square distribution.
        assert chi_square < freedom + 4 * np.sqrt(2 * max(freedom, 1)) + 4


def test_distance_weighted_falls_back_to_uniform_beyond_the_cutoff():
    rows = np.concatenate([np.eye(4)[:1]] * 2 + [-np.eye(4)[:1]] * 3)
    labels = np.array([0, 0, 1, 1, 1])
    probabilities = mining.get("distance_weighted").probabilities(
        tf.constant(np.linalg.norm(rows[:, None] - rows[None], axis=-1)), tf.constant(labels, tf.int32), 4
    )
    np.testing.assert_allclose(probabilities[0], [0, 0, 1 / 3, 1 / 3, 1 / 3])


@pytest.mark.parametrize("name", mining.names())
def test_reproducible_by_seed_and_alike_in_graph_and_xla(unit_rows, name):
    rows, labels = unit_rows(12, 4).astype(np.float32), np.arange(12) % 3
    eager = valid_triplets(mine(name, rows, labels, (5, 2)))
    for jit in (None, False, True):
        np.testing.assert_array_equal(eager, valid_triplets(mine(name, rows, labels, (5, 2), jit=jit)))
    if name == "distance_weighted":
        assert not np.array_equal(eager, valid_triplets(mine(name, rows, labels, (5, 3))))


def test_errors():
    with pytest.raises(ValueError, match="miner: expected one of"):
        mining.get("nonsense")
    with pytest.raises(ValueError, match="lower_cutoff"):
        mining.get("distance_weighted", lower_cutoff=0.0)
    with pytest.raises(ValueError, match="upper_cutoff"):
        mining.get("distance_weighted", upper_cutoff=0.3)
