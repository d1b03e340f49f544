"""The config of emoji_s2sd.py: EfficientNet-Lite0 with ImageNet weights, fine-tuned at 48 pixels on emoji.

`emoji_config.py:msd` is another variant (plain, dsd, msd, msda, msdf, msdfa).
"""

from s2sd_tf.training import default_config, preset_config


def get_config(variant="msdfa"):
    config = default_config()
    config.data.name = "lists"
    config.data.image_size = 48
    config.data.resize_size = 52
    # Random shifts of up to 4 pixels. No flips: some emoji differ by them.
    config.data.augmentation = "red"
    config.data.augmentation_settings.flip = 0.0
    config.data.classes_per_batch = 28
    config.data.samples_per_class = 4
    config.model.backbone = "efficientnet_lite0"
    config.model.weights = "imagenet"
    config.model.frozen_bn = "statistics"
    config.model.l2 = 4e-4
    config.model.learning_rate_multipliers.heads = 3.0
    config.model.embedding_dim = 64
    config.s2sd.target_dims = (512, 1024, 1536)
    config.s2sd.distill_weight = 20.0
    config.s2sd.feature_distill_weight = 20.0
    config.s2sd.distill_warmup_steps = 100
    config.s2sd.feature_distill_delay = 100
    config.s2sd.feature_distill_warmup_steps = 100
    config.optimizer.learning_rate = 1e-4
    config.train.epochs = 5
    config.train.steps_per_epoch = 200
    config.eval.every = 0
    return preset_config(config, variant)
