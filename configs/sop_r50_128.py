r"""Stanford Online Products, ResNet-50, 128 dimensions: the published protocol.

    s2sd-train --config=configs/sop_r50_128.py --config.data.root=<folder> \
        --config.model.weights=resnet50.weights.h5 --workdir=runs/sop_r50_128

Variants: `--config=configs/sop_r50_128.py:<options>`, words separated by commas: plain, dsd, msd, msda, msdf, msdfa
(published: msdf); multi_similarity, margin, r_margin (published: margin); frozen. Their meaning:
`s2sd_tf.training.published_config`. `s2sd-convert` makes the weights' file.

Published (recall@1 / NMI on the test classes, best epoch): multi_similarity 77.99 / 90.00, dsd 78.23 / 90.08,
msd 78.42 / 90.09, msdf 78.59 / 90.09, msdfa 78.07 / 89.88; margin 78.43 / 90.40, with msdf 79.63 / 90.70; r_margin
77.58 / 90.42, with msdfa 78.00 / 90.41; best with tuned schedules 80.2.

Expected time: 79,650 steps of 112 images, 531 an epoch; on two CPU cores about 17 seconds a step, not yet
measured on a GPU. The last epoch is evaluated, and the test classes choose nothing: expect a little less than the best
epoch has.
"""

from s2sd_tf.training import published_config


def get_config(options=""):
    return published_config("sop", "resnet50_v1_5", 128, options)
