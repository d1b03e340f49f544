"""The table of backbones, and what can be asked of one by its name."""

import inspect
import os
from collections.abc import Callable
from typing import NamedTuple

from s2sd_tf.models.backbones import applications, state_dict
from s2sd_tf.models.backbones.bn_inception import bn_inception
from s2sd_tf.models.backbones.conv_net import conv_blocks
from s2sd_tf.models.backbones.frozen_norm import check_kind, freeze_batch_norm
from s2sd_tf.models.backbones.googlenet import googlenet
from s2sd_tf.models.backbones.resnet import resnet50_v1_5
from s2sd_tf.models.backbones.torch_weights import load_state_dict
from s2sd_tf.models.backbones.vit import torchvision_state, vit_b16, vit_s16

_IDENTITY = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "channel_order": "rgb"}
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "channel_order": "rgb"}
# From -1 to 1.
_SYMMETRIC = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "channel_order": "rgb"}
# The bytes from -1 to 127/128.
_OF_128 = {"mean": (128 / 255,) * 3, "std": (128 / 255,) * 3, "channel_order": "rgb"}


def _caffe(*mean):
    """Bytes in BGR order without their mean, as Caffe's networks want them."""
    return {"mean": tuple(value / 255 for value in mean), "std": (1 / 255,) * 3, "channel_order": "bgr"}


class _Backbone(NamedTuple):
    """How a backbone is built, what its images are normalised by, and which PyTorch file its weights are in."""

    build: Callable
    normalization: dict
    torch_file: str = ""


_BACKBONES = {
    "conv_blocks": _Backbone(conv_blocks, _IDENTITY),
    "resnet50_v1_5": _Backbone(resnet50_v1_5, _IMAGENET, "torchvision's resnet50-0676ba61.pth"),
    "googlenet": _Backbone(googlenet, _SYMMETRIC, "torchvision's googlenet-1378be20.pth"),
    "bn_inception": _Backbone(bn_inception, _caffe(104, 117, 128), "bn_inception-52deb4733.pth of pretrainedmodels"),
    "vit_s16": _Backbone(vit_s16, _IMAGENET, "deit_small_patch16_224-cd65a155.pth of DeiT"),
    "vit_b16": _Backbone(vit_b16, _IMAGENET, "torchvision's vit_b_16-c867db91.pth"),
}
_BACKBONES.update((name, _Backbone(applications.builder(name), _IMAGENET)) for name in applications.APPLICATIONS)
_BACKBONES.update(
    (name, _BACKBONES[name]._replace(normalization=_OF_128)) for name in ("efficientnet_v2_s", "efficientnet_v2_m")
)
_BACKBONES["resnet50"] = _BACKBONES["resnet50"]._replace(normalization=_caffe(103.939, 116.779, 123.68))


def names():
    """Names that `get` knows."""
    return sorted(_BACKBONES)


def get(name, input_shape, weights=None, frozen_bn=None, **settings):
    """The backbone of that name: a model from images to feature maps, without pooling and classifier.

    Args:
        name: one of `names()`. "resnet50" is that of `keras.applications`, which takes its strides in the first 1 x 1
            convolution of a stage, and "resnet50_v1_5" that of torchvision and of the published S2SD code, which takes
            them in the 3 x 3 one.
        input_shape: `(height, width, channels)`; 3 channels for all but "conv_blocks".
        weights: None (random), "imagenet" (what `keras.applications` downloads) or a file: `.weights.h5` or `.h5` of
            Keras, or `.pth`, `.pt`, `.safetensors` or `.npz` with the parameters of the PyTorch model (torchvision's;
            `pretrainedmodels`' for "bn_inception"; also timm's for "resnet50_v1_5" and the transformers).
        frozen_bn: None, or the kind of `freeze_batch_norm`.
        **settings: further arguments of the backbone's function: `filters` and `pools` of "conv_blocks"; `depth`,
            `dim`, `heads` and `mlp_dim` of the transformers.

    Returns:
        A functional `keras.Model` from float images `(batch, height, width, channels)`, normalised as `normalization`
        says, to `(batch, h, w, features)`.

    Raises:
        FileNotFoundError: no file `weights`.
        ValueError: an unknown name, setting or kind; weights that cannot be had or do not fit; `frozen_bn` for a
            backbone without batch normalisation.
    """
    backbone = _lookup(name)
    unknown = set(settings) - set(inspect.signature(backbone.build).parameters)
    if unknown:
        raise ValueError(f"backbone: expected arguments that {name} has. Received: {sorted(unknown)}")
    if frozen_bn is not None:
        check_kind("frozen_bn", frozen_bn)
    if weights == "imagenet" and name in applications.APPLICATIONS:
        model = applications.pretrained(name, input_shape)
    else:
        if weights is not None:
            _check_weights(name, weights)
        model = backbone.build(input_shape, **settings)
        if weights is not None:
            _load(model, name, weights)
    return model if frozen_bn is None else freeze_batch_norm(model, frozen_bn)


def normalization(name, weights=None):
    """What images are to be normalised by for a backbone: (x - mean) / std, white being 1.

    It is what the pretrained weights were trained with, and the same without them; but "resnet50" with random weights
    gets ImageNet's mean and deviation in place of Caffe's. For "googlenet" it is 0.5 and 0.5: torchvision normalises by
    ImageNet's mean and deviation, and its pretrained model undoes that for these (`transform_input`). For "vit_s16"
    it is that of DeiT and DINO; the weights of timm named "augreg" want 0.5 and 0.5.

    Args:
        name: one of `names()`.
        weights: as for `get`.

    Returns:
        dict of "mean" and "std", 3 floats each in the order that comes out, and "channel_order", "rgb" or "bgr": the
        arguments of `data.Preprocessing`.

    Raises:
        ValueError: an unknown name.
    """
    found = _lookup(name).normalization
    return dict(_IMAGENET if name == "resnet50" and weights is None else found)


def _lookup(name):
    if name not in _BACKBONES:
        raise ValueError(f"backbone: expected one of {names()}. Received: {name!r}")
    return _BACKBONES[name]


def _check_weights(name, weights):
    torch_file = _BACKBONES[name].torch_file
    if weights == "imagenet":
        advice = f"a file, such as {torch_file} or what s2sd-convert makes of it" if torch_file else "None or a file"
        raise ValueError(f"weights: expected {advice} for {name}, which has none to download. Received: 'imagenet'")
    extension = os.path.splitext(weights)[1].lower()
    known = (".h5", *(state_dict.EXTENSIONS if torch_file else ()))
    if extension not in known:
        raise ValueError(f"weights: expected 'imagenet' or a file {', '.join(known)} for {name}. Received: {weights!r}")
    if not os.path.isfile(weights):
        raise FileNotFoundError(f"weights: expected a file. Received: {weights!r}")


def _load(model, name, path):
    if os.path.splitext(path)[1].lower() == ".h5":
        try:
            model.load_weights(path)
        # For a file that does not fit Keras raises ValueError, KeyError or OSError, by its version and the format.
        except (ValueError, KeyError, OSError) as error:
            raise ValueError(f"weights: expected Keras weights of {name}. Received: {path!r}: {error}") from error
        return
    state = state_dict.read_state_dict(path)
    try:
        if name.startswith("vit_"):
            state = torchvision_state(state, model.output_shape[1:3])
        load_state_dict(model, state)
    except ValueError as error:
        raise ValueError(f"weights: {path!r}: {error}") from error
