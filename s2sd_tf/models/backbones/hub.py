"""The image models of keras-hub as backbones: `hub:<preset>`."""

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from s2sd_tf.checks import check_choice, did_you_mean
from s2sd_tf.files import local_path
from s2sd_tf.keras_compat import IS_KERAS_3, keras
from s2sd_tf.models.backbones.layers import image_input
from s2sd_tf.models.backbones.vit import ClassTokenAndPositions
from s2sd_tf.untrusted import check_layers, read_json_object, reading

PREFIX = "hub:"
# How the names of these backbones are listed.
ANY = f"{PREFIX}<preset>"
TOKENS = ("grid", "class")


def is_hub(name: Any) -> bool:
    """Returns whether a backbone is one of keras-hub, by its name."""
    return isinstance(name, str) and name.startswith(PREFIX)


def hub_model(preset: str, input_shape: Sequence[int], weights: str | None = None, tokens: str = "grid") -> keras.Model:
    """Builds an image model of keras-hub, such as DINOv2, SigLIP, ViT or ResNet, from a preset.

    Of a model of images and texts, such as SigLIP, this is the image encoder.

    Args:
        preset: name of one of keras-hub's presets, which it downloads, or a folder that `save_to_preset` wrote.
        input_shape: `(height, width, 3)`. Models without fixed position embeddings, such as DINOv2, DINOv3 and
            convolutional ones, load their weights for other sizes than the preset's too.
        weights: None (random) or "preset", those of the preset.
        tokens: what a transformer outputs. "grid": the tokens of its patches, as feature maps. "class": one vector, the
            class token; if there is none, as in SigLIP, what the model itself pools.

    Returns:
        A functional model from `(batch, height, width, 3)` to `(batch, h, w, features)`, or to `(batch, features)` for
        "class".

    Raises:
        ImportError: keras-hub is missing; the message says what to install.
        FileNotFoundError: the folder has no preset.
        ValueError: an argument is invalid; the preset is unknown, cannot be downloaded, is damaged, or is not of an
            image model; or its weights are for images of another size.
    """
    name = f"{PREFIX}{preset}"
    if weights not in (None, "preset"):
        raise ValueError(f"weights: expected None or 'preset' for {name}. Received: {weights!r}")
    check_choice("tokens", tokens, TOKENS)
    images = image_input(input_shape)
    encoder = _encoder(preset, tuple(images.shape[1:]), weights is not None)
    return _from_images(encoder, images, tokens, name)


def hub_normalization(preset: str) -> dict[str, Any]:
    """Returns the normalisation of a preset's `ImageConverter`, as arguments of `data.Preprocessing`.

    Raises:
        ImportError: keras-hub is missing; the message says what to install.
        ValueError, FileNotFoundError: the preset is unknown, cannot be downloaded, is damaged, or has no
            `ImageConverter`.
    """
    hub, path = _find(preset)
    wanted = "a preset with an ImageConverter (image_converter.json), which its save_to_preset(folder) adds"
    with reading(f"backbone {PREFIX + preset!r}", wanted):
        converter = hub.layers.ImageConverter.from_preset(path)
        scale, offset = (
            np.broadcast_to(np.float64(default if value is None else value), 3)
            for value, default in ((converter.scale, 1.0), (converter.offset, 0.0))
        )
        if not (np.isfinite([scale, offset]).all() and (scale > 0).all()):
            raise ValueError(f"scale {converter.scale}, offset {converter.offset}")
    # The converter computes scale * x + offset of bytes; Preprocessing computes (x - mean) / std where white is 1.
    std = 1 / (255 * scale)
    return {"mean": tuple((-offset * std).tolist()), "std": tuple(std.tolist()), "channel_order": "rgb"}


_WANTED = "a preset of an image model that keras-hub can read, from a folder, its cache or a download"


def _find(preset):
    """Imports keras-hub. Returns it, and the name of one of its presets or a checked folder."""
    if not IS_KERAS_3 or importlib.util.find_spec("keras_hub") is None:
        raise ImportError(
            f"backbone {PREFIX + preset!r}: expected keras-hub, which needs the default stack and Python 3.11 or "
            "later: pip install 's2sd_tf[hub]'. Received: an installation without it"
        )
    import keras_hub

    presets = keras_hub.models.Backbone.presets
    if preset in presets:
        return keras_hub, preset
    path = local_path("backbone", preset)
    if not os.path.isdir(path):
        raise ValueError(
            f"backbone: expected {ANY}, with the name of a preset of keras-hub or a folder with one. "
            f"Received: {PREFIX + preset!r}{did_you_mean(preset, presets)}"
        )
    for file in ("config.json", "image_converter.json"):
        if file == "config.json" or os.path.exists(os.path.join(path, file)):
            with reading(f"backbone {PREFIX + preset!r}", _WANTED):
                check_layers(read_json_object(os.path.join(path, file)))
    return keras_hub, path


def _encoder(preset, shape, pretrained):
    """Returns the image encoder of a preset, for images of `shape` and in Keras's global precision."""
    hub, path = _find(preset)
    name, load = f"{PREFIX}{preset}", hub.models.Backbone.from_preset
    with reading(f"backbone {name!r}", _WANTED):
        whole = load(path, load_weights=False)
    # A model of images and texts has one.
    own = getattr(whole, "vision_encoder", None)
    found = own or whole
    config = found.get_config()
    key = next((key for key in ("image_shape", "input_shape") if key in config), None)
    if key is None or len(found.inputs) != 1:
        raise ValueError(f"backbone {name!r}: expected {_WANTED}. Received: a {type(found).__name__}")
    settings = {key: shape, "dtype": keras.mixed_precision.global_policy()}
    size = tuple(config[key])
    wanted = _WANTED if size in (shape, (None, None, 3)) else f"input_shape {size}, or another that its weights accept"
    with reading(f"backbone {name!r} for input_shape {shape}", wanted):
        if pretrained and own is None:
            return load(path, **settings)
        encoder = type(found).from_config({**config, **settings})
        if pretrained:
            encoder.set_weights(load(path).vision_encoder.get_weights())
        return encoder


def _from_images(encoder, images, tokens, name):
    """Returns the model from images to what `tokens` says."""
    if hasattr(getattr(encoder, "embeddings", None), "interpolated_position_embeddings"):
        features = _dinov2(encoder, images)
        return keras.Model(images, _from_tokens(features, encoder, images.shape[1:3], tokens, name), name=encoder.name)
    inner = _patch_tokens(encoder) if tokens == "grid" else None
    # Keras's own layers are taken out of the encoder, so that their BatchNorm can be frozen. The others stay inside:
    # as a whole an encoder can be saved, which some of keras-hub's layers cannot on their own.
    if inner is not None or all(type(layer).__module__.startswith("keras.") for layer in encoder.layers):
        images, features = encoder.inputs[0], encoder.output if inner is None else inner
    else:
        features = encoder(dict.fromkeys(encoder.input, images) if isinstance(encoder.input, dict) else images)
    shape = getattr(features, "shape", ())
    if len(shape) == 3:
        features = _from_tokens(features, encoder, images.shape[1:3], tokens, name)
    elif len(shape) != (4 if tokens == "grid" else 2):
        wanted = "a model with tokens or maps" if tokens == "grid" else "'grid', or a model with a class token"
        found = shape or f"a {type(features).__name__}"
        raise ValueError(f"tokens: expected {wanted}. Received: {tokens!r} for {name}, which outputs {found}")
    return keras.Model(images, features, name=encoder.name)


def _dinov2(encoder, images):
    """The tokens of a DINOv2 encoder, from its layers and an embedding layer that saves what it trained.

    keras-hub's own keeps the position embeddings twice, at the size of the preset and of the images, trains the latter
    and saves the former, which it updates only if the sum of all changes is negative.
    """
    own = encoder.embeddings
    layer = ClassTokenAndPositions(own.num_register_tokens, dtype=own.dtype_policy, name="embeddings")
    tokens = layer(own.patch_embeddings(images))
    layer.class_token.assign(own.cls_token)
    layer.positions.assign(own.interpolated_position_embeddings)
    if own.num_register_tokens:
        layer.register_tokens.assign(own.register_tokens)
    tokens, _ = encoder.encoder(tokens)
    return encoder.layernorm(tokens)


def _patch_tokens(encoder):
    """The tokens that an encoder pools; None if it outputs tokens or maps itself."""
    if len(getattr(encoder.output, "shape", ())) != 2:
        return None
    outputs = (layer.output for layer in reversed(encoder.layers))
    return next((output for output in outputs if len(getattr(output, "shape", ())) == 3), None)


def _from_tokens(features, encoder, sides, tokens, name):
    """The class token of tokens `(batch, tokens, features)`, or its last ones, those of the patches, as maps."""
    patch = getattr(encoder, "patch_size", None)
    patch = (patch, patch) if isinstance(patch, int) else tuple(patch or sides)
    rows, columns = (side // size for side, size in zip(sides, patch))
    _, count, dim = features.shape
    others = count - rows * columns
    if others < 0 or (tokens == "class" and not others):
        raise ValueError(
            f"tokens: expected a model with {'a class token' if tokens == 'class' else 'a token for each patch'}. "
            f"Received: {tokens!r} for {name}, which has {count} tokens for {rows} x {columns} patches"
        )
    # The shape that keras-hub states for SigLIP's tokens has one token more than there are, hence from the end.
    if tokens == "class":
        return features[:, 0]
    return keras.layers.Reshape((rows, columns, dim), name="map")(features[:, -rows * columns :])
