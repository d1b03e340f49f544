"""Scikit-learn's handwritten digits, the embedded data set."""

import numpy as np

from s2sd_tf.data.datasets import register
from s2sd_tf.data.image_set import ImageSet
from s2sd_tf.data.preprocessing import Preprocessing
from s2sd_tf.data.retrieval_split import RetrievalSplit


def load_digits() -> tuple[ImageSet, ImageSet, Preprocessing]:
    """Loads the 1,797 handwritten digits of scikit-learn and returns `(train, test, preprocessing)`.

    The images are 8 x 8 pixels, grayscale. Digits 0-4 train and 5-9 test, so no class is in both (zero-shot retrieval).
    """
    from sklearn.datasets import load_digits as load

    digits = load()
    # scikit-learn has values from 0 to 16. As bytes they survive a round trip through PNG.
    pixels = np.round(digits.images * (255.0 / 16.0)).astype(np.uint8)[..., None]
    images = ImageSet(pixels, digits.target.astype(np.int32), tuple(str(digit) for digit in range(10)))
    return images.select_classes(range(5)), images.select_classes(range(5, 10)), _preprocessing()


def _preprocessing(image_size=8):
    return Preprocessing(8, 8, channels=1)


@register("digits", preprocessing=_preprocessing)
def _split():
    """Handwritten digits of 8 x 8 pixels that come with scikit-learn; the digits 5 to 9 are the test classes."""
    return RetrievalSplit(*load_digits()[:2])
