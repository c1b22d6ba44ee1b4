"""Batches of two views, in an order and with an augmentation that depend on (seed, epoch, index) alone."""
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .augment import Augmentation, Finish, crop, crop_box, draw, finish, normalize
from .counted import permutation
from .sources import Images, UnreadableError


def _quiet(_worker: int) -> None:
    torch.set_num_threads(1)


class _Batches(Sampler):
    """Yields (epoch, indices): a global batch is a run of the epoch's permutation, a process takes its slice of it.

    Thus N processes see, batch for batch, what one process sees. The last incomplete batch is dropped.
    """

    def __init__(self, n: int, batch: int, seed: int, rank: int, world: int) -> None:
        self.n, self.batch, self.seed, self.rank, self.world = n, batch, seed, rank, world
        self.epoch, self.start = 0, 0

    def __len__(self) -> int:
        return self.n // self.batch

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        order = permutation(self.seed, self.epoch, self.n)
        share = self.batch // self.world
        for b in range(self.start, len(self)):
            first = b * self.batch + self.rank * share
            yield self.epoch, order[first:first + share]


class _Crops(Dataset):
    """(epoch, indices) -> (2, B, S, S, 3) uint8 crops, the indices, and which files could not be read."""

    def __init__(self, images: Images, aug: Augmentation, seed: int) -> None:
        self.images, self.aug, self.seed = images, aug, seed

    def __getitem__(self, batch: tuple[int, np.ndarray]) -> tuple[Tensor, Tensor, dict[int, str]]:
        epoch, indices = batch
        size = self.aug.size
        out = np.empty((2, len(indices), size, size, 3), np.uint8)
        draws = [draw(self.aug, self.seed, epoch, indices, view)[0] for view in (0, 1)]
        bad: dict[int, str] = {}
        for i, index in enumerate(indices):
            image = self._read(int(index), bad)
            for view in (0, 1):
                box = crop_box(self.aug, draws[view][i], *image.size)
                out[view, i] = crop(image, box, size)
        return torch.from_numpy(out), torch.from_numpy(indices), bad

    def _read(self, index: int, bad: dict[int, str]) -> Image.Image:
        """An unreadable image is named in `bad` and replaced by the next readable one (black if none is left)."""
        for step in range(len(self.images)):
            at = (index + step) % len(self.images)
            try:
                return self.images.read(at)
            except UnreadableError as e:
                bad[at] = str(e)
        return Image.new('RGB', (self.aug.size, self.aug.size))


class TwoViews:
    """The training data: `epoch(e)` yields (x1, x2) on the device, each (B / world, 3, S, S) float32.

    Args:
        batch: samples per step over all processes.
        max_unreadable: share of the images that may be unreadable (each is replaced by the next readable one).

    Raises:
        ValueError: the batch does not fit the data or the processes.
        UnreadableError: more unreadable files than allowed, while iterating.
    """

    def __init__(
        self, images: Images, aug: Augmentation, batch: int, seed: int = 0, rank: int = 0, world: int = 1,
        device: torch.device | str = 'cpu', workers: int = 0, max_unreadable: float = 0.0,
    ) -> None:
        if batch % world:
            raise ValueError(
                f'--batch-size {batch} does not divide by {world} processes; use a multiple of {world}')
        if batch > len(images):
            raise ValueError(
                f'--batch-size {batch} is larger than the data set: {images.name} has {len(images)} images; '
                f'use at most {len(images)}')
        if batch // world < 2:
            raise ValueError(f'--batch-size {batch} on {world} processes: batch norm needs at least 2 samples each')
        self.images, self.aug, self.seed, self.device = images, aug, seed, torch.device(device)
        self.max_unreadable, self.unreadable = max_unreadable, {}
        self._batches = _Batches(len(images), batch, seed, rank, world)
        cuda = self.device.type == 'cuda'
        more: dict[str, Any] = dict(persistent_workers=True, prefetch_factor=4) if workers else {}
        self._loader = DataLoader(
            _Crops(images, aug, seed), sampler=self._batches, batch_size=None, num_workers=workers, pin_memory=cuda,
            worker_init_fn=_quiet, **more)

    def __len__(self) -> int:
        return len(self._batches)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The views of one epoch, from its batch number `start` on."""
        self._batches.epoch, self._batches.start = epoch, start
        for crops, indices, bad in self._loader:
            self._count(bad)
            crops = crops.to(self.device, non_blocking=True).permute(0, 1, 4, 2, 3)  # (2, B, 3, S, S), channels last
            yield tuple(finish(crops[v], self._finish(epoch, indices, v)) for v in (0, 1))

    def _finish(self, epoch: int, indices: Tensor, view: int) -> Finish:
        return draw(self.aug, self.seed, epoch, indices.numpy(), view)[1]

    def _count(self, bad: dict[int, str]) -> None:
        self.unreadable.update(bad)
        allowed = int(self.max_unreadable * len(self.images))
        if len(self.unreadable) > allowed:
            first = next(iter(self.unreadable.values()))
            raise UnreadableError(
                f'{first}; {len(self.unreadable)} unreadable so far, {allowed} of {len(self.images)} allowed: repair '
                'or remove it, or allow a share of them with --max-unreadable 0.01')


class EvalImages:
    """Images as features are measured: short side to `resize`, centre crop `size`, normalised; (B, 3, S, S) each."""

    def __init__(
        self, images: Images, indices: np.ndarray, size: int, resize: int, batch: int = 256, workers: int = 0,
        device: torch.device | str = 'cpu',
    ) -> None:
        chunks = [indices[i:i + batch] for i in range(0, len(indices), batch)]
        self.device = torch.device(device)
        self._loader = DataLoader(
            _Centre(images, size, resize), sampler=chunks, batch_size=None, num_workers=workers, worker_init_fn=_quiet)

    def __iter__(self) -> Iterator[Tensor]:
        for x in self._loader:
            yield normalize(x.to(self.device).permute(0, 3, 1, 2).float() / 255)


class _Centre(Dataset):
    def __init__(self, images: Images, size: int, resize: int) -> None:
        self.images, self.size, self.resize = images, size, resize

    def __getitem__(self, indices: np.ndarray) -> Tensor:
        return torch.from_numpy(np.stack([self._one(int(i)) for i in indices]))

    def _one(self, index: int) -> np.ndarray:
        try:
            image = self.images.read(index)
        except UnreadableError:  # counted and judged where it is trained on; here it is black
            return np.zeros((self.size, self.size, 3), np.uint8)
        w, h = image.size
        scale = self.resize / min(w, h)
        # torchvision's Resize: the short side is exact, the long one is cut down to a whole number.
        size = (self.resize, int(self.resize * h / w)) if w <= h else (int(self.resize * w / h), self.resize)
        if scale != 1:
            image = image.resize(size, Image.Resampling.BILINEAR)
        left, top = round((image.width - self.size) / 2), round((image.height - self.size) / 2)
        return np.asarray(image.crop((left, top, left + self.size, top + self.size)))
