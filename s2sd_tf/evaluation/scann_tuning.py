"""How much of a gallery ScaNN has to look at for a recall, measured on the gallery's own items."""

import numpy as np

from s2sd_tf.evaluation.exact import exact_neighbors
from s2sd_tf.evaluation.neighbors import Neighbors, without_own

# Queries on which a search is tuned; on as many others its recall is measured.
_QUERIES = 1000


class RecallSample:
    """Items of a gallery as queries, with what exact search finds for them.

    Args:
        find: function `(queries, k, **numbers)` to `(indices, similarities)`, ScaNN's search of the rows.
        rows: float32 `(n, dim)`, n >= 2, as ScaNN was given them.
        metric: "cosine" or "euclidean".
        k: int >= 1, neighbours of which it is the recall.
        recall: float in (0, 1], that is to be reached.
        generator: `np.random.Generator`.

    Attributes:
        k: `k`, or as many others as there are.
    """

    def __init__(self, find, rows, metric, k, recall, generator):
        size = len(rows)
        self.k = min(k, size - 1)
        self._find = find
        self._rows = rows
        self._recall = recall
        self._keys = np.arange(size)
        self._sample = generator.choice(size, min(2 * _QUERIES, size), replace=False)
        keys = (self._sample, self._keys)
        worst = exact_neighbors(rows[self._sample], rows, self.k, metric, keys).similarities[:, -1]
        # A little below, as products are rounded otherwise elsewhere.
        self._worst = worst - 1e-5 * np.maximum(1.0, np.abs(worst))
        self._tuned_on, self._others = np.array_split(np.arange(len(self._sample)), 2)

    def enough(self, **numbers):
        """Whether the recall is reached with `reorder` and, for a tree, `leaves_to_search`."""
        shares = self._shares(self._tuned_on, **numbers)
        # One standard error above, so that other queries reach it too.
        return shares.mean() - (self._recall < 1) * shares.std() / np.sqrt(len(shares)) >= self._recall

    def measured(self, **numbers):
        """The recall on the queries that `enough` does not see, float."""
        return float(self._shares(self._others, **numbers).mean())

    def _shares(self, part, reorder, **leaves):
        queries = self._sample[part]
        found = self._find(self._rows[queries], self.k + 1, pre_reorder_num_neighbors=reorder, **leaves)
        found = without_own(Neighbors(*found), self.k, queries, self._keys)
        return np.mean(found.similarities >= self._worst[part, None], axis=1)


def smallest_numbers(sample, size, leaves=None):
    """The smallest `reorder` and, for a tree of so many leaves, `leaves_to_search` that are enough for a sample.

    Args:
        sample: `RecallSample` of `size` rows.

    Returns:
        dict of ints; None where the quantisation is too coarse for any.
    """
    numbers = {} if leaves is None else {"leaves_to_search": leaves}
    # Many candidates first; as many as it takes where the quantisation is too coarse for these.
    reorder = min(max(200, 10 * sample.k), size)
    while not sample.enough(reorder=reorder, **numbers):
        if reorder >= size // 8:
            return None
        reorder *= 2
    if leaves is not None:
        numbers["leaves_to_search"] = _smallest_leaves(
            leaves, lambda count: sample.enough(reorder=reorder, leaves_to_search=count)
        )
    fewer = _smallest(sample.k, reorder, lambda count: sample.enough(reorder=count, **numbers))
    return {"reorder": int(fewer or reorder), **numbers}


def _smallest_leaves(leaves, enough):
    found, high = _smallest(0, 1, enough), 1
    while found is None:
        high = min(2 * high, leaves)
        found = _smallest(high // 2, high, enough)
    return found


def _smallest(low, high, enough):
    """The smallest of low..high that is enough, to within a twentieth; None where high is not."""
    if not enough(high):
        return None
    while high - low > max(1, high // 20):
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
