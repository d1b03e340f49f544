"""Verification: how well a threshold on the similarity separates pairs of one class from others."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from s2sd_tf.checks import check_above, check_choice, check_within, checked_int
from s2sd_tf.evaluation.embeddings import Rows
from s2sd_tf.evaluation.neighbors import METRICS
from s2sd_tf.evaluation.pairs import Pairs
from s2sd_tf.evaluation.rows import checked_labeled_sets

FARS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
# Thresholds at which the pairs of every class are counted, half of them by FAR and half by TAR, and the number of steps
# between two of them in which a resampled curve is drawn.
_COUNTED, _BETWEEN = 256, 8
# Resamples that are computed together.
_TOGETHER = 50


@dataclasses.dataclass(frozen=True)
class VerificationResult:
    """The receiver operating characteristic (ROC) of all pairs: what each threshold accepts.

    A pair is accepted if its similarity is at least the threshold. TAR, the true accept rate, is the share of accepted
    pairs among those of one class (positives); FAR, the false accept rate, among those of different classes
    (negatives). ISO/IEC 19795-1 calls FAR the false match rate, and 1 - TAR the false non-match rate.

    Attributes:
        thresholds: float64 `(t,)`, descending: infinity, and then every similarity that occurs, up to `resolution`.
        true_accepts, false_accepts: numbers of accepted positives and negatives, int64 `(t,)`.
        values: dict of the metrics and of their thresholds; see `verification_metrics`.
        resolution: 0 if the thresholds are all similarities that occur; else the least difference between two.
        counted: positions in `thresholds` at which the pairs of every class were counted, int64 `(c,)`.
        class_true_accepts, class_false_accepts: the accepted pairs of every class there, int64 `(classes, c)`. A
            negative counts for both of its classes.
    """

    thresholds: np.ndarray
    true_accepts: np.ndarray
    false_accepts: np.ndarray
    values: dict[str, float]
    resolution: float
    counted: np.ndarray
    class_true_accepts: np.ndarray
    class_false_accepts: np.ndarray

    @property
    def tar(self) -> np.ndarray:
        """True accept rate at every threshold, float64 `(t,)`, ascending."""
        return self.true_accepts / self.true_accepts[-1]

    @property
    def far(self) -> np.ndarray:
        """False accept rate at every threshold, float64 `(t,)`, ascending."""
        return self.false_accepts / self.false_accepts[-1]

    def threshold(self, *, far: float | None = None, precision: float | None = None) -> float:
        """Chooses a threshold. As `min_score` of a search it accepts these pairs too, as that allows for rounding.

        Args:
            far: the largest FAR, in (0, 1].
            precision: the smallest share of positives among the accepted pairs, in (0, 1].

        Returns:
            The lowest threshold that meets the condition, which accepts the most pairs. Without a condition,
            `threshold@best_f1`.

        Raises:
            ValueError: both conditions, one out of range, or one that no similarity meets.
        """
        if far is not None and precision is not None:
            raise ValueError(f"far and precision: expected at most one. Received: {far!r} and {precision!r}")
        if far is None and precision is None:
            return self.values["threshold@best_f1"]
        if precision is None:
            name, value, reached = "far", _rate("far", far), self.far <= far
        else:
            name, value = "precision", _rate("precision", precision)
            reached = self.true_accepts / np.maximum(self.true_accepts + self.false_accepts, 1) >= value
        # Position 0 accepts nothing.
        there = np.flatnonzero(reached[1:])
        if not len(there):
            raise ValueError(f"{name}: expected a rate that some threshold reaches. Received: {value}")
        return float(self.thresholds[1 + there[-1]])

    def probability(self, similarities: np.ndarray, prior: float | None = None) -> np.ndarray:
        """Probability that pairs of these similarities are of one class, by isotonic regression on all pairs.

        Args:
            similarities: float array of any shape, as a search returns them: -inf for none.
            prior: share of positives among the pairs to be judged, in (0, 1). Default: that among the pairs evaluated.

        Returns:
            float64 of the same shape, in [0, 1], not descending with the similarity.
        """
        from sklearn.isotonic import IsotonicRegression

        positives, negatives = np.diff(self.true_accepts), np.diff(self.false_accepts)
        times = 1.0
        if prior is not None:
            check_within("prior", prior, 1e-12, 1 - 1e-12)
            times = prior / (1 - prior) * self.false_accepts[-1] / self.true_accepts[-1]
        weights = times * positives + negatives
        fitted = IsotonicRegression(out_of_bounds="clip")
        fitted.fit(self.thresholds[1:], times * positives / weights, weights)
        values = np.asarray(similarities, np.float64)
        if not values.size:
            return values
        found = fitted.predict(np.maximum(values, self.thresholds[-1]).reshape(-1)).reshape(values.shape)
        return np.where(np.isneginf(values), 0.0, found)

    def confidence_intervals(
        self, level: float = 0.95, resamples: int = 1000, seed: int = 0
    ) -> dict[str, tuple[float, float]]:
        """Percentile bootstrap intervals of the metrics, which draw whole classes with replacement.

        A class drawn w times weighs its positives by w. A negative of classes drawn v and w times weighs v + w - 1, the
        part of v w that is linear. The curve of a resample is computed at up to 256 thresholds and interpolated.
        Resamples without a positive are left out.

        Args:
            level: confidence level in (0, 1).
            resamples: int >= 1.
            seed: int >= 0.

        Returns:
            dict from metric to `(low, high)`; none for thresholds.
        """
        if not 0 < level < 1:
            raise ValueError(f"level: expected a number in (0, 1). Received: {level!r}")
        resamples = checked_int("resamples", resamples, 1)
        generator = np.random.default_rng(checked_int("seed", seed, 0))
        classes = len(self.class_true_accepts)
        of_classes = (self.class_true_accepts.astype(np.float64), self.class_false_accepts.astype(np.float64))
        every = self.false_accepts[self.counted]
        names = [name for name in self.values if not name.startswith("threshold@")]
        fars = [float(name[4:]) for name in names if name.startswith("tar@")]
        found = []
        for start in range(0, resamples + 1, _TOGETHER):
            draws = [generator.integers(0, classes, classes) for _ in range(min(_TOGETHER, resamples + 1 - start))]
            weights = np.stack([np.bincount(drawn, minlength=classes) for drawn in draws])
            if not start:
                # The first is the set itself, by which the error of counting at few thresholds is known.
                weights[0] = 1
            true, false = weights @ of_classes[0], weights @ of_classes[1] - every
            for one, other in zip(true, np.maximum.accumulate(np.maximum(false, 0.0), axis=1)):
                drawn = _curve_values(_drawn(one), _drawn(other), fars)
                found.append([drawn[name] for name in names])
        changes = np.array(found[1:]) - found[0]
        changes = changes[np.isfinite(changes).all(axis=1)] if np.isfinite(changes).any() else changes
        values = np.clip(changes + [self.values[name] for name in names], 0.0, 1.0)
        low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0)
        return {name: (float(low[i]), float(high[i])) for i, name in enumerate(names)}


def verification_metrics(
    queries: Rows | tf.Tensor,
    query_labels: tf.Tensor | np.ndarray,
    gallery: Rows | tf.Tensor | None = None,
    gallery_labels: tf.Tensor | np.ndarray | None = None,
    *,
    fars: Sequence[float] = FARS,
    query_ids: np.ndarray | None = None,
    gallery_ids: np.ndarray | None = None,
    metric: str = "cosine",
    memory_mib: int = 512,
    progress: bool = False,
) -> VerificationResult:
    """Compares all pairs of a query and a gallery item. Without a gallery, all pairs of queries, each once.

    - `tar@f`: the largest TAR of a threshold whose FAR is at most f. With fewer than 1 / f negatives, it is that of the
      thresholds which accept none;
    - `eer`: the equal error rate, where FAR = 1 - TAR on the ROC, interpolated linearly between thresholds;
    - `auroc`: the area under the ROC;
    - `best_f1`: the largest F1 of precision and TAR, over thresholds;
    - `average_precision`: the sum over thresholds of the precision times the increase of TAR;
    - `threshold@f`, `threshold@eer`: the lowest threshold whose FAR is at most f or `eer`; infinity if that of every
      similarity is larger;
    - `threshold@best_f1`: the threshold of `best_f1`.

    Similarities are computed in float64. Those of up to 2^22 pairs are sorted, so that every similarity is a threshold;
    for "cosine", those that agree to 12 decimals are one. Of more pairs the thresholds are multiples of 2^-20 (for
    "euclidean", of about 2^-20 times the longest distance), and the counts at them are exact, up to float64's rounding.

    `best_f1`, `average_precision` and precisions depend on the share of positives among the pairs, and so on the number
    of classes; the other metrics do not.

    Args:
        queries, query_labels, gallery, gallery_labels, query_ids, gallery_ids, metric: see `evaluate_retrieval`. Pairs
            with equal ids are left out.
        fars: numbers in (0, 1], for `tar@f`.
        memory_mib: MiB, >= 1, that blocks may take. Counts and the result take up to 500 MiB more, and 9 KiB for each
            class.
        progress: whether to show a progress bar.

    Raises:
        ValueError: arguments that do not fit, or no pair of one class, or none of different classes.
    """
    fars = checked_fars(fars)
    check_choice("metric", metric, METRICS)
    memory_mib = checked_int("memory_mib", memory_mib, 1)
    sets = checked_labeled_sets(queries, query_labels, gallery, gallery_labels, query_ids, gallery_ids)
    pairs = Pairs(sets, metric, memory_mib, progress)
    if not pairs.positives or not pairs.negatives:
        raise ValueError(
            f"query_labels: expected pairs of one class and pairs of different classes. Received: "
            f"{pairs.positives} and {pairs.negatives}"
        )
    found = pairs.counts()
    thresholds = np.append(np.inf, found.thresholds)
    true, false = (np.append(0, np.cumsum(counts)) for counts in (found.positives, found.negatives))
    steps = np.linspace(0, 1, _COUNTED // 2)
    at_far = np.searchsorted(false, np.geomspace(1, false[-1], _COUNTED // 2), "right") - 1
    at_tar = np.searchsorted(true, steps * true[-1], "right") - 1
    counted = np.unique(np.concatenate([at_far, at_tar, [1, len(thresholds) - 1]]))
    counted = counted[counted > 0]
    of_classes = pairs.counts_of_classes(thresholds[counted])
    values = _curve_values(true, false, fars)
    for name, far in [*((f"{far:g}", far) for far in fars), ("eer", values["eer"])]:
        values[f"threshold@{name}"] = float(thresholds[np.searchsorted(false / false[-1], far, "right") - 1])
    values["threshold@best_f1"] = float(thresholds[np.argmax(true / (true + false + true[-1]))])
    return VerificationResult(thresholds, true, false, values, found.resolution, counted, *of_classes)


def checked_fars(fars: Any) -> list[float]:
    """Returns `fars` as a list of floats.

    Raises:
        ValueError: not a sequence of numbers in (0, 1].
    """
    if isinstance(fars, (str, bytes)) or not isinstance(fars, Iterable):
        raise ValueError(f"fars: expected a sequence of numbers in (0, 1]. Received: {fars!r}")
    return [_rate("fars", far) for far in fars]


def _rate(name, value):
    check_within(name, value, 0.0, 1.0)
    check_above(name, value, 0.0)
    return float(value)


def _curve_values(true: Any, false: Any, fars: Sequence[float]) -> dict[str, float]:
    """The metrics of accepted positives and negatives `(t,)`, ascending from 0 to all of them; NaN without either."""
    if not true[-1] or not false[-1]:
        names = [*(f"tar@{far:g}" for far in fars), "eer", "auroc", "best_f1", "average_precision"]
        return dict.fromkeys(names, float("nan"))
    tar, far = true / true[-1], false / false[-1]
    values = {f"tar@{limit:g}": tar[np.searchsorted(far, limit, "right") - 1] for limit in fars}
    excess = far + tar - 1.0
    after = int(np.argmax(excess >= 0))
    part = excess[after - 1] / (excess[after - 1] - excess[after])
    values["eer"] = far[after - 1] + part * (far[after] - far[after - 1])
    values["auroc"] = np.sum(np.diff(far) * (tar[1:] + tar[:-1])) / 2.0
    values["best_f1"] = np.max(2.0 * true / (true + false + true[-1]))
    accepted = np.where(true + false > 0, true + false, 1.0)
    values["average_precision"] = np.sum(np.diff(tar) * (true / accepted)[1:])
    return {name: float(value) for name, value in values.items()}


def _drawn(accepts):
    """A curve from 0 through counted values `(c,)`, with steps between them."""
    places = np.arange(len(accepts) + 1)
    return np.interp(np.linspace(0, len(accepts), _BETWEEN * len(accepts) + 1), places, np.append(0.0, accepts))
