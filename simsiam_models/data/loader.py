"""Batches of two views, in an order and with an augmentation that depend on (seed, epoch, index) alone.

A stream has its own order; its index is the position in the epoch.

Threads fill each batch in place: decoding and kernel.c release the interpreter lock, so nothing is pickled, copied or
collated, and the images are in memory once.
"""
import contextlib
import functools
import itertools
import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ..runtime.messages import counted
from . import kernel
from .augment import Augmentation, Sent, cut_crops, draw, finish, finish_colours, send_parameters
from .philox import permutation
from .readers.decode import DataError, UnreadableError, decode
from .readers.images import Images, Stream
from .threads import AHEAD, Job, make_threads, run_in_order, split_range

GROUP = 1 << 22  # bytes of images that are cut in one call of the kernel

_logger = logging.getLogger('simsiam_models')


class _BufferPool:
    """Arrays for batches, reused once no tensor refers to them: new memory would cost half as much time as a view."""

    def __init__(self, shape: tuple[int, ...], dtype: type, pinned: bool) -> None:
        self.shape, self.dtype, self.pinned = shape, dtype, pinned
        self.free: list[np.ndarray] = []

    def take(self) -> Tensor:
        if self.pinned:  # torch caches pinned memory itself, and waits for copies in flight
            return torch.empty(self.shape, dtype=torch.uint8, pin_memory=True)
        array = self.free.pop() if self.free else np.empty(self.shape, self.dtype)
        lease = array.view()  # every tensor that shares the memory holds this object
        weakref.finalize(lease, self.free.append, array).atexit = False
        return torch.from_numpy(lease)


@dataclass
class Batch:
    """The views of B samples, before or after they are filled."""

    epoch: int
    indices: np.ndarray  # (B,)
    tensor: Tensor  # (2, B, S, S, 3), uint8 crops or finished float32
    u: np.ndarray  # (2 B, 22), for the crops
    table: np.ndarray  # (2 B, 12), see `Finish.table`
    raw: list[bytes | np.ndarray] | None = None  # from a stream: all samples of the global batch, undecoded
    bad: dict[int, str] = field(default_factory=dict)  # unreadable images


def check_batch(batch: int, name: str, images: int, world: int) -> None:
    """Raises ValueError if the batch does not fit the images of `name` or the processes."""
    most = images // world * world
    if most < 2 * world:
        raise ValueError(
            f'{name} has {counted(images, "image")}, but a batch needs 2 for each of '
            f'{counted(world, "process", "processes")}: add images'
            f'{", or use fewer processes" if world > 1 else ""}')
    if batch % world:
        raise ValueError(
            f'--batch-size {batch} does not divide by {world} processes; use a multiple of {world}'
            + (f' from {2 * world} to {most}' if not 2 * world <= batch // world * world < most else ''))
    if batch > images:
        raise ValueError(
            f'--batch-size {batch} is larger than the data set: {name} has {images} images; '
            f'use at most {most}, or let simsiam preflight choose a recipe')
    if batch < 2 * world:
        raise ValueError(
            f'--batch-size {batch} on {world} processes: batch norm needs at least 2 samples per process; use at '
            f'least {2 * world}')


class TwoViews:
    """The training data: `epoch(e)` yields (x1, x2) on the device, each (B / world, 3, S, S) float32.

    Args:
        batch: samples per step over all processes.
        workers: threads that read and cut; with 0, the caller's own thread does.
        max_unreadable: share of the images that may be unreadable (each is replaced by the next readable one); for a
            stream, share of an epoch.
        on_device: cut uint8 crops on the CPU and finish them with torch on `device`, as for a GPU. By default, the
            kernel does everything if `device` is the CPU and the kernel is available.

    Raises:
        ValueError: the batch does not fit the data or the processes.
        UnreadableError: more unreadable images than allowed, while iterating.
        DataError: a stream breaks off, or ends in the middle of an epoch.

    `unreadable` holds the reasons by index; for a stream, by epoch * length + position.
    """

    def __init__(
        self, images: Images | Stream, aug: Augmentation, batch: int, *, seed: int = 0, rank: int = 0, world: int = 1,
        device: torch.device | str = 'cpu', workers: int = 0, max_unreadable: float = 0.0,
        on_device: bool | None = None,
    ) -> None:
        check_batch(batch, images.name, len(images), world)
        self.images, self.aug, self.seed, self.device = images, aug, seed, torch.device(device)
        self.max_unreadable, self._allowed = max_unreadable, int(max_unreadable * len(images))
        self.unreadable: dict[int, str] = {}
        self.batch, self.rank, self.world, self.share = batch, rank, world, batch // world
        self.whole = not on_device and self.device.type == 'cpu' and kernel.load_library() is not None  # finished views
        self.buffers = _BufferPool(
            (2, self.share, aug.size, aug.size, 3), np.float32 if self.whole else np.uint8, self.device.type == 'cuda')
        cuda = self.device.type == 'cuda'
        self._colours = _compile(finish_colours) if cuda else finish_colours
        self._copies = torch.cuda.Stream(self.device) if cuda else None
        self._threads = make_threads(workers)
        self.stream = hasattr(images, 'samples')
        self._reader = make_threads(1) if self.stream and workers else None  # reads the stream, one batch ahead

    def __len__(self) -> int:
        """Steps per epoch; the last incomplete batch is dropped."""
        return len(self.images) // self.batch

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the views of one epoch, starting with batch number `start`."""
        for batch in self.batches(epoch, start):
            yield self.finish(batch)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Does the CPU's part of `epoch`: yields its batches, read and cut."""
        jobs = self._read_stream(epoch, start) if self.stream else self._shuffle(epoch, start)
        for batch in run_in_order(self._threads, jobs, AHEAD - 1 if self.stream else AHEAD):
            batch.raw = None  # at most AHEAD + 1 undecoded global batches are alive, including the one being read
            self.unreadable.update(batch.bad)
            self.judge(self.unreadable, epoch)
            yield batch

    def redraw(self, epoch: int, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Returns the views that training makes of these samples in an epoch; as many as a batch of this process."""
        batch, calls = self._make_job(epoch, indices)
        for call in calls:
            call()
        self.unreadable.update(batch.bad)
        return self.finish(batch)

    def finish(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Moves a batch to the device and finishes its views there."""
        x, sent = self._copy(batch)
        x1, x2 = (x if sent is None else finish(x, sent, self._colours)).chunk(2)
        return x1, x2

    def _copy(self, batch: Batch) -> tuple[Tensor, Sent | None]:
        """Copies a batch to the device, as (2 B, 3, S, S); on CUDA while the GPU is still running the previous step."""
        with contextlib.nullcontext() if self._copies is None else torch.cuda.stream(self._copies):
            # Only pinned memory may be copied asynchronously: other memory is soon filled again. torch reuses pinned
            # memory only after the copies from it.
            x = batch.tensor.to(self.device, non_blocking=batch.tensor.is_pinned())
            sent = None if self.whole else send_parameters(batch.table, x)
        if self._copies is not None:
            here = torch.cuda.current_stream(self.device)
            here.wait_stream(self._copies)
            for y in (x, *(sent or ())):  # so that the memory is reused only after the work here
                y.record_stream(here)
        return x.flatten(0, 1).permute(0, 3, 1, 2), sent  # channels last

    def judge(self, unreadable: dict[int, str], epoch: int) -> None:
        """Raises UnreadableError if there are more unreadable images than allowed."""
        # Each epoch of a stream counts separately: its images may come at other positions in the next.
        found = [text for at, text in unreadable.items() if not self.stream or at // len(self.images) == epoch]
        if len(found) > self._allowed:
            raise UnreadableError(
                f'{found[0]}; {len(found)} unreadable so far, {self._allowed} of {len(self.images)} allowed: repair '
                f'or remove them (simsiam preflight --all counts them), or raise --max-unreadable, now '
                f'{self.max_unreadable:g}')

    def _shuffle(self, epoch: int, start: int) -> Iterator[Job]:
        """Yields batches in the order of the epoch's permutation. Every process takes its slice of each."""
        order = permutation(self.seed, epoch, len(self.images))
        for b in range(start, len(self)):
            first = b * self.batch + self.rank * self.share
            yield self._make_job(epoch, order[first:first + self.share])

    def _read_stream(self, epoch: int, start: int) -> Iterator[Job]:
        """Yields batches in the order of the stream. Every process reads all of it and decodes its own slices."""
        samples = cast(Stream, self.images).samples(self.seed, epoch, start * self.batch)

        def take(b: int, raw: list[bytes | np.ndarray]) -> None:
            raw += itertools.islice(samples, self.batch)
            if len(raw) < self.batch:
                had = b * self.batch + len(raw)
                advice = f'use --images-per-epoch {had} or less' if had >= self.batch else (
                    f'that is less than a batch of {self.batch}: check the stream')
                raise DataError(
                    f'{self.images.name}: the stream ended after {had} images of epoch {epoch + 1}, but '
                    f'{len(self.images)} were expected; {advice}')

        jobs = (((b, raw), [functools.partial(take, b, raw)]) for b in range(start, len(self))
                for raw in [list[bytes | np.ndarray]()])
        try:
            with contextlib.closing(run_in_order(self._reader, jobs, 1)) as batches:
                for b, raw in batches:
                    first = b * self.batch + self.rank * self.share
                    yield self._make_job(epoch, np.arange(first, first + self.share), raw)
                    del raw
        finally:  # runs also if the consumer stops early; a generator is closed in the thread that runs it
            if self._reader is not None:
                self._reader.submit(getattr(samples, 'close', int))

    def _make_job(self, epoch: int, indices: np.ndarray, raw: list[bytes | np.ndarray] | None = None) -> Job:
        """Returns an empty batch, and the calls that fill it."""
        u, params = zip(*(draw(self.aug, self.seed, epoch, indices, view) for view in (0, 1)), strict=True)
        table = np.concatenate([p.table() for p in params])
        batch = Batch(epoch, indices, self.buffers.take(), np.concatenate(u), table, raw)
        return batch, [functools.partial(self._fill, batch, part) for part in split_range(len(indices))]

    def _fill(self, batch: Batch, part: slice) -> None:
        """Reads these samples and cuts their views."""
        images, first, out = list[np.ndarray](), part.start, batch.tensor.flatten(0, 1).numpy()
        for i in range(part.start, part.stop):
            images.append(self._read(int(batch.indices[i]), batch))
            if sum(x.nbytes for x in images) >= GROUP or i == part.stop - 1:
                rows = np.concatenate([np.arange(first, i + 1) + view * len(batch.indices) for view in (0, 1)])
                table = batch.table[rows] if self.whole else None
                cut_crops(images + images, batch.u[rows], self.aug, out, rows, table)
                images, first = [], i + 1

    def _read(self, index: int, batch: Batch) -> np.ndarray:
        """Reads a sample, or the next readable one (in a stream: of its global batch); black if there is none."""
        n = len(self.images) if batch.raw is None else len(batch.raw)
        first = 0 if batch.raw is None else index - index % n
        for step in range(n):
            at = first + (index + step) % n
            try:
                if batch.raw is None:
                    return cast(Images, self.images).read(at)
                data = batch.raw[at - first]
                return data if isinstance(data, np.ndarray) else decode(
                    data, f'{self.images.name}: image {at} of epoch {batch.epoch + 1}')
            except UnreadableError as e:
                batch.bad[at if batch.raw is None else batch.epoch * len(self.images) + at] = str(e)
            if batch.raw is None and len(batch.bad) > self._allowed:
                break  # `judge` will end the run: do not try every file of a folder that is gone
        return np.zeros((self.aug.size, self.aug.size, 3), np.uint8)


def _compile(colours: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Returns `colours` fused by torch.compile; if that fails, warns once and uses `colours` itself."""
    compiled: Any = None

    def run(*args: Tensor) -> Tensor:
        nonlocal compiled
        try:
            compiled = compiled or torch.compile(colours, dynamic=False)  # raises if torch has no compiler here
            views: Tensor = compiled(*args)
            return views
        # torch.compile raises errors of Dynamo, Inductor, Triton and the C compiler, which share no base class.
        except Exception as e:
            if compiled is colours:
                raise
            _logger.warning(
                f'the augmentation cannot be compiled here ({type(e).__name__}); continuing uncompiled, slower')
            compiled = colours
            return colours(*args)

    return run
