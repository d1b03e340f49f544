"""PyTorch weights to a file of Keras weights, with proof that it is the same network."""

from typing import NamedTuple

import numpy as np

from s2sd_tf.files import replacing
from s2sd_tf.models.backbones.registry import get
from s2sd_tf.models.backbones.state_dict import read_state_dict

# torchvision's constructor, its arguments, and the module that gives what the backbone gives.
_REFERENCES = {
    "resnet50_v1_5": ("resnet50", {}, "layer4"),
    "googlenet": ("googlenet", {"aux_logits": False, "transform_input": False, "init_weights": False}, "inception5b"),
    "vit_b16": ("vit_b_16", {}, "encoder"),
}


class Converted(NamedTuple):
    """What came of a conversion.

    Attributes:
        parameters: int, numbers in the file, moving statistics included.
        features: float32 `(1, h, w, features)` of `probe_images`.
        difference: float, the largest difference of these to what torchvision's model gives, or None where it was not
            compared.
    """

    parameters: int
    features: np.ndarray
    difference: float


def convert_weights(name, weights, output, input_size=224):
    """Writes the Keras weights of a backbone from a PyTorch file, and loads them to see that they give the same.

    Where PyTorch and torchvision are installed and torchvision has the backbone, its features are compared too.

    Args:
        name: of the backbone.
        weights: file that `backbones.get` takes.
        output: `.weights.h5` file to write.
        input_size: int >= 1, side of the images; for transformers, the position embeddings are for it.

    Returns:
        `Converted`.

    Raises:
        FileNotFoundError: no file `weights`.
        ValueError: another extension of `output`, or weights that do not fit; see `backbones.get`.
        RuntimeError: what was written gives other features.
    """
    if not str(output).endswith(".weights.h5"):
        raise ValueError(f"output: expected a file .weights.h5. Received: {output!r}")
    shape = (input_size, input_size, 3)
    model = get(name, shape, weights)
    images = probe_images(shape)
    features = np.asarray(model(images, training=False))
    with replacing(output) as temporary:
        model.save_weights(temporary)
        written = np.asarray(get(name, shape, temporary)(images, training=False))
        if not np.allclose(written, features, rtol=0, atol=1e-5 * np.abs(features).max()):
            raise RuntimeError(f"output: expected the features of {weights!r} from what was written. Received: others")
    expected = _reference_features(name, weights, images)
    difference = None if expected is None else float(np.abs(features - expected).max())
    return Converted(model.count_params(), features, difference)


def probe_images(shape):
    """Fixed random normalised images `(1, *shape)`, float32."""
    return np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)


def _reference_features(name, weights, images):
    """What torchvision's model gives; None where there is none, or no PyTorch."""
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
        # Position embeddings of another size.
        return None
    if any(not key.startswith(("fc.", "heads.")) and not key.endswith("num_batches_tracked") for key in left_out):
        # timm's names.
        return None
    found = []
    reference.get_submodule(module).register_forward_hook(lambda module, inputs, output: found.append(output))
    with torch.no_grad():
        reference(torch.from_numpy(images.transpose(0, 3, 1, 2)))
    if name == "vit_b16":
        side = images.shape[1] // 16
        return found[0][:, 1:].reshape(1, side, side, -1).numpy()
    return found[0].permute(0, 2, 3, 1).numpy()
