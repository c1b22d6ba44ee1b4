import numpy as np

from .sources import MemoryImages


def demo_images():
    r = np.random.default_rng(0)
    return tuple(MemoryImages(r.integers(0, 255, (n, 32, 32, 3), dtype=np.uint8), r.integers(0, 4, n), list('abcd'), 'placeholder') for n in (640, 100))
