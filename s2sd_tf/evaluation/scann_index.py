"""An index for approximate search with ScaNN."""

import os
import tempfile
from collections.abc import Iterable
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from s2sd_tf.checks import check_choice, checked_int
from s2sd_tf.evaluation.embeddings import Rows
from s2sd_tf.evaluation.index import GROWN, Index, checked_items
from s2sd_tf.evaluation.neighbors import Neighbors, check_search, lengths, padded, without_own
from s2sd_tf.evaluation.rows import normalized, scale_of, scaled
from s2sd_tf.evaluation.scann_files import digests, load_searcher, save_searcher
from s2sd_tf.evaluation.scann_searcher import SCANN_OPS, build_searcher, import_scann, settings_for
from s2sd_tf.evaluation.scann_tuning import RecallSample, smallest_numbers
from s2sd_tf.truncation import truncate
from s2sd_tf.untrusted import read_array, reading

# Subfolder of an index with the files of ScaNN.
_ASSETS = "scann"
_LARGEST = 1e15
# The numbers in the settings of each kind of search.
_NUMBERS = {"brute_force": (), "hashing": ("reorder",), "tree": ("reorder", "leaves", "leaves_to_search")}


class ScannIndex(Index):
    """Approximate search with ScaNN, tuned to a recall.

    The size of the gallery determines the kind of search, as ScaNN's authors advise: brute force below 20,000 items,
    asymmetric hashing below 100,000, and a tree above, with spilling (SOAR) for the cosine metric. The number of leaves
    to search and of candidates to score again exactly are tuned: the smallest with which a sample of the gallery's own
    items reaches the recall against exact search. If none does, the search is brute force.

    Attributes:
        settings: dict with "kind" ("brute_force", "hashing" or "tree") and the numbers of that kind: "reorder" (hashing
            and tree), "leaves", "leaves_to_search" and "spilling" (tree). A tree with spilling is rebuilt at its first
            addition or removal. Any index is built and tuned again when it has half as many items again.
        tuned: dict with the requested "recall", "k", "size", the number of items then, and "measured", the recall on
            items that were not tuned on.
    """

    method = "scann"

    def __init__(
        self,
        searcher: Any,
        metric: str,
        dim: int,
        ids: Any,
        labels: list[str] | None,
        settings: dict[str, Any],
        tuned: dict[str, Any],
    ) -> None:
        super().__init__(metric, dim, ids, labels)
        self._searcher = searcher
        self._updater: Any = None
        self.settings = settings
        self.tuned = tuned

    @classmethod
    def build(
        cls,
        embeddings: Rows | tf.Tensor,
        ids: Iterable[str] | None = None,
        labels: Iterable[str] | None = None,
        metric: str = "cosine",
        recall: float = 0.99,
        k: int = 10,
        seed: int = 0,
    ) -> "ScannIndex":
        """Builds and tunes an index.

        Args:
            embeddings: float rows `(n, dim)`, n >= 1; they are copied into memory.
            ids: n different ids, or None to use the positions.
            labels: n labels, or None.
            metric: "cosine" or "euclidean".
            recall: the share of the k nearest to find, in (0, 1].
            k: int >= 1.
            seed: int >= 0, for the sample to tune on.

        Raises:
            ValueError: a bad argument.
            ImportError: ScaNN is missing or does not fit TensorFlow.
        """
        rows, ids, labels = checked_items(embeddings, ids, labels)
        check_search(cls.method, metric, recall)
        k, seed = checked_int("k", k, 1), checked_int("seed", seed, 0)
        ops, rows = import_scann().scann_ops_pybind, _prepared("embeddings", rows, metric)
        settings = settings_for(len(rows), spilling=metric == "cosine")
        return cls._tuned(ops, rows, metric, ids, labels, settings=settings, recall=recall, k=k, seed=seed)

    @classmethod
    def _tuned(
        cls,
        ops: Any,
        rows: np.ndarray,
        metric: str,
        ids: Any,
        labels: list[str] | None,
        *,
        settings: dict[str, Any],
        recall: float,
        k: int,
        seed: int = 0,
    ) -> "ScannIndex":
        """Builds and tunes an index of prepared rows. `ops` is ScaNN's Python module or its TensorFlow operations."""
        searcher = build_searcher(ops, rows, metric, settings, k)
        tuned = {"recall": recall, "k": k, "size": len(rows), "measured": 1.0}
        index = cls(searcher, metric, rows.shape[1], ids, labels, settings, tuned)
        if settings["kind"] != "brute_force":
            index._tune(ops, rows, seed)
        return index

    def rows(self) -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder:
            self._searcher.serialize(folder)
            return read_array(os.path.join(folder, "dataset.npy"))

    def _search(self, queries, k):
        return self._found(_prepared("queries", queries, self.metric), k)

    def _found(self, queries, k, **numbers):
        """`(indices, similarities)` of prepared queries. `numbers` replace the tuned arguments of ScaNN's search."""
        numbers = numbers or self._numbers(k)
        indices, scores = self._searcher.search_batched_parallel(queries, final_num_neighbors=k, **numbers)
        indices, scores = np.asarray(indices, np.int64), np.array(scores, np.float32)
        missing = ~np.isfinite(scores) | (indices >= len(self))
        if self.metric == "euclidean":
            scores = -np.sqrt(np.maximum(scores, 0.0))
        scores = np.where(missing, np.float32(-np.inf), scores)
        # If the searched leaves have fewer than k items, the rest is not valid. And ScaNN's order is not always that of
        # its scores.
        order = np.argsort(-scores, axis=1, kind="stable")
        indices = np.take_along_axis(np.where(missing, -1, indices), order, axis=1)
        return indices, np.take_along_axis(scores, order, axis=1)

    def _numbers(self, k):
        """ScaNN's arguments of a search for k neighbours: more leaves and candidates if k exceeds the tuned k."""
        if self.settings["kind"] == "brute_force":
            return {}
        settings, more = self.settings, max(1.0, k / self.tuned["k"])
        numbers = {"pre_reorder_num_neighbors": min(int(np.ceil(settings["reorder"] * more)), len(self))}
        if settings["kind"] == "tree":
            numbers["leaves_to_search"] = min(int(np.ceil(settings["leaves_to_search"] * more)), settings["leaves"])
        return numbers

    def _tune(self, ops, rows, seed):
        """Sets the smallest `leaves_to_search` and `reorder` that reach the recall, or falls back to brute force."""
        recall, k, generator = self.tuned["recall"], self.tuned["k"], np.random.default_rng(seed)
        sample = RecallSample(self._found, rows, self.metric, k, recall, generator)
        numbers = smallest_numbers(sample, len(rows), self.settings.get("leaves"))
        if numbers is None:
            self.settings = {"kind": "brute_force"}
            self._searcher = build_searcher(ops, rows, self.metric, self.settings, k)
            return
        self.settings = {**self.settings, **numbers}
        self.tuned["measured"] = sample.measured(**numbers)

    def _add(self, rows, ids):
        updater = self._for_updates()
        updater.upsert(ids, _prepared("embeddings", rows, self.metric), batch_size=256)
        ids = list(updater.docids)
        if len(ids) > GROWN * self.tuned["size"]:
            self._rebuild(ids)
        return ids

    def _remove(self, ids):
        updater = self._for_updates()
        updater.delete(ids)
        return list(updater.docids)

    def _for_updates(self):
        if self.settings.get("spilling"):
            # ScaNN breaks if an item that is in two leaves is replaced or removed.
            logging.info("First change of the index: rebuilding it without spilling.")
            self._rebuild(self.ids)
        if self._updater is None:
            # ScaNN maps every result to its id if it has ids, so the searcher itself gets none.
            self._updater = type(self._searcher)(self._searcher.searcher, docids=list(self.ids))
        return self._updater

    def _rebuild(self, ids):
        """Builds and tunes the index for the rows that it has now, without spilling."""
        ops, settings = import_scann().scann_ops_pybind, settings_for(len(ids), spilling=False)
        asked = {"recall": self.tuned["recall"], "k": self.tuned["k"]}
        rebuilt = self._tuned(ops, self.rows(), self.metric, ids, None, settings=settings, **asked)
        self._searcher, self.settings, self.tuned = rebuilt._searcher, rebuilt.settings, rebuilt.tuned
        self._updater = None

    def _save(self, folder):
        save_searcher(self._searcher, os.path.join(folder, _ASSETS))

    def _about(self, folder):
        written = digests(os.path.join(folder, _ASSETS))
        return {"settings": self.settings, "tuned": self.tuned, "sha256": written}

    @classmethod
    def load(
        cls, folder: str | os.PathLike, about: dict[str, Any], ids: list[str], labels: list[str] | None
    ) -> "ScannIndex":
        settings, tuned = _checked_settings(os.path.join(folder, "index.json"), about)
        searcher = load_searcher(os.path.join(folder, _ASSETS), about.get("sha256"))
        return cls(searcher, about["metric"], about["dim"], ids, labels, settings, tuned)


def scann_neighbors(
    queries: Rows,
    gallery: Rows,
    k: int,
    metric: str,
    keys: tuple[np.ndarray, np.ndarray] | None = None,
    recall: float = 0.99,
) -> Neighbors:
    """Builds a temporary `ScannIndex` and searches it. For the arguments see `exact_neighbors`."""
    # Find as many more as can share a query's key, so that k remain when those are removed.
    own = 0
    if keys is not None:
        counts = np.bincount(keys[1], minlength=int(keys[0].max()) + 1)
        own = int(counts[keys[0]].max())
    ops, scale = import_scann().scann_ops_pybind, 1.0
    if metric == "euclidean":
        scale = scale_of(queries, gallery)
        queries, gallery = (scaled(one, scale) for one in (queries, gallery))
    rows = _prepared("gallery", gallery, metric)
    wanted, settings = min(k + own, len(rows)), settings_for(len(rows), spilling=metric == "cosine")
    index = ScannIndex._tuned(ops, rows, metric, range(len(rows)), None, settings=settings, recall=recall, k=wanted)
    found = index.nearest(np.asarray(queries), wanted)
    if scale != 1.0:
        found = found._replace(similarities=lengths(found.indices, found.similarities, scale))
    return padded(found.indices, found.similarities, k) if keys is None else without_own(found, k, *keys)


def index_for_graphs(index: Index, k: int, dim: int | None = None) -> tuple[Any, str, dict[str, int]]:
    """Rebuilds an index with ScaNN's TensorFlow operations, whose state can be saved in a graph.

    Args:
        index: the index.
        k: number of neighbours to find, >= 1.
        dim: dimension of the prefixes to search; None: the whole one.

    Returns:
        `(searcher, metric, numbers)`: `numbers` are the arguments to search for k neighbours.

    Raises:
        ImportError: ScaNN is missing or does not fit TensorFlow.
    """
    ops = import_scann(SCANN_OPS)
    rows = _prepared("index", index.rows(), index.metric)
    tuned = getattr(index, "tuned", {"recall": 0.99, "k": k})
    asked = {"recall": tuned["recall"], "k": tuned["k"] if dim is None else k}
    if dim is not None:
        rows = truncate(rows, dim)
    by_scann = index.method == "scann" or getattr(index, "settings", {}).get("codes") == "scann"
    settings = settings_for(len(rows), spilling=False) if by_scann else {"kind": "brute_force"}
    built = ScannIndex._tuned(ops, rows, index.metric, index.ids, index.labels, settings=settings, **asked)
    return built._searcher, index.metric, built._numbers(k)


def _checked_settings(path, about):
    """Returns `(settings, tuned)` from the `index.json` of a ScaNN index, checked."""
    with reading(path, "what a ScaNN index writes"):
        settings, tuned = about["settings"], about["tuned"]
        check_choice("kind", settings["kind"], ("brute_force", "hashing", "tree"))
        # Indexes of earlier versions have none.
        tuned = {"size": about["size"], **tuned}
        for values, names in ((settings, _NUMBERS[settings["kind"]]), (tuned, ("k", "size"))):
            for name in names:
                checked_int(name, values[name], 1)
    return settings, tuned


def _prepared(name, rows, metric):
    """Copies rows into memory as float32, normalised for the cosine metric. `name` is that of the argument."""
    rows = np.asarray(rows[:])
    if metric == "cosine":
        return normalized(rows)
    largest = float(np.abs(rows).max(initial=0.0))
    if largest > _LARGEST or (name == "embeddings" and 0 < largest < 1 / _LARGEST):
        raise ValueError(
            f"{name}: expected a largest absolute value from {1 / _LARGEST:g} to {_LARGEST:g}, as ScaNN squares "
            f"distances in float32; multiply all rows by one number, or use method='exact'. Received: {largest:.3g}"
        )
    return np.ascontiguousarray(rows, np.float32)
