"""Trained segmenters on disk, and their use: `load(FOLDER)(images)`."""
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
from ..pixels import Normalizer, read_image
from ..transfer import KEYS
from .data import resize_test
from .inference import Inference, segment
from .model import Segmenter, build
from .pictures import write_mask

FOLDER, BACKBONE = 'segmenter', 'backbone'  # in a run's folder
FORMAT, VERSION = 'simsiam_models segmenter', 1


def describe(segmenter: Segmenter, rule: Inference, ids: Sequence[int]) -> dict[str, Any]:
    """Returns what `restore` needs besides the weights, as JSON holds it. `ids`: of the classes in files of masks."""
    source = segmenter.source
    return json.loads(json.dumps({
        'format': FORMAT, 'version': VERSION, 'classes': segmenter.names, 'ids': list(ids),
        'channels': segmenter.channels, 'align_corners': segmenter.align_corners,
        'dropout': segmenter.decode_head.dropout.p, 'loss_mean': segmenter.loss_mean,
        'architecture': source.architecture, 'model_args': source.args, 'mean': source.mean, 'std': source.std,
        'inference': dataclasses.asdict(rule)}))


def restore(config: dict[str, Any], weights: dict[str, Tensor], where: Path) -> tuple[Segmenter, Inference]:
    """Builds the segmenter of a configuration from `describe`; its weights fill it, or this raises ValueError."""
    try:
        network = check_network(config['architecture'], config['model_args'], where)
        source = load_backbone(f'{network.name}{RANDOM}', **network.args)
        source.mean, source.std = tuple(config['mean']), tuple(config['std'])
        segmenter = build(
            source, config['classes'], config['align_corners'], channels=tuple(config['channels']),
            dropout=config['dropout'], loss_mean=config['loss_mean'])
        segmenter.load_state_dict(weights)
        rule = Inference(**{**config['inference'], 'box': tuple(config['inference']['box'])})
        if len(config['ids']) != len(segmenter.names):
            raise KeyError('ids of the classes')
    except (KeyError, TypeError, AttributeError, RuntimeError) as e:
        raise ValueError(f'{where}: no usable segmenter ({str(e).splitlines()[0][:150]})') from None
    return segmenter, rule


def export(segmenter: Segmenter, folder: Path, rule: Inference, ids: Sequence[int]) -> None:
    """Writes FOLDER/segmenter for `load`, and FOLDER/backbone for timm."""
    (folder / FOLDER).mkdir(exist_ok=True)
    tensorfile.write(folder / FOLDER / MODEL, segmenter.state_dict())
    write_json(folder / FOLDER / CONFIG, describe(segmenter, rule, ids))
    source = segmenter.source
    export_backbone(source.model, folder / BACKBONE, source.architecture, source.args, source.image_size)


class MaskPredictor:
    """Predicts the class of every pixel of images of any size.

        predictor = segmentation.load('runs/my_segmenter')
        for mask in predictor(['a.jpg', 'b.jpg']):
            predictor.classes[mask[0, 0]]
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
        """Writes a predicted mask as a PNG with a palette, whose numbers are the ids of the classes in training."""
        write_mask(Path(path), np.array(self.ids, np.uint8)[mask])


def load(folder: str | Path, device: str | None = None) -> MaskPredictor:
    """Loads the segmenter that `simsiam segment` wrote into `folder`.

    Args:
        device: cuda, mps or cpu; by default the first one available.

    Raises:
        FileNotFoundError, ValueError: there is no segmenter, or it is damaged.
    """
    folder = Path(folder)
    folder = folder / FOLDER if (folder / FOLDER).is_dir() else folder
    if not (folder / CONFIG).is_file() or not (folder / MODEL).is_file():
        raise FileNotFoundError(
            f'{folder}: no {CONFIG} and {MODEL} of a segmenter there; name the --output of `simsiam segment`')
    config = read_json(folder / CONFIG)
    if config.get('format') != FORMAT or config.get('version') != VERSION:
        raise ValueError(f'{folder / CONFIG} is not of a segmenter, whose "format" is {FORMAT!r}, version {VERSION}')
    if not tensorfile.is_whole(folder / MODEL):
        raise ValueError(f'{folder / MODEL}: it is damaged or was cut off; export or copy it again')
    segmenter, rule = restore(config, load_file(folder / MODEL), folder)
    return MaskPredictor(segmenter, rule, config['ids'], choose_device(device))


def open_trained(path: Path) -> tuple[Segmenter, Inference, dict[str, Any]]:
    """Returns a trained segmenter, how it is measured, and the identity of its run.

    `path` is the folder of a run, or its checkpoint.pth, which a run that is not finished has, too.
    """
    file = path / LAST if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f'--eval-only {path}: no {LAST} of `simsiam segment` there')
    state = checkpoint.read(file, KEYS)
    run = state['run']
    if run.get('benchmark') != 'segment':
        raise ValueError(f'--eval-only {path}: a run of another kind ({short(run.get("benchmark"))})')
    return *restore(run['segmenter'], state['model'], file), run
