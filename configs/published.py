r"""The published protocol of S2SD: CUB200-2011, CARS196, Stanford Online Products and In-Shop.

    s2sd-train --config=configs/published.py:cub200,resnet50_v1_5,128,msdfa --config.data.root=<folder> \
        --config.model.weights=resnet50.weights.h5 --workdir=runs/cub200

After the colon: the data set (cub200, cars196, sop, inshop), then whatever should differ from the defaults: backbone
(resnet50_v1_5, bn_inception), dimension, variant (plain, dsd, msd, msda, msdf, msdfa), objective (multi_similarity,
margin, r_margin), frozen, later. `s2sd_tf.training.published_config` explains them and gives their defaults.
`s2sd-convert` makes the weights file. The published figures and the expected times of all settings are in
docs/published.md.
"""

from s2sd_tf.training import published_config


def get_config(options=""):
    return published_config(options)
