"""The embeddings of one batch that is shared out over the replicas of a distribution strategy."""

from typing import NamedTuple

import tensorflow as tf


class Batch(NamedTuple):
    """What the loss of a batch is computed from.

    Attributes:
        embedding: float tensor `(batch, dim)`, the base embeddings.
        targets: list of float tensors `(batch, dim_k)`.
        features: float tensor `(batch, features)`, or None.
        labels: integer tensor `(batch,)`.
        rows: int32 tensor `(2,)`, `(offset, count)` of the rows that are this replica's own; None: all.
        share: scalar tensor, the own rows' part of the batch times the number of replicas; None: 1.
    """

    embedding: tf.Tensor
    targets: list
    features: tf.Tensor
    labels: tf.Tensor
    rows: tf.Tensor = None
    share: tf.Tensor = None


def count():
    """Number of replicas that take a step together."""
    return tf.distribute.get_strategy().num_replicas_in_sync


def gather(batch):
    """The batch of all replicas, in their order, from a replica's own part; the batch itself where there is but one.

    Differentiable in embedding and targets: the gradient of a row is the sum of what all replicas have for it. So where
    every replica takes the gradient of its own loss, their sum is that of the sum of the losses.
    """
    replica = tf.distribute.get_replica_context()
    if replica is None or replica.num_replicas_in_sync == 1:
        return batch
    own = tf.convert_to_tensor(replica.replica_id_in_sync_group, tf.int32)
    labels = tf.cast(tf.reshape(batch.labels, [-1]), tf.int32)
    size = tf.shape(labels)[0]

    def all_gather(rows):
        return tf.ensure_shape(replica.all_gather(rows, axis=0), [None, rows.shape[1]])

    # As few collectives as there can be: on a network each of them waits.
    known = all_gather(tf.stack([labels, tf.fill([size], own)], axis=1))
    dims = [batch.embedding.shape[1], *(target.shape[1] for target in batch.targets)]
    embedding, *targets = tf.split(all_gather(tf.concat([batch.embedding, *batch.targets], axis=1)), dims, axis=1)
    features = batch.features
    if features is not None:
        features = tf.stop_gradient(all_gather(tf.stop_gradient(features)))
    offset = tf.argmax(tf.equal(known[:, 1], own), output_type=tf.int32)
    share = size * replica.num_replicas_in_sync / tf.shape(known)[0]
    # A replica may be left without images by a small last batch: a row that does not count stands in.
    rows = tf.stack([offset, tf.maximum(size, 1)])
    return Batch(embedding, targets, features, known[:, 0], rows, tf.cast(share, embedding.dtype))


def sum_gradients(gradients):
    """Gradients, some of which may be None, summed over the replicas."""
    replica = tf.distribute.get_replica_context()
    present = [gradient for gradient in gradients if gradient is not None]
    summed = iter(replica.all_reduce(tf.distribute.ReduceOp.SUM, present))
    return [None if gradient is None else next(summed) for gradient in gradients]
