"""Trains and measures a detector on the loop of `transfer`."""
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ...data.philox import uniforms
from ...runtime.distributed import World
from ..datasets.objects import ObjectImages
from ..pixels import Normalizer
from ..transfer import Transfer, measure_batch_norms
from .data import EvalLoader, Item, Target
from .masks import encode_pasted
from .metrics import Detections, coco_metrics, voc_metrics
from .model import Detector

SAMPLES = 2  # the view, in the sense of data.philox, of the seeds of samples


def make_keys(seed: int, step: int, indices: Sequence[int]) -> list[int]:
    """Returns the seed of the samples of each image in iteration `step`."""
    words = (uniforms(seed, step, np.asarray(indices), SAMPLES, 2) * 2**32).astype(np.uint64)
    return [(a << 31) ^ b for a, b in words.tolist()]


def make_inputs(items: list[Item], step: int, seed: int, normalize: Normalizer) -> tuple[Any, ...]:
    """Returns the arguments of `Detector.losses` for a batch."""
    keys = make_keys(seed, step, [item.row for item in items])
    return [normalize(item.image) for item in items], [_to_dict(item) for item in items], keys


def _to_dict(item: Item) -> dict[str, Tensor]:
    target = cast(Target, item.target)
    return {k: v for k, v in target._asdict().items() if v is not None}


def make_example(detector: Detector, device: torch.device) -> tuple[Any, ...]:
    """Returns arguments of `Detector.losses` on made-up input."""
    target = {'boxes': torch.tensor([[8.0, 8, 40, 40]]), 'labels': torch.zeros(1, dtype=torch.long)}
    if detector.roi_head.has_masks:
        target['masks'] = torch.ones(1, 64, 64)
    return [torch.zeros(3, 64, 64, device=device)], [target], [0]


@torch.no_grad()
def predict(detector: Detector, items: EvalLoader, normalize: Normalizer) -> tuple[list[int], list[Detections]]:
    """Returns the detections of the loader's images, one image at a time, and their numbers."""
    rows, found = [], []
    for item in items:
        rows.append(item.row)
        found.append(detect_one(detector, normalize(item.image), item.size))
    return rows, found


@torch.no_grad()
def detect_one(detector: Detector, image: Tensor, size: tuple[int, int]) -> Detections:
    """Returns the detections in a normalised image (3, H, W); `size` is the original's, in whose pixels they are."""
    found = detector.detect([image], [size])[0]
    masks = None if found.masks is None else encode_pasted(found.masks, found.boxes, *size)
    boxes, scores, labels = (x.cpu().numpy() for x in (found.boxes, found.scores, found.labels))
    return Detections(boxes, scores, labels, masks)


@dataclass(frozen=True)
class Evaluation:
    """Measures a detector on test images. `write` takes the numbers of the images and their detections, on rank 0."""

    images: ObjectImages
    loader: EvalLoader
    normalize: Normalizer
    voc: bool  # VOC's metric, or COCO's
    write: Callable[[list[int], list[Detections]], Any]

    def measure(self, detector: Detector, world: World) -> dict[str, Any]:
        """Returns the metrics in percent, and per_class and unreadable images."""
        mine = world.all_or_none(lambda: predict(detector, self.loader, self.normalize))
        parts = world.gather((*mine, self.loader.unreadable))
        by_row = {row: d for rows, found, _ in parts for row, d in zip(rows, found, strict=True)}
        rows = sorted(by_row)
        found = [by_row[row] for row in rows]

        def compute() -> tuple[dict[str, float], list[dict[str, Any]]]:
            self.write(rows, found)
            if self.voc:
                return voc_metrics(self.images, rows, found, detector.numbers.variant)
            return coco_metrics(self.images, rows, found)

        metrics, per_class = world.broadcast_from_main(compute)
        unreadable = {row: why for *_, bad in parts for row, why in bad.items()}
        return {'metrics': metrics, 'per_class': per_class, 'unreadable': unreadable}

    def measure_run(self, run: Transfer) -> dict[str, Any]:
        """Measures a run's detector, after its batch norms if the variant does so."""
        detector = cast(Detector, run.trainer.model)
        if detector.numbers.rules.precise_bn:
            measure_batch_norms(run, detector.numbers.rules.precise_bn)
        return self.measure(detector, run.life.world)
