"""s2sd-convert: PyTorch weights of a backbone to Keras weights, checked by their features.

s2sd-convert --backbone=resnet50_v1_5 --weights=resnet50.pth --output=resnet50.weights.h5
"""

import numpy as np
from absl import flags

from s2sd_tf.cli import app
from s2sd_tf.models import backbones
from s2sd_tf.models.backbones.convert import convert_weights

_BACKBONE = flags.DEFINE_enum("backbone", None, backbones.names(), "Name of the backbone.", required=True)
_WEIGHTS = flags.DEFINE_string("weights", None, "PyTorch state dict: .pth, .pt, .safetensors or .npz.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, ".weights.h5 file to write.", required=True)
_INPUT_SIZE = flags.DEFINE_integer(
    "input_size", 224, "Side of the images; for transformers, the position embeddings are for it.", lower_bound=1
)


def main():
    app.run(_main)


def _main(_):
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
