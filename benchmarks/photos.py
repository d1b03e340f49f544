"""Generated JPEGs that cost as much to decode as photographs."""

import os

import numpy as np
from PIL import Image


def generate(folder, count=64, size=(500, 375), seed=0):
    """Writes JPEGs, a third of them upright: clouds of seven octaves plus grain."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        width, height = size if number % 3 else size[::-1]
        pixels = np.zeros((height, width, 3))
        for octave in range(1, 8):
            points = rng.normal(size=(2**octave + 1, 2**octave + 1, 3)).astype(np.float32)
            layers = [
                np.asarray(Image.fromarray(points[..., c]).resize((width, height), Image.BICUBIC)) for c in range(3)
            ]
            pixels += 0.55**octave * np.stack(layers, -1)
        pixels = 255 * (pixels - pixels.min()) / np.ptp(pixels) + rng.normal(scale=7, size=(height, width, 1))
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        image.save(os.path.join(folder, f"{number:03d}.jpg"), quality=95)
