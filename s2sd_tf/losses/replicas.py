"""Gathers the parts of a batch that a distribution strategy splits over its replicas."""

from collections.abc import Sequence
from typing import NamedTuple

import tensorflow as tf

from s2sd_tf.labels import exact_labels


class Batch(NamedTuple):
    """The inputs to the loss of a batch.

    Attributes:
        embedding: float `(batch, dim)`, the base embeddings.
        targets: each float `(batch, dim_k)`.
        frozen: the teachers that no gradient flows into, each float `(batch, dim)`.
        labels: integer `(batch,)`, or `(batch, n)` for graded relevance.
        rows: int32 `(2,)`, `(offset, count)` of the rows that belong to this replica; None: all rows.
        share: scalar, this replica's fraction of the batch times the number of replicas; None: 1.
    """

    embedding: tf.Tensor
    targets: list[tf.Tensor]
    frozen: list[tf.Tensor]
    labels: tf.Tensor
    rows: tf.Tensor | None = None
    share: tf.Tensor | None = None


def count() -> int:
    """The number of replicas that take a step together."""
    return tf.distribute.get_strategy().num_replicas_in_sync


def gather(batch: Batch, columns: int = 0) -> Batch:
    """Gathers the whole batch, in replica order, from this replica's part. With one replica, returns `batch` unchanged.

    The labels of an image are `columns`, see `checked_labels`.

    Differentiable in embedding and targets: the gradient of a row is the sum of its gradients on all replicas. So if
    every replica differentiates its own loss, the gradients add up to the gradient of the sum of the losses.
    """
    replica = tf.distribute.get_replica_context()
    if replica is None or replica.num_replicas_in_sync == 1:
        return batch
    own = tf.cast(replica.replica_id_in_sync_group, tf.int64)
    labels, _ = exact_labels("labels", batch.labels, columns=columns)
    size = tf.shape(labels)[0]

    def all_gather(rows):
        return tf.ensure_shape(replica.all_gather(rows, axis=0), [None, rows.shape[1]])

    # As few collectives as possible: each one waits for the network.
    known = all_gather(tf.concat([labels if columns else labels[:, None], tf.fill([size, 1], own)], axis=1))
    dims = [batch.embedding.shape[1], *(target.shape[1] for target in batch.targets)]
    embedding, *targets = tf.split(all_gather(tf.concat([batch.embedding, *batch.targets], axis=1)), dims, axis=1)
    frozen = []
    if batch.frozen:
        gathered = tf.stop_gradient(all_gather(tf.stop_gradient(tf.concat(batch.frozen, axis=1))))
        frozen = tf.split(gathered, [teacher.shape[1] for teacher in batch.frozen], axis=1)
    offset = tf.argmax(tf.equal(known[:, -1], own), output_type=tf.int32)
    share = size * replica.num_replicas_in_sync / tf.shape(known)[0]
    # A small last batch may leave a replica without images. It then gets one row, with share 0.
    rows = tf.stack([offset, tf.maximum(size, 1)])
    labels = known[:, :-1] if columns else known[:, 0]
    return Batch(embedding, targets, frozen, labels, rows, tf.cast(share, embedding.dtype))


def sum_gradients(gradients: Sequence[tf.Tensor | None]) -> list[tf.Tensor | None]:
    """Sums gradients over the replicas; None stays None."""
    replica = tf.distribute.get_replica_context()
    present = [gradient for gradient in gradients if gradient is not None]
    summed = iter(replica.all_reduce(tf.distribute.ReduceOp.SUM, present))
    return [None if gradient is None else next(summed) for gradient in gradients]
