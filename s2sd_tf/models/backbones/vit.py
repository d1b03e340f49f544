"""Vision transformers."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from s2sd_tf.keras_compat import keras
from s2sd_tf.models.backbones.layers import image_input

PATCH = 16
# From the names in timm (also DeiT and DINO) and in older torchvision versions to those in current torchvision.
RENAMED = (
    (r"^cls_token$", "class_token"),
    (r"^pos_embed$", "encoder.pos_embedding"),
    (r"^patch_embed\.proj\.", "conv_proj."),
    (r"^norm\.", "encoder.ln."),
    (r"^blocks\.(\d+)\.", r"encoder.layers.encoder_layer_\1."),
    (r"\.norm([12])\.", r".ln_\1."),
    (r"\.attn\.qkv\.", ".self_attention.in_proj_"),
    (r"\.attn\.proj\.", ".self_attention.out_proj."),
    (r"\.mlp\.(fc1|linear_1)\.", ".mlp.0."),
    (r"\.mlp\.(fc2|linear_2)\.", ".mlp.3."),
)


def vit_b16(
    input_shape: Sequence[int], depth: int = 12, dim: int = 768, heads: int = 12, mlp_dim: int = 3072
) -> keras.Model:
    """Builds ViT-B/16 (Dosovitskiy et al., ICLR 2021) without dropout; it outputs the normalised patch tokens.

    Its layers load the parameters of torchvision and timm by name. It is implemented here because KerasHub's
    transformers need Keras 3 and a different TensorFlow than ScaNN, and KerasCV has only the detector variant (ViTDet).

    Args:
        input_shape: `(height, width, 3)`, multiples of 16. There is a position embedding for each 16 x 16 patch.
        depth: >= 1, the number of blocks.
        dim: >= 1, features of a token, a multiple of `heads`.
        heads: >= 1, attention heads.
        mlp_dim: >= 1, units of the hidden layer of each block.

    Returns:
        A model from `(batch, height, width, 3)` to `(batch, height / 16, width / 16, dim)`.

    Raises:
        ValueError: `input_shape` is invalid, or `dim` is not a multiple of `heads`.
    """
    return _vit(input_shape, depth, dim, heads, mlp_dim, "vit_b16")


def vit_s16(
    input_shape: Sequence[int], depth: int = 12, dim: int = 384, heads: int = 6, mlp_dim: int = 1536
) -> keras.Model:
    """Builds ViT-S/16 (DeiT-S of Touvron et al., ICML 2021); arguments and output shape as for `vit_b16`."""
    return _vit(input_shape, depth, dim, heads, mlp_dim, "vit_s16")


def torchvision_state(state: Mapping[str, np.ndarray], grid: tuple[int, int]) -> dict[str, np.ndarray]:
    """Renames the parameters of a vision transformer to torchvision's names and fits the position embeddings to `grid`.

    Args:
        state: parameters under the names of torchvision or timm.
        grid: `(rows, columns)` of patches. If `state` has position embeddings for another grid, which must be square,
            they are interpolated (bicubic), as in the paper for other resolutions.

    Returns:
        The renamed parameters.
    """
    renamed = {}
    for name, array in state.items():
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        renamed[name] = array
    positions = renamed.get("encoder.pos_embedding")
    if positions is not None and positions.ndim == 3:
        count = positions.shape[1] - 1
        side = round(count**0.5)
        if count > 0 and side * side == count and (side, side) != tuple(grid):
            maps = positions[:, 1:].reshape(1, side, side, -1).astype(np.float32)
            maps = tf.image.resize(maps, grid, "bicubic", antialias=True).numpy().reshape(1, grid[0] * grid[1], -1)
            renamed["encoder.pos_embedding"] = np.concatenate([positions[:, :1], maps], axis=1)
    return renamed


@keras.utils.register_keras_serializable("s2sd_tf")
class ClassTokenAndPositions(keras.layers.Layer):
    """Prepends a learned class token to the patches and adds a learned embedding for each position.

    `(batch, patches, dim)` to `(batch, 1 + registers + patches, dim)`.

    Args:
        registers: >= 0, the number of learned tokens without a position between the class token and the patches
            (Darcet et al., ICLR 2024).
    """

    def __init__(self, registers: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.registers = registers

    def build(self, input_shape: Sequence[Any]) -> None:
        _, patches, dim = input_shape
        self.class_token = self.add_weight(name="class_token", shape=(1, 1, dim), initializer="zeros")
        self.positions = self.add_weight(name="positions", shape=(1, 1 + patches, dim), initializer=_initializer())
        if self.registers:
            self.register_tokens = self.add_weight(
                name="register_tokens", shape=(1, self.registers, dim), initializer="zeros"
            )
        super().build(input_shape)

    def call(self, patches: tf.Tensor) -> tf.Tensor:
        def repeated(token):
            return tf.tile(tf.cast(tf.convert_to_tensor(token), patches.dtype), [tf.shape(patches)[0], 1, 1])

        tokens = tf.concat([repeated(self.class_token), patches], axis=1)
        tokens += tf.cast(tf.convert_to_tensor(self.positions), patches.dtype)
        if self.registers:
            tokens = tf.concat([tokens[:, :1], repeated(self.register_tokens), tokens[:, 1:]], axis=1)
        return tokens

    def compute_output_shape(self, input_shape: Sequence[Any]) -> tuple[Any, ...]:
        return (input_shape[0], 1 + self.registers + input_shape[1], input_shape[2])

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "registers": self.registers}


def _vit(input_shape, depth, dim, heads, mlp_dim, name):
    if dim % heads:
        raise ValueError(f"dim: expected a multiple of heads, {heads}. Received: {dim}")
    images = image_input(input_shape, PATCH)
    if any(side % PATCH for side in images.shape[1:3]):
        raise ValueError(f"input_shape: expected sides that are multiples of {PATCH}. Received: {input_shape!r}")
    patches = keras.layers.Conv2D(dim, PATCH, PATCH, kernel_initializer=_initializer(), name="conv_proj")(images)
    rows, columns = patches.shape[1:3]
    tokens = keras.layers.Reshape((rows * columns, dim), name="patches")(patches)
    tokens = ClassTokenAndPositions(name="encoder")(tokens)
    for block in range(depth):
        tokens = _block(tokens, dim, heads, mlp_dim, f"encoder.layers.encoder_layer_{block}")
    tokens = _layer_norm(tokens, "encoder.ln")
    patches = keras.layers.Cropping1D((1, 0), name="without_class_token")(tokens)
    return keras.Model(images, keras.layers.Reshape((rows, columns, dim), name="map")(patches), name=name)


def _block(tokens, dim, heads, mlp_dim, name):
    attention = keras.layers.MultiHeadAttention(
        heads, dim // heads, kernel_initializer=_initializer(), name=f"{name}.self_attention"
    )
    normalized = _layer_norm(tokens, f"{name}.ln_1")
    tokens = keras.layers.Add(name=f"{name}.attended")([tokens, attention(normalized, normalized)])
    hidden = _dense(_layer_norm(tokens, f"{name}.ln_2"), mlp_dim, f"{name}.mlp.0", activation="gelu")
    return keras.layers.Add(name=name)([tokens, _dense(hidden, dim, f"{name}.mlp.3")])


def _layer_norm(tokens, name):
    return keras.layers.LayerNormalization(epsilon=1e-6, name=name)(tokens)


def _dense(tokens, units, name, activation=None):
    return keras.layers.Dense(units, activation=activation, kernel_initializer=_initializer(), name=name)(tokens)


def _initializer():
    # As in timm. Keras's default would count the heads of an attention kernel as inputs.
    return keras.initializers.TruncatedNormal(stddev=0.02)
