"""The images of a linear protocol: threads cut crops on the CPU, and the device finishes the augmentation.

As in pretraining, the augmentation of an image depends on (seed, epoch, index) alone. No batch is dropped, so the last
one of an epoch may be short.
"""
import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ...data import DataError, EvalImages, Images, Transform, UnreadableError
from ...data.augment import Augmentation, cut_crops, draw, jitter_and_gray, resize, send, short_side
from ...data.evaluation import SHARE
from ...data.philox import permutation, uniforms
from ...data.threads import Job, make_threads, run_in_order, split_range
from ...runtime.distributed import World
from ..protocols import LinearProtocol
from ..samples import Pair, subset

LIGHTING_VIEW = 2  # a view number for Philox that no view uses
# PCA of ImageNet's colours (Krizhevsky et al., 2012), as in MMSelfSup's Lighting: it adds
# sum_j PCA_VECTORS[i, j] alpha_j PCA_VALUES[j] to channel i of colours in [0, 1].
PCA_VALUES = np.array([0.2175, 0.0188, 0.0045])
PCA_VECTORS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
ADVICE = 'a benchmark on other images is another benchmark: repair or remove it, or leave it out with --allow-partial'


@dataclass
class Piece:
    """Images that go through the backbone together: the share of a process in a training step, or a part of it."""

    rows: np.ndarray  # (n,) indices of the images
    pixels: Tensor  # (n, S, S, 3) uint8
    step: int = 0
    last: bool = True  # of the step
    u: np.ndarray | None = None  # uniform numbers of the crops, (n, 22); for 'random_crop' (n, 3): left, top, flip
    flip: np.ndarray | None = None  # (n,) bool
    table: np.ndarray | None = None  # (n, 12), rows of augment.Finish.table, if colours are jittered
    light: np.ndarray | None = None  # (n, 3) added to the channels


class TrainCrops:
    """Loads augmented training images: yields this process's share of each step in pieces of `micro_batch`.

    A step is a slice of the epoch's permutation, and process r of n takes its rows r, r + n, ... In a short step a
    process may have no row left; it then gets an empty piece. `workers` threads read and cut; 0: the caller's own does.
    """

    def __init__(
        self, images: Images, protocol: LinearProtocol, micro_batch: int, workers: int, seed: int, world: World,
    ) -> None:
        self.images, self.protocol, self.micro_batch, self.seed, self.world = images, protocol, micro_batch, seed, world
        colour = protocol.jitter if protocol.augmentation == 'resized_crop_colour' else 0.0
        self.augmentation = Augmentation(
            size=protocol.image_size, crop_scale=protocol.crop_scale, jitter_p=float(colour > 0), brightness=colour,
            contrast=colour, saturation=colour, hue=0.0, gray_p=0.0, blur_p=0.0, flip_p=protocol.flip_p)
        self._threads = make_threads(workers)

    def __len__(self) -> int:
        """Steps per epoch, including the short one."""
        return -(-len(self.images) // self.protocol.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Piece, np.ndarray]]:
        """Yields pieces from step `start` on, each with the rows of all processes in its step."""
        order, batch = permutation(self.seed, epoch, len(self.images)), self.protocol.batch_size
        steps = [order[i:i + batch] for i in range(0, len(order), batch)]
        try:
            for piece in run_in_order(self._threads, self._jobs(steps, epoch, start)):
                yield piece, steps[piece.step]
        except UnreadableError as e:
            raise UnreadableError(f'{e}; {ADVICE}') from None

    def _jobs(self, steps: list[np.ndarray], epoch: int, start: int) -> Iterator[Job]:
        p, pin = self.protocol, self.world.device.type == 'cuda'
        for step in range(start, len(steps)):
            mine = steps[step][self.world.rank::self.world.size]
            firsts = range(0, max(1, len(mine)), self.micro_batch)
            for first in firsts:
                rows = mine[first:first + self.micro_batch]
                pixels = torch.empty(len(rows), p.image_size, p.image_size, 3, dtype=torch.uint8, pin_memory=pin)
                piece = Piece(rows, pixels, step, first == firsts[-1])
                if p.augmentation == 'random_crop':
                    piece.u = uniforms(self.seed, epoch, rows, 0, 3)
                    piece.flip = piece.u[:, 2] < p.flip_p
                else:
                    piece.u, rest = draw(self.augmentation, self.seed, epoch, rows, 0)
                    piece.flip, piece.table = rest.flip, rest.table() if self.augmentation.jitter_p else None
                if p.augmentation == 'resized_crop_colour':
                    piece.light = draw_lighting(p.lighting, self.seed, epoch, rows)
                yield piece, [functools.partial(self._fill, piece, s) for s in split_range(len(rows), SHARE)]

    def _fill(self, piece: Piece, part: slice) -> None:
        p, out, u_of = self.protocol, piece.pixels.numpy(), cast(np.ndarray, piece.u)
        images = [self.images.read(int(row)) for row in piece.rows[part]]
        if p.augmentation != 'random_crop':
            return cut_crops(images, u_of[part], self.augmentation, out, np.arange(part.start, part.stop))
        room = p.resize - p.image_size + 1  # Places205: a RandomCrop of the centre square of `resize` pixels
        for image, u, place in zip(images, u_of[part], out[part], strict=True):
            size = short_side(image, p.resize)
            left, top = (round((size[i] - p.resize) / 2) + int(u[i] * room) for i in (0, 1))
            resize(image, *size, left, top, place)


def draw_lighting(std: float, seed: int, epoch: int, rows: np.ndarray) -> np.ndarray:
    """Returns the PCA noise of each image, (n, 3) float32; alpha ~ N(0, std) by Box and Muller from Philox numbers."""
    u = uniforms(seed, epoch, rows, LIGHTING_VIEW, 4)
    radius, angle = np.sqrt(-2 * np.log1p(-u[:, :2])), 2 * np.pi * u[:, 2:]  # u < 1
    normal = np.concatenate([radius * np.cos(angle), radius[:, :1] * np.sin(angle[:, :1])], 1)  # (n, 3)
    light: np.ndarray = ((std * normal * PCA_VALUES) @ PCA_VECTORS.T).astype(np.float32)
    return light


def finish(piece: Piece, device: torch.device, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Jitters, flips, lights and normalizes on the device; returns (n, 3, S, S) float32, channels last."""
    x = piece.pixels.to(device, non_blocking=piece.pixels.is_pinned()).permute(0, 3, 1, 2)
    x = x.float() / 255 if piece.table is None else jitter_and_gray(x, send(piece.table, x))
    if piece.flip is not None:
        x = torch.where(send(piece.flip, x).view(-1, 1, 1, 1), x.flip(-1), x)
    if piece.light is not None:
        x = x + send(piece.light, x)[:, :, None, None]
    middle, spread = (send(np.array(v, np.float32), x).view(3, 1, 1) for v in (mean, std))
    return ((x - middle) / spread).contiguous(memory_format=torch.channels_last)


def leave_out_unreadable(
    pair: Pair, workers: int, world: World, say: Callable[[str], Any]) -> tuple[Pair, int]:
    """Returns the pair without unreadable images, and their number; raises DataError if they are the majority."""
    say('reading all images once to leave out those that cannot be read (--allow-partial)')
    kept, reasons = dict[str, Any](), list[str]()
    for name, images in (('train', pair.train), ('test', pair.test)):
        mine = np.arange(world.rank, len(images), world.size)
        loader = EvalImages(images, np.split(mine, range(256, len(mine), 256)), Transform(1, 1), workers)
        world.all_or_none(functools.partial(list, loader))
        bad = {row: reason for found in world.gather(loader.unreadable) for row, reason in found.items()}
        if 2 * len(bad) > len(images):
            raise DataError(
                f'{bad[min(bad)]}; {len(bad)} of {len(images)} images cannot be read: is the data still there?')
        if bad:
            kept[name] = subset(images, np.setdiff1d(np.arange(len(images)), list(bad)))
            reasons += [bad[row] for row in sorted(bad)]
    if kept:
        say(f'{len(reasons)} images cannot be read and are left out, the first: {reasons[0]}')
    return dataclasses.replace(pair, **kept) if kept else pair, len(reasons)
