"""The base of classification objectives: a softmax over the cosine similarities to the proxies."""

import tensorflow as tf

from s2sd_tf.objectives.base import ProxyObjective


class SoftmaxObjective(ProxyObjective):
    """Mean cross entropy of `logit_scale` times the cosine similarities to the proxies.

    A subclass may override `with_margin` to make the logit of the image's own class harder.
    """

    cost = "B C"

    def compute(self, embeddings: tf.Tensor, labels: tf.Tensor, training: bool) -> tf.Tensor:
        del training
        logits = tf.matmul(embeddings, self.unit_proxies(self.logit_scale), transpose_b=True)
        return softmax_loss(self.with_margin(logits, labels), labels)

    @property
    def logit_scale(self) -> float:
        """Factor on the similarities."""
        raise NotImplementedError

    def with_margin(self, logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        """Returns the logits `(batch, num_classes)`, with those of the images' own classes made harder."""
        del labels
        return logits


def own_positions(labels: tf.Tensor) -> tf.Tensor:
    """Returns int32 `(batch, 2)`: the position of each image's own class in a matrix `(batch, classes)`."""
    return tf.stack([tf.range(tf.shape(labels)[0], dtype=tf.int32), labels], axis=1)


def lower_own(logits: tf.Tensor, labels: tf.Tensor, amount: float) -> tf.Tensor:
    """Subtracts `amount` from the logit of each image's own class, in logits `(batch, classes)`."""
    amounts = tf.fill(tf.shape(labels), tf.constant(amount, logits.dtype))
    return tf.tensor_scatter_nd_sub(logits, own_positions(labels), amounts)


def softmax_loss(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """Computes the mean cross entropy of `logits` `(batch, classes)`; 0 for an empty batch."""
    positions = own_positions(labels)
    count = tf.maximum(tf.cast(tf.shape(labels)[0], logits.dtype), 1.0)

    # On a CPU, TensorFlow's own op is several times slower with some hundred classes. The exponentials are kept for the
    # gradient.
    @tf.custom_gradient
    def loss(values):
        shifted = values - tf.reduce_max(values, axis=1, keepdims=True)
        powers = tf.exp(shifted)
        sums = tf.reduce_sum(powers, axis=1, keepdims=True)
        losses = tf.math.log(sums[:, 0]) - tf.gather_nd(shifted, positions)

        def gradient(upstream):
            share = upstream / count
            return tf.tensor_scatter_nd_sub(powers * (share / sums), positions, tf.fill(tf.shape(labels), share))

        return tf.reduce_sum(losses) / count, gradient

    return loss(logits)
