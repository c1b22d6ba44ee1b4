"""Trained segmenters on disk, and their use: `load(FOLDER)(images)`."""
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
from ..pixels import Normalizer, read_image
from ..trained import describe_source, export_network, read_export, read_run, rename_source, restore_source
from .data import resize_test
from .inference import Inference, segment
from .model import Segmenter, build
from .pictures import write_mask

NAME = 'segmenter'  # of the folder in a run's


def describe(segmenter: Segmenter, rule: Inference, ids: Sequence[int]) -> dict[str, Any]:
    """Returns what `restore` needs besides the weights, as JSON holds it. `ids`: of the classes in files of masks."""
    record: dict[str, Any] = json.loads(json.dumps({
        'classes': segmenter.names, 'ids': list(ids), 'channels': segmenter.channels,
        'align_corners': segmenter.align_corners, 'dropout': segmenter.decode_head.dropout.p,
        'loss_mean': segmenter.loss_mean, **describe_source(segmenter.source), 'inference': dataclasses.asdict(rule)}))
    return record


def restore(config: dict[str, Any], weights: dict[str, Tensor], where: Path) -> tuple[Segmenter, Inference]:
    """Builds the segmenter of a configuration from `describe`; its weights fill it, or this raises ValueError."""
    try:
        segmenter = build(
            restore_source(config, where), config['classes'], config['align_corners'],
            channels=tuple(config['channels']), dropout=config['dropout'], loss_mean=config['loss_mean'])
        segmenter.load_state_dict(weights)
        rule = Inference(**{**config['inference'], 'box': tuple(config['inference']['box'])})
        if len(config['ids']) != len(segmenter.names):
            raise KeyError('ids of the classes')
    except (KeyError, TypeError, AttributeError, RuntimeError) as e:
        raise ValueError(f'{where}: no usable segmenter ({str(e).splitlines()[0][:150]})') from None
    return segmenter, rule


def export(segmenter: Segmenter, folder: Path, rule: Inference, ids: Sequence[int]) -> None:
    """Writes FOLDER/segmenter for `load`, and FOLDER/backbone for timm."""
    export_network(segmenter, segmenter.source, folder, NAME, describe(segmenter, rule, ids))


class MaskPredictor:
    """Predicts the class of every pixel of images of any size::

        predictor = segmentation.load('runs/my_segmenter')
        for mask in predictor(['a.jpg', 'b.jpg']):
            predictor.classes[mask[0, 0]]

    `classes` are the names of all classes.
    """

    def __init__(self, segmenter: Segmenter, rule: Inference, ids: Sequence[int], device: torch.device) -> None:
        self.segmenter = segmenter.to(device).eval().requires_grad_(False)
        self.classes, self.ids, self.rule = segmenter.names, list(ids), rule
        self.normalize = Normalizer(segmenter.source.mean, segmenter.source.std, device)

    def __call__(self, images: Sequence[str | Path | Image.Image | np.ndarray]) -> list[np.ndarray]:
        """Returns for each image the positions in `classes` of its pixels, (H, W) uint8.

        Args:
            images: files, PIL images, or arrays (H, W, 3) of uint8 in RGB.

        Raises:
            ValueError: an array is not an image.
            OSError, DataError: a file cannot be read.
        """
        if isinstance(images, (str, Path, Image.Image, np.ndarray)):
            raise ValueError('a list of images is needed, even for a single one')
        return [self._segment(read_image(image)) for image in images]

    def _segment(self, image: np.ndarray) -> np.ndarray:
        pixels = self.normalize(resize_test(image, self.rule.box))
        return segment(self.segmenter, pixels, image.shape[:2], self.rule)

    def save(self, mask: np.ndarray, path: str | Path) -> None:
        """Writes a predicted mask as a palette PNG whose pixel values are the class ids used in training.

        Raises:
            ValueError: the path does not end in .png, or the mask has labels that are not indices into `classes`.
        """
        if Path(path).suffix.lower() != '.png':
            raise ValueError(f'{path}: masks are saved as PNG files; use a name that ends in .png')
        if mask.size and not 0 <= mask.min() <= mask.max() < len(self.ids):
            raise ValueError(
                f'the mask has labels from {mask.min()} to {mask.max()}, but the classes are 0 to {len(self.ids) - 1}')
        write_mask(Path(path), np.array(self.ids, np.uint8)[mask])


def load(folder: str | Path, device: str | None = None) -> MaskPredictor:
    """Loads the segmenter that `simsiam segment` wrote into `folder`.

    Args:
        device: cuda, mps or cpu; by default the first one available.

    Raises:
        FileNotFoundError, ValueError: there is no segmenter, or it is damaged.
    """
    config, weights, where = read_export(Path(folder), NAME, 'segment')
    segmenter, rule = restore(config, weights, where)
    return MaskPredictor(segmenter, rule, config['ids'], choose_device(device))


def open_trained(path: Path) -> tuple[Segmenter, Inference, dict[str, Any]]:
    """Returns a trained segmenter, how it is measured, and the identity of its run; `path`: see `read_run`."""
    run, weights, file = read_run(path, 'segment')
    segmenter, rule = restore(run['segmenter'], weights, file)
    rename_source(segmenter.source, run['source'])
    return segmenter, rule, run
