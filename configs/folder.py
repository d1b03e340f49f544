r"""Your own images, one folder per class: trains on the first half of the classes, retrieves the other half.

    s2sd-train --config=configs/folder.py --config.data.root=<folder> --workdir=runs/mine

Choose the test classes with `--config.data.folder.test_classes='birds/*,cats'`, or a second folder
with `--config.data.folder.test_root=<folder>`.
`--config=configs/folder.py:msd` trains another variant (plain, dsd, msd, msda, msdf, msdfa).
"""

from s2sd_tf.training import default_config, preset_config


def get_config(variant="msdfa"):
    config = default_config()
    config.data.name = "folder"
    config.data.folder.on_corrupt = "skip"
    config.data.image_size = 64
    config.data.resize_size = 72
    # 4 classes are held out from training to choose the best checkpoint.
    config.data.validation_classes = 4
    config.data.classes_per_batch = 8
    config.data.samples_per_class = 4
    config.model.filters = (64, 64, 128, 128)
    config.model.embedding_dim = 64
    config.s2sd.target_dims = (256, 512, 1024)
    config.s2sd.distill_warmup_steps = 300
    config.s2sd.feature_distill_delay = 300
    config.s2sd.feature_distill_warmup_steps = 300
    config.train.epochs = 50
    config.train.checkpoint_every = 5
    config.eval.every = 5
    return preset_config(config, variant)
