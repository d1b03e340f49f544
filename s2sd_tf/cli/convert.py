"""s2sd-convert: converts PyTorch weights of a backbone to Keras weights.

Checks the result: prints the features of a fixed image, and compares them with torchvision where that is installed.

Examples:
  s2sd-convert --backbone=resnet50_v1_5 --weights=resnet50.pth --output=resnet50.weights.h5
  s2sd-convert --backbone=vit_b16 --weights=vit.safetensors --output=vit.weights.h5 --input_size=384
"""

import numpy as np
from absl import flags

from s2sd_tf.cli import app

_BACKBONE = flags.DEFINE_string(
    "backbone", None, "Name of the backbone; see s2sd-train --list=backbones.", required=True
)
_WEIGHTS = app.define_path(
    "weights", None, "PyTorch state dict, a .pth, .pt, .safetensors or .npz file.", required=True
)
_OUTPUT = app.define_path("output", None, ".weights.h5 file to write.", required=True)
_INPUT_SIZE = flags.DEFINE_integer(
    "input_size", 224, "Side of the images in pixels. Transformers get position embeddings for it.", lower_bound=1
)


def main() -> None:
    """The program `s2sd-convert`."""
    app.run(_main)


def _main(_):
    from s2sd_tf.models.backbones.convert import convert_weights

    converted = convert_weights(_BACKBONE.value, _WEIGHTS.value, _OUTPUT.value, _INPUT_SIZE.value)
    features = converted.features
    print(f"{converted.parameters:,} parameters: {_OUTPUT.value}")
    norm = np.linalg.norm(features.astype(np.float64))
    print(f"features {features.shape[1:]} of a fixed image: mean {features.mean():.6g}, norm {norm:.6g}")
    if converted.difference is not None:
        most = np.abs(features).max()
        print(f"largest difference to torchvision: {converted.difference:.3g}, of features up to {most:.3g}")


if __name__ == "__main__":
    main()
