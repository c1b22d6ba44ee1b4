"""Trained detectors on disk, and their use: `load(FOLDER)(images)`."""
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...runtime.distributed import choose_device
from ..pixels import Normalizer, fit_size, read_image, resize_image
from ..trained import describe_source, export_network, read_export, read_run, rename_source, restore_source
from .masks import rasterize
from .model import Detector, build
from .training import detect_one

NAME = 'detector'  # of the folder in a run's


def describe(detector: Detector, test_side: int, long_side: int) -> dict[str, Any]:
    """Returns what `restore` needs besides the weights, as JSON holds it."""
    record: dict[str, Any] = json.loads(json.dumps({
        'kind': detector.kind, 'classes': detector.names, 'numbers': dataclasses.asdict(detector.numbers),
        **describe_source(detector.source), 'test_side': test_side, 'long_side': long_side}))
    return record


def restore(config: dict[str, Any], weights: dict[str, Tensor], where: Path) -> Detector:
    """Builds the detector of a configuration from `describe`; its weights fill it, or this raises ValueError."""
    try:
        numbers: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config['numbers'].items()}
        detector = build(restore_source(config, where), config['kind'], config['classes'], **numbers)
        detector.load_state_dict(weights)
    except (KeyError, TypeError, AttributeError, RuntimeError) as e:
        raise ValueError(f'{where}: no usable detector ({str(e).splitlines()[0][:150]})') from None
    return detector


def export(detector: Detector, folder: Path, test_side: int, long_side: int) -> None:
    """Writes FOLDER/detector for `load`, and FOLDER/backbone for timm."""
    export_network(detector, detector.source, folder, NAME, describe(detector, test_side, long_side))


class Predictor:
    """Detects objects in images of any size::

        predictor = detection.load('runs/my_detector')
        for found in predictor(['a.jpg', 'b.jpg']):
            found['boxes'], found['scores'], found['names']

    `classes` are the names of all classes.
    """

    def __init__(self, detector: Detector, test_side: int, long_side: int, device: torch.device) -> None:
        self.detector = detector.to(device).eval().requires_grad_(False)
        self.classes, self.test_side, self.long_side = detector.names, test_side, long_side
        self.normalize = Normalizer(detector.source.mean, detector.source.std, device)

    def __call__(
        self, images: Sequence[str | Path | Image.Image | np.ndarray], score: float = 0.05,
    ) -> list[dict[str, Any]]:
        """Returns, for each image, the objects whose score is at least `score`, the highest first.

        Args:
            images: files, PIL images, or arrays (H, W, 3) of uint8 in RGB.

        Returns:
            boxes (n, 4) float32 as x1, y1, x2, y2 in the image's pixels, scores (n,), labels (n,), names, and masks
            (n, H, W) of bool if the detector segments.

        Raises:
            ValueError: an array is not an image.
            OSError, DataError: a file cannot be read.
        """
        if isinstance(images, (str, Path, Image.Image, np.ndarray)):
            raise ValueError('a list of images is needed, even for a single one')
        return [self._detect(read_image(image), score) for image in images]

    def _detect(self, image: np.ndarray, score: float) -> dict[str, Any]:
        height, width = image.shape[:2]
        h, w = fit_size(height, width, self.test_side, self.long_side)
        resized = resize_image(image, h, w, self.detector.numbers.variant)
        found = detect_one(self.detector, self.normalize(resized), (height, width))
        kept = np.flatnonzero(found.scores >= score)
        result = {
            'boxes': found.boxes[kept], 'scores': found.scores[kept], 'labels': found.labels[kept],
            'names': [self.classes[i] for i in found.labels[kept]]}
        if found.masks is not None:
            masks = [rasterize(found.masks[i], height, width).astype(bool) for i in kept]
            result['masks'] = np.stack(masks) if masks else np.zeros((0, height, width), bool)
        return result


def load(folder: str | Path, device: str | None = None) -> Predictor:
    """Loads the detector that `simsiam detect` wrote into `folder`.

    Args:
        device: cuda, mps or cpu; by default the first one available.

    Raises:
        FileNotFoundError, ValueError: there is no detector, or it is damaged.
    """
    config, weights, where = read_export(Path(folder), NAME, 'detect')
    detector = restore(config, weights, where)
    return Predictor(detector, config['test_side'], config['long_side'], choose_device(device))


def open_trained(path: Path) -> tuple[Detector, dict[str, Any]]:
    """Returns a trained detector and the identity of its run; `path`: see `read_run`."""
    run, weights, file = read_run(path, 'detect')
    detector = restore(run['detector'], weights, file)
    rename_source(detector.source, run['source'])
    return detector, run
