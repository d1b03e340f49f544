"""Tunes how much of a gallery a search must look at to reach a recall, measured on the gallery's own items."""

from collections.abc import Callable
from typing import Any

import numpy as np

from s2sd_tf.evaluation.exact import exact_neighbors
from s2sd_tf.evaluation.neighbors import Neighbors, without_own

# Number of queries to tune a search on. Its recall is measured on as many others.
_QUERIES = 1000


class RecallSample:
    """Items of a gallery that serve as queries to measure recall against exact search.

    Args:
        find: the search of the rows, a function from `(queries, k, **numbers)` to `(indices, similarities)`.
        rows: float32 `(n, dim)`, n >= 2, as the search has them.
        metric: "cosine" or "euclidean".
        k: number of neighbours to find, >= 1.
        recall: the recall to reach, in (0, 1].
        generator: draws the items.

    Attributes:
        k: `k`, at most n - 1.
    """

    def __init__(
        self,
        find: Callable[..., Any],
        rows: np.ndarray,
        metric: str,
        k: int,
        recall: float,
        generator: np.random.Generator,
    ) -> None:
        size = len(rows)
        self.k = min(k, size - 1)
        self._find = find
        self._rows = rows
        self._recall = recall
        self._keys = np.arange(size)
        self._sample = generator.choice(size, min(2 * _QUERIES, size), replace=False)
        keys = (self._sample, self._keys)
        worst = exact_neighbors(rows[self._sample], rows, self.k, metric, keys).similarities[:, -1]
        # Slightly lower, as the search rounds products differently.
        self._worst = worst - 1e-5 * np.maximum(1.0, np.abs(worst))
        self._tuned_on, self._others = np.array_split(np.arange(len(self._sample)), 2)

    def enough(self, **numbers: int) -> bool:
        """Whether the search reaches the recall with the given `reorder` and, for a tree, `leaves_to_search`."""
        shares = self._shares(self._tuned_on, **numbers)
        # Require one standard error more, so that other queries reach the recall too.
        return shares.mean() - (self._recall < 1) * shares.std() / np.sqrt(len(shares)) >= self._recall

    def measured(self, **numbers: int) -> float:
        """The recall on the queries that `enough` does not use."""
        return float(self._shares(self._others, **numbers).mean())

    def _shares(self, part, reorder, **leaves):
        queries = self._sample[part]
        found = self._find(self._rows[queries], self.k + 1, pre_reorder_num_neighbors=reorder, **leaves)
        found = without_own(Neighbors(*found), self.k, queries, self._keys)
        return np.mean(found.similarities >= self._worst[part, None], axis=1)


def smallest_numbers(sample: RecallSample, size: int, leaves: int | None = None) -> dict[str, int] | None:
    """Finds the smallest `reorder` and, for a tree, `leaves_to_search` that are enough for a sample.

    Args:
        sample: sample of the gallery's rows.
        size: number of rows in the gallery.
        leaves: number of leaves of the tree, or None without a tree.

    Returns:
        dict with "reorder" and, for a tree, "leaves_to_search"; None if the quantisation is too coarse for any.
    """
    numbers: dict[str, int] = {} if leaves is None else {"leaves_to_search": leaves}
    # Start with many candidates, and double their number while the quantisation is too coarse for it.
    reorder = min(max(200, 10 * sample.k), size)
    while not sample.enough(reorder=reorder, **numbers):
        if reorder >= size // 8:
            return None
        reorder *= 2
    if leaves is not None:
        numbers["leaves_to_search"] = smallest_leaves(
            leaves, lambda count: sample.enough(reorder=reorder, leaves_to_search=count)
        )
    fewer = _smallest(sample.k, reorder, lambda count: sample.enough(reorder=count, **numbers))
    return {"reorder": int(fewer or reorder), **numbers}


def smallest_leaves(leaves: int, enough: Callable[[int], bool]) -> int:
    """The smallest number of `leaves` to search that is enough, to within 5%. All leaves are enough."""
    found, high = _smallest(0, 1, enough), 1
    while found is None and high < leaves:
        high = min(2 * high, leaves)
        found = _smallest(high // 2, high, enough)
    return found or leaves


def _smallest(low, high, enough):
    """The smallest number in low..high that is enough, to within 5%; None if high is not enough."""
    if not enough(high):
        return None
    while high - low > max(1, high // 20):
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
