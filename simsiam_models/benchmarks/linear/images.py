"""Images as a linear protocol sees them: bytes from threads, the rest on the device.

What an image is turned into depends on (seed, epoch, index) alone, as in pretraining. No batch is dropped: the last one
is short.
"""
import dataclasses
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...data import DataError, Images, UnreadableError, kernel
from ...data.augment import Augmentation, crop, crop_box, draw, jitter_and_gray, resize, send, short_side
from ...data.loader import in_order, make_threads, parts
from ...data.philox import permutation, uniforms
from ...runtime.distributed import World, default_workers
from ..protocols import LinearProtocol
from ..samples import Pair, subset

LIGHTING_VIEW = 2  # counted numbers that no view uses
# PCA of ImageNet's colours (Krizhevsky et al., 2012), as MMSelfSup's Lighting has it: channel i gets
# sum_j VECTORS[i, j] alpha_j VALUES[j] on colours in [0, 1].
VALUES = np.array([0.2175, 0.0188, 0.0045])
VECTORS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])


@dataclass
class Piece:
    """Images of one step (training) or of an evaluation that go through the backbone together."""

    step: int
    last: bool  # of its step
    rows: np.ndarray  # which images
    pixels: Tensor  # (n, S, S, 3) uint8
    flip: np.ndarray | None = None  # bool
    table: np.ndarray | None = None  # augment.Finish.table, where colours are jittered
    light: np.ndarray | None = None  # (n, 3) what is added to the channels
    u: np.ndarray | None = field(default=None, repr=False)


def lighting(std: float, seed: int, epoch: int, rows: np.ndarray) -> np.ndarray:
    """(n, 3) float32: the PCA noise of each image, alpha ~ N(0, std) by Box and Muller from counted numbers."""
    u = uniforms(seed, epoch, rows, LIGHTING_VIEW, 4)
    radius = np.sqrt(-2 * np.log1p(-u[:, :2]))  # u < 1
    angle = 2 * np.pi * u[:, 2:]
    normal = np.concatenate([radius * np.cos(angle), radius[:, :1] * np.sin(angle[:, :1])], 1)  # (n, 3)
    return ((std * normal * VALUES) @ VECTORS.T).astype(np.float32)


def readable(pair: Pair, workers: int | None, world: World, say: Callable[[str], Any]) -> Pair:
    """The pair without the images that cannot be read: all are read once, of several processes each reads a share.

    Raises:
        DataError: most of them cannot be read.
    """
    say('reading all images once: those that cannot be read are left out (--allow-partial)')
    threads = make_threads(default_workers(world.device) if workers is None else workers)
    kept, whys = {}, []
    for name in ('train', 'test'):
        images: Images = getattr(pair, name)
        bad = _unreadable(images, threads, world)
        if 2 * len(bad) > len(images):
            raise DataError(
                f'{min(bad.items())[1]}; {len(bad)} of {len(images)} images cannot be read: is the data still there?')
        if bad:
            kept[name] = subset(images, np.setdiff1d(np.arange(len(images)), list(bad)))
            whys += [bad[i] for i in sorted(bad)]
    if not kept:
        return pair
    say(f'{len(whys)} images cannot be read and are left out, the first: {whys[0]}')
    return dataclasses.replace(pair, **kept)


def _unreadable(images: Images, threads: ThreadPoolExecutor | None, world: World) -> dict[int, str]:
    bad: dict[int, str] = {}

    def look(rows: np.ndarray) -> None:
        for i in rows:
            try:
                images.read(int(i))
            except UnreadableError as e:
                bad[int(i)] = str(e)

    mine = np.arange(world.rank, len(images), world.size)
    jobs = ((None, [functools.partial(look, mine[part])]) for part in parts(len(mine)))
    world.all_or_none(lambda: list(in_order(threads, jobs)))
    return {i: why for found in world.gather(bad) for i, why in found.items()}


def centre(image: np.ndarray, short: int, size: int, left: int, top: int, out: np.ndarray) -> None:
    """torchvision's Resize (to `short`) and CenterCrop (of `size`) of (H, W, 3) uint8; `out` is its window there."""
    width, height = short_side(image, short)
    resize(image, width, height, round((width - size) / 2) + left, round((height - size) / 2) + top, out)


class _Reader:
    """Threads that fill pieces, a few ahead."""

    def __init__(
        self, images: Images, protocol: LinearProtocol, micro: int, device: torch.device, workers: int) -> None:
        self.images, self.protocol, self.micro, self.device = images, protocol, micro, device
        self.threads = make_threads(workers)

    def run(self, pieces: Iterator[Piece], fill: Callable[[Piece, slice], None]) -> Iterator[Piece]:
        jobs = ((p, [functools.partial(fill, p, part) for part in parts(len(p.rows))]) for p in pieces)
        yield from in_order(self.threads, jobs)

    def empty(self, n: int) -> Tensor:
        size = self.protocol.image_size
        return torch.empty(n, size, size, 3, dtype=torch.uint8, pin_memory=self.device.type == 'cuda')

    def read(self, row: int) -> np.ndarray:
        try:
            return self.images.read(int(row))
        except UnreadableError as e:
            raise UnreadableError(
                f'{e}; a benchmark on other images is another benchmark: repair or remove it, or leave it out with '
                '--allow-partial') from None


class TrainCrops(_Reader):
    """Augmented images of an epoch, step by step, a process's share of each step in pieces of `micro`.

    A step is a run of the epoch's permutation; process r of n takes its rows r, r + n, ... (a short step may leave it
    none: then its piece is empty). Raises UnreadableError at an image that cannot be read.
    """

    def __init__(
        self, images: Images, protocol: LinearProtocol, micro: int, device: torch.device, workers: int, seed: int,
        rank: int = 0, world: int = 1,
    ) -> None:
        super().__init__(images, protocol, micro, device, workers)
        self.seed, self.rank, self.world = seed, rank, world
        colour = protocol.jitter if protocol.augmentation == 'resized_crop_colour' else 0.0
        self.aug = Augmentation(
            size=protocol.image_size, crop_scale=protocol.crop_scale, jitter_p=float(colour > 0), brightness=colour,
            contrast=colour, saturation=colour, hue=0.0, gray_p=0.0, blur_p=0.0, flip_p=protocol.flip_p)
        self.rule = self.aug.rule()

    def __len__(self) -> int:
        """Steps per epoch, the short one included."""
        return -(-len(self.images) // self.protocol.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Piece, np.ndarray]]:
        """From step `start` on: pieces, and the rows of all processes in their step."""
        order = permutation(self.seed, epoch, len(self.images))
        batch = self.protocol.batch_size
        for piece in self.run(self._pieces(order, epoch, start), self._fill):
            yield piece, order[piece.step * batch:(piece.step + 1) * batch]

    def _pieces(self, order: np.ndarray, epoch: int, start: int) -> Iterator[Piece]:
        batch = self.protocol.batch_size
        for step in range(start, len(self)):
            mine = order[step * batch:(step + 1) * batch][self.rank::self.world]
            firsts = range(0, max(1, len(mine)), self.micro)
            for first in firsts:
                rows = mine[first:first + self.micro]
                yield self._piece(Piece(step, first == firsts[-1], rows, self.empty(len(rows))), epoch)

    def _piece(self, piece: Piece, epoch: int) -> Piece:
        p, rows = self.protocol, piece.rows
        if p.augmentation == 'random_crop':
            piece.u = uniforms(self.seed, epoch, rows, 0, 3)  # left, top, flip
            piece.flip = piece.u[:, 2] < p.flip_p
            return piece
        piece.u, rest = draw(self.aug, self.seed, epoch, rows, 0)
        piece.flip = rest.flip
        if p.augmentation == 'resized_crop_colour':
            piece.table = rest.table() if self.aug.jitter_p else None
            piece.light = lighting(p.lighting, self.seed, epoch, rows)
        return piece

    def _fill(self, piece: Piece, part: slice) -> None:
        images = [self.read(i) for i in piece.rows[part]]
        out, p = piece.pixels.numpy(), self.protocol
        if p.augmentation == 'random_crop':  # Resize, CenterCrop and RandomCrop
            room = p.resize - p.image_size + 1
            for row, image in zip(range(part.start, part.stop), images, strict=True):
                left, top = (int(x * room) for x in piece.u[row, :2])
                centre(image, p.resize, p.resize, left, top, out[row])
        elif kernel.library() is not None:
            kernel.views(images, piece.u[part], self.rule, None, out, np.arange(part.start, part.stop))
        else:
            for row, image in zip(range(part.start, part.stop), images, strict=True):
                height, width, _ = image.shape
                out[row] = crop(Image.fromarray(image), crop_box(self.aug, piece.u[row], width, height), p.image_size)


class CentreCrops(_Reader):
    """Rows rank, rank + world, ... of the test images, resized and cut from the centre; in pieces of `micro`."""

    def pieces(self, rank: int = 0, world: int = 1) -> Iterator[Piece]:
        mine = np.arange(rank, len(self.images), world)
        chunks = (mine[i:i + self.micro] for i in range(0, len(mine), self.micro))
        yield from self.run((Piece(0, False, rows, self.empty(len(rows))) for rows in chunks), self._fill)

    def _fill(self, piece: Piece, part: slice) -> None:
        p, out = self.protocol, piece.pixels.numpy()
        for row in range(part.start, part.stop):
            centre(self.read(piece.rows[row]), p.resize, p.image_size, 0, 0, out[row])


def to_device(
    piece: Piece, device: torch.device, mean: tuple[float, ...], std: tuple[float, ...], bgr: bool = False) -> Tensor:
    """(n, 3, S, S) float32, channels last: [BGR,] colours, flip, lighting, normalised.

    Weights of the BGR generation saw BGR pixels in every transform, so channels are swapped first.
    """
    # Only pinned memory may be copied behind our back.
    x = piece.pixels.to(device, non_blocking=piece.pixels.is_pinned()).permute(0, 3, 1, 2)
    if bgr:
        x = x.flip(1)
    x = x.float() / 255 if piece.table is None else jitter_and_gray(x, send(piece.table, x))
    if piece.flip is not None:
        x = torch.where(send(piece.flip, x).view(-1, 1, 1, 1), x.flip(-1), x)
    if piece.light is not None:
        x = x + send(piece.light, x)[:, :, None, None]
    mean, std = (send(np.array(v, np.float32), x).view(3, 1, 1) for v in (mean, std))
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)
