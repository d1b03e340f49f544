"""Indexes that are built once, saved, and searched: exact, by ScaNN, and many of them as one."""

import hashlib
import importlib
import os
import re
import tempfile

import numpy as np
from absl import logging

from s2sd_tf.checks import checked_int
from s2sd_tf.evaluation import exact
from s2sd_tf.evaluation.embeddings import check_finished, read_items, read_rows, shard_folders, write_items
from s2sd_tf.evaluation.exact import METRICS
from s2sd_tf.evaluation.neighbors import (
    METHODS,
    Neighbors,
    check_choice,
    checked_rows,
    exact_neighbors,
    padded,
    without_own,
)
from s2sd_tf.files import check_replaceable, replacing, write_json
from s2sd_tf.untrusted import read_array, read_json_object, reading

# ScaNN's authors: brute force below the first size, quantisation without a tree below the second, a tree above.
BRUTE_FORCE_SIZE = 20_000
TREE_SIZE = 100_000
# Queries on which a search is tuned, and on as many others its recall is told.
_SAMPLE = 1000
# Rows that are looked at together.
_BLOCK = 65_536
_FORMAT = 1
# Numbers that each kind of search by ScaNN is tuned by.
_NUMBERS = {"brute_force": (), "hashing": ("reorder",), "tree": ("reorder", "leaves", "leaves_to_search")}


class Index:
    """A gallery that can be searched, with the id and, where given, the label of every item.

    Attributes:
        metric: "cosine" or "euclidean".
        dim: int, dimension of the embeddings.
        ids: list of str, by position.
        labels: list of str by position, or None.
    """

    method = None

    def __init__(self, metric, dim, ids, labels):
        self.metric = metric
        self.dim = dim
        self.ids = ids
        self.labels = labels

    def __len__(self):
        return len(self.ids)

    def search(self, queries, k):
        """`Neighbors` of float rows `(queries, dim)`: positions, of which `ids` and `labels` tell more.

        Raises:
            ValueError: queries of another dimension or with values that are not finite, or k < 1.
        """
        queries = checked_rows("queries", np.asarray(queries))
        if queries.shape[1] != self.dim:
            raise ValueError(f"queries: expected dimension {self.dim}. Received: {queries.shape[1]}")
        exact.check_finite("queries", queries)
        k = checked_int("k", k, 1)
        if not len(queries) or not len(self):
            return padded(np.empty((len(queries), 0), np.int64), np.empty((len(queries), 0), np.float32), k)
        return padded(*self._search(queries, min(k, len(self))), k)

    def add(self, embeddings, ids, labels=None):
        """Adds items; one whose id is there already takes its place.

        Args:
            embeddings: float array `(n, dim)`.
            ids: n different str.
            labels: n str, where the index has labels.

        Raises:
            ValueError: what does not fit.
        """
        rows, ids, labels = _checked(embeddings, ids, labels)
        if rows.shape[1] != self.dim:
            raise ValueError(f"embeddings: expected dimension {self.dim}. Received: {rows.shape[1]}")
        if (labels is None) != (self.labels is None):
            has, got = ("none" if value is None else "labels" for value in (self.labels, labels))
            raise ValueError(f"labels: expected them as the index has them: {has}. Received: {got}")
        before = dict(zip(self.ids, self.labels)) if labels is not None else None
        self.ids = self._add(rows, ids)
        if before is not None:
            before.update(zip(ids, labels))
            self.labels = [before[item] for item in self.ids]

    def remove(self, ids):
        """Removes the items of some ids; the positions of others may change.

        Raises:
            ValueError: an id that is not there, or no item would be left.
        """
        ids = [str(item) for item in ids]
        unknown = sorted(set(ids) - set(self.ids))
        if unknown or len(set(ids)) < len(ids):
            raise ValueError(f"ids: expected different ids of items of the index. Received: {unknown[:5] or ids[:5]}")
        if len(ids) == len(self):
            raise ValueError("ids: expected at least one item to be left. Received: all")
        before = dict(zip(self.ids, self.labels)) if self.labels is not None else None
        self.ids = self._remove(ids)
        if before is not None:
            self.labels = [before[item] for item in self.ids]

    def rows(self):
        """The embeddings of all items, float32 `(n, dim)`, by position; for the cosine metric they may be unit rows."""
        raise NotImplementedError

    def save(self, folder):
        """Writes the index as a folder, whole or not at all; `load_index` reads it.

        Raises:
            ValueError: a folder that is there and is something else.
        """
        check_replaceable("folder", folder, "index.json")
        with replacing(folder) as temporary:
            os.makedirs(temporary)
            self._save(temporary)
            write_items(temporary, self.ids, self.labels)
            about = {"format": _FORMAT, "method": self.method, "metric": self.metric, "dim": self.dim}
            write_json(os.path.join(temporary, "index.json"), {**about, "size": len(self), **self._about(temporary)})

    def _about(self, folder):
        return {}


class ExactIndex(Index):
    """Exact search over embeddings in memory or in a memory-mapped file."""

    method = "exact"

    def __init__(self, rows, metric, ids, labels):
        super().__init__(metric, rows.shape[1], ids, labels)
        self._rows = rows

    def rows(self):
        return np.asarray(self._rows[:], np.float32)

    def _search(self, queries, k):
        return exact_neighbors(queries, self._rows, k, self.metric)

    def _add(self, rows, ids):
        position = {item: i for i, item in enumerate(self.ids)}
        kept = np.array(self._rows[:], np.float32)
        new = [i for i, item in enumerate(ids) if item not in position]
        for i, item in enumerate(ids):
            if item in position:
                kept[position[item]] = rows[i]
        self._rows = np.concatenate([kept, np.asarray(rows, np.float32)[new]])
        return [*self.ids, *(ids[i] for i in new)]

    def _remove(self, ids):
        gone = set(ids)
        kept = [i for i, item in enumerate(self.ids) if item not in gone]
        self._rows = np.asarray(self._rows[:])[kept]
        return [self.ids[i] for i in kept]

    def _save(self, folder):
        np.save(os.path.join(folder, "embeddings.npy"), self.rows(), allow_pickle=False)

    @classmethod
    def _load(cls, folder, about, ids, labels):
        rows = read_rows(folder, ids)
        if rows.shape[1] != about["dim"]:
            raise ValueError(f"{folder}: expected rows of dimension {about['dim']}. Received: {rows.shape[1]}")
        return cls(rows, about["metric"], ids, labels)


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
        rows, ids, labels = _checked(embeddings, ids, labels)
        check_choice("metric", metric, METRICS)
        k = checked_int("k", k, 1)
        if not 0 < recall <= 1:
            raise ValueError(f"recall: expected a number in (0, 1]. Received: {recall!r}")
        rows = _prepared(rows, metric)
        tuned = {"recall": recall, "k": k, "measured": 1.0}
        settings = settings_for(len(rows), spilling=metric == "cosine")
        return cls._tuned(import_scann().scann_ops_pybind, rows, metric, ids, labels, settings, tuned, seed)

    @classmethod
    def _tuned(cls, ops, rows, metric, ids, labels, settings, tuned, seed=0):
        """An index of prepared rows, searched by ScaNN's own interface or by TensorFlow's operations (`ops`)."""
        searcher = build_searcher(ops, rows, metric, settings, tuned["k"])
        index = cls(searcher, metric, rows.shape[1], ids, labels, settings, tuned)
        if settings["kind"] != "brute_force":
            index._tune(ops, rows, np.random.default_rng(checked_int("seed", seed, 0)))
        return index

    def rows(self):
        with tempfile.TemporaryDirectory() as folder:
            self._searcher.serialize(folder)
            return read_array(os.path.join(folder, "dataset.npy"))

    def _search(self, queries, k):
        return self._found(_prepared(queries, self.metric), k)

    def _found(self, queries, k, **numbers):
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

    def _tune(self, ops, rows, generator):
        """Sets the smallest `leaves_to_search` and `reorder` that reach the recall, or brute force."""
        k, recall, size = self.tuned["k"], self.tuned["recall"], len(rows)
        k = min(k, size - 1)
        sample = generator.choice(size, min(2 * _SAMPLE, size), replace=False)
        keys = (sample, np.arange(size))
        worst = exact_neighbors(rows[sample], rows, k, self.metric, keys).similarities[:, -1]
        # A little below, as products are rounded otherwise elsewhere.
        worst = worst - 1e-5 * np.maximum(1.0, np.abs(worst))
        halves = np.array_split(np.arange(len(sample)), 2)

        def measure(part, **numbers):
            found = Neighbors(*self._found(rows[sample[part]], k + 1, **numbers))
            found = without_own(found, k, sample[part], keys[1])
            return np.mean(found.similarities >= worst[part, None], axis=1)

        def enough(**numbers):
            shares = measure(halves[0], **numbers)
            # One standard error above, so that other queries reach it too.
            return shares.mean() - (recall < 1) * shares.std() / np.sqrt(len(shares)) >= min(recall, 1.0)

        def smallest(low, high, works):
            """The smallest of low..high that works, to within a twentieth; None where high does not."""
            if not works(high):
                return None
            while high - low > max(1, high // 20):
                middle = (low + high) // 2
                low, high = (low, middle) if works(middle) else (middle, high)
            return high

        leaves = {"leaves_to_search": self.settings["leaves"]} if self.settings["kind"] == "tree" else {}
        # Many candidates first; as many as it takes where the quantisation is too coarse for these.
        reorder = min(max(200, 10 * k), size)
        while not enough(pre_reorder_num_neighbors=reorder, **leaves):
            if reorder >= size // 8:
                self._searcher = build_searcher(ops, rows, self.metric, {"kind": "brute_force"}, k)
                self.settings = {"kind": "brute_force"}
                return
            reorder *= 2
        if leaves:

            def reached(count):
                return enough(pre_reorder_num_neighbors=reorder, leaves_to_search=count)

            found = smallest(0, 1, reached)
            high = 1
            while found is None:
                high = min(2 * high, self.settings["leaves"])
                found = smallest(high // 2, high, reached)
            leaves = {"leaves_to_search": found}
        reorder = smallest(k, reorder, lambda count: enough(pre_reorder_num_neighbors=count, **leaves)) or reorder
        self.settings = {**self.settings, "reorder": int(reorder), **leaves}
        self.tuned["measured"] = float(measure(halves[1], pre_reorder_num_neighbors=reorder, **leaves).mean())

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
            anew = self._tuned(ops, self.rows(), self.metric, self.ids, self.labels, settings, {**self.tuned})
            self._searcher, self.settings, self.tuned = anew._searcher, anew.settings, anew.tuned
        if self._updater is None:
            # ScaNN maps every result where it knows ids, so what searches knows none.
            self._updater = type(self._searcher)(self._searcher.searcher, docids=list(self.ids))
        return self._updater

    def _save(self, folder):
        assets = os.path.join(folder, "scann")
        os.makedirs(assets)
        self._searcher.serialize(assets)
        # ScaNN writes where the files are; names alone let the folder be moved.
        path = os.path.join(assets, "scann_assets.pbtxt")
        with open(path) as file:
            text = file.read()
        with open(path, "w") as file:
            file.write(re.sub(r'asset_path: ".*/([^/"]+)"', r'asset_path: "\1"', text))

    def _about(self, folder):
        assets = os.path.join(folder, "scann")
        digests = _digests(assets, sorted(os.listdir(assets)))
        return {"settings": self.settings, "tuned": self.tuned, "sha256": digests}

    @classmethod
    def _load(cls, folder, about, ids, labels):
        scann = import_scann()
        assets = os.path.abspath(os.path.join(folder, "scann"))
        settings, tuned = _checked_settings(os.path.join(folder, "index.json"), about)
        with reading(assets, "what ScaNN writes"), open(os.path.join(assets, "scann_assets.pbtxt")) as file:
            found = re.findall(r'assets \{\s*asset_type: (\w+)\s*asset_path: "([^"]*)"\s*\}', file.read())
        for _, name in found:
            if os.path.basename(name) != name or name.endswith(".pkl"):
                raise ValueError(f"index: expected names of files in {assets!r}. Received: {name!r}")
        names = {"scann_config.pb", *(name for _, name in found)}
        # ScaNN's own code reads them, which ends the process where they are broken.
        with reading(assets, "the files as they were written"):
            written = about.get("sha256")
            there = _digests(assets, sorted({*names, "scann_assets.pbtxt"}))
            changed = written and [name for name, digest in there.items() if written.get(name) != digest]
            if changed:
                raise ValueError(f"another SHA-256 of {changed}")
        # ScaNN takes names as they were when it wrote them: it gets a folder with where the files are now. Nothing else
        # is in it, as it would unpickle a file of ids.
        with tempfile.TemporaryDirectory() as links, reading(assets, "what ScaNN writes"):
            for name in names:
                os.symlink(os.path.join(assets, name), os.path.join(links, name))
            with open(os.path.join(links, "scann_assets.pbtxt"), "w") as file:
                file.writelines(f'assets {{\n  asset_type: {a}\n  asset_path: "{links}/{b}"\n}}\n' for a, b in found)
            searcher = scann.scann_ops_pybind.load_searcher(links)
        return cls(searcher, about["metric"], about["dim"], ids, labels, settings, tuned)


class ShardedIndex(Index):
    """Indexes of parts of a gallery, searched one by one and merged: `ids` and positions go on from one to the next."""

    method = "sharded"

    def __init__(self, indexes):
        kinds = {(index.metric, index.dim) for index in indexes}
        if len(kinds) != 1:
            raise ValueError(f"indexes: expected one metric and dimension. Received: {sorted(kinds)}")
        ids = [item for index in indexes for item in index.ids]
        labels = None
        if all(index.labels is not None for index in indexes):
            labels = [label for index in indexes for label in index.labels]
        super().__init__(indexes[0].metric, indexes[0].dim, ids, labels)
        self.indexes = list(indexes)

    def rows(self):
        return np.concatenate([index.rows() for index in self.indexes])

    def _search(self, queries, k):
        parts, offset = [], 0
        for index in self.indexes:
            indices, similarities = index.search(queries, k)
            parts.append((np.where(indices < 0, -1, indices + offset), similarities))
            offset += len(index)
        indices, similarities = (np.concatenate(values, axis=1) for values in zip(*parts))
        order = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(indices, order, axis=1), np.take_along_axis(similarities, order, axis=1)

    def add(self, embeddings, ids, labels=None):
        raise ValueError("add: expected an index of one part. Received: many; add to one of `indexes`, and save that")

    def remove(self, ids):
        raise ValueError("remove: expected an index of one part. Received: many; remove from one of `indexes`")

    def save(self, folder):
        raise ValueError("save: expected an index of one part. Received: many; each of `indexes` is saved by itself")


def build_index(embeddings, ids=None, labels=None, method="scann", metric="cosine", recall=0.99, k=10, seed=0):
    """An `Index` of a gallery.

    Args:
        embeddings: float rows `(n, dim)`.
        ids: n different str, or None for the positions.
        labels: n str, or None.
        method: "exact" or "scann".
        metric: "cosine" or "euclidean".
        recall, k, seed: for "scann": see `ScannIndex.build`.

    Raises:
        ValueError: a bad argument.
    """
    check_choice("method", method, METHODS)
    if method == "scann":
        return ScannIndex.build(embeddings, ids, labels, metric, recall, k, seed)
    check_choice("metric", metric, METRICS)
    rows, ids, labels = _checked(embeddings, ids, labels)
    return ExactIndex(rows, metric, ids, labels)


def load_index(folder):
    """The `Index` that `save` wrote in `folder`, or all that are in its shards as one.

    Raises:
        FileNotFoundError: no index there.
        ValueError: one of a later format, or one that is broken; the message names the file.
    """
    path = os.path.join(folder, "index.json")
    if not os.path.exists(path):
        parts = [os.path.join(shard, "index") for shard in shard_folders(folder)]
        # A shard none of whose images could be embedded has no index.
        parts = [part for part in parts if os.path.exists(part) or read_items(os.path.dirname(part))[0]]
        if not parts or not all(os.path.exists(part) for part in parts):
            raise FileNotFoundError(
                f"index: expected a folder with an index, or with shards that have one each. Received: {folder!r}"
            )
        check_finished(folder)
        with reading(folder, "shards with indexes of one kind"):
            return ShardedIndex([load_index(part) for part in parts])
    about = read_json_object(path)
    if about.get("format") != _FORMAT:
        raise ValueError(f"index: expected format {_FORMAT}. Received: {about.get('format')!r} in {path!r}")
    kinds = {cls.method: cls for cls in (ExactIndex, ScannIndex)}
    with reading(path, "what an index writes"):
        check_choice("method", about["method"], tuple(kinds))
        check_choice("metric", about["metric"], METRICS)
        checked_int("dim", about["dim"], 1)
    ids, labels = read_items(folder)
    if about.get("size") != len(ids):
        raise ValueError(f"{path}: expected the size of its items, {len(ids)}. Received: {about.get('size')!r}")
    return kinds[about["method"]]._load(folder, about, ids, labels)


def settings_for(size, spilling):
    """How ScaNN is to search a gallery of that size, before it is tuned: see `ScannIndex.settings`."""
    if size < BRUTE_FORCE_SIZE:
        return {"kind": "brute_force"}
    if size < TREE_SIZE:
        return {"kind": "hashing", "reorder": 200}
    leaves = int(2 * np.sqrt(size))
    numbers = {"leaves": leaves, "leaves_to_search": max(1, leaves // 10), "reorder": 200}
    return {"kind": "tree", **numbers, "spilling": spilling}


def index_for_graphs(index, k):
    """`(searcher, metric, numbers)`: an index's items in a searcher of TensorFlow's operations, whose state can be
    saved, and what it is to be called with to find k of them.

    Raises:
        ImportError: ScaNN is missing or does not fit TensorFlow.
    """
    ops = import_scann("scann.scann_ops.py.scann_ops")
    rows = _prepared(index.rows(), index.metric)
    tuned = dict(getattr(index, "tuned", {"recall": 0.99, "k": k}))
    settings = {"kind": "brute_force"} if index.method == "exact" else settings_for(len(rows), spilling=False)
    tuned = {**tuned, "measured": 1.0}
    built = ScannIndex._tuned(ops, rows, index.metric, index.ids, index.labels, settings, tuned)
    return built._searcher, index.metric, built._numbers(k)


def build_searcher(ops, rows, metric, settings, k):
    """ScaNN's searcher of prepared rows.

    Args:
        ops: ScaNN's module of its own interface, or of TensorFlow's operations; the latter, and the Euclidean metric,
            know no spilling.
        rows: float32 array `(n, dim)`, of unit length for the cosine metric.
        metric, settings: see `ScannIndex`.
        k: int >= 1.
    """
    builder = ops.builder(rows, min(k, len(rows)), "dot_product" if metric == "cosine" else "squared_l2")
    if settings["kind"] == "brute_force":
        return builder.score_brute_force().build()
    if settings["kind"] == "tree":
        builder = builder.tree(
            settings["leaves"],
            settings["leaves_to_search"],
            training_sample_size=min(len(rows), 250_000),
            **({"soar_lambda": 1.5} if settings["spilling"] else {}),
        )
    # The threshold is for products: errors along a row count more, as those decide whether it is found.
    threshold = {"anisotropic_quantization_threshold": 0.2} if metric == "cosine" else {}
    return builder.score_ah(2, **threshold).reorder(min(settings["reorder"], len(rows))).build()


def import_scann(module="scann"):
    """The module `scann`, or one of its own.

    Raises:
        ImportError: it is missing or was built for another TensorFlow; the message says what to install.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:  # a library that does not load raises TensorFlow's errors too
        raise ImportError(
            "method='scann' needs ScaNN built for this TensorFlow: `pip install scann==1.4.2` for TensorFlow 2.20, "
            "`pip install scann==1.3.0` for 2.15. Or use method='exact'."
        ) from error


def _digests(folder, names):
    """SHA-256 of some files in a folder, by name."""
    found = {}
    for name in names:
        digest = hashlib.sha256()
        with open(os.path.join(folder, name), "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
        found[name] = digest.hexdigest()
    return found


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
    rows = np.asarray(rows[:])
    return exact.normalized(rows) if metric == "cosine" else np.ascontiguousarray(rows, np.float32)


def _checked(embeddings, ids, labels):
    rows = checked_rows("embeddings", embeddings)
    if not rows.shape[0]:
        raise ValueError("embeddings: expected at least one row. Received: none")
    for start in range(0, rows.shape[0], _BLOCK):
        exact.check_finite("embeddings", np.asarray(rows[start : start + _BLOCK]), start)
    ids = [str(i) for i in range(rows.shape[0])] if ids is None else [str(item) for item in ids]
    labels = None if labels is None else [str(label) for label in labels]
    for name, values in (("ids", ids), ("labels", labels)):
        if values is not None and len(values) != rows.shape[0]:
            raise ValueError(f"{name}: expected one for each of {rows.shape[0]} rows. Received: {len(values)}")
    if len(set(ids)) < len(ids):
        raise ValueError("ids: expected different ones. Received: duplicates")
    return rows, ids, labels
