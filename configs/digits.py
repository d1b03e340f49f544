r"""Handwritten digits from scikit-learn: trains on 0-4, retrieves the unseen 5-9. Nothing to download.

    s2sd-train --config=configs/digits.py --workdir=runs/digits

`--config=configs/digits.py:msd` trains another variant (plain, dsd, msd, msda, msdf, msdfa).
"""

from s2sd_tf.training import default_config, preset_config


def get_config(variant="msdfa"):
    config = default_config()
    config.data.name = "digits"
    config.data.classes_per_batch = 5
    config.data.samples_per_class = 16
    config.model.filters = (32, 64, 64)
    # Images of 8 x 8 pixels leave little to pool.
    config.model.pools = 1
    config.model.embedding_dim = 8
    config.objective.name = "multi_similarity"
    config.s2sd.target_dims = (64, 128, 256)
    # The five classes are learned quickly; then only the distillation teaches, so it weighs more than in the paper.
    config.s2sd.distill_weight = 200.0
    config.s2sd.feature_distill_weight = 1000.0
    config.s2sd.distill_warmup_steps = 300
    config.s2sd.feature_distill_delay = 300
    config.s2sd.feature_distill_warmup_steps = 300
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 3e-4
    config.train.epochs = 120
    config.train.steps_per_epoch = 11
    config.train.checkpoint_every = 10
    config.eval.every = 10
    return preset_config(config, variant)
