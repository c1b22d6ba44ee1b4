"""Trains and measures a segmenter on the loop of `transfer`."""
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...runtime.distributed import World
from ..items import EvalItems
from ..pixels import Normalizer
from ..transfer import Transfer
from .data import MaskedItem, draw_dropout
from .inference import Inference, segment
from .metrics import IGNORED, compute_metrics, count_pixels
from .model import Segmenter


def make_inputs(
    items: list[MaskedItem], step: int, seed: int, crop: int, normalize: Normalizer, channels: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the arguments of `Segmenter.losses` for a batch.

    Normalises the images, then pads them with 0, and masks with 255, at the right and below, to crop x crop.
    """
    images = torch.stack([_pad(normalize(item.image), crop, 0.0) for item in items])
    masks = torch.stack([_pad(torch.from_numpy(item.mask), crop, IGNORED) for item in items])
    draws = draw_dropout(seed, step, [item.row for item in items], channels)
    return images, masks.to(images.device, non_blocking=True), draws


def _pad(x: Tensor, side: int, value: float) -> Tensor:
    return F.pad(x, (0, side - x.shape[-1], 0, side - x.shape[-2]), value=value)


def make_example(segmenter: Segmenter, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns arguments of `Segmenter.losses` on made-up input."""
    return torch.zeros(2, 3, 32, 32, device=device), torch.zeros(2, 32, 32, dtype=torch.uint8)


@dataclass(frozen=True)
class SegmentationEvaluation:
    """Measures a segmenter on test images.

    `show` takes the predictions of a few images by row, on rank 0; `keep` one of each image, on the process that made
    it, once the training is over.
    """

    loader: EvalItems
    rule: Inference
    normalize: Normalizer
    names: list[str]
    shown: frozenset[int]  # rows
    show: Callable[[dict[int, np.ndarray]], Any]
    keep: Callable[[int, np.ndarray], Any]

    def measure(self, segmenter: Segmenter, world: World, keep: bool = True) -> dict[str, Any]:
        """Returns the metrics in percent, and per_class and unreadable images."""
        counts, shown = world.all_or_none(lambda: self._predict(segmenter, keep))
        parts = world.gather((counts, shown, self.loader.unreadable))

        def compute() -> tuple[dict[str, float], list[dict[str, Any]]]:
            self.show({row: labels for _, found, _ in parts for row, labels in found.items()})
            return compute_metrics(np.sum([n for n, *_ in parts], 0), self.names)

        metrics, per_class = world.broadcast_from_main(compute)
        unreadable = {row: why for *_, bad in parts for row, why in bad.items()}
        return {'metrics': metrics, 'per_class': per_class, 'unreadable': unreadable}

    def _predict(self, segmenter: Segmenter, keep: bool) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        counts, shown = np.zeros((len(self.names), len(self.names) + 1), np.int64), {}
        for item in self.loader:
            labels = segment(segmenter, self.normalize(item.image), item.mask.shape, self.rule)
            counts += count_pixels(item.mask, labels, len(self.names))
            if item.row in self.shown:
                shown[item.row] = labels
            if keep:
                self.keep(item.row, labels)
        return counts, shown

    def measure_run(self, run: Transfer) -> dict[str, Any]:
        """Measures a run's segmenter."""
        segmenter = cast(Segmenter, run.trainer.model)
        return self.measure(segmenter, run.life.world, run.step == run.trainer.schedule.iterations)
