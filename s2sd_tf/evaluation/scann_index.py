"""Approximate search by ScaNN."""

import os
import tempfile

import numpy as np
from absl import logging

from s2sd_tf.checks import check_choice, checked_int
from s2sd_tf.evaluation.index import Index, checked_items
from s2sd_tf.evaluation.neighbors import check_search, padded, without_own
from s2sd_tf.evaluation.rows import normalized
from s2sd_tf.evaluation.scann_files import digests, load_searcher, save_searcher
from s2sd_tf.evaluation.scann_searcher import build_searcher, import_scann, settings_for
from s2sd_tf.evaluation.scann_tuning import RecallSample, smallest_numbers
from s2sd_tf.untrusted import read_array, reading

# The folder of what ScaNN writes, in that of an index.
_ASSETS = "scann"
# Numbers that each kind of search is tuned by.
_NUMBERS = {"brute_force": (), "hashing": ("reorder",), "tree": ("reorder", "leaves", "leaves_to_search")}


class ScannIndex(Index):
    """Approximate search by ScaNN, tuned to a recall.

    The gallery's size chooses the kind, as ScaNN's authors advise: brute force below 20,000 items, asymmetric hashing
    below 100,000, a tree above, for the cosine metric with spilling (SOAR). How many leaves are searched, and how many
    candidates are scored again exactly, are the smallest numbers with which a sample of the gallery's own items reaches
    the recall against exact search. Where no numbers do, it is brute force.

    Attributes:
        settings: dict: "kind" ("brute_force", "hashing" or "tree"), and of the others "reorder", "leaves",
            "leaves_to_search" and "spilling". A tree with spilling is built anew at its first addition or removal.
        tuned: dict: "recall" asked for, "k", and "measured", the recall on items that were not tuned on.
    """

    method = "scann"

    def __init__(self, searcher, metric, dim, ids, labels, settings, tuned):
        super().__init__(metric, dim, ids, labels)
        self._searcher = searcher
        self._updater = None
        self.settings = settings
        self.tuned = tuned

    @classmethod
    def build(cls, embeddings, ids=None, labels=None, metric="cosine", recall=0.99, k=10, seed=0):
        """Builds and tunes an index.

        Args:
            embeddings: float rows `(n, dim)`, n >= 1; they are copied into memory.
            ids: n different str, or None for the positions.
            labels: n str, or None.
            metric: "cosine" or "euclidean".
            recall: float in (0, 1], the share of the k nearest that is to be found.
            k: int >= 1.
            seed: int >= 0, of the sample.

        Raises:
            ValueError: a bad argument.
            ImportError: ScaNN is missing or does not fit TensorFlow.
        """
        rows, ids, labels = checked_items(embeddings, ids, labels)
        check_search(cls.method, metric, recall)
        k, seed = checked_int("k", k, 1), checked_int("seed", seed, 0)
        ops, rows = import_scann().scann_ops_pybind, _prepared(rows, metric)
        settings = settings_for(len(rows), spilling=metric == "cosine")
        return cls._tuned(ops, rows, metric, ids, labels, settings=settings, recall=recall, k=k, seed=seed)

    @classmethod
    def _tuned(cls, ops, rows, metric, ids, labels, *, settings, recall, k, seed=0):
        """An index of prepared rows, searched by ScaNN's own interface or by TensorFlow's operations (`ops`)."""
        searcher = build_searcher(ops, rows, metric, settings, k)
        tuned = {"recall": recall, "k": k, "measured": 1.0}
        index = cls(searcher, metric, rows.shape[1], ids, labels, settings, tuned)
        if settings["kind"] != "brute_force":
            index._tune(ops, rows, seed)
        return index

    def rows(self):
        with tempfile.TemporaryDirectory() as folder:
            self._searcher.serialize(folder)
            return read_array(os.path.join(folder, "dataset.npy"))

    def _search(self, queries, k):
        return self._found(_prepared(queries, self.metric), k)

    def _found(self, queries, k, **numbers):
        """`(indices, similarities)` of prepared queries, with ScaNN's `numbers` in place of those that were tuned."""
        numbers = numbers or self._numbers(k)
        indices, scores = self._searcher.search_batched_parallel(queries, final_num_neighbors=k, **numbers)
        indices, scores = np.asarray(indices, np.int64), np.array(scores, np.float32)
        missing = ~np.isfinite(scores) | (indices >= len(self))
        if self.metric == "euclidean":
            scores = -np.sqrt(np.maximum(scores, 0.0))
        # Where the leaves hold fewer than k, the rest is no result.
        order = np.argsort(missing, axis=1, kind="stable")
        missing = np.take_along_axis(missing, order, axis=1)
        indices = np.where(missing, -1, np.take_along_axis(indices, order, axis=1))
        return indices, np.where(missing, np.float32(-np.inf), np.take_along_axis(scores, order, axis=1))

    def _numbers(self, k):
        """Arguments of a search for k neighbours: more leaves and candidates where k is more than was tuned for."""
        if self.settings["kind"] == "brute_force":
            return {}
        settings, more = self.settings, max(1.0, k / self.tuned["k"])
        numbers = {"pre_reorder_num_neighbors": min(int(np.ceil(settings["reorder"] * more)), len(self))}
        if settings["kind"] == "tree":
            numbers["leaves_to_search"] = min(int(np.ceil(settings["leaves_to_search"] * more)), settings["leaves"])
        return numbers

    def _tune(self, ops, rows, seed):
        """Sets the smallest `leaves_to_search` and `reorder` that reach the recall, or brute force."""
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
        updater.upsert(ids, _prepared(rows, self.metric), batch_size=256)
        return list(updater.docids)

    def _remove(self, ids):
        updater = self._for_updates()
        updater.delete(ids)
        return list(updater.docids)

    def _for_updates(self):
        if self.settings.get("spilling"):
            # ScaNN breaks where an item that is in two leaves is replaced or removed.
            logging.info("The first change of the index: it is built anew, without spilling.")
            ops, settings = import_scann().scann_ops_pybind, settings_for(len(self), spilling=False)
            asked = {"recall": self.tuned["recall"], "k": self.tuned["k"]}
            anew = self._tuned(ops, self.rows(), self.metric, self.ids, self.labels, settings=settings, **asked)
            self._searcher, self.settings, self.tuned = anew._searcher, anew.settings, anew.tuned
        if self._updater is None:
            # ScaNN maps every result where it knows ids, so what searches knows none.
            self._updater = type(self._searcher)(self._searcher.searcher, docids=list(self.ids))
        return self._updater

    def _save(self, folder):
        save_searcher(self._searcher, os.path.join(folder, _ASSETS))

    def _about(self, folder):
        written = digests(os.path.join(folder, _ASSETS))
        return {"settings": self.settings, "tuned": self.tuned, "sha256": written}

    @classmethod
    def load(cls, folder, about, ids, labels):
        settings, tuned = _checked_settings(os.path.join(folder, "index.json"), about)
        searcher = load_searcher(os.path.join(folder, _ASSETS), about.get("sha256"))
        return cls(searcher, about["metric"], about["dim"], ids, labels, settings, tuned)


def scann_neighbors(queries, gallery, k, metric, keys=None, recall=0.99):
    """As `exact_neighbors`, which describes the arguments, by a `ScannIndex` that is built for it."""
    # As many more as share one id, so that k remain after the query's own are taken out.
    own = 0
    if keys is not None:
        counts = np.bincount(keys[1], minlength=int(keys[0].max()) + 1)
        own = int(counts[keys[0]].max())
    ops, rows = import_scann().scann_ops_pybind, _prepared(gallery, metric)
    wanted, settings = min(k + own, len(rows)), settings_for(len(rows), spilling=metric == "cosine")
    index = ScannIndex._tuned(ops, rows, metric, range(len(rows)), None, settings=settings, recall=recall, k=wanted)
    found = index.nearest(np.asarray(queries), wanted)
    return padded(*found, k) if keys is None else without_own(found, k, *keys)


def index_for_graphs(index, k):
    """`(searcher, metric, numbers)`: an index's items in a searcher of TensorFlow's operations, whose state can be
    saved, and what it is to be called with to find k of them.

    Raises:
        ImportError: ScaNN is missing or does not fit TensorFlow.
    """
    ops = import_scann("scann.scann_ops.py.scann_ops")
    rows = _prepared(index.rows(), index.metric)
    settings = {"kind": "brute_force"} if index.method == "exact" else settings_for(len(rows), spilling=False)
    tuned = getattr(index, "tuned", {"recall": 0.99, "k": k})
    asked = {"recall": tuned["recall"], "k": tuned["k"]}
    built = ScannIndex._tuned(ops, rows, index.metric, index.ids, index.labels, settings=settings, **asked)
    return built._searcher, index.metric, built._numbers(k)


def _checked_settings(path, about):
    """`(settings, tuned)` of a ScaNN index."""
    with reading(path, "what a ScaNN index writes"):
        settings, tuned = about["settings"], about["tuned"]
        check_choice("kind", settings["kind"], ("brute_force", "hashing", "tree"))
        for values, names in ((settings, _NUMBERS[settings["kind"]]), (tuned, ("k",))):
            for name in names:
                checked_int(name, values[name], 1)
    return settings, tuned


def _prepared(rows, metric):
    """float32 rows in memory: of unit length for the cosine metric."""
    rows = np.asarray(rows[:])
    return normalized(rows) if metric == "cosine" else np.ascontiguousarray(rows, np.float32)
