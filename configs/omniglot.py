r"""Zero-shot retrieval of handwritten characters, Omniglot's two small archives: trains on 136, retrieves 106 others.

    s2sd-train --config=configs/omniglot.py --workdir=runs/omniglot

The archives come with the package. The settings were chosen on held-out training characters, see
benchmarks/results/omniglot_search.md.
`--config=configs/omniglot.py:msd` trains another variant (plain, dsd, msd, msda, msdf, msdfa).
"""

from s2sd_tf.training import default_config, preset_config


def get_config(variant="msdfa"):
    config = default_config()
    config.data.name = "omniglot"
    config.data.image_size = 28
    config.data.classes_per_batch = 28
    config.data.samples_per_class = 4
    config.model.filters = (64, 64, 64, 64)
    # The last feature map keeps 3 x 3 positions, so that maximum and average pooling differ.
    config.model.pools = 3
    config.model.embedding_dim = 16
    config.objective.name = "multi_similarity"
    config.s2sd.target_dims = (128, 256, 512)
    # Without these ramps, untrained targets teach from the first step on, which costs the base embedding ten epochs.
    config.s2sd.distill_warmup_steps = 300
    config.s2sd.feature_distill_delay = 300
    config.s2sd.feature_distill_warmup_steps = 300
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 1e-3
    config.train.epochs = 50
    config.train.steps_per_epoch = 24
    config.eval.every = 5
    return preset_config(config, variant)
