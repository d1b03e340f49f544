r"""Stanford Online Products, ResNet-50, 512 dimensions: the published protocol.

    s2sd-train --config=configs/sop_r50_512.py --config.data.root=<folder> \
        --config.model.weights=resnet50.weights.h5 --workdir=runs/sop_r50_512

Variants: `--config=configs/sop_r50_512.py:<options>`, words separated by commas: plain, dsd, msd, msda, msdf, msdfa
(published: msdf); multi_similarity, margin, r_margin (published: margin); frozen. Their meaning:
`s2sd_tf.training.published_config`. `s2sd-convert` makes the weights' file.

Published: recall@1 81.0 on the test classes, with a tuned schedule.

Expected time: 79,650 steps of 112 images, 531 an epoch; on two CPU cores about 17 seconds a step, not yet
measured on a GPU. The last epoch is evaluated, and the test classes choose nothing: expect a little less than the best
epoch has.
"""

from s2sd_tf.training import published_config


def get_config(options=""):
    return published_config("sop", "resnet50_v1_5", 512, options)
