"""Many indexes as one."""

import numpy as np

from s2sd_tf.evaluation.index import Index


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
            indices, similarities = index.nearest(queries, k)
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
