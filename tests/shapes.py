"""A data set of detection with coloured shapes, written as a folder in COCO's form."""
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

NAMES, IDS = ['disc', 'square', 'triangle'], [7, 2, 90]  # with gaps, in no order


def write_shapes(root: Path, train: int, test: int, side: int = 128, seed: int = 0) -> Path:
    """Writes `train` and `test` images of about `side` px, with 1 to 3 shapes each, whose colours say nothing."""
    rng = np.random.default_rng(seed)
    for part, n in (('train', train), ('val', test)):
        (root / part).mkdir(parents=True)
        images, annotations = [], []
        for i in range(n):
            name = f'{part}/{i:04}.png'
            width, height = (side, side * 3 // 4) if i % 4 else (side * 3 // 4, side)
            image, shapes = draw_image(rng, width, height)
            image.save(root / name)
            images.append({'id': 10 * i + 3, 'file_name': name, 'width': width, 'height': height})
            annotations += [
                {**shape, 'id': len(annotations) + k + 1, 'image_id': 10 * i + 3} for k, shape in enumerate(shapes)]
        categories = [{'id': k, 'name': name} for k, name in zip(IDS, NAMES, strict=True)]
        (root / f'{part}.json').write_text(json.dumps(
            {'images': images, 'annotations': annotations, 'categories': categories}))
    return root


def draw_image(rng: np.random.Generator, width: int, height: int) -> tuple[Image.Image, list[dict[str, Any]]]:
    pixels = rng.integers(0, 256, 3) * 0.3 + rng.normal(60, 20, (height, width, 3))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw, shapes, taken = ImageDraw.Draw(image), [], []
    for _ in range(int(rng.integers(1, 4))):
        radius = float(rng.uniform(0.12, 0.24) * min(width, height))
        x, y = float(rng.uniform(radius, width - radius)), float(rng.uniform(radius, height - radius))
        if any(math.hypot(x - u, y - v) < 1.1 * (radius + r) for u, v, r in taken):
            continue
        taken.append((x, y, radius))
        kind = int(rng.integers(3))
        corners = ((24, 0), (4, math.pi / 4), (3, -math.pi / 2))[kind]
        points = [(x + radius * math.cos(corners[1] + 2 * math.pi * k / corners[0]),
                   y + radius * math.sin(corners[1] + 2 * math.pi * k / corners[0])) for k in range(corners[0])]
        draw.polygon(points, fill=tuple(int(c) for c in rng.integers(120, 256, 3)))
        (x1, y1), (x2, y2) = np.min(points, 0).tolist(), np.max(points, 0).tolist()
        shapes.append({
            'category_id': IDS[kind], 'bbox': [x1, y1, x2 - x1, y2 - y1], 'area': (x2 - x1) * (y2 - y1) / 2,
            'iscrowd': 0, 'segmentation': [[c for point in points for c in point]]})
    return image, shapes
