"""An index that searches many indexes as one."""

import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from s2sd_tf.evaluation.index import Index


class ShardedIndex(Index):
    """Searches the indexes of the parts of a gallery one by one and merges the results.

    `ids` and positions continue from one index to the next.

    Attributes:
        indexes: the indexes of the parts.
    """

    method = "sharded"

    def __init__(self, indexes: Sequence[Index]) -> None:
        kinds = {(index.metric, index.dim, index.min_score) for index in indexes}
        if len(kinds) != 1:
            raise ValueError(
                f"indexes: expected the same metric, dimension and min_score. Received: {sorted(kinds, key=str)}"
            )
        ids = [item for index in indexes for item in index.ids]
        parts = [index.labels for index in indexes if index.labels is not None]
        labels = [label for part in parts for label in part] if len(parts) == len(indexes) else None
        super().__init__(indexes[0].metric, indexes[0].dim, ids, labels)
        self.min_score = indexes[0].min_score
        self.indexes = list(indexes)

    def rows(self) -> np.ndarray:
        return np.concatenate([index.rows() for index in self.indexes])

    def _search(self, queries, k):
        parts, offset = [], 0
        for index in self.indexes:
            indices, similarities = index.nearest(queries, k)
            parts.append((np.where(indices < 0, -1, indices + offset), similarities))
            offset += len(index)
        indices, similarities = (np.concatenate(values, axis=1) for values in zip(*parts))
        order = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(indices, order, axis=1), np.take_along_axis(similarities, order, axis=1)

    def add(self, embeddings: Any, ids: Iterable[str], labels: Iterable[str] | None = None) -> None:
        raise ValueError("add: expected an index of one part. Received: many; add to one of `indexes` and save that")

    def remove(self, ids: Iterable[str]) -> None:
        raise ValueError("remove: expected an index of one part. Received: many; remove from one of `indexes`")

    def save(self, folder: str | os.PathLike) -> None:
        raise ValueError("save: expected an index of one part. Received: many; save each of `indexes` separately")
