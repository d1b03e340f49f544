"""s2sd-export: writes the encoder of a finished run as a SavedModel, or for ONNX or LiteRT.

The SavedModel embeds images without this package. Its signature serving_default takes float images in [0, 1], pixels
takes uint8 images, encoded_images takes the bytes of image files. ONNX and LiteRT files take float images of any size,
in [0, 1].

Examples:
  s2sd-export --workdir=runs/omniglot
  s2sd-export --workdir=runs/omniglot --output=encoder
  s2sd-export --workdir=runs/omniglot --format=onnx --output=encoder.onnx
"""

import os

from absl import flags

from s2sd_tf.cli import app, configs

_WORKDIR = app.define_path("workdir", None, "Folder of a finished run.", required=True)
_FORMAT = flags.DEFINE_enum(
    "format", "savedmodel", ["savedmodel", "onnx", "litert"], "What to write: a SavedModel, or an ONNX or LiteRT file."
)
_OUTPUT = app.define_path(
    "output",
    None,
    "Folder or file to write. By default saved_model, encoder.onnx or encoder.tflite in the work directory.",
)
_WHITEN = flags.DEFINE_integer(
    "whiten",
    None,
    "Whiten the embeddings, with this number of dimensions: PCA whitening, fitted to the run's training images.",
    lower_bound=1,
)
_REGISTER = configs.define_register()


def main() -> None:
    """The program `s2sd-export`."""
    app.run(_main)


def _main(_):
    from s2sd_tf.checks import check_file_to_write
    from s2sd_tf.evaluation import Whitening
    from s2sd_tf.export import export_encoder
    from s2sd_tf.export.files import import_tf2onnx
    from s2sd_tf.files import check_replaceable, only_writer
    from s2sd_tf.training import load_run
    from s2sd_tf.training.datasets import load_data
    from s2sd_tf.training.embedding import embed

    if _WHITEN.value and not _OUTPUT.value:
        raise ValueError("--whiten: expected --output too, so that the run keeps its own. Received: none")
    if _FORMAT.value == "onnx":
        import_tf2onnx()
    name = {"savedmodel": "saved_model", "onnx": "encoder.onnx", "litert": "encoder.tflite"}[_FORMAT.value]
    output = _OUTPUT.value or os.path.join(_WORKDIR.value, name)
    if _FORMAT.value == "savedmodel":
        check_replaceable("--output", output, "saved_model.pb")
    else:
        check_file_to_write("--output", output)
    configs.register(_REGISTER)
    with only_writer("--output", output):
        model, config, preprocessing = load_run(_WORKDIR.value)
        whitening = None
        if _WHITEN.value:
            if _WHITEN.value > config.model.embedding_dim:
                raise ValueError(f"--whiten: expected at most {config.model.embedding_dim}. Received: {_WHITEN.value}")
            whitening = Whitening.fit(embed(model, load_data(config).train, preprocessing), _WHITEN.value)
        export_encoder(model, preprocessing, output, _FORMAT.value, whitening)
    if _FORMAT.value == "savedmodel":
        print(f"SavedModel with signatures serving_default, pixels and encoded_images: {output}")
    else:
        print(f"{_FORMAT.value} file of {os.path.getsize(output) / 1e6:.1f} MB, from images to embedding: {output}")


if __name__ == "__main__":
    main()
