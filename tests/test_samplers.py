"""Samplers: batch content, class frequencies, coresets and matching on toy data, storages, resuming, strategies."""

import gc
import json
import threading
import tracemalloc
import warnings

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import tensorflow as tf
import threadpoolctl

from s2sd_tf import data, training
from s2sd_tf.data import batches as data_batches
from s2sd_tf.data import samplers
from s2sd_tf.data.samplers import class_balanced, coreset, matching
from s2sd_tf.keras_compat import IS_KERAS_3, keras

STORED = ("d2_coreset", "distance_matching", "fid_matching", "greedy_coreset")
BY_CLASS = ("class_balanced", *STORED)


def unit(points):
    return points / np.linalg.norm(points, axis=-1, keepdims=True)


def make(name, p, m, **settings):
    if name == "random":
        return samplers.get(name, batch_size=p * m)
    return samplers.get(name, classes_per_batch=p, samples_per_class=m, **settings)


def filled(sampler, embeddings, positions=None):
    """Stores the embeddings if the sampler has a storage; returns the sampler."""
    if sampler.storage is not None:
        positions = np.arange(len(embeddings)) if positions is None else positions
        sampler.storage.refill(positions, embeddings.shape[1], [embeddings[positions]])
    return sampler


def log_draws(sampler):
    """Returns a list to which everything that the sampler draws is appended."""
    drawn, draw = [], sampler.draw
    sampler.draw = lambda *arguments: drawn.append(draw(*arguments)) or drawn[-1]
    return drawn


def random_case(seed):
    """Random labels with gaps between the classes, embeddings for them, and a possible P and M."""
    generator = np.random.default_rng(seed)
    counts = generator.integers(3, 12, 9)
    counts[generator.choice(9, 2, replace=False)] = 0
    labels = generator.permutation(np.repeat(np.arange(9), counts)).astype(np.int32)
    embeddings = generator.normal(size=(len(labels), 5)).astype(np.float32)
    return labels, embeddings, int(generator.integers(1, 8)), int(generator.integers(1, 4))


def chosen_counts(sampler, labels, steps, seed=0):
    """The number of batches with each class."""
    batches = labels[sampler.epoch(labels, steps, seed, 0)]
    return np.array([(batches == c).any(axis=1).sum() for c in range(labels.max() + 1)])


def covering_radius(points, chosen):
    return np.sqrt(np.square(points[:, None] - points[chosen]).sum(-1)).min(1).max()


@pytest.fixture
def linear_model():
    """Makes compiled Keras models for digits, always with the same weights."""

    def make_model():
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(5)])
        model.build((None, 8, 8, 1))
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer=keras.optimizers.Adam(0.01), loss=loss)
        return model

    return make_model


class TestEverySampler:
    def test_registry(self):
        assert samplers.names() == sorted(["random", *BY_CLASS])
        for name in samplers.names():
            sampler = filled(make(name, 2, 3), np.eye(12, dtype=np.float32))
            assert samplers.get(sampler) is sampler
            assert sampler.registered_name == name
            batches = sampler.epoch(np.arange(12) % 4, 5, 0, 0)
            assert batches.shape == (5, 6)
            assert batches.dtype == np.int64
        with pytest.raises(ValueError, match="sampler: expected one of"):
            samplers.get("nonsense")
        with pytest.raises(ValueError, match=r"sampler 'random': expected settings from \['batch_size'\]"):
            samplers.get("random", classes_per_batch=3)

    @pytest.mark.parametrize("name", BY_CLASS)
    @pytest.mark.parametrize("seed", range(6))
    def test_p_classes_with_m_images_and_no_repeats(self, name, seed):
        labels, embeddings, p, m = random_case(seed)
        m += name != "class_balanced" and m == 1  # pure coresets need more, and one image has no distances
        for batch in filled(make(name, p, m), embeddings).epoch(labels, 12, seed, 1):
            assert len(np.unique(batch)) == p * m
            # Images of a class are adjacent.
            rows = labels[batch].reshape(p, m)
            assert (rows == rows[:, :1]).all()
            assert len(np.unique(rows[:, 0])) == p

    @pytest.mark.parametrize("name", ["random", "greedy_coreset", "d2_coreset"])
    @pytest.mark.parametrize("seed", range(4))
    def test_no_image_repeated_if_classes_are_ignored(self, name, seed):
        labels, embeddings, _, _ = random_case(seed)
        for batch in filled(make(name, 17, 1), embeddings).epoch(labels, 12, seed, 1):
            assert len(np.unique(batch)) == 17

    @pytest.mark.parametrize("name", ["random", *BY_CLASS])
    def test_draws_depend_only_on_seed_and_epoch(self, name):
        labels, embeddings, _, _ = random_case(0)
        sampler, other = (filled(make(name, 3, 3), embeddings) for _ in range(2))
        first = sampler.epoch(labels, 6, 0, 1)
        for seed, epoch in ((0, 2), (1, 1)):
            assert (sampler.epoch(labels, 6, seed, epoch) != first).any()
        np.testing.assert_array_equal(other.epoch(labels, 6, 0, 1), first)

    @pytest.mark.parametrize("name", BY_CLASS)
    def test_short_classes(self, name):
        labels = np.repeat(np.arange(4), [2, 9, 5, 7])
        embeddings = np.random.default_rng(0).normal(size=(len(labels), 5)).astype(np.float32)
        with pytest.raises(ValueError, match=r"samples_per_class: expected at least 5 .* Received: class 0 with 2$"):
            filled(make(name, 4, 5), embeddings).epoch(labels, 1, 0, 0)
        for batch in filled(make(name, 4, 5, short_classes="repeat"), embeddings).epoch(labels, 8, 0, 0):
            assert sorted(labels[batch]) == np.repeat(np.arange(4), 5).tolist()
            counts = np.bincount(batch, minlength=len(labels))
            assert sorted(counts[:2]) == [2, 3]
            assert counts[2:].max() == 1
        for batch in filled(make(name, 3, 5, short_classes="skip"), embeddings).epoch(labels, 8, 0, 0):
            assert sorted(labels[batch]) == np.repeat([1, 2, 3], 5).tolist()
        with pytest.raises(ValueError, match=r"classes_per_batch: expected at most 3 classes\. Received: 4"):
            make(name, 4, 5, short_classes="skip").epoch(labels, 1, 0, 0)

    @pytest.mark.parametrize(
        ("name", "settings", "words"),
        [
            ("class_balanced", {"classes_per_batch": 0}, "classes_per_batch: expected an int >= 1. Received: 0"),
            ("class_balanced", {"classes_per_batch": 2.5}, "classes_per_batch: expected an int >= 1. Received: 2.5"),
            ("fid_matching", {"samples_per_class": True}, "samples_per_class: expected an int >= 1. Received: True"),
            ("class_balanced", {"short_classes": "drop"}, "short_classes: expected one of"),
            ("class_balanced", {"class_power": np.nan}, "class_power: expected a finite"),
            ("class_balanced", {"class_power": "1"}, "class_power: expected a finite number. Received: '1'"),
            ("class_balanced", {"class_weights": [1, -1]}, "class_weights: expected finite numbers >= 0"),
            ("class_balanced", {"class_weights": [1, np.inf]}, "class_weights: expected finite numbers >= 0"),
            ("class_balanced", {"class_weights": "heavy"}, "class_weights: expected finite numbers >= 0"),
            ("class_balanced", {"class_weights": [1, 1], "class_power": 1}, "at most one of them"),
            ("class_balanced", {"replacement": 1}, "replacement: expected a bool. Received: 1"),
            ("greedy_coreset", {"pool_factor": 0}, "pool_factor: expected an int >= 1"),
            ("greedy_coreset", {"pool_factor": 1.5}, "pool_factor: expected an int >= 1"),
            ("d2_coreset", {"max_mib": 0}, "max_mib: expected a number > 0"),
            ("d2_coreset", {"max_mib": np.inf}, "max_mib: expected a number > 0"),
            ("fid_matching", {"candidates": 0}, "candidates: expected an int >= 1"),
            ("fid_matching", {"classes_per_batch": 1, "samples_per_class": 1}, "at least 2 images"),
            ("distance_matching", {"bins": 1}, "bins: expected an int >= 2"),
            ("distance_matching", {"reference_images": 1}, "reference_images: expected an int >= 2"),
            ("random", {"batch_size": 0}, "batch_size: expected an int >= 1"),
            ("random", {"batch_size": 2.5}, "batch_size: expected an int >= 1"),
        ],
    )
    def test_bad_settings(self, name, settings, words):
        given = {} if name == "random" else {"classes_per_batch": 2, "samples_per_class": 2}
        with pytest.raises(ValueError, match=words):
            samplers.get(name, **{**given, **settings})

    def test_unsuitable_labels(self):
        labels = np.arange(12) % 4
        for sampler, words in [
            (make("random", 13, 1), "batch_size: expected at most 12, the number of images. Received: 13"),
            (make("greedy_coreset", 13, 1), "classes_per_batch: expected at most 12, the number of images"),
            (make("class_balanced", 5, 1), "classes_per_batch: expected at most 4"),
            (make("class_balanced", 2, 1, class_weights=[1, 1]), "class_weights: expected at least 4, .* Received: 2"),
            (make("class_balanced", 2, 1, class_weights=[0, 0, 0, 1]), "at least 2 classes with a weight > 0"),
        ]:
            with pytest.raises(ValueError, match=words):
                sampler.epoch(labels, 1, 0, 0)

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"steps": 0}, "steps: expected an int >= 1. Received: 0"),
            ({"steps": 2.0}, "steps: expected an int >= 1. Received: 2.0"),
            ({"seed": -1}, "seed: expected an int >= 0. Received: -1"),
            ({"epoch": True}, "epoch: expected an int >= 0. Received: True"),
            ({"labels": np.arange(12.0)}, r"labels: expected integers \(n,\). Received: float64 \(12,\)"),
            ({"labels": np.zeros((12, 1), int)}, r"labels: expected integers \(n,\). Received: int64 \(12, 1\)"),
            ({"labels": np.arange(12) - 1}, "labels: expected integers >= 0. Received: -1"),
        ],
    )
    def test_bad_arguments(self, arguments, words):
        with pytest.raises(ValueError, match=words):
            make("random", 3, 1).epoch(**{"labels": np.arange(12), "steps": 1, "seed": 0, "epoch": 0, **arguments})
        if "steps" not in arguments:
            with pytest.raises(ValueError, match=words):
                make("d2_coreset", 3, 1).images_to_store(
                    **{"labels": np.arange(12), "dim": 2, "seed": 0, "epoch": 0, **arguments}
                )


class TestClassFrequencies:
    labels = np.repeat(np.arange(6), [4, 8, 16, 32, 64, 128])

    def check(self, sampler, expected, steps=4000):
        """Compares counts with inclusion probabilities: within 4 sigma, and with a chi-square test for P = 1."""
        counts = chosen_counts(sampler, self.labels, steps)
        assert counts.sum() == steps * sampler.classes_per_batch
        certain = np.isclose(expected, 1.0)
        assert (counts[certain] == steps).all()
        assert (counts[expected == 0] == 0).all()
        some = ~certain & (expected > 0)
        expected, counts = expected[some], counts[some]
        z = (counts - steps * expected) / np.sqrt(steps * expected * (1 - expected))
        assert np.abs(z).max() < 4
        if sampler.classes_per_batch == 1:
            assert scipy.stats.chisquare(counts, steps * expected).pvalue > 1e-3

    @pytest.mark.parametrize("power", [1.0, 0.5, -0.5])
    @pytest.mark.parametrize("p", [1, 2])
    def test_power(self, power, p):
        sizes = np.bincount(self.labels) ** power
        expected = class_balanced.inclusion_probabilities(sizes, p)
        if p == 1:
            np.testing.assert_allclose(expected, sizes / sizes.sum())
        self.check(make("class_balanced", p, 2, class_power=power), expected)

    def test_a_class_that_is_always_included(self):
        # 3 classes by frequency: 3 * 128/252 is above 1, then 2 * 64/124 is, so the other classes share one place.
        expected = np.array([4 / 60, 8 / 60, 16 / 60, 32 / 60, 1, 1])
        np.testing.assert_allclose(class_balanced.inclusion_probabilities(np.bincount(self.labels), 3), expected)
        self.check(make("class_balanced", 3, 2, class_power=1), expected)

    def test_weights(self):
        weights = np.array([3.0, 0, 1, 2, 2, 4])
        self.check(make("class_balanced", 2, 2, class_weights=weights), weights / 6)
        counts = chosen_counts(make("class_balanced", 5, 2, class_weights=weights), self.labels, 50)
        assert counts.tolist() == [50, 0, 50, 50, 50, 50]

    @pytest.mark.parametrize("weights", [(), (3.0, 0, 1, 2, 2, 4)])
    def test_replacement(self, weights):
        sampler = make("class_balanced", 2, 3, class_weights=weights, replacement=True)
        batches = sampler.epoch(self.labels, 4000, 0, 0).reshape(4000, 2, 3)
        classes = self.labels[batches]
        assert (classes == classes[:, :, :1]).all()
        shares = np.array(weights or [1.0] * 6)
        pairs = np.outer(shares, shares).ravel() / shares.sum() ** 2
        counts = np.bincount(6 * classes[:, 0, 0] + classes[:, 1, 0], minlength=36)
        assert not counts[pairs == 0].any()
        assert scipy.stats.chisquare(counts[pairs > 0], 4000 * pairs[pairs > 0]).pvalue > 1e-3
        # The first class has four images.
        images = batches[:, 0][classes[:, 0, 0] == 0]
        counts = np.bincount(4 * images[:, 0] + images[:, 1], minlength=16)
        assert scipy.stats.chisquare(counts).pvalue > 1e-3

    def test_classes_without_images_may_have_weights(self):
        one, other = (
            make("class_balanced", 2, 2, class_weights=w) for w in ([3, 1, 1, 2, 2, 4], [3, 1, 1, 2, 2, 4, 9, 0])
        )
        np.testing.assert_array_equal(one.epoch(self.labels, 20, 0, 0), other.epoch(self.labels, 20, 0, 0))

    @pytest.mark.parametrize(
        ("settings", "p", "classes"),
        [
            ({"class_power": 1e300}, 1, {5}),
            ({"class_power": -1e300}, 1, {0}),
            ({"class_power": 1000}, 2, {4, 5}),
            ({"class_power": -1000.0}, 2, {0, 1}),
            ({"class_weights": [1e308] * 6}, 2, set(range(6))),
            ({"class_weights": [5e-324] * 6}, 2, set(range(6))),
            ({"class_weights": [1e308, 0, 1e-320, 0, 1e-320, 1e308]}, 4, {0, 2, 4, 5}),
        ],
    )
    def test_extreme_weights(self, settings, p, classes):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            batches = make("class_balanced", p, 2, **settings).epoch(self.labels, 100, 0, 0)
        assert set(self.labels[batches].ravel()) == classes
        assert all(len(np.unique(self.labels[batch])) == p for batch in batches)

    def test_a_power_that_leaves_too_few_classes(self):
        train, _, preprocessing = data.load_digits()
        for power, p, received in ((1000.0, 3, 2), (-1e300, 2, 1)):
            words = f"class_power {power}: expected at least {p} classes with a weight > 0 .* Received: {received}$"
            with pytest.raises(ValueError, match=words.replace("+", r"\+")):
                make("class_balanced", p, 2, class_power=power).epoch(self.labels, 1, 0, 0)
        with pytest.raises(ValueError, match="class_power"):
            data.training_batches(train, preprocessing, make("class_balanced", 5, 2, class_power=1e6))

    def test_uniform_is_exact(self):
        counts = chosen_counts(make("class_balanced", 3, 2), self.labels, 400)
        assert (counts == 200).all()
        assert make("random", 4, 2).epoch(self.labels, 63, 0, 0).ravel().tolist() != list(range(252))
        assert (np.bincount(make("random", 4, 2).epoch(self.labels, 63, 0, 0).ravel()) == 2).all()

    def test_random_follows_the_number_of_images(self):
        batches = self.labels[make("random", 8, 1).epoch(self.labels, 31 * 40, 0, 0)]
        assert (
            scipy.stats.chisquare(np.bincount(batches.ravel()), batches.size * np.bincount(self.labels) / 252)[1] > 0.01
        )

    def test_inclusion_probabilities_add_up(self):
        generator = np.random.default_rng(0)
        for _ in range(200):
            weights = generator.exponential(size=20) ** 4
            count = int(generator.integers(1, 21))
            found = class_balanced.inclusion_probabilities(weights, count)
            assert found.sum() == pytest.approx(count)
            assert (found <= 1 + 1e-12).all()
            free = found < 1 - 1e-9
            assert (
                np.ptp(found[free] / weights[free]) < 1e-6 * (found[free] / weights[free]).max() if free.any() else True
            )
            drawn = class_balanced.systematic_sample(found, generator)
            assert len(np.unique(drawn)) == count


class TestCoresets:
    @pytest.fixture
    def clusters(self):
        """8 narrow clusters far apart, each with 2 classes and 40 images: labels, clusters and embeddings."""
        generator = np.random.default_rng(0)
        clusters = np.repeat(np.arange(8), 40)
        embeddings = unit(np.eye(8)[clusters] + 0.02 * generator.normal(size=(320, 8)))
        return 2 * clusters + np.arange(320) % 2, clusters, embeddings.astype(np.float32)

    def hits(self, sampler, labels, clusters):
        """The mean number of clusters with images in a batch."""
        return np.mean([len(np.unique(clusters[batch])) for batch in sampler.epoch(labels, 50, 0, 0)])

    @pytest.mark.parametrize("m", [1, 3])
    def test_as_many_anchors_as_clusters_hit_every_one(self, clusters, m):
        labels, clusters, embeddings = clusters
        found = {
            name: self.hits(filled(make(name, 8, m, pool_factor=16), embeddings), labels, clusters)
            for name in ("greedy_coreset", "d2_coreset")
        }
        plain = self.hits(make("random" if m == 1 else "class_balanced", 8, m), labels, clusters)
        assert found["greedy_coreset"] == 8
        assert found["d2_coreset"] > 7.8
        assert plain < 6.5

    def test_covering_radius_is_below_random(self):
        generator = np.random.default_rng(1)
        points = unit(generator.normal(size=(400, 3)) * [1, 1, 0.3]).astype(np.float32)
        labels = np.zeros(400, np.int32)
        radius = {
            name: np.array(
                [covering_radius(points, batch) for batch in filled(make(name, 20, 1), points).epoch(labels, 60, 0, 0)]
            )
            for name in ("random", "d2_coreset", "greedy_coreset")
        }
        assert radius["greedy_coreset"].max() < np.median(radius["random"])
        assert radius["greedy_coreset"].mean() < radius["d2_coreset"].mean() < radius["random"].mean()

    def test_greedy_covers_within_twice_the_best_radius(self):
        # 3 of 12 points on a circle cover it within 60 degrees, a chord of 1. Greedy ones cover it within twice that.
        angles = np.arange(12) * np.pi / 6
        points = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
        sampler = filled(make("greedy_coreset", 3, 1, pool_factor=4), points)
        for batch in sampler.epoch(np.zeros(12, np.int32), 30, 0, 0):
            assert covering_radius(points, batch) <= 2.0 * 1.0 + 1e-6
            # The second anchor is opposite the first, the third at a right angle to both.
            assert sorted(np.abs((batch - batch[0] + 6) % 12 - 6)) == [0, 3, 6]

    def test_d2_draws_by_squared_distance(self):
        distances = np.array([-1.0, 1.0, 0.0, 3.0, 4.0], np.float32)
        generator = np.random.default_rng(0)
        sampler = make("d2_coreset", 2, 2)
        counts = np.bincount([sampler.pick(distances, generator) for _ in range(4000)], minlength=5)
        assert counts[0] == counts[2] == 0
        assert scipy.stats.chisquare(counts[[1, 3, 4]], np.array([500, 1500, 2000])).pvalue > 1e-3

    def test_the_others_of_a_class_are_drawn_evenly(self):
        generator = np.random.default_rng(0)
        members = np.array([2, 3, 5, 7, 11, 13])
        for anchor in (2, 7, 13):
            drawn = np.stack([coreset._with_others(anchor, members, 3, generator) for _ in range(3000)])
            assert (drawn[:, 0] == anchor).all()
            assert (drawn[:, 1] != drawn[:, 2]).all()
            counts = np.bincount(drawn[:, 1:].ravel(), minlength=14)[members]
            assert counts[members == anchor] == 0
            assert scipy.stats.chisquare(counts[members != anchor]).pvalue > 1e-3
        assert coreset._with_others(4, np.array([4]), 3, generator).tolist() == [4, 4, 4]

    def test_coinciding_embeddings(self):
        labels = np.arange(24) % 6
        for name in ("greedy_coreset", "d2_coreset"):
            for m in (1, 2):
                for batch in filled(make(name, 5, m), np.ones((24, 3), np.float32)).epoch(labels, 20, 0, 0):
                    assert len(np.unique(batch)) == 5 * m


class TestMatching:
    @pytest.mark.filterwarnings("ignore:Matrix is singular")
    def test_frechet_distance_matches_scipy(self):
        generator = np.random.default_rng(0)
        for batch, dim in ((30, 6), (8, 20), (2, 5)):
            reference = generator.normal(size=(200, dim)) @ generator.normal(size=(dim, dim)) + 1
            batches = generator.normal(size=(3, batch, dim))
            found = matching.frechet_distances(batches, *matching.gaussian(reference))
            for points, value in zip(batches, found):
                s, c = np.cov(points.T), np.cov(reference.T)
                root = np.trace(scipy.linalg.sqrtm(s @ c)).real
                mean = np.square(points.mean(0) - reference.mean(0)).sum()
                assert value == pytest.approx(mean + np.trace(s) + np.trace(c) - 2 * root, rel=1e-5)

    def test_frechet_distance_to_itself_is_zero(self):
        points = np.random.default_rng(0).normal(size=(40, 6))
        assert matching.frechet_distances(points[None], *matching.gaussian(points)) == pytest.approx(0, abs=1e-9)
        flat = np.concatenate([points, np.zeros((40, 3))], axis=1)  # the covariance does not have full rank
        assert matching.frechet_distances(flat[None], *matching.gaussian(flat)) == pytest.approx(0, abs=1e-9)

    def test_histograms_match_numpy(self):
        points = unit(np.random.default_rng(0).normal(size=(2, 30, 6)))
        for batch, found in zip(points, matching.cumulative_histograms(points, 20)):
            distances = np.linalg.norm(batch[:, None] - batch, axis=-1)[np.triu_indices(30, 1)]
            counts, _ = np.histogram(distances, 20, (0, 2))
            np.testing.assert_allclose(found, np.cumsum(counts) / counts.sum(), atol=2 / counts.sum())

    def test_the_distance_between_histograms_is_wasserstein(self):
        generator = np.random.default_rng(0)
        points, batch = (unit(generator.normal(size=(n, 4)) + np.eye(4)[0]) for n in (60, 20))
        found = make("distance_matching", 2, 2, bins=4000).distance(points, generator)(batch[None])
        expected = scipy.stats.wasserstein_distance(
            *(np.linalg.norm(x[:, None] - x, axis=-1)[np.triu_indices(len(x), 1)] for x in (points, batch))
        )
        assert found == pytest.approx(expected, abs=1e-3)

    def test_histograms_in_blocks(self, monkeypatch):
        points = unit(np.random.default_rng(0).normal(size=(2, 30, 6)))
        whole = matching.cumulative_histograms(points, 20)
        for pairs in (1, 150, 2 * 30 * 29):
            monkeypatch.setattr(matching, "_BLOCK_PAIRS", pairs)
            np.testing.assert_allclose(matching.cumulative_histograms(points, 20), whole, atol=2 / 435)
        monkeypatch.undo()
        many = unit(np.random.default_rng(0).normal(size=(1, 4000, 4))).astype(np.float32)
        tracemalloc.start()
        matching.cumulative_histograms(many, 20)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 60 * 2**20

    @pytest.mark.parametrize("name", ["fid_matching", "distance_matching"])
    @pytest.mark.parametrize("count", [1, 6])
    def test_nothing_to_distinguish(self, name, count):
        """One stored image, and images that coincide."""
        labels = np.zeros(count, np.int32)
        embeddings = np.eye(3, dtype=np.float32)[labels]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sampler = filled(make(name, 1, 2, short_classes="repeat"), embeddings)
            assert np.isfinite(sampler.epoch(labels, 3, 0, 0)).all()
            distance = sampler.distance(embeddings, np.random.default_rng(0))
            assert np.isfinite(distance(embeddings[np.zeros((4, 2), int)])).all()

    def test_blas_gets_its_threads_back(self):
        labels = np.arange(60) % 6
        embeddings = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)

        def threads():
            return [library["num_threads"] for library in threadpoolctl.threadpool_info()]

        def draw():
            for epoch in range(5):
                filled(make("fid_matching", 4, 3), embeddings).epoch(labels, 5, 0, epoch)

        before = threads()
        both = [threading.Thread(target=draw) for _ in range(2)]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()
        assert threads() == before

    @pytest.mark.parametrize("name", ["fid_matching", "distance_matching"])
    def test_takes_the_best_of_the_candidates(self, name):
        generator = np.random.default_rng(0)
        labels = np.arange(300) % 30
        embeddings = unit(generator.normal(size=(30, 5))[labels] + 0.5 * generator.normal(size=(300, 5)))
        sampler = filled(make(name, 4, 3, candidates=6), embeddings.astype(np.float32))
        batches = sampler.epoch(labels, 40, 0, 3)
        candidates = make("class_balanced", 4, 3).epoch(labels, 240, 0, 3).reshape(40, 6, 12)
        distance = sampler.distance(sampler.storage.embeddings, generator)
        stored = sampler.storage.embeddings
        means = []
        for batch, drawn in zip(batches, candidates):
            found = distance(stored[drawn])
            assert distance(stored[batch][None]) == pytest.approx(found.min())
            means.append(found.mean())
        taken = [distance(stored[batch][None])[0] for batch in batches]
        assert np.mean(taken) < 0.9 * np.mean(means)


class TestStorage:
    def test_drawing_before_it_is_filled_is_refused(self):
        for name in STORED:
            with pytest.raises(RuntimeError, match=r"none yet. Add s2sd_tf.data.RefreshStorage\("):
                make(name, 2, 2).epoch(np.arange(12) % 4, 1, 0, 0)

    def test_rows_are_normalised_for_any_batch_size(self):
        rows = np.random.default_rng(0).normal(size=(10, 3))
        storage = samplers.EmbeddingStorage()
        storage.refill(np.arange(10) * 2, 3, [rows[:4], rows[4:]])
        np.testing.assert_allclose(storage.embeddings, unit(rows), rtol=1e-6)
        assert storage.embeddings.dtype == np.float32
        assert storage.positions.tolist() == list(range(0, 20, 2))
        assert storage.epoch == 0

    def test_rows_of_any_size(self):
        rows = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
        scales = np.array([1e30, 3e37, 1e-30, 1e-37, 1, 0], np.float32)[:, None]
        storage = samplers.EmbeddingStorage()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            storage.refill(np.arange(6), 3, [rows * scales], epoch=4)
        np.testing.assert_allclose(storage.embeddings[:5], unit(rows[:5]), rtol=1e-5)
        assert (storage.embeddings[5] == 0).all()
        assert storage.epoch == 4

    def test_rows_of_zeros_can_be_drawn_from(self):
        labels = np.arange(24) % 6
        for name in STORED:
            for batch in filled(make(name, 5, 2), np.zeros((24, 3), np.float32)).epoch(labels, 5, 0, 0):
                assert len(np.unique(batch)) == 10

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"positions": []}, r"positions: expected \(n,\), at least one. Received: \(0,\)"),
            ({"positions": [1, 1]}, "positions: expected integers >= 0, ascending"),
            ({"positions": [-1, 1]}, "positions: expected integers >= 0, ascending"),
            ({"positions": [0.0, 1.0]}, "positions: expected integers >= 0, ascending. Received: float64"),
            ({"dim": 0}, "dim: expected an int >= 1. Received: 0"),
            ({"epoch": -1}, "epoch: expected an int >= 0. Received: -1"),
        ],
    )
    def test_bad_arguments(self, arguments, words):
        storage = samplers.EmbeddingStorage()
        good = {"positions": [0, 1], "dim": 2, "batches": [np.ones((2, 2))]}
        storage.refill(**good)
        with pytest.raises(ValueError, match=words):
            storage.refill(**{**good, **arguments})
        assert not storage.is_filled
        storage.refill(**good)
        assert storage.is_filled

    def test_after_an_error_it_is_empty_and_works(self):
        def broken():
            yield np.ones((2, 3))
            raise KeyError("gone")

        sampler = make("greedy_coreset", 2, 2, max_mib=1e14)
        for error, arguments in (
            (KeyError, (np.arange(4), 3, broken())),
            (KeyError, (np.arange(12), 3, broken())),
            (MemoryError, (np.arange(12), 10**15, [])),
        ):
            filled(sampler, np.eye(12, dtype=np.float32))
            with pytest.raises(error):
                sampler.storage.refill(*arguments)
            assert not sampler.storage.is_filled
            with pytest.raises(RuntimeError, match="none yet"):
                sampler.epoch(np.arange(12) % 4, 1, 0, 0)
        filled(sampler, np.eye(12, dtype=np.float32)).epoch(np.arange(12) % 4, 1, 0, 0)

    def test_a_draw_waits_for_a_refill(self):
        train, _, preprocessing = data.load_digits()
        old, new = np.random.default_rng(0).normal(size=(2, len(train), 5)).astype(np.float32)
        sampler = filled(make("greedy_coreset", 4, 3), old)
        started, resume = threading.Event(), threading.Event()
        drawn = log_draws(sampler)

        def halves():
            yield new[:300]
            started.set()
            assert resume.wait(30)
            yield new[300:]

        batches = data.training_batches(train, preprocessing, sampler, 2)
        threads = [
            threading.Thread(target=lambda: sampler.storage.refill(np.arange(len(train)), 5, halves(), epoch=7)),
            threading.Thread(target=lambda: sampler.epoch(train.labels, 2, 0, 7)),
            threading.Thread(target=lambda: list(batches)),
        ]
        threads[0].start()
        assert started.wait(30)
        for thread in threads[1:]:
            thread.start()
        threads[1].join(0.5)
        assert not drawn
        resume.set()
        for thread in threads:
            thread.join(30)
        expected = filled(make("greedy_coreset", 4, 3), new).epoch(train.labels, 2, 0, 7)
        assert len(drawn) == 2
        for found in drawn:
            np.testing.assert_array_equal(found, expected)

    def test_a_refill_waits_for_a_draw(self):
        sampler = filled(make("d2_coreset", 2, 2), np.eye(12, dtype=np.float32))
        started, resume = threading.Event(), threading.Event()
        draw = sampler.draw

        def slow(*arguments):
            started.set()
            assert resume.wait(30)
            return draw(*arguments)

        sampler.draw = slow
        threads = [
            threading.Thread(target=lambda: sampler.epoch(np.arange(12) % 4, 1, 0, 0)),
            threading.Thread(target=lambda: sampler.storage.refill(np.arange(3), 2, [np.ones((3, 2))], epoch=1)),
        ]
        threads[0].start()
        assert started.wait(30)
        threads[1].start()
        threads[1].join(0.2)
        assert sampler.storage.epoch == 0
        assert sampler.storage.embeddings.shape == (12, 12)
        resume.set()
        for thread in threads:
            thread.join(30)
        assert sampler.storage.epoch == 1

    def test_a_refill_needs_memory_for_the_storage_and_a_batch(self):
        storage = samplers.EmbeddingStorage(max_mib=5)
        tracemalloc.start()
        for count in (20_000, 20_000, 19_000):
            storage.refill(np.arange(count), 64, (np.ones((500, 64), np.float32) for _ in range(count // 500)))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert 20_000 * 64 * 4 < peak < 6.2 * 2**20

    @pytest.mark.parametrize(
        ("batches", "words"),
        [
            ([np.ones((3, 2))], "Received: 3 rows"),
            ([np.ones((3, 2)), np.ones((2, 2))], "after 3 rows"),
            ([np.ones((4, 3))], r"expected \(4, 2\)"),
            ([np.full((4, 2), np.nan)], "expected finite numbers"),
        ],
    )
    def test_bad_batches_leave_it_empty(self, batches, words):
        storage = samplers.EmbeddingStorage()
        storage.refill(np.arange(4), 2, [np.ones((4, 2))])
        with pytest.raises(ValueError, match=words):
            storage.refill(np.arange(4), 2, batches)
        assert not storage.is_filled

    @pytest.mark.parametrize("name", STORED)
    def test_not_all_images_fit(self, name):
        generator = np.random.default_rng(0)
        labels = generator.permutation(np.repeat(np.arange(20), 50))
        embeddings = generator.normal(size=(1000, 16)).astype(np.float32)
        sampler = make(name, 5, 4, max_mib=200 * 16 * 4 / 2**20)
        assert sampler.storage.capacity(16) == 200
        seen = set()
        for epoch in range(12):
            positions = sampler.images_to_store(labels, 16, 0, epoch)
            assert len(positions) == 200
            assert (np.diff(positions) > 0).all()
            assert np.bincount(labels[positions]).min() >= 4
            seen |= set(positions.tolist())
        assert len(seen) > 850
        np.testing.assert_array_equal(positions, sampler.images_to_store(labels, 16, 0, 11))
        filled(sampler, embeddings, positions)
        assert sampler.storage.embeddings.nbytes <= sampler.storage.max_mib * 2**20
        for batch in sampler.epoch(labels, 10, 0, 0):
            assert len(np.unique(batch)) == 20
            assert len(np.unique(labels[batch])) == 5
        with pytest.raises(ValueError, match="labels: expected the labels of the images"):
            sampler.epoch(np.arange(100) % 20, 1, 0, 0)
        with pytest.raises(ValueError, match="classes_per_batch: expected at most 1 classes"):
            filled(sampler, embeddings, np.flatnonzero(labels == 0)).epoch(labels, 1, 0, 0)
        with pytest.raises(ValueError, match="positions: expected at most 200"):
            sampler.storage.refill(np.arange(201), 16, [])

    def test_fewer_classes_if_not_all_images_fit(self):
        labels = np.repeat(np.arange(20), 50)
        sampler = make("fid_matching", 5, 4, max_mib=33 * 16 * 4 / 2**20)
        counts = np.bincount(labels[sampler.images_to_store(labels, 16, 0, 0)], minlength=20)
        assert sorted(counts) == [0] * 12 + [4] * 8
        with pytest.raises(
            ValueError, match=r"max_mib: expected at least .* one batch of 20 embeddings of dimension 32"
        ):
            sampler.images_to_store(labels, 32, 0, 0)


class TestRefresh:
    def test_follows_the_live_model(self, linear_model):
        train, _, preprocessing = data.load_digits()
        sampler = make("greedy_coreset", 5, 4)
        refresh = data.RefreshStorage(sampler, train, preprocessing, batch_size=200)
        model = linear_model()
        seen = []

        class Watch(keras.callbacks.Callback):
            def on_epoch_begin(self, epoch, logs=None):
                seen.append(sampler.storage.embeddings.copy())
                live = model(preprocessing.from_pixels(train.images), training=False)
                np.testing.assert_allclose(seen[-1], unit(live.numpy()), atol=1e-5)

        batches = data.training_batches(train, preprocessing, sampler, steps_per_epoch=2)
        model.fit(batches, epochs=3, verbose=0, shuffle=False, callbacks=[refresh, Watch()])
        assert len(seen) == 3
        assert np.abs(seen[0] - seen[1]).max() > 1e-3 < np.abs(seen[1] - seen[2]).max()

    def test_only_what_fits_is_embedded(self, linear_model):
        train, _, preprocessing = data.load_digits()
        sampler = make("fid_matching", 5, 4, max_mib=100 * 5 * 4 / 2**20)
        refresh = data.RefreshStorage(sampler, train, preprocessing, start_epoch=3, batch_size=30)
        refresh.refresh(linear_model())
        positions = sampler.images_to_store(train.labels, 5, 0, 3)
        np.testing.assert_array_equal(sampler.storage.positions, positions)
        assert sampler.storage.embeddings.shape == (100, 5)

    def test_fit_without_the_callback_names_it(self, linear_model):
        train, _, preprocessing = data.load_digits()
        model = linear_model()
        batches = data.training_batches(train, preprocessing, make("d2_coreset", 5, 4), steps_per_epoch=2)
        with pytest.raises(tf.errors.OpError, match="RefreshStorage"):
            model.fit(batches, verbose=0, shuffle=False)

    def test_errors(self):
        train, _, preprocessing = data.load_digits()
        with pytest.raises(ValueError, match="sampler: expected one that stores embeddings"):
            data.RefreshStorage(make("random", 5, 4), train, preprocessing)
        refresh = data.RefreshStorage(make("d2_coreset", 5, 4), train, preprocessing)
        with pytest.raises(ValueError, match=r"model: expected an output of shape \(batch, dim\)"):
            refresh.refresh(lambda images, training: images)
        with pytest.raises(ValueError, match=r"sampler: expected a samplers.Sampler. Received: 'random'"):
            data.training_batches(train, preprocessing, "random")
        with pytest.raises(ValueError, match="classes_per_batch: expected at most 5"):
            data.training_batches(train, preprocessing, make("d2_coreset", 6, 4))
        for name, value in (("seed", -1), ("seed", 1.5), ("start_epoch", -1), ("start_epoch", True)):
            with pytest.raises(ValueError, match=f"{name}: expected an int >= 0. Received: {value}"):
                data.RefreshStorage(make("d2_coreset", 5, 4), train, preprocessing, **{name: value})
            with pytest.raises(ValueError, match=f"{name}: expected an int >= 0. Received: {value}"):
                data.training_batches(train, preprocessing, make("random", 5, 4), **{name: value})
        for value in (0, 2.5, True):
            with pytest.raises(ValueError, match=f"steps_per_epoch: expected an int >= 1. Received: {value}"):
                data.training_batches(train, preprocessing, make("random", 5, 4), steps_per_epoch=value)
            with pytest.raises(ValueError, match=f"batch_size: expected an int >= 1. Received: {value}"):
                data.RefreshStorage(make("d2_coreset", 5, 4), train, preprocessing, batch_size=value)
            with pytest.raises(ValueError, match=f"batch_size: expected an int >= 1. Received: {value}"):
                data.evaluation_batches(train, preprocessing, value)
        with pytest.raises(ValueError, match=r"epoch: expected an int >= 0\. Received: -1"):
            refresh.refresh(None, -1)
        with pytest.raises(ValueError, match="labels: expected integers"):
            data.ImageSet(train.images, train.labels.astype(np.float32), train.class_names)

    def test_a_pass_belongs_to_the_epoch_of_the_refresh(self, linear_model):
        train, _, preprocessing = data.load_digits()
        sampler = make("d2_coreset", 5, 4)
        refresh = data.RefreshStorage(sampler, train, preprocessing, seed=1)
        batches = data.training_batches(train, preprocessing, sampler, 3, seed=1)
        drawn, model = log_draws(sampler), linear_model()
        for epoch in (0, 0, 5):
            refresh.refresh(model, epoch)
            assert sampler.storage.epoch == epoch
            # Another pass, or reading only the first batch, gives the same epoch.
            list(batches)
            next(iter(batches))
            expected = sampler.epoch(train.labels, 3, 1, epoch)
            for found in drawn:
                np.testing.assert_array_equal(found, expected)
            drawn.clear()

    def test_a_second_fit_resumes(self, linear_model):
        train, _, preprocessing = data.load_digits()

        def fit(*epochs):
            model, sampler = linear_model(), make("greedy_coreset", 5, 4, max_mib=400 * 5 * 4 / 2**20)
            drawn = log_draws(sampler)
            batches = data.training_batches(train, preprocessing, sampler, 3, seed=5)
            refresh = data.RefreshStorage(sampler, train, preprocessing, seed=5)
            for count in epochs:
                model.fit(batches, epochs=count, verbose=0, callbacks=[refresh], shuffle=False)
            return drawn, model.get_weights()

        once, expected = fit(4)
        twice, found = fit(1, 3)
        np.testing.assert_array_equal(np.stack(once), np.stack(twice))
        for a, b in zip(expected, found):
            np.testing.assert_array_equal(a, b)

    def test_mixed_precision(self, linear_model):
        train, _, preprocessing = data.load_digits()
        sampler = make("fid_matching", 5, 4)
        keras.mixed_precision.set_global_policy("mixed_float16")
        try:
            model = linear_model()
            refresh = data.RefreshStorage(sampler, train, preprocessing)
            batches = data.training_batches(train, preprocessing, sampler, 2)
            model.fit(batches, epochs=2, verbose=0, shuffle=False, callbacks=[refresh])
            refresh.refresh(model)
        finally:
            keras.mixed_precision.set_global_policy("float32")
        assert model.compute_dtype == "float16"
        kernel, bias = model.get_weights()
        live = train.images.reshape(len(train), -1) / 255.0 @ kernel + bias
        stored = sampler.storage.embeddings
        np.testing.assert_allclose(np.linalg.norm(stored, axis=1), 1.0, rtol=1e-6)
        np.testing.assert_allclose(stored, unit(live), atol=0.02)

    def test_images_in_memory_are_copied_once(self):
        train, _, preprocessing = data.load_digits()
        sampler = make("d2_coreset", 5, 4)
        batches = data.training_batches(train, preprocessing, sampler, 2, cache=False)
        copy = data_batches._sources[train]
        refresh = data.RefreshStorage(sampler, train, preprocessing)
        assert data_batches._source(train) is copy
        del copy
        gc.collect()
        assert train in data_batches._sources
        del batches, refresh
        gc.collect()
        assert train not in data_batches._sources

    @pytest.mark.parametrize("name", ["class_balanced", *STORED])
    def test_resuming_is_as_if_never_stopped(self, tmp_path, linear_model, name):
        train, _, preprocessing = data.load_digits()

        def fit(model, first, last):
            # Not all fit, so each epoch stores a different sample.
            sampler = make(name, 5, 4, **({"max_mib": 400 * 5 * 4 / 2**20} if name in STORED else {}))
            drawn = log_draws(sampler)
            batches = data.training_batches(train, preprocessing, sampler, 3, seed=5, start_epoch=first)
            callbacks = []
            if sampler.storage is not None:
                callbacks.append(data.RefreshStorage(sampler, train, preprocessing, seed=5, start_epoch=first))
            model.fit(batches, epochs=last, initial_epoch=first, verbose=0, callbacks=callbacks, shuffle=False)
            return drawn

        whole, half = linear_model(), linear_model()
        expected = fit(whole, 0, 4)
        found = fit(half, 0, 2)
        half.save(tmp_path / "half.keras")
        resumed = keras.models.load_model(tmp_path / "half.keras")
        found += fit(resumed, 2, 4)
        np.testing.assert_array_equal(np.stack(expected), np.stack(found))
        for a, b in zip(whole.get_weights(), resumed.get_weights()):
            np.testing.assert_array_equal(a, b)


class TestConfig:
    @pytest.mark.parametrize("name", samplers.names())
    def test_settings_and_sizes_reach_the_sampler(self, name):
        config = training.default_config()
        config.sampler.name = name
        config.data.update(classes_per_batch=3, samples_per_class=5)
        config.sampler.class_balanced.update(class_weights=(1.0, 2.0, 3.0), short_classes="repeat")
        config.sampler.d2_coreset.update(pool_factor=3, max_mib=2.5)
        sampler = training.build.build_sampler(training.resolve(config))
        assert sampler.registered_name == name
        assert sampler.batch_size == 15
        if name == "class_balanced":
            assert sampler.class_weights.tolist() == [1, 2, 3]
            assert sampler.short_classes == "repeat"
        if name == "d2_coreset":
            assert (sampler.pool_factor, sampler.storage.max_mib) == (3, 2.5)

    def test_an_unknown_name(self):
        config = training.default_config()
        config.sampler.name = "nonsense"
        with pytest.raises(ValueError, match=r"sampler.*: expected one of .* Received: 'nonsense'"):
            training.build.build_sampler(training.resolve(config))

    def test_a_run_with_a_storage(self, tmp_path):
        config = training.default_config()
        config.train.update(deterministic=False, epochs=2, steps_per_epoch=2)
        config.sampler.name = "greedy_coreset"
        config.model.filters = (4, 4)
        config = training.preset_config(config, "plain")
        config.eval.every = 0
        training.train(config, str(tmp_path / "run"))
        written = json.loads((tmp_path / "run" / "config.json").read_text())
        assert written["sampler"]["name"] == "greedy_coreset"
        assert written["sampler"]["greedy_coreset"]["pool_factor"] == 8


class TestTrainingBatches:
    @pytest.mark.parametrize("cache", [True, False])
    def test_come_from_the_sampler(self, cache):
        train, _, preprocessing = data.load_digits()
        sampler = make("class_balanced", 4, 3, class_power=0.5)
        batches = data.training_batches(train, preprocessing, sampler, 4, seed=2, start_epoch=1, cache=cache)
        for epoch in (1, 2):
            found = list(batches.as_numpy_iterator())
            assert len(found) == 4
            for (images, labels), chosen in zip(found, sampler.epoch(train.labels, 4, 2, epoch)):
                np.testing.assert_array_equal(labels, train.labels[chosen])
                np.testing.assert_allclose(images, train.images[chosen] / 255.0, atol=1e-6)

    def test_class_balanced_batches_are_the_short_form(self):
        train, _, preprocessing = data.load_digits()
        one = next(iter(data.class_balanced_batches(train, preprocessing, 4, 3, seed=1)))
        other = next(iter(data.training_batches(train, preprocessing, make("class_balanced", 4, 3), seed=1)))
        np.testing.assert_array_equal(one[0], other[0])

    def test_the_same_under_a_distribution_strategy(self, tmp_path, run_python):
        (tmp_path / "script.py").write_text(STRATEGY)
        found = json.loads(run_python("script.py", cwd=tmp_path).stdout.splitlines()[-1])
        for name, (alone, replicas) in found["batches"].items():
            assert len(alone) == 6, name
            assert alone == [first + second for first, second in replicas], name
            assert all(len(first) == len(second) == 6 for first, second in replicas), name
        assert found["distance"] < 1e-5
        # Two calls of `fit` with two epochs: each epoch trains on its own draws, also the pass in which Keras 3 builds.
        assert found["epochs"] == [0, 1, 2, 3]
        assert found["used"] == found["expected"]
        assert len(set(map(str, found["used"]))) == 4
        draws = {epoch: [batches for e, batches in found["drawn"] if e == epoch] for epoch in range(4)}
        for epoch, drawn in draws.items():
            assert all(batches == drawn[0] for batches in drawn), epoch
        assert [len(drawn) for drawn in draws.values()] == ([2, 2, 1, 1] if IS_KERAS_3 else [1, 1, 1, 1])
        # Without a storage, that pass counts as an epoch.
        assert found["passes"] == (4 if IS_KERAS_3 else 2)


STRATEGY = """
import json
import numpy as np, tensorflow as tf
from s2sd_tf import data
keras = tf.keras
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
train, _, preprocessing = data.load_digits()
# Each image's position can be read off its first pixels.
n = np.arange(len(train))
train.images[:, 0, 0, 0], train.images[:, 0, 1, 0] = n // 256, n % 256

def positions(images):
    pixels = np.round(np.asarray(images)[:, 0, :2, 0] * 255).astype(int)
    return (256 * pixels[:, 0] + pixels[:, 1]).tolist()

class Uses(keras.layers.Layer):
    # Its weights grow with the gradient by 1 / 12 for an image each time the image is trained on.
    def build(self, shape):
        self.uses = self.add_weight(name="uses", shape=(len(train), 1), initializer="zeros")

    def call(self, images):
        pixels = tf.cast(tf.round(255.0 * images[:, 0, :2, 0]), tf.int32)
        uses = tf.one_hot(256 * pixels[:, 0] + pixels[:, 1], len(train)) @ self.uses
        return tf.concat([50.0 * uses, tf.reshape(images, [-1, 64])], axis=1)

with strategy.scope():
    model = keras.Sequential([Uses()])
    model.build((None, 8, 8, 1))
    model.compile(optimizer=keras.optimizers.SGD(1 / 50), loss=lambda labels, outputs: -outputs[:, 0])

found = {}
for name, settings in (
    ("random", {"batch_size": 12}), ("greedy_coreset", {"classes_per_batch": 4, "samples_per_class": 3})
):
    for cache in (True, False):
        alone, split = [], []
        for replicas in (False, True):
            sampler = data.samplers.get(name, **settings)
            if sampler.storage is not None:
                refresh = data.RefreshStorage(sampler, train, preprocessing)
                refresh.refresh(model)
            batches = data.training_batches(train, preprocessing, sampler, steps_per_epoch=3, cache=cache)
            if replicas:
                batches = strategy.experimental_distribute_dataset(batches)
            for _ in range(2):
                for images, _ in batches:
                    if replicas:
                        split.append([positions(part) for part in strategy.experimental_local_results(images)])
                    else:
                        alone.append(positions(images))
        found[f"{name} {cache}"] = alone, split

sampler = data.samplers.get("greedy_coreset", classes_per_batch=4, samples_per_class=3)
refresh = data.RefreshStorage(sampler, train, preprocessing)
drawn, epochs, expected, used = [], [], [], []
draw = sampler.draw

def logged(*arguments):
    drawn.append((sampler.storage.epoch, draw(*arguments).tolist()))
    return np.array(drawn[-1][1])

class Watch(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        sampler.draw = draw
        epochs.append(sampler.storage.epoch)
        expected.append(np.sort(sampler.epoch(train.labels, 3, 0, epochs[-1]).ravel()).tolist())
        sampler.draw = logged
        self.before = model.get_weights()[0][:, 0]

    def on_epoch_end(self, epoch, logs=None):
        counts = np.round(12 * (model.get_weights()[0][:, 0] - self.before)).astype(int)
        used.append(np.repeat(np.arange(len(train)), counts).tolist())

refresh.refresh(model)
sampler.draw = logged
batches = data.training_batches(train, preprocessing, sampler, 3)
for _ in range(2):
    model.fit(batches, epochs=2, verbose=0, callbacks=[refresh, Watch()])
refresh.refresh(model)
live = tf.math.l2_normalize(model(preprocessing.from_pixels(train.images)), axis=1).numpy()

passes, plain = [], data.samplers.get("random", batch_size=12)
plain_draw = plain.draw
plain.draw = lambda *arguments: passes.append(1) or plain_draw(*arguments)
batches = data.training_batches(train, preprocessing, plain, 3)
for _ in range(2):
    model.fit(batches, epochs=1, verbose=0)
print(json.dumps({"batches": found, "epochs": epochs, "expected": expected, "used": used, "drawn": drawn,
                  "passes": len(passes), "distance": float(np.abs(sampler.storage.embeddings - live).max())}))
"""
