"""Evaluation images: resized and cropped at the centre, without augmentation."""
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .augment import resize, short_side
from .readers.decode import UnreadableError
from .readers.images import Images
from .threads import AHEAD, Job, make_threads, run_in_order, split_range

SHARE = 8  # images that a thread takes at a time


@dataclass(frozen=True)
class Transform:
    """Resizes images and crops them at the centre.

    'center' resizes the short side to `resize` and crops the central crop x crop pixels. 'squash' (VOC07) resizes the
    short side to `resize`, too, and then the whole image to crop x crop. Both match torchvision's bilinear operators on
    PIL images (see `augment.resize`).
    """

    resize: int = 256
    crop: int = 224
    kind: str = 'center'

    def __post_init__(self) -> None:
        if self.kind not in ('center', 'squash'):
            raise ValueError(f"transform {self.kind!r}: must be 'center' or 'squash'")
        if min(self.resize, self.crop) < 1 or (self.kind == 'center' and self.crop > self.resize):
            raise ValueError(
                f'--image-size {self.crop} and --resize {self.resize}: the crop must fit into the resized image')

    def __call__(self, image: np.ndarray, out: np.ndarray) -> None:
        """Transforms (H, W, 3) uint8 into `out` (crop, crop, 3) uint8."""
        width, height = short_side(image, self.resize)
        if self.kind == 'center':
            return resize(image, width, height, round((width - self.crop) / 2), round((height - self.crop) / 2), out)
        whole = np.empty((height, width, 3), np.uint8)
        resize(image, width, height, 0, 0, whole)
        resize(whole, self.crop, self.crop, 0, 0, out)


class EvalImages:
    """Loads evaluation images: yields (rows, pixels), one pair for each array of indices in `batches`.

    rows is that array; pixels are the crops of its images, (B, S, S, 3) uint8 on the CPU (pinned for CUDA).
    The pixels of an unreadable image are zeros. `unreadable` (index -> reason) names it before its batch is yielded, so
    that the caller can leave it out of the result, or stop: it is never measured as a black image.

    Args:
        workers: threads that read and resize; with 0, the caller's own thread does.
    """

    def __init__(
        self, images: Images, batches: Sequence[np.ndarray], transform: Transform, workers: int = 0,
        device: torch.device | str = 'cpu',
    ) -> None:
        self.images, self.batches, self.transform, self.device = images, batches, transform, torch.device(device)
        self.unreadable: dict[int, str] = {}
        self._threads = make_threads(workers)
        largest = max([1, *map(len, batches)])
        self._ahead = max(AHEAD, -(-2 * workers * SHARE // largest))  # so that no thread waits for the model

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[np.ndarray, Tensor]]:
        self.unreadable = {}  # what failed in an earlier pass may be readable now
        return run_in_order(self._threads, self._jobs(), self._ahead)

    def _jobs(self) -> Iterator[Job]:
        size = self.transform.crop
        for rows in self.batches:
            x = torch.empty(len(rows), size, size, 3, dtype=torch.uint8, pin_memory=self.device.type == 'cuda')
            parts = split_range(len(rows), SHARE)
            yield (rows, x), [functools.partial(self._fill, x.numpy()[part], rows[part]) for part in parts]

    def _fill(self, out: np.ndarray, rows: np.ndarray) -> None:
        for place, row in zip(out, rows, strict=True):
            try:
                self.transform(self.images.read(int(row)), place)
            except UnreadableError as e:
                self.unreadable[int(row)] = str(e)
                place[:] = 0
