"""Trained detectors on disk, and their use: `load(FOLDER)(images)`."""
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from ...runtime import checkpoint
from ...runtime.checkpoint import LAST
from ...runtime.distributed import choose_device
from ...runtime.files import write_json
from ...runtime.messages import short
from ...weights import tensorfile
from ...weights.export import export_backbone
from ...weights.folders import check_network, read_json
from ...weights.tensorfile import CONFIG, MODEL
from ..backbone import RANDOM, load_backbone
from ..pixels import Normalizer, fit_size, read_image, resize_image
from ..transfer import KEYS
from .model import Detector, build
from .training import detect_one

FOLDER, BACKBONE = 'detector', 'backbone'  # in a run's folder
FORMAT, VERSION = 'simsiam_models detector', 1


def describe(detector: Detector, test_side: int, long_side: int) -> dict[str, Any]:
    """Returns what `restore` needs besides the weights, as JSON holds it."""
    source = detector.source
    return json.loads(json.dumps({
        'format': FORMAT, 'version': VERSION, 'kind': detector.kind, 'classes': detector.names,
        'numbers': dataclasses.asdict(detector.numbers), 'architecture': source.architecture,
        'model_args': source.args, 'mean': source.mean, 'std': source.std, 'test_side': test_side,
        'long_side': long_side}))


def restore(config: dict[str, Any], weights: dict[str, Tensor], where: Path) -> Detector:
    """Builds the detector of a configuration from `describe`; its weights fill it, or this raises ValueError."""
    try:
        network = check_network(config['architecture'], config['model_args'], where)
        source = load_backbone(f'{network.name}{RANDOM}', **network.args)
        source.mean, source.std = tuple(config['mean']), tuple(config['std'])
        numbers = {k: tuple(v) if isinstance(v, list) else v for k, v in config['numbers'].items()}
        detector = build(source, config['kind'], config['classes'], **numbers)
        detector.load_state_dict(weights)
    except (KeyError, TypeError, AttributeError, RuntimeError) as e:
        raise ValueError(f'{where}: no usable detector ({str(e).splitlines()[0][:150]})') from None
    return detector


def export(detector: Detector, folder: Path, test_side: int, long_side: int) -> None:
    """Writes FOLDER/detector for `load`, and FOLDER/backbone for timm."""
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    tensorfile.write(folder / FOLDER / MODEL, detector.state_dict())
    write_json(folder / FOLDER / CONFIG, describe(detector, test_side, long_side))
    source = detector.source
    export_backbone(source.model, folder / BACKBONE, source.architecture, source.args, source.image_size)


class Predictor:
    """Detects objects in images of any size.

        predictor = detection.load('runs/my_detector')
        for found in predictor(['a.jpg', 'b.jpg']):
            found['boxes'], found['scores'], found['names']
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
            from pycocotools import mask as coco_masks

            masks = [coco_masks.decode(found.masks[i]).astype(bool) for i in kept]
            result['masks'] = np.stack(masks) if masks else np.zeros((0, height, width), bool)
        return result


def load(folder: str | Path, device: str | None = None) -> Predictor:
    """Loads the detector that `simsiam detect` wrote into `folder`.

    Args:
        device: cuda, mps or cpu; by default the first one available.

    Raises:
        FileNotFoundError, ValueError: there is no detector, or it is damaged.
    """
    folder = Path(folder)
    folder = folder / FOLDER if (folder / FOLDER).is_dir() else folder
    detector, config = read(folder)
    return Predictor(detector, config['test_side'], config['long_side'], choose_device(device))


def read(folder: Path) -> tuple[Detector, dict[str, Any]]:
    """Returns the detector in an exported folder, and its configuration."""
    if not (folder / CONFIG).is_file() or not (folder / MODEL).is_file():
        raise FileNotFoundError(
            f'{folder}: no {CONFIG} and {MODEL} of a detector there; name the --output of `simsiam detect`')
    config = read_json(folder / CONFIG)
    if config.get('format') != FORMAT or config.get('version') != VERSION:
        raise ValueError(f'{folder / CONFIG} is not of a detector, whose "format" is {FORMAT!r}, version {VERSION}')
    if not tensorfile.is_whole(folder / MODEL):
        raise ValueError(f'{folder / MODEL}: it is damaged or was cut off; export or copy it again')
    return restore(config, load_file(folder / MODEL), folder), config


def open_trained(path: Path) -> tuple[Detector, dict[str, Any]]:
    """Returns a trained detector and the identity of its run.

    `path` is the folder of a run, or its checkpoint.pth, which a run that is not finished has, too.
    """
    file = path / LAST if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f'--eval-only {path}: no {LAST} of `simsiam detect` there')
    state = checkpoint.read(file, KEYS)
    run = state['run']
    if run.get('benchmark') != 'detect':
        raise ValueError(f'--eval-only {path}: a run of another kind ({short(run.get("benchmark"))})')
    detector = restore(run['detector'], state['model'], file)
    for name, value in run['source'].items():  # of the record: the weights that it was trained from
        setattr(detector.source, name, value)
    return detector, run
