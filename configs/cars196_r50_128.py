r"""CARS196, ResNet-50, 128 dimensions: the published protocol.

    s2sd-train --config=configs/cars196_r50_128.py --config.data.root=<folder> \
        --config.model.weights=resnet50.weights.h5 --workdir=runs/cars196_r50_128

Variants: `--config=configs/cars196_r50_128.py:<options>`, words separated by commas: plain, dsd, msd, msda, msdf, msdfa
(published: msdfa); multi_similarity, margin, r_margin (published: multi_similarity); frozen, later. Their meaning:
`s2sd_tf.training.published_config`. `s2sd-convert` makes the weights' file.

Published (recall@1 / NMI on the test classes, best epoch): multi_similarity 81.68 / 69.43, dsd 83.51 / 70.30,
msd 83.98 / 71.34, msdf 85.69 / 72.77, msdfa 85.89 / 71.45; margin 79.86 / 67.36, with msdf 85.55 / 71.68; r_margin
82.37 / 68.66, with msdfa 86.81 / 71.48; best with tuned schedules 87.6.

Expected time: 10,650 steps of 112 images, 71 an epoch; on two CPU cores about 17 seconds a step, not yet
measured on a GPU. The last epoch is evaluated, and the test classes choose nothing: expect a little less than the best
epoch has.
"""

from s2sd_tf.training import published_config


def get_config(options=""):
    return published_config("cars196", "resnet50_v1_5", 128, options)
