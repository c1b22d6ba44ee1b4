"""A data set of segmentation with coloured shapes, written as a user's own folder of images and masks."""
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

NAMES = ['ground', 'disc', 'square']
COLOURS = [(60, 60, 60), (200, 60, 60), (60, 60, 200)]


def draw_scene(rng: np.random.Generator, width: int, height: int) -> tuple[Image.Image, Image.Image]:
    """An image and its mask of labels 0 to 2, with an ignored border around shapes."""
    mask = Image.new('L', (width, height), 0)
    draw = ImageDraw.Draw(mask)
    for _ in range(3):
        radius = int(rng.uniform(0.12, 0.3) * min(width, height))
        x, y = (int(rng.uniform(0, side)) for side in (width, height))
        kind, box = int(rng.integers(1, 3)), (x - radius, y - radius, x + radius, y + radius)
        (draw.ellipse if kind == 1 else draw.rectangle)(box, kind, 255)
    labels = np.asarray(mask)
    pixels = np.array(COLOURS)[np.where(labels == 255, 0, labels)] + rng.normal(0, 12, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), mask


def write_scenes(root: Path, train: int, test: int, side: int = 64, seed: int = 0) -> Path:
    """Writes `train` and `test` images and masks of about `side` px; without `test`, there are no parts."""
    rng = np.random.default_rng(seed)
    for part, n in (('train', train), ('val', test)) if test else (('', train),):
        for folder in ('images', 'masks'):
            (root / folder / part).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            image, mask = draw_scene(rng, side, side * 3 // 4)
            image.save(root / 'images' / part / f'{i:04}.jpg', quality=95)
            mask.save(root / 'masks' / part / f'{i:04}.png')
    (root / 'classes.txt').write_text('\n'.join(NAMES))
    return root
