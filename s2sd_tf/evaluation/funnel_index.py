"""An index that shortlists by the prefix of an embedding and ranks the shortlist by the whole embedding."""

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from s2sd_tf.checks import check_choice, checked_int
from s2sd_tf.evaluation.clustering import kmeans
from s2sd_tf.evaluation.embeddings import Rows, read_items, read_rows, write_array
from s2sd_tf.evaluation.exact import exact_neighbors
from s2sd_tf.evaluation.index import GROWN, RowsIndex, checked_items
from s2sd_tf.evaluation.neighbors import check_search
from s2sd_tf.evaluation.rows import checked_rows, normalized
from s2sd_tf.evaluation.scann_index import ScannIndex
from s2sd_tf.evaluation.shortlist import CODES, ScannShortlist, make_shortlist, nearest_centres
from s2sd_tf.process_settings import workers
from s2sd_tf.truncation import truncate
from s2sd_tf.untrusted import read_array, read_json_object, reading

# Number of queries to tune the shortlist on. Its recall is measured on as many others.
_TUNING_QUERIES = 1000
# Queries whose shortlists are ranked at a time, and about the largest number of values in these.
_RANKED, _VALUES = 32, 2**23
# Galleries of at least so many items are divided into clusters, as many as the square root of the size. They are found
# from so many items each.
_CLUSTERED, _PER_CLUSTER = 100_000, 64
# Subfolder of an index with the ScaNN index of the prefixes, and file with the clusters' centres.
_SHORTLIST, _CENTRES = "shortlist", "centres.npy"


class FunnelIndex(RowsIndex):
    """Funnel search for nested embeddings, by cosine similarity (Kusupati et al., 2022, arXiv 2205.13147, section 4.3).

    A query's nearest items by the first `dim` dimensions are its shortlist; these are ranked by the whole embedding.
    The length of the shortlist is tuned: the smallest with which a sample of the gallery's own items reaches the recall
    against exact search in the whole dimension. If a quarter of the gallery does not (of large ones 1/64), search is
    exact. The shortlist grows with the gallery. When that has half as many items again, the shortlist is tuned again.

    A gallery of 100,000 items or more is divided into clusters by its prefixes, except with "scann". A query's
    shortlist comes from the nearest clusters, the fewest that lose half of the neighbours that the recall may lose.

    Attributes:
        settings: dict with "dim", "codes" and "shortlist", the tuned length; None: exact search. With clusters, also
            "clusters", their number, and "clusters_to_search".
        tuned: dict with the requested "recall", "k", "size", the number of items then, and "measured", the recall on
            items that were not tuned on.
    """

    method = "funnel"

    def __init__(
        self,
        rows: np.ndarray,
        ids: Any,
        labels: list[str] | None,
        settings: dict[str, Any],
        tuned: dict[str, Any],
        centres: np.ndarray | None = None,
    ) -> None:
        super().__init__(rows, "cosine", ids, labels)
        self._centres = centres
        self.settings = settings
        self.tuned = tuned
        self._shortlist: Any = None

    @classmethod
    def build(
        cls,
        embeddings: Rows | tf.Tensor,
        ids: Iterable[str] | None = None,
        labels: Iterable[str] | None = None,
        *,
        dim: int,
        codes: str = "float32",
        recall: float = 0.99,
        k: int = 10,
        seed: int = 0,
    ) -> "FunnelIndex":
        """Builds and tunes an index.

        Args:
            embeddings: float rows `(n, embedding_dim)`, n >= 1; they are copied into memory.
            ids: n different ids, or None to use the positions.
            labels: n labels, or None.
            dim: from 1 to embedding_dim, dimension of the prefixes: one of the model's `nested_dims`.
            codes: how the prefixes are stored for the shortlist: "float32"; "int8", a byte per dimension; "bits", the
                sign of each dimension after a random rotation; "scann", an approximate search of float32 prefixes.
            recall: the share of the k nearest to find, in (0, 1].
            k: int >= 1.
            seed: int >= 0, for the sample to tune on.

        Raises:
            ValueError: a bad argument.
            ImportError: ScaNN is needed, and is missing or does not fit TensorFlow.
        """
        rows, ids, labels = checked_items(embeddings, ids, labels)
        check_search("exact", "cosine", recall)
        check_choice("codes", codes, CODES)
        k, seed, dim = checked_int("k", k, 1), checked_int("seed", seed, 0), checked_int("dim", dim, 1)
        if dim > rows.shape[1]:
            raise ValueError(f"dim: expected at most {rows.shape[1]}, that of the embeddings. Received: {dim}")
        settings = {"dim": dim, "codes": codes, "shortlist": None}
        tuned = {"recall": recall, "k": k, "size": rows.shape[0], "measured": 1.0}
        index = cls(normalized(np.asarray(rows[:])), ids, labels, settings, tuned)
        index._tune(seed)
        return index

    @property
    def shortlist(self) -> Any:
        """The shortlist of the prefixes, made when it is first needed."""
        if self._shortlist is None:
            tuned = self.tuned
            # The nearest by the whole embedding are often far down by the prefix.
            length = max(50 * tuned["k"], self.settings["shortlist"] or 0)
            # An approximate search of the prefixes may lose a tenth of what the whole funnel may.
            recall = 1.0 - (1.0 - tuned["recall"]) / 10
            self._shortlist = make_shortlist(
                self._rows,
                self.settings["dim"],
                self.settings["codes"],
                recall,
                length,
                seed=0,
                centres=self._centres,
                clusters_to_search=self.settings.get("clusters_to_search", 1),
            )
        return self._shortlist

    def length(self, k: int) -> int | None:
        """The length of the shortlist for k neighbours. None: exact search.

        It is longer than the tuned one if k exceeds the tuned k, or if the gallery has grown.
        """
        if self.settings["shortlist"] is None:
            return None
        longer = max(1.0, k / self.tuned["k"]) * max(1.0, len(self) / self.tuned["size"])
        return min(len(self), max(k, int(np.ceil(self.settings["shortlist"] * longer))))

    def _search(self, queries, k):
        length = self.length(k)
        if length is None:
            return exact_neighbors(queries, self._rows, k)
        queries = normalized(queries)
        shortlists = self.shortlist.find(queries, length, widen=max(1.0, k / self.tuned["k"]))
        return self._ranked(queries, shortlists, k)

    def _ranked(self, queries, shortlists, k):
        """`(indices, similarities)` of the k nearest in shortlists `(queries, length)`, in which -1 is missing."""
        indices = np.empty((len(queries), k), np.int64)
        similarities = np.empty((len(queries), k), np.float32)
        # Among equally similar items, the lower position comes first.
        shortlists = np.sort(shortlists, axis=1)

        height = max(1, min(_RANKED, _VALUES // (shortlists.shape[1] * self.dim)))

        def rank(start):
            part = slice(start, start + height)
            chosen = shortlists[part]
            found = np.matmul(np.take(self._rows, chosen, axis=0), queries[part, :, None])[:, :, 0]
            found[chosen < 0] = -np.inf
            order = np.argsort(-found, axis=1, kind="stable")[:, :k]
            indices[part] = np.take_along_axis(chosen, order, axis=1)
            similarities[part] = np.take_along_axis(found, order, axis=1)

        with workers() as pool:
            list(pool.map(rank, range(0, len(queries), height)))
        return indices, similarities

    def _tune(self, seed):
        """Sets the smallest length of the shortlist that reaches the recall, or None for exact search."""
        size, recall = len(self), self.tuned["recall"]
        k = min(self.tuned["k"], size - 1)
        if not k:
            return
        sample = np.random.default_rng(seed).choice(size, min(2 * _TUNING_QUERIES, size), replace=False)
        queries = self._rows[sample]
        nearest = exact_neighbors(queries, self._rows, k, keys=(sample, np.arange(size))).indices
        tuned_on, others = np.array_split(np.arange(len(sample)), 2)
        if size >= _CLUSTERED and self.settings["codes"] != "scann":
            self._divide(queries[tuned_on], nearest[tuned_on], seed)
        length, fewest = 8 * k, None
        longest = max(16 * k, min(size // 4, max(size // 64, 4096)))
        while fewest is None and length < longest:
            length *= 2
            places = _places(self.shortlist.find(queries, length), nearest, sample)
            fewest = _fewest(places[tuned_on], recall)
        if fewest is None:
            logging.info("No shortlist of up to %d items reaches the recall %g; search is exact.", length, recall)
            self._forget()
            return
        # One more, because items that search among themselves find themselves.
        self.settings["shortlist"] = min(max(fewest, k) + 1, size)
        found = self.shortlist.find(queries[others], self.settings["shortlist"])
        self.tuned["measured"] = float(np.mean(np.isfinite(_places(found, nearest[others], sample[others]))))

    def _forget(self):
        """Makes search exact, without clusters."""
        self._centres = self._shortlist = None
        self.settings = {"dim": self.settings["dim"], "codes": self.settings["codes"], "shortlist": None}

    def _divide(self, queries, nearest, seed):
        """Divides the items into clusters, if queries find their `nearest` `(queries, k)` in a quarter of them."""
        dim, count = self.settings["dim"], int(np.sqrt(len(self)))
        sample = np.random.default_rng(seed).choice(len(self), min(_PER_CLUSTER * count, len(self)), replace=False)
        found = kmeans(truncate(self._rows[sample], dim), count, spherical=True, iterations=10, seed=seed)
        centres = found.centroids
        wanted = nearest_centres(truncate(self._rows[nearest.reshape(-1)], dim), centres).reshape(nearest.shape)
        order = np.argsort(-(truncate(queries, dim) @ centres.T), axis=1)
        places = np.take_along_axis(np.argsort(order, axis=1), wanted, axis=1)
        fewest = _fewest(places, (1 + self.tuned["recall"]) / 2)
        if fewest is not None and fewest <= count // 4:
            self._centres = centres
            self.settings.update(clusters=count, clusters_to_search=fewest)

    def _add(self, rows, ids):
        self._shortlist = None
        self.ids = super()._add(normalized(np.asarray(rows[:])), ids)
        if len(self) > GROWN * self.tuned["size"]:
            self._forget()
            self.tuned.update(size=len(self), measured=1.0)
            self._tune(seed=0)
        return self.ids

    def _remove(self, ids):
        self._shortlist = None
        return super()._remove(ids)

    def _save(self, folder):
        super()._save(folder)
        if self.settings["codes"] == "scann":
            self.shortlist.index.save(os.path.join(folder, _SHORTLIST))
        if self._centres is not None:
            write_array(os.path.join(folder, _CENTRES), self._centres)

    def _about(self, folder):
        return {"settings": self.settings, "tuned": self.tuned}

    @classmethod
    def load(
        cls, folder: str | os.PathLike, about: dict[str, Any], ids: list[str], labels: list[str] | None
    ) -> "FunnelIndex":
        rows = checked_rows(os.fspath(folder), read_rows(folder, ids))
        with reading(os.path.join(folder, "index.json"), "what a funnel index writes"):
            settings, tuned = about["settings"], about["tuned"]
            check_choice("codes", settings["codes"], CODES)
            checked_int("k", tuned["k"], 1)
            # Indexes of earlier versions have none.
            tuned = {"size": len(ids), **tuned}
            checked_int("size", tuned["size"], 1)
            check_search("exact", about["metric"], tuned["recall"])
            if settings["shortlist"] is not None:
                checked_int("shortlist", settings["shortlist"], 1)
            if not checked_int("dim", settings["dim"], 1) <= rows.shape[1] == about["dim"]:
                raise ValueError(f"dimensions up to {rows.shape[1]}, not {settings['dim']} of {about['dim']}")
            if "clusters" in settings or "clusters_to_search" in settings:
                clusters = checked_int("clusters", settings["clusters"], 1)
                if checked_int("clusters_to_search", settings["clusters_to_search"], 1) > clusters:
                    raise ValueError(f"at most {clusters} clusters, not {settings['clusters_to_search']}")
        centres = None
        if "clusters" in settings:
            path = os.path.join(folder, _CENTRES)
            centres = np.asarray(checked_rows(path, read_array(path)), np.float32)
            if centres.shape != (clusters, settings["dim"]):
                raise ValueError(f"{path}: expected shape {(clusters, settings['dim'])}. Received: {centres.shape}")
        index = cls(normalized(np.asarray(rows[:])), ids, labels, settings, tuned, centres)
        if settings["codes"] == "scann":
            index._shortlist = ScannShortlist(_load_scann(os.path.join(folder, _SHORTLIST), settings["dim"], len(ids)))
        return index


def _load_scann(folder, dim, size):
    path = os.path.join(folder, "index.json")
    about = read_json_object(path)
    ids, labels = read_items(folder)
    with reading(path, "the shortlist of the index"):
        if (about["method"], about["metric"], about["dim"], len(ids)) != ("scann", "cosine", dim, size):
            raise ValueError(f"{about['method']}, {about['metric']}, {about['dim']} dimensions, {len(ids)} items")
    return ScannIndex.load(folder, about, ids, labels)


def _places(shortlists, wanted, own):
    """The place of each of the `wanted` items `(queries, k)` in shortlists, not counting the items `own` `(queries,)`.

    It is infinite for items that are not there.
    """
    places = np.full(wanted.shape, np.inf)
    for row, (shortlist, items) in enumerate(zip(shortlists, wanted)):
        shortlist = shortlist[shortlist != own[row]]
        order = np.argsort(shortlist, kind="stable")
        at = order[np.minimum(np.searchsorted(shortlist, items, sorter=order), len(shortlist) - 1)]
        there = shortlist[at] == items
        places[row, there] = at[there]
    return places


def _fewest(places, recall):
    """The smallest length within which places `(queries, k)` reach the recall; None if the shortlists are too short.

    Unless the recall is 1, one standard error more is required, so that other queries reach it too.
    """

    def enough(length):
        shares = np.mean(places < length, axis=1)
        return shares.mean() - (recall < 1) * shares.std() / np.sqrt(len(shares)) >= recall

    lengths = np.unique(places[np.isfinite(places)]) + 1
    low, high = 0, len(lengths)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(lengths[middle]) else (middle + 1, high)
    return None if low == len(lengths) else int(lengths[low])
