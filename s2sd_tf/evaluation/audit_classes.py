"""Classes that are confused with each other, and classes that fall into two groups.

Arguments are not checked here; `audit` has done that.
"""

from typing import NamedTuple

import numpy as np

from s2sd_tf.evaluation.embeddings import Rows
from s2sd_tf.evaluation.neighbors import Neighbors
from s2sd_tf.evaluation.rows import normalized, take
from s2sd_tf.evaluation.search import find_neighbors

# The least items in a group, the least share of its class, and the silhouette of clear groups: "reasonable structure",
# by Kaufman and Rousseeuw, "Finding Groups in Data", 1990, is above 0.5.
_LEAST, _SHARE, _SILHOUETTE = 3, 0.1, 0.5
_STEPS = 20


class Confusions(NamedTuple):
    """Pairs of classes that are each other's neighbours, the most confused first.

    Attributes:
        first, second: int64 `(pairs,)`, labels; `first` < `second`.
        shares: float64 `(pairs,)` in (0, 1], the mean of two shares: of the second class among the neighbours of the
            first, and of the first among those of the second. It is the same in both directions, and large classes
            count no more than small ones.
    """

    first: np.ndarray
    second: np.ndarray
    shares: np.ndarray


class SplitClass(NamedTuple):
    """A class that is two: its items fall into two groups that are far from each other.

    The groups are those of spherical 2-means. They are reported if their silhouette is at least 0.5, so that they are
    clear, and if the two group means are no closer to each other than one of them is to the mean of another class, so
    that they matter: in this space, they are as different as two classes. Silhouettes alone would also find two views
    of one thing, and distances alone would cut in two every class that has a near neighbour.

    Attributes:
        label: the label.
        groups: ascending positions of the items of both groups, int64, the larger group first.
        silhouette: mean silhouette of the items, in cosine distances.
        distance: cosine distance of the two group means.
        other_distance: smallest cosine distance of a group mean to the mean of another class.
    """

    label: int
    groups: tuple[np.ndarray, np.ndarray]
    silhouette: float
    distance: float
    other_distance: float


def confused_classes(found: Neighbors, labels: np.ndarray, counts: np.ndarray) -> Confusions:
    """Finds `Confusions`.

    Args:
        found: neighbours of the items among themselves, `(n, k)`.
        labels: int64 `(n,)`.
        counts: the number of neighbours that count, int64 `(n,)`.
    """
    classes, codes = np.unique(labels, return_inverse=True)
    counted = (np.arange(found.indices.shape[1]) < counts[:, None]) & (found.indices >= 0)
    items, _ = np.nonzero(counted)
    own, other = codes[items], codes[found.indices[counted]]
    totals = np.bincount(own, minlength=len(classes))
    apart = own != other
    pairs, number = np.unique(own[apart] * len(classes) + other[apart], return_counts=True)
    own, other = pairs // len(classes), pairs % len(classes)
    low, high = np.minimum(own, other), np.maximum(own, other)
    both, place = np.unique(low * len(classes) + high, return_inverse=True)
    shares = np.bincount(place, number / totals[own] / 2, len(both))
    order = np.argsort(-shares, kind="stable")
    return Confusions(classes[both // len(classes)][order], classes[both % len(classes)][order], shares[order])


def split_classes(rows: Rows, labels: np.ndarray, memory_mib: int) -> list[SplitClass]:
    """Finds the classes of at least 6 items that are two; see `SplitClass`.

    Args:
        rows: float rows `(n, dim)`.
        labels: int64 `(n,)`.
        memory_mib: memory for the search of the nearest class means.
    """
    classes, codes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    order, starts = np.argsort(codes, kind="stable"), np.cumsum(sizes) - sizes
    means = np.zeros((len(classes), rows.shape[1]), np.float32)
    clear = []
    for code, (start, size) in enumerate(zip(starts.tolist(), sizes.tolist())):
        members = order[start : start + size]
        its_rows = normalized(take(rows, members))
        means[code] = its_rows.mean(axis=0)
        if len(classes) > 1 and size >= 2 * _LEAST:
            side = _two_means(its_rows)
            if min(np.sum(side), np.sum(~side)) >= max(_LEAST, _SHARE * size):
                silhouette = _silhouette(its_rows, side)
                if silhouette >= _SILHOUETTE:
                    # The larger group first, or else that of the first item.
                    if (np.sum(side), side[0]) < (np.sum(~side), ~side[0]):
                        side = ~side
                    groups = [(members[part], its_rows[part].mean(axis=0)) for part in (side, ~side)]
                    clear.append((code, silhouette, groups))
    if not clear:
        return []
    centers = np.stack([center for _, _, groups in clear for _, center in groups])
    own = np.repeat([code for code, _, _ in clear], 2)
    nearest = find_neighbors(centers, means, 1, own, np.arange(len(classes)), memory_mib=memory_mib).similarities
    found = []
    for (code, silhouette, groups), near in zip(clear, nearest.reshape(-1, 2)):
        (one, center), (other, other_center) = groups
        distance = 1.0 - float(np.dot(*normalized(np.stack([center, other_center]))))
        other_distance = 1.0 - float(near.max())
        if distance >= other_distance:
            found.append(SplitClass(int(classes[code]), (one, other), silhouette, distance, other_distance))
    return sorted(found, key=lambda split: -split.silhouette)


def _two_means(rows):
    """Spherical 2-means of unit rows `(n, dim)`, from the sides of the principal direction: bool `(n,)`.

    The principal component is the relaxed solution of 2-means (Ding and He, ICML 2004), so nothing is drawn at random.
    """
    centered = rows - rows.mean(axis=0)
    direction = centered[np.argmax(np.einsum("ij,ij->i", centered, centered))]
    for _ in range(_STEPS):
        direction = centered.T @ (centered @ direction)
        length = np.linalg.norm(direction)
        if not length > 0:
            break
        direction = direction / length
    side = centered @ direction > 0
    for _ in range(_STEPS):
        if side.all() or not side.any():
            break
        one, other = normalized(np.stack([rows[side].sum(axis=0), rows[~side].sum(axis=0)]))
        moved = rows @ one > rows @ other
        if np.array_equal(moved, side):
            break
        side = moved
    return side


def _silhouette(rows, side):
    """Mean silhouette of two groups of unit rows in cosine distances, for groups of at least 2 items.

    The mean distance of a row to a group is 1 minus the product with the group's mean, so no pairs are needed.
    """
    values = np.empty(len(rows))
    for part in (side, ~side):
        inside, outside = rows[part].astype(np.float64), rows[~part].mean(axis=0, dtype=np.float64)
        # An item is at distance 0 from itself, which is not counted.
        own = (len(inside) - inside @ inside.sum(axis=0)) / (len(inside) - 1)
        other = 1.0 - inside @ outside
        largest = np.maximum(own, other)
        values[part] = np.where(largest > 1e-12, (other - own) / np.where(largest > 1e-12, largest, 1.0), 0.0)
    return float(values.mean())
