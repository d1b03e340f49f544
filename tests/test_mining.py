"""Miners: valid choices, distributions against plain Python, reproducibility, graphs."""

import inspect
import json

import numpy as np
import pytest
import tensorflow as tf

from s2sd_tf import mining
from s2sd_tf.keras_compat import keras
from s2sd_tf.mining.base import drawn_members, weighted_members
from s2sd_tf.objectives.base import euclidean_distances

DETERMINISTIC = {"all", "hard", "lifted", "semi_hard"}
IN_CLASS = {"intra_random", "rho_distance"}
AN_ANCHOR = {"easy_positive", "hard", "soft_hard"}
CASES = [
    *((name, {}) for name in mining.names()),
    ("easy_positive", {"negatives": "hard"}),
    ("easy_positive", {"negatives": "distance_weighted"}),
    ("parametric", {"shape": "gaussian", "bins": 6, "support": [0.2, 1.8], "mu": 1.0, "sigma": 0.3}),
    ("parametric", {"shape": "distance", "bins": 1}),
    ("parametric", {"bins": 3, "weights": [0.0, 1.0, 2.0]}),
    ("rho_distance", {"rho": 1.0}),
    ("distance_weighted", {"one_per_anchor": True}),
    ("rho_distance", {"rho": 0.6, "anchor_as_positive": True}),
    ("rho_distance", {"rho": 1.0, "anchor_as_positive": True, "one_per_anchor": True}),
]
TRIPLET_CASES = [(name, settings) for name, settings in CASES if name not in {"lifted", "n_pair"}]


def is_stochastic(name, settings):
    return name not in DETERMINISTIC and (name != "easy_positive" or settings.get("negatives") == "distance_weighted")


def chooser(name, **settings):
    """A function from distances, labels and seed to the miner's triplets, or its pairs if it only mines pairs."""
    miner = mining.get(name, **settings)
    choose = miner.pairs if isinstance(miner, mining.PairMiner) else miner
    return lambda distances, labels, seed: choose(distances, labels, dim=5, seed=seed)


def mine(name, rows, labels, seed=(0, 0), jit=None, **settings):
    call = chooser(name, **settings)
    if jit is not None:
        call = tf.function(call, jit_compile=jit)
    found = call(euclidean_distances(tf.constant(rows)), tf.constant(labels, tf.int32), tf.constant(seed))
    return type(found)(*(part.numpy() for part in found))


def valid_triplets(found):
    return np.stack([found.anchor, found.positive, found.negative], axis=-1)[found.valid]


def as_rows(found):
    """The choice as an array, to compare it."""
    return valid_triplets(found) if isinstance(found, mining.Triplets) else np.stack(found)


def same_class(labels):
    labels = np.asarray(labels)
    return labels[:, None] == labels[None, :]


def label_patterns():
    """25 random patterns, then one sample, a pair, one class, all different, one pair among singletons, two classes."""
    for seed in range(25):
        generator = np.random.default_rng(seed)
        batch = int(generator.integers(1, 14))
        yield generator.integers(-2, int(generator.integers(-1, 5)), batch)
    yield from map(np.array, ([3], [1, 1], [1, 2], [7] * 5, range(6), [0, 1, 1, 2, 3], [0, 0, 0, 9, 9, 9]))


@pytest.mark.parametrize(("name", "settings"), TRIPLET_CASES)
def test_triplets_are_valid_and_complete_for_any_labels(unit_rows, name, settings):
    an_anchor = name in AN_ANCHOR or settings.get("one_per_anchor")
    for seed, labels in enumerate(label_patterns()):
        batch = len(labels)
        found = mine(name, unit_rows(batch, 5, seed), labels, (seed, 1), **settings)
        assert len(found.valid) == batch ** (1 if an_anchor else 3 if name == "all" else 2)
        # Objectives also gather with the indices of invalid entries.
        for part in found[:3]:
            assert part.dtype == np.int32
            assert np.all((part >= 0) & (part < batch))
        triplets = valid_triplets(found)
        anchor, positive, negative = triplets.T
        same = same_class(labels)
        own = anchor == positive
        if settings.get("anchor_as_positive"):
            # Only in a class of two, with the other one as the negative.
            assert np.all(same.sum(axis=1)[anchor[own]] == 2)
            assert np.all(same[anchor, negative][own])
        else:
            assert not own.any()
        assert np.all(same[anchor, positive])
        if name in IN_CLASS:
            assert np.all((negative != anchor) & (negative != positive))
        switched = same[anchor, negative]
        if name == "rho_distance":
            least = 2 if settings.get("anchor_as_positive") else 3
            assert np.all(same.sum(axis=1)[anchor[switched]] >= least)
            if settings.get("rho") == 1.0:
                assert np.all(switched == (same.sum(axis=1)[anchor] >= least))
        else:
            assert np.all(switched == (name == "intra_random"))
        # Every possible anchor, pair or triplet, once.
        positives, negatives = same.sum(axis=1) - 1, batch - same.sum(axis=1)
        if an_anchor:
            expected, once = np.sum((positives > 0) & (negatives > 0)), anchor
        elif name == "all":
            expected, once = np.sum(positives * negatives), triplets
        else:
            expected = np.sum(positives * (positives > 1 if name == "intra_random" else negatives > 0))
            # Where the anchor is its own positive, the pair's other sample is the negative.
            once = np.stack([anchor, np.where(own, negative, positive)], axis=1)
        assert len(triplets) == expected == len(np.unique(once, axis=0))


@pytest.mark.parametrize(("name", "settings"), TRIPLET_CASES)
def test_pairs_match_the_triplets(unit_rows, name, settings):
    miner = mining.get(name, **settings)
    assert miner.negatives_in_class == (name in IN_CLASS)
    for seed, labels in enumerate(label_patterns()):
        batch = len(labels)
        distances = euclidean_distances(tf.constant(unit_rows(batch, 5, seed)))
        arguments = (distances, tf.constant(labels, tf.int32))
        anchor, positive, negative = valid_triplets(
            mining.Triplets(*(part.numpy() for part in miner(*arguments, dim=5, seed=tf.constant([seed, 1]))))
        ).T
        pairs = miner.pairs(*arguments, dim=5, seed=tf.constant([seed, 1]))
        if name == "all":
            np.testing.assert_array_equal(pairs.positive, same_class(labels) & ~np.eye(batch, dtype=bool))
            np.testing.assert_array_equal(pairs.negative, ~same_class(labels))
            continue
        for mask, other in zip(pairs, (positive, negative)):
            expected = np.zeros((batch, batch), bool)
            expected[anchor, other] = True
            np.testing.assert_array_equal(mask, expected)


def test_lifted_takes_all_pairs_of_complete_anchors(unit_rows):
    for seed, labels in enumerate(label_patterns()):
        positive, negative = mine("lifted", unit_rows(len(labels), 5, seed), labels)
        for a in range(len(labels)):
            positives = [j for j in range(len(labels)) if j != a and labels[j] == labels[a]]
            negatives = [j for j in range(len(labels)) if labels[j] != labels[a]]
            complete = bool(positives and negatives)
            assert np.flatnonzero(positive[a]).tolist() == (positives if complete else [])
            assert np.flatnonzero(negative[a]).tolist() == (negatives if complete else [])


def test_n_pair_takes_one_pair_per_class(unit_rows):
    for seed, labels in enumerate(label_patterns()):
        positive, negative = mine("n_pair", unit_rows(len(labels), 5, seed), labels, (seed, 1))
        classes = [label for label in np.unique(labels) if np.sum(labels == label) > 1]
        anchors, positives = np.nonzero(positive)
        if len(classes) < 2:
            assert not positive.any()
            assert not negative.any()
            continue
        assert sorted(labels[anchors]) == classes
        assert np.all(anchors != positives)
        np.testing.assert_array_equal(labels[anchors], labels[positives])
        for a, p in zip(anchors, positives):
            np.testing.assert_array_equal(np.flatnonzero(negative[a]), np.sort(positives[positives != p]))
        assert not np.delete(negative, anchors, axis=0).any()


def plain_semi_hard(a, p, negatives, d):
    farther = [j for j in negatives if d[a, j] > d[a, p]]
    return min(farther, key=lambda j: d[a, j]) if farther else max(negatives, key=lambda j: d[a, j])


def plain_triplets(name, labels, d, negatives=None):
    """The triplets of a deterministic miner, one sample at a time."""
    found = []
    for a in range(len(labels)):
        positive = [j for j in range(len(labels)) if j != a and labels[j] == labels[a]]
        negative = [j for j in range(len(labels)) if labels[j] != labels[a]]
        if not positive or not negative:
            continue
        if name == "semi_hard":
            found += [(a, p, plain_semi_hard(a, p, negative, d)) for p in positive]
            continue
        p = (max if name == "hard" else min)(positive, key=lambda j: d[a, j])
        if negatives == "semi_hard":
            found.append((a, p, plain_semi_hard(a, p, negative, d)))
        else:
            found.append((a, p, min(negative, key=lambda j: d[a, j])))
    return np.reshape(np.array(found, np.int32), (-1, 3))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("semi_hard", {}),
        ("hard", {}),
        ("easy_positive", {"negatives": "semi_hard"}),
        ("easy_positive", {"negatives": "hard"}),
    ],
)
def test_deterministic_miners_match_plain_python(unit_rows, name, settings):
    patterns = [*label_patterns(), np.arange(24) % 5]
    for seed, labels in enumerate(patterns):
        # Rows along one direction give anchors without a farther negative, and equal distances.
        rows = unit_rows(len(labels), 3, seed)
        rows = np.round(rows, 1) if seed % 2 else rows
        d = euclidean_distances(tf.constant(rows)).numpy()
        np.testing.assert_array_equal(
            valid_triplets(mine(name, rows, labels, **settings)), plain_triplets(name, labels, d, **settings)
        )


# Distributions


def draw(name, distances, labels, count, **settings):
    """Draws `count` choices with seeds (7, 0), (7, 1), ...; stacks each of their parts along a first axis."""
    call = chooser(name, **settings)
    distances, labels = tf.constant(distances), tf.constant(labels, tf.int32)
    kind = mining.Pairs if name == "n_pair" else mining.Triplets
    types = kind(*([tf.bool] * 2 if name == "n_pair" else [tf.int32] * 3 + [tf.bool]))

    @tf.function
    def run():
        return tf.map_fn(lambda step: call(distances, labels, tf.stack([7, step])), tf.range(count), types)

    return kind(*(part.numpy() for part in run()))


def count_triplets(found, batch):
    """The number of draws of each (anchor, positive, negative), `(batch, batch, batch)`."""
    counts = np.zeros([batch] * 3)
    np.add.at(counts, tuple(valid_triplets(found).T), 1)
    return counts


def assert_follows(counts, probabilities):
    """Chi-square test of the counts of outcomes against their probabilities."""
    counts, probabilities = np.ravel(counts), np.ravel(probabilities)
    np.testing.assert_allclose(probabilities.sum(), 1.0)
    assert np.all(counts[probabilities == 0] == 0)
    possible = probabilities > 0
    wanted = counts.sum() * probabilities[possible]
    chi_square = np.sum((counts[possible] - wanted) ** 2 / wanted)
    freedom = possible.sum() - 1
    # Mean plus four standard deviations of the chi-square distribution, plus 4 for its skew at few degrees of freedom.
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom) + 4


def assert_negatives_follow(counts, labels, probability_of, draws):
    """`probability_of(a, p)` returns the probabilities of the negatives, or None if there is no triplet."""
    tested = 0
    for a, p in zip(*np.nonzero(same_class(labels) & ~np.eye(len(labels), dtype=bool))):
        expected = probability_of(a, p)
        assert counts[a, p].sum() == (0 if expected is None else draws)
        if expected is not None:
            assert_follows(counts[a, p], expected)
            tested += 1
    assert tested


def assert_independent(first, second):
    """Chi-square test for independence of two columns of outcomes that were drawn together."""
    (_, first), (_, second) = np.unique(first, return_inverse=True), np.unique(second, return_inverse=True)
    table = np.zeros((first.max() + 1, second.max() + 1))
    np.add.at(table, (first, second), 1)
    assert min(table.shape) > 1
    assert_follows(table, np.outer(table.sum(axis=1), table.sum(axis=0)) / table.sum() ** 2)


def uniform(members, batch):
    expected = np.zeros(batch)
    expected[list(members)] = 1.0 / len(members)
    return expected


def plain_distances(rows):
    return np.linalg.norm(rows[:, None] - rows[None], axis=-1)


def plain_distance_weighted(d, labels, dim=5, cutoff=1.4):
    clipped = np.maximum(d, 0.5)
    weights = 1.0 / (clipped ** (dim - 2) * (1 - clipped**2 / 4) ** ((dim - 3) / 2))
    weights = np.where(~same_class(labels) & (d < cutoff), weights, 0.0)
    assert np.all(weights.sum(axis=1) > 0)
    return weights / weights.sum(axis=1, keepdims=True)


# Classes with four, three, two and one samples.
MIXED = np.array([0, 1, 0, 2, 3, 1, 0, 2, 1, 0])
SAME = same_class(MIXED)


def test_distance_weighted_draws_follow_the_exact_distribution(unit_rows):
    d = plain_distances(unit_rows(10, 5))
    expected = plain_distance_weighted(d, MIXED)
    exact = mining.get("distance_weighted").probabilities(tf.constant(d), tf.constant(MIXED, tf.int32), 5)
    np.testing.assert_allclose(exact, expected, atol=1e-9)
    found = draw("distance_weighted", d, MIXED, 4000)
    assert_negatives_follow(count_triplets(found, 10), MIXED, lambda a, p: expected[a], 4000)


def test_distance_weighted_falls_back_to_uniform_beyond_the_cutoff():
    rows = np.concatenate([np.eye(4)[:1]] * 2 + [-np.eye(4)[:1]] * 3)
    labels = np.array([0, 0, 1, 1, 1])
    probabilities = mining.get("distance_weighted").probabilities(
        tf.constant(plain_distances(rows)), tf.constant(labels, tf.int32), 4
    )
    np.testing.assert_allclose(probabilities[0], [0, 0, 1 / 3, 1 / 3, 1 / 3])


@pytest.mark.parametrize("rho", [0.2, 0.7])
def test_rho_distance_draws_follow_the_exact_distribution(unit_rows, rho):
    d = plain_distances(unit_rows(10, 5))
    weighted = plain_distance_weighted(d, MIXED)

    def probability_of(a, p):
        third = set(np.flatnonzero(SAME[a])) - {a, p}
        return (1 - rho) * weighted[a] + rho * uniform(third, 10) if third else weighted[a]

    found = draw("rho_distance", d, MIXED, 4000, rho=rho)
    assert_negatives_follow(count_triplets(found, 10), MIXED, probability_of, 4000)
    # Replacing the negative of one pair is independent of replacing another's.
    negatives = found.negative.reshape(-1, 10, 10)
    switched = MIXED[negatives] == MIXED[None, :, None]
    assert_independent(switched[:, 0, 2], switched[:, 0, 6])
    assert_independent(negatives[:, 0, 2], switched[:, 1, 5])


def test_rho_distance_without_rho_is_distance_weighted(unit_rows):
    rows = unit_rows(10, 5)
    np.testing.assert_array_equal(
        valid_triplets(mine("rho_distance", rows, MIXED, (3, 4), rho=0.0)),
        valid_triplets(mine("distance_weighted", rows, MIXED, (3, 4))),
    )


def published_triplets(d, labels, rho):
    """The probability of each triplet `(batch, batch, batch)` of an anchor in the published code."""
    batch = len(labels)
    weighted = plain_distance_weighted(d, labels, cutoff=3.0)
    expected = np.zeros([batch] * 3)
    for a in range(batch):
        others = [j for j in range(batch) if j != a and labels[j] == labels[a]]
        for p in others:
            thirds = [j for j in others if j != p]
            for n in range(batch):
                expected[a, p, n] += (1 - rho) * weighted[a, n] / len(others)
            for n in thirds:
                expected[a, p, n] += rho / len(others) / len(thirds)
            if not thirds:
                expected[a, a, p] += rho
    return expected


@pytest.mark.parametrize("rho", [None, 0.3])
def test_published_draws(unit_rows, rho):
    d = plain_distances(unit_rows(10, 5))
    assert np.max(d) > 1.4
    settings = {"upper_cutoff": 3.0, "one_per_anchor": True}
    if rho is None:
        found = draw("distance_weighted", d, MIXED, 4000, **settings)
    else:
        found = draw("rho_distance", d, MIXED, 4000, rho=rho, anchor_as_positive=True, **settings)
    counts, expected = count_triplets(found, 10), published_triplets(d, MIXED, rho or 0.0)
    for a in range(10):
        if expected[a].any():
            assert counts[a].sum() == 4000
            assert_follows(counts[a], expected[a])
        else:
            assert not counts[a].any()
    # An anchor's positive and negative are independent without rho, and so are two anchors' draws.
    if rho is None:
        assert_independent(found.positive[:, 0], found.negative[:, 0])
    assert_independent(found.positive[:, 0], found.positive[:, 2])
    assert_independent(found.negative[:, 0], found.negative[:, 1])


def test_two_images_a_class_switch_with_probability_rho(unit_rows):
    labels = np.repeat(np.arange(8), 2)
    d = plain_distances(unit_rows(16, 5))
    found = draw("rho_distance", d, labels, 400, anchor_as_positive=True, upper_cutoff=3.0)
    anchor, positive, negative = valid_triplets(found).T
    switched = anchor == positive
    np.testing.assert_array_equal(negative[switched], anchor[switched] ^ 1)
    np.testing.assert_array_equal(positive[~switched], anchor[~switched] ^ 1)
    # Five standard deviations of 6,400 draws.
    assert abs(np.mean(switched) - 0.2) < 5 * 0.4 / 80


def test_random_draws_are_uniform(unit_rows):
    found = draw("random", plain_distances(unit_rows(10, 5)), MIXED, 4000)
    counts = count_triplets(found, 10)
    assert_negatives_follow(counts, MIXED, lambda a, p: uniform(np.flatnonzero(~SAME[a]), 10), 4000)
    negatives = found.negative.reshape(-1, 10, 10)
    assert_independent(negatives[:, 0, 2], negatives[:, 0, 6])
    assert_independent(negatives[:, 0, 2], negatives[:, 2, 0])
    assert_independent(negatives[:-1, 0, 2], negatives[1:, 0, 2])


def test_intra_random_draws_are_uniform(unit_rows):
    def probability_of(a, p):
        third = set(np.flatnonzero(SAME[a])) - {a, p}
        return uniform(third, 10) if third else None

    found = draw("intra_random", plain_distances(unit_rows(10, 5)), MIXED, 4000)
    assert_negatives_follow(count_triplets(found, 10), MIXED, probability_of, 4000)
    negatives = found.negative.reshape(-1, 10, 10)
    assert_independent(negatives[:, 0, 2], negatives[:, 0, 6])


def test_soft_hard_draws_follow_the_exact_distribution(unit_rows):
    rows = unit_rows(12, 5)
    rows[10], rows[11] = [1, 0, 0, 0, 0], [1, 1e-3, 0, 0, 0]
    labels = np.array([*MIXED, 4, 4])
    # Rounding gives equal distances, for anchor 0 also between a positive and the nearest negative.
    d = np.round(plain_distances(rows), 1)
    d[0, 2] = d[2, 0] = d[0, labels != 0].min()
    assert d[0, labels == 0].max() > d[0, 2]
    counts = count_triplets(draw("soft_hard", d, labels, 4000), 12)
    hard = fallback = 0
    for a in range(12):
        positives = [j for j in range(12) if j != a and labels[j] == labels[a]]
        if not positives:
            assert counts[a].sum() == 0
            continue
        negatives = [j for j in range(12) if labels[j] != labels[a]]
        farther = [j for j in positives if d[a, j] > min(d[a, negatives])]
        nearer = [j for j in negatives if d[a, j] < max(d[a, positives])]
        hard += len(farther) > 1 and len(nearer) > 1
        fallback += not farther
        farther = farther or [max(positives, key=lambda j, a=a: d[a, j])]
        nearer = nearer or [min(negatives, key=lambda j, a=a: d[a, j])]
        assert counts[a].sum() == 4000
        # The two draws of an anchor are independent.
        assert_follows(counts[a], np.outer(uniform(farther, 12), uniform(nearer, 12)))
    assert hard > 2
    assert fallback > 1


def test_easy_positive_draws_follow_the_exact_distribution(unit_rows):
    d = plain_distances(unit_rows(10, 5))
    weighted = plain_distance_weighted(d, MIXED)
    counts = count_triplets(draw("easy_positive", d, MIXED, 4000, negatives="distance_weighted"), 10)
    for a in range(10):
        positives = [j for j in range(10) if j != a and SAME[a, j]]
        if positives:
            nearest = min(positives, key=lambda j, a=a: d[a, j])
            assert counts[a].sum() == 4000
            assert_follows(counts[a, nearest], weighted[a])


def test_n_pair_draws_are_uniform(unit_rows):
    found = draw("n_pair", plain_distances(unit_rows(10, 5)), MIXED, 4000)
    outcomes = {}
    for label in (0, 1, 2):
        members = np.flatnonzero(label == MIXED)
        block = found.positive[:, members][:, :, members].reshape(4000, -1)
        assert np.all(block.sum(axis=1) == 1)
        others = ~np.eye(len(members), dtype=bool)
        assert_follows(block.sum(axis=0), others / others.sum())
        outcomes[label] = np.argmax(block, axis=1)
    assert_independent(outcomes[0], outcomes[1])
    assert_independent(outcomes[0], outcomes[2])


@pytest.mark.parametrize(
    "settings",
    [
        {"bins": 4, "support": [0.5, 1.7]},
        {"shape": "gaussian", "bins": 5, "support": [0.3, 1.8], "mu": 1.2, "sigma": 0.4},
        {"shape": "distance", "bins": 4, "support": [0.8, 1.6]},
        {"bins": 3, "support": [1.0, 1.6], "weights": [3, 0, 1]},
        # Only the farthest tenth of the range has weight: for many anchors, all negatives are in bins of weight 0.
        {"bins": 10, "support": [0.0, 2.0], "weights": [0] * 9 + [1]},
    ],
)
def test_parametric_draws_follow_the_exact_distribution(unit_rows, settings):
    d = plain_distances(unit_rows(10, 5))
    bins, (lower, upper) = settings["bins"], settings["support"]
    centres = lower + (upper - lower) * (np.arange(bins) + 0.5) / bins
    shape = settings.get("shape", "uniform")
    if "weights" in settings:
        weights = np.array(settings["weights"], float)
    elif shape == "gaussian":
        weights = np.exp(-((centres - settings["mu"]) ** 2) / (2 * settings["sigma"] ** 2))
    elif shape == "distance":
        weights = 1.0 / (centres**3 * (1 - centres**2 / 4))
    else:
        weights = np.ones(bins)
    bin_of = np.clip(np.floor((d - lower) / (upper - lower) * bins), 0, bins - 1).astype(int)

    def probability_of(a, p):
        negatives = np.flatnonzero(~SAME[a])
        members = {b: [j for j in negatives if bin_of[a, j] == b] for b in range(bins)}
        held = {b: weights[b] for b in range(bins) if members[b]}
        if not sum(held.values()):
            held = dict.fromkeys(held, 1.0)
        return sum(weight / sum(held.values()) * uniform(members[b], 10) for b, weight in held.items())

    found = draw("parametric", d, MIXED, 4000, **settings)
    assert_negatives_follow(count_triplets(found, 10), MIXED, probability_of, 4000)


def test_parametric_handles_bins_whose_weights_underflow(unit_rows):
    # The weights of all bins with negatives underflow, but their ratios still select the bin nearest to mu.
    d = plain_distances(unit_rows(10, 5))
    found = mine("parametric", unit_rows(10, 5), MIXED, shape="gaussian", bins=200, mu=0.0, sigma=1e-3, support=[0, 2])
    for a, _, n in valid_triplets(found):
        nearest = d[a, ~SAME[a]].min()
        assert np.floor(d[a, n] * 100) == np.floor(nearest * 100)


def test_drawn_members_at_the_limits_of_the_draws():
    least = 2.0**-24
    mask = tf.constant([[False, True, False, True, True], [False] * 5])
    draws = tf.constant([[least, 1 / 3, 0.4, 2 / 3, 1.0]] * 2, tf.float64)
    np.testing.assert_array_equal(drawn_members(mask, draws), [[1, 1, 3, 3, 4], [0] * 5])
    # Draw j is from {1, 3, 4} without j.
    for value, expected in ((least, [1, 3, 1, 1, 1]), (0.5, [3, 3, 3, 1, 1]), (1.0, [4, 4, 4, 4, 3])):
        draws = tf.fill([2, 5], tf.constant(value, tf.float32))
        np.testing.assert_array_equal(drawn_members(mask, draws, besides=True), [expected, [0] * 5])


def test_weighted_members_never_choose_probability_0():
    least = 2.0**-24
    probabilities = tf.constant([[0.0, 0.5, 0.0, 0.5, 0.0], [0.0] * 5])
    draws = tf.constant([[least, 0.5, 0.5 + least, 1.0]] * 2, tf.float64)
    np.testing.assert_array_equal(weighted_members(probabilities, draws), [[1, 1, 3, 3], [0] * 4])


# Graphs, configs, errors


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_reproducible_by_seed_and_equal_in_graph_and_xla(unit_rows, name, settings):
    for batch, dtype in ((12, np.float64), (96 if name != "all" else 24, np.float32)):
        rows, labels = unit_rows(batch, 24).astype(dtype), np.arange(batch) % (batch // 4)
        eager = as_rows(mine(name, rows, labels, (5, 2), **settings))
        for jit in (None, False, True):
            np.testing.assert_array_equal(eager, as_rows(mine(name, rows, labels, (5, 2), jit=jit, **settings)))
    for seed in ((5, 3), (6, 2)):
        other = as_rows(mine(name, rows, labels, seed, **settings))
        assert np.array_equal(eager, other) != is_stochastic(name, settings)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_shapes_are_static_if_the_batch_size_is(name, settings):
    call = chooser(name, **settings)
    seed = tf.TensorSpec([2], tf.int32)
    for batch in (8, None):
        specs = tf.TensorSpec([batch, batch], tf.float32), tf.TensorSpec([batch], tf.int32), seed
        outputs = tf.function(call).get_concrete_function(*specs).structured_outputs
        assert all(part.shape.is_fully_defined() == (batch is not None) for part in outputs)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_config_round_trip(name, settings):
    miner = mining.get(name, **settings)
    config = miner.get_config()
    json.dumps(config)
    if "__init__" in vars(type(miner)):
        assert set(config) == set(inspect.signature(type(miner)).parameters)
    assert {key: config[key] for key in settings} == settings
    again = keras.utils.deserialize_keras_object(json.loads(json.dumps(keras.utils.serialize_keras_object(miner))))
    assert type(again) is type(miner)
    assert again.get_config() == config
    assert mining.get(again) is again


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("nonsense", {}, "miner: expected one of"),
        ("hard", {"rho": 1}, "expected settings from"),
        ("distance_weighted", {"lower_cutoff": 0.0}, "lower_cutoff"),
        ("distance_weighted", {"upper_cutoff": 0.3}, "upper_cutoff"),
        ("distance_weighted", {"one_per_anchor": 1}, "one_per_anchor: expected a bool. Received: 1"),
        ("rho_distance", {"anchor_as_positive": 2}, "anchor_as_positive: expected a bool. Received: 2"),
        ("rho_distance", {"lower_cutoff": 0.0}, "lower_cutoff"),
        ("rho_distance", {"rho": 1.2}, r"rho: expected a number in \[0, 1\]. Received: 1.2"),
        ("easy_positive", {"negatives": "easy"}, r"negatives: expected one of \['semi_hard'.*Received: 'easy'"),
        ("parametric", {"shape": "square"}, r"shape: expected one of \['uniform'.*Received: 'square'"),
        ("parametric", {"bins": 0}, "bins: expected an int >= 1. Received: 0"),
        ("parametric", {"bins": 2.5}, "bins: expected an int >= 1. Received: 2.5"),
        ("parametric", {"support": [0.5]}, r"support: expected two numbers.*Received: \[0.5\]"),
        ("parametric", {"support": (1.0, 0.5)}, r"support: expected two numbers.*Received: \(1.0, 0.5\)"),
        ("parametric", {"support": (0.0, 2.5)}, r"support: expected two numbers.*Received: \(0.0, 2.5\)"),
        ("parametric", {"mu": float("nan")}, "mu: expected a number. Received: nan"),
        ("parametric", {"sigma": 0.0}, "sigma: expected a number > 0. Received: 0.0"),
        ("parametric", {"bins": 3, "weights": [1.0, 2.0]}, r"weights: expected 3 numbers.*Received: \[1.0, 2.0\]"),
        ("parametric", {"bins": 2, "weights": [1.0, -2.0]}, "weights: expected 2 numbers >= 0"),
        ("parametric", {"bins": 2, "weights": [0, 0]}, "at least one > 0"),
        ("parametric", {"bins": 2, "weights": "ab"}, "weights: expected 2 numbers.*Received: 'ab'"),
    ],
)
def test_errors_name_argument_expected_and_received(name, settings, message):
    with pytest.raises(ValueError, match=message):
        mining.get(name, **settings)


@pytest.mark.parametrize("name", ["lifted", "n_pair"])
def test_pair_miners_have_no_triplets(name):
    with pytest.raises(TypeError, match=f"expected one that chooses triplets. Received: '{name}'"):
        mining.get(name)(tf.zeros([2, 2]), tf.zeros([2], tf.int32), dim=2, seed=tf.constant([0, 0]))
