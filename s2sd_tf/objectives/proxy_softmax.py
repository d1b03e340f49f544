"""What classification objectives share: a softmax over the cosine similarities to the proxies."""

import tensorflow as tf

from s2sd_tf.objectives.base import ProxyObjective


class SoftmaxObjective(ProxyObjective):
    """Mean cross entropy of `logit_scale` times the cosine similarities, of which that to the own class may change."""

    cost = "B C"

    def compute(self, embeddings, labels, training):
        del training
        logits = tf.matmul(embeddings, self.unit_proxies(self.logit_scale), transpose_b=True)
        return softmax_loss(self.with_margin(logits, labels), labels)

    @property
    def logit_scale(self):
        """Factor on the similarities."""
        raise NotImplementedError

    def with_margin(self, logits, labels):
        """The logits `(batch, num_classes)` with those of the own classes made harder."""
        del labels
        return logits


def own_positions(labels):
    """Positions `(batch, 2)` of the own classes in a matrix `(batch, classes)`."""
    return tf.stack([tf.range(tf.shape(labels)[0], dtype=tf.int32), labels], axis=1)


def lower_own(logits, labels, amount):
    """Logits `(batch, classes)` with `amount` subtracted from those of the own classes."""
    amounts = tf.fill(tf.shape(labels), tf.constant(amount, logits.dtype))
    return tf.tensor_scatter_nd_sub(logits, own_positions(labels), amounts)


def softmax_loss(logits, labels):
    """Mean cross entropy of `logits` `(batch, classes)`; 0 for an empty batch."""
    positions = own_positions(labels)
    count = tf.maximum(tf.cast(tf.shape(labels)[0], logits.dtype), 1.0)

    # TensorFlow's own op is several times slower on a CPU where there are some hundred classes.
    @tf.custom_gradient
    def loss(values):
        logs = tf.nn.log_softmax(values)

        def gradient(upstream):
            shares = tf.exp(logs)
            return tf.tensor_scatter_nd_sub(shares, positions, tf.ones_like(shares[:, 0])) * (upstream / count)

        return -tf.reduce_sum(tf.gather_nd(logs, positions)) / count, gradient

    return loss(logits)
