"""What the neighbours of an item say about it: duplicates, a wrong label, an outlier.

Arguments are not checked here; `audit` has done that.
"""

from typing import NamedTuple

import numpy as np

from s2sd_tf.evaluation.embeddings import Rows
from s2sd_tf.evaluation.neighbors import Neighbors
from s2sd_tf.evaluation.rows import take

# The least number of neighbours that an item is judged by, and of items with a median of their own.
_LEAST, _MEDIAN = 3, 5
# Pairs in a block, and pairs of neighbours in a block of items.
_BLOCK, _PAIRS = 4096, 2**21


class SimilarPairs(NamedTuple):
    """Pairs of similar items, the most similar first.

    Attributes:
        first, second: int64 `(pairs,)`, positions.
        similarities: float32 `(pairs,)`, cosine similarities.
        equal: bool `(pairs,)`, whether the embeddings are equal.
    """

    first: np.ndarray
    second: np.ndarray
    similarities: np.ndarray
    equal: np.ndarray


def reach(labels: np.ndarray, k: int) -> np.ndarray:
    """The number of neighbours to judge each item by: int64 `(n,)`; see `audit`."""
    _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return np.minimum(k, np.maximum(counts[inverse] - 1, _LEAST))


def near_pairs(found: Neighbors, rows: Rows, others: Rows, similarity: float, once: bool = False) -> SimilarPairs:
    """The pairs of an item and one of its neighbours whose similarity is at least `similarity`.

    Args:
        found: neighbours of the items.
        rows: rows of the items `(n, dim)`.
        others: rows that the neighbours are from.
        similarity: the least similarity.
        once: whether both are the same rows, so that every pair is found from both sides. It is returned once, with
            `first` < `second`.
    """
    first, place = np.nonzero((found.similarities >= np.float32(similarity)) & (found.indices >= 0))
    second, values = found.indices[first, place], found.similarities[first, place]
    if once:
        first, second = np.minimum(first, second), np.maximum(first, second)
        chosen = np.unique(first * rows.shape[0] + second, return_index=True)[1]
        first, second, values = first[chosen], second[chosen], values[chosen]
    order = np.lexsort((second, first, -values))
    first, second, values = first[order], second[order], values[order]
    equal = np.zeros(len(first), bool)
    for start in range(0, len(first), _BLOCK):
        block = slice(start, start + _BLOCK)
        equal[block] = np.all(take(rows, first[block]) == take(others, second[block]), axis=1)
    return SimilarPairs(first, second, values, equal)


def distinct_pairs(pairs: SimilarPairs, scores: np.ndarray) -> np.ndarray:
    """Positions of the items to leave out so that no pair is left, ascending int64.

    Every item that is left out is in a pair with one that is kept. Items in the most pairs are kept first, then those
    with low `scores`, then those at low positions.
    """
    rank, number = np.empty(len(scores), np.int64), np.bincount(np.concatenate(pairs[:2]), minlength=len(scores))
    rank[np.lexsort((scores, -number))] = np.arange(len(scores))
    ahead = rank[pairs.first] < rank[pairs.second]
    earlier = np.where(ahead, pairs.first, pairs.second)
    later = np.where(ahead, pairs.second, pairs.first)
    dropped: set[int] = set()
    # When an item's pairs come up, it is decided whether it is kept, as all items before it have had their turn.
    for i in np.argsort(rank[earlier], kind="stable"):
        if int(earlier[i]) not in dropped:
            dropped.add(int(later[i]))
    return np.array(sorted(dropped), np.int64)


def label_scores(found: Neighbors, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The evidence among the neighbours of every item for one other class, and that class; see `audit`.

    Args:
        found: neighbours of the items among themselves, `(n, k)`.
        labels: int64 `(n,)`.

    Returns:
        `(scores, suggested)`, float64 in [0, 1] and int64, `(n,)`; 0 and the own label where no other class has more
        than the own and than is usual, and for the only item of a class.
    """
    _, codes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    keys, given = [np.empty(0, np.int64)], [np.empty(0, np.float32)]
    for _, pairs, shares, _ in _class_shares(found, codes, sizes):
        keys.append(pairs[shares > 0])
        given.append(shares[shares > 0].astype(np.float32))
    known, usual = _medians(np.concatenate(keys), np.concatenate(given), sizes)
    scores, suggested = np.zeros(len(labels)), labels.copy()
    for block, pairs, shares, of_own in _class_shares(found, codes, sizes):
        at = np.minimum(np.searchsorted(known, pairs), len(known) - 1)
        expected = np.where(known[at] == pairs, usual[at], 0.0)
        # Rounded, so that of equally strong classes the nearest is the first.
        evidence = np.where(shares > 0, np.round(shares - of_own - expected, 6), 0.0)
        best = np.argmax(evidence, axis=1)[:, None]
        scores[block] = np.clip(np.take_along_axis(evidence, best, axis=1)[:, 0], 0.0, 1.0)
        nearest = labels[np.take_along_axis(found.indices[block], best, axis=1)[:, 0]]
        suggested[block] = np.where(scores[block] > 0, nearest, labels[block])
    return scores, suggested


def _class_shares(found, codes, sizes):
    """The shares of classes among the neighbours, in blocks of items.

    Args:
        found: neighbours, `(n, k)`.
        codes: the classes of the items, numbered from 0, int64 `(n,)`.
        sizes: the number of items of each class.

    Yields:
        `(block, pairs, shares, of_own)`: the slice of the items; for each neighbour `(items, k)` the number of the pair
        of the item's class and its own, and the share of its class if it is the first of another, else 0; and the share
        of the item's class `(items, 1)`.
    """
    places = np.arange(found.indices.shape[1])
    height = max(1, _PAIRS // len(places) ** 2)
    for start in range(0, len(codes), height):
        block = slice(start, start + height)
        there, own = found.indices[block], codes[block, None]
        of_neighbors = codes[there]
        weights = np.where(there >= 0, np.maximum(found.similarities[block].astype(np.float64), 0.0), 0.0)
        # For the class of each neighbour: how many neighbours count, their weight and that of the class, `(items, k)`.
        number = np.maximum(np.minimum(sizes[own] - 1, sizes[of_neighbors]), _LEAST)
        counted = places < number[:, :, None]
        same = of_neighbors[:, None, :] == of_neighbors[:, :, None]
        total = np.einsum("ij,icj->ic", weights, counted)
        votes = np.einsum("ij,icj->ic", weights, counted & same)
        shares = np.where((total > 0) & (there >= 0), votes / np.where(total > 0, total, 1.0), 0.0)
        of_own = np.max(shares, axis=1, where=of_neighbors == own, initial=0.0, keepdims=True)
        again = np.tril(same, -1).any(axis=2)
        shares = np.where(again | (of_neighbors == own) | (sizes[own] == 1), 0.0, shares)
        yield block, own * len(sizes) + of_neighbors, shares, of_own


def _medians(keys, given, sizes):
    """The median share over all items of a class, for the pairs of classes where it is not 0.

    Args:
        keys: int64 `(m,)`, the pairs of the shares that are not 0, as in `_class_shares`.
        given: these shares, `(m,)`.
        sizes: the number of items of each class.

    Returns:
        `(keys, medians)`: the keys, ascending, and never none.
    """
    order = np.lexsort((given, keys))
    pairs, starts, counts = np.unique(keys[order], return_index=True, return_counts=True)
    given = given[order]
    medians = np.zeros(len(pairs))
    size = sizes[pairs // len(sizes)]
    for middle in ((size - 1) // 2, size // 2):
        # The others of the class have a share of 0.
        place = middle - (size - counts)
        medians += np.where(place >= 0, given[starts + np.maximum(place, 0)], 0.0) / 2 if len(given) else 0.0
    some = medians > 0
    return np.append(pairs[some], np.iinfo(np.int64).max), np.append(medians[some], 0.0)


def outlier_scores(found: Neighbors, labels: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """How much farther from its neighbours an item is than the median item of its class, in robust deviations.

    The modified z-score of Iglewicz and Hoaglin, 1993, with the deviations of all classes together: few classes have
    enough items for their own, but their medians differ, as some classes are wide. A class of fewer than 5 items takes
    the median of all items. If more than half of the deviations are 0, their mean replaces their median, as proposed.

    Args:
        found: neighbours of the items among themselves, `(n, k)`.
        labels: int64 `(n,)`.
        counts: the number of neighbours that count, int64 `(n,)`.

    Returns:
        float64 `(n,)`, positive for items that are farther away; 0 if all are equally far.
    """
    counted = (np.arange(found.indices.shape[1]) < counts[:, None]) & (found.indices >= 0)
    similarities = np.where(counted, found.similarities, 0.0).sum(axis=1, dtype=np.float64)
    means = similarities / np.maximum(counted.sum(axis=1), 1)
    _, codes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    ascending, starts = means[np.lexsort((means, codes))], np.cumsum(sizes) - sizes
    medians = (ascending[starts + (sizes - 1) // 2] + ascending[starts + sizes // 2]) / 2
    medians[sizes < _MEDIAN] = np.median(means)
    deviations = medians[codes] - means
    # In a normal distribution both are the standard deviation.
    scale = 1.4826 * np.median(np.abs(deviations)) or 1.2533 * np.mean(np.abs(deviations))
    return deviations / scale if scale > 0 else np.zeros(len(means))
