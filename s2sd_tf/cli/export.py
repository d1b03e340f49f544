"""s2sd-export: writes the encoder of a finished run as a SavedModel.

The SavedModel embeds images without this package. Its signature serving_default takes float images in [0, 1], pixels
takes uint8 images, encoded_images takes the bytes of image files.

Examples:
  s2sd-export --workdir=runs/omniglot
  s2sd-export --workdir=runs/omniglot --output=encoder
"""

import os

from s2sd_tf.cli import app, configs

_WORKDIR = app.define_path("workdir", None, "Folder of a finished run.", required=True)
_OUTPUT = app.define_path("output", None, "Folder to write. By default saved_model in the work directory.")
_REGISTER = configs.define_register()


def main() -> None:
    """The program `s2sd-export`."""
    app.run(_main)


def _main(_):
    from s2sd_tf.export import export_encoder
    from s2sd_tf.files import check_replaceable, only_writer
    from s2sd_tf.training import load_run

    output = _OUTPUT.value or os.path.join(_WORKDIR.value, "saved_model")
    check_replaceable("--output", output, "saved_model.pb")
    configs.register(_REGISTER)
    with only_writer("--output", output):
        model, _, preprocessing = load_run(_WORKDIR.value)
        export_encoder(model, preprocessing, output)
    print(f"SavedModel with signatures serving_default, pixels and encoded_images: {output}")


if __name__ == "__main__":
    main()
