"""Converts PyTorch weights to a file of Keras weights and checks that the features stay the same."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from s2sd_tf.files import check_room, local_path, replacing
from s2sd_tf.models.backbones.registry import get
from s2sd_tf.models.backbones.state_dict import read_state_dict

# torchvision's constructor, its arguments, and the module whose output equals the backbone's output.
_REFERENCES: dict[str, tuple[str, dict[str, Any], str]] = {
    "resnet50_v1_5": ("resnet50", {}, "layer4"),
    "googlenet": ("googlenet", {"aux_logits": False, "transform_input": False, "init_weights": False}, "inception5b"),
    "vit_b16": ("vit_b_16", {}, "encoder"),
}


class Converted(NamedTuple):
    """The result of a conversion.

    Attributes:
        parameters: how many numbers the file has, moving statistics included.
        features: features of `probe_images`, float32 `(1, h, w, features)`.
        difference: the largest difference between `features` and those of torchvision's model; None if they were not
            compared.
    """

    parameters: int
    features: np.ndarray
    difference: float | None


def convert_weights(
    name: str, weights: str | os.PathLike, output: str | os.PathLike, input_size: int = 224
) -> Converted:
    """Converts a PyTorch file to Keras weights of a backbone, and checks that the written file gives the same features.

    If PyTorch and torchvision are installed and torchvision has the backbone, compares the features with its model too.

    Args:
        name: name of the backbone.
        weights: file that `backbones.get` accepts.
        output: `.weights.h5` file to write.
        input_size: >= 1, side of the images; transformers get position embeddings for this size.

    Raises:
        FileNotFoundError: the file `weights` does not exist.
        ValueError: `output` has another extension, or the weights do not fit; see `backbones.get`.
        RuntimeError: the written file gives other features.
    """
    weights, output = local_path("weights", weights), local_path("output", output)
    if not output.endswith(".weights.h5"):
        raise ValueError(f"output: expected a .weights.h5 file. Received: {output!r}")
    shape = (input_size, input_size, 3)
    model = get(name, shape, weights)
    images = probe_images(shape)
    features = np.asarray(model(images, training=False))
    with replacing(output) as temporary:
        # HDF5 crashes if it runs out of room. It needs less than a page for what it says of a variable.
        check_room(temporary, 4 * model.count_params() + 4096 * len(model.variables))
        model.save_weights(temporary)
        written = np.asarray(get(name, shape, temporary)(images, training=False))
        if not np.allclose(written, features, rtol=0, atol=1e-5 * np.abs(features).max()):
            raise RuntimeError(f"output: expected the same features as from {weights!r}. Received: other features")
    expected = _reference_features(name, weights, images)
    difference = None if expected is None else float(np.abs(features - expected).max())
    return Converted(model.count_params(), features, difference)


def probe_images(shape: Sequence[int]) -> np.ndarray:
    """Returns a batch of one random, normalised image, float32 `(1, *shape)`; the same on every call."""
    return np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)


def _reference_features(name, weights, images):
    """Returns the features of torchvision's model; None if torchvision has none, or PyTorch is not installed."""
    if name not in _REFERENCES or str(weights).endswith(".h5"):
        return None
    try:
        import torch
        import torchvision
    except ImportError:
        return None
    constructor, settings, module = _REFERENCES[name]
    if name == "vit_b16":
        settings = {**settings, "image_size": images.shape[1]}
    reference = getattr(torchvision.models, constructor)(weights=None, **settings).eval()
    state = {key: torch.from_numpy(np.array(value)) for key, value in read_state_dict(weights).items()}
    try:
        left_out = reference.load_state_dict(state, strict=False).missing_keys
    except RuntimeError:
        # The position embeddings are for another size.
        return None
    if any(not key.startswith(("fc.", "heads.")) and not key.endswith("num_batches_tracked") for key in left_out):
        # The parameters have timm's names.
        return None
    found = []
    reference.get_submodule(module).register_forward_hook(lambda module, inputs, output: found.append(output))
    with torch.no_grad():
        reference(torch.from_numpy(images.transpose(0, 3, 1, 2)))
    if name == "vit_b16":
        side = images.shape[1] // 16
        return found[0][:, 1:].reshape(1, side, side, -1).numpy()
    return found[0].permute(0, 2, 3, 1).numpy()
