"""Batches of two views, in an order and with an augmentation that depend on (seed, epoch, index) alone.

Of a stream, which has an order of its own, the index is the position in the epoch.

Threads fill a batch where it lies: decoding and kernel.c release the interpreter lock, so nothing is pickled, copied or
collated, and a source is in memory once.
"""
import functools
import itertools
import logging
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from . import kernel
from .augment import Augmentation, crop, crop_box, draw, finish, jitter_and_gray
from .philox import permutation
from .readers.decode import DataError, UnreadableError, decode
from .readers.images import Images, Stream

AHEAD = 3  # batches that are being filled while one is trained on
SHARE = 16  # samples that a thread takes at a time
GROUP = 1 << 22  # bytes of images that are handed to the kernel together

_logger = logging.getLogger('simsiam_models')


def in_order(
    threads: ThreadPoolExecutor | None, jobs: Iterable[tuple[Any, list[Callable[[], Any]]]], ahead: int = AHEAD,
) -> Iterator[Any]:
    """Yield the first of each pair once its calls have run: in threads, `ahead` pairs early, or without here and now.

    Raises what a call raises.
    """
    if threads is None:
        for what, calls in jobs:
            for call in calls:
                call()
            yield what
        return
    waiting: deque[tuple[Any, list[Future]]] = deque()
    try:
        for what, calls in jobs:
            waiting.append((what, [threads.submit(call) for call in calls]))
            if len(waiting) > ahead:
                yield _done(waiting.popleft())
        while waiting:
            yield _done(waiting.popleft())
    finally:  # also where the consumer stops early
        if isinstance(jobs, Generator):
            jobs.close()
        for _, futures in waiting:
            for future in futures:
                future.cancel()


def _done(job: tuple[Any, list[Future]]) -> Any:
    for future in job[1]:
        future.result()
    return job[0]


def make_threads(workers: int) -> ThreadPoolExecutor | None:
    """None for 0 workers."""
    return ThreadPoolExecutor(workers, 'simsiam-data') if workers else None


def parts(n: int) -> list[slice]:
    """n samples in runs for one thread each."""
    return [slice(i, min(i + SHARE, n)) for i in range(0, n, SHARE)]


class _Buffers:
    """Arrays for batches, used again once nobody holds a tensor on them: new memory costs half of what a view does."""

    def __init__(self, shape: tuple[int, ...], dtype: type, pinned: bool) -> None:
        self.shape, self.dtype, self.pinned, self.free = shape, dtype, pinned, []

    def take(self) -> Tensor:
        if self.pinned:  # torch keeps pinned memory itself, and waits for copies that are under way
            return torch.empty(self.shape, dtype=torch.uint8, pin_memory=True)
        try:
            array = self.free.pop()
        except IndexError:
            array = np.empty(self.shape, self.dtype)
        lease = array.view()  # a tensor, and whoever shares its memory, holds this object
        weakref.finalize(lease, self.free.append, array).atexit = False
        return torch.from_numpy(lease)


class _Batch:
    """A batch while it is filled: `views` (2, B, S, S, 3), uint8 crops or finished float32."""

    def __init__(
        self, owner: 'TwoViews', epoch: int, indices: np.ndarray, raw: list[bytes | np.ndarray] | None = None,
    ) -> None:
        aug = owner.aug
        self.owner, self.epoch, self.indices, self.bad = owner, epoch, indices, {}
        self.raw = raw  # of a stream: all samples of the global batch, undecoded
        drawn = [draw(aug, owner.seed, epoch, indices, view) for view in (0, 1)]
        self.params = [d[1] for d in drawn]
        self.u = np.concatenate([d[0] for d in drawn])  # (2 B, 22)
        self.table = np.concatenate([p.table() for p in self.params]) if owner.whole else None
        self.tensor = owner.buffers.take()
        self.views = self.tensor.flatten(0, 1).numpy()

    def fill(self, part: slice) -> None:
        """Read samples and cut their views."""
        images: list[np.ndarray] = []
        first = part.start
        for i in range(part.start, part.stop):
            read = self.owner.read if self.raw is None else self._decode
            images.append(read(int(self.indices[i]), self.bad))
            if sum(x.nbytes for x in images) >= GROUP or i == part.stop - 1:
                self._cut(images, first)
                images, first = [], i + 1

    def _decode(self, position: int, bad: dict[int, str]) -> np.ndarray:
        """An unreadable sample is replaced by the next readable one of the global batch (black if there is none)."""
        owner, n = self.owner, len(self.raw)
        first, before = position - position % n, self.epoch * len(owner.images)
        for step in range(n):
            at = first + (position + step) % n
            data = self.raw[at - first]
            if isinstance(data, np.ndarray):
                return data
            try:
                return decode(data, f'{owner.images.name}: image {at} of epoch {self.epoch}')
            except UnreadableError as e:
                bad[before + at] = str(e)
        return np.zeros((owner.aug.size, owner.aug.size, 3), np.uint8)

    def _cut(self, images: list[np.ndarray], first: int) -> None:
        both = np.arange(first, first + len(images))
        both = np.concatenate([both, both + len(self.indices)])
        images = images + images
        if kernel.library() is not None:
            table = None if self.table is None else self.table[both]
            kernel.views(images, self.u[both], self.owner.rule, table, self.views, both)
            return
        aug = self.owner.aug
        for image, row in zip(images, both, strict=True):
            height, width, _ = image.shape
            self.views[row] = crop(Image.fromarray(image), crop_box(aug, self.u[row], width, height), aug.size)


class TwoViews:
    """The training data: `epoch(e)` yields (x1, x2) on the device, each (B / world, 3, S, S) float32.

    Args:
        batch: samples per step over all processes.
        workers: threads that read and cut; 0: the caller's own.
        max_unreadable: share of the images that may be unreadable (each is replaced by the next readable one); of a
            stream, share of an epoch.
        on_device: cut crops of bytes on the CPU and finish them by torch on `device`, as a GPU needs it. Default: where
            `device` is no CPU or kernel.c is not there; else the kernel does everything.

    Raises:
        ValueError: the batch does not fit the data or the processes.
        UnreadableError: more unreadable files than allowed, while iterating.
        DataError: a stream that breaks off, or ends within an epoch.

    `unreadable` says what could not be read, by index; of a stream, by epoch * length + position.
    """

    def __init__(
        self, images: Images | Stream, aug: Augmentation, batch: int, seed: int = 0, rank: int = 0, world: int = 1,
        device: torch.device | str = 'cpu', workers: int = 0, max_unreadable: float = 0.0,
        on_device: bool | None = None,
    ) -> None:
        if batch % world:
            raise ValueError(
                f'--batch-size {batch} does not divide by {world} processes; use a multiple of {world}')
        if batch > len(images):
            raise ValueError(
                f'--batch-size {batch} is larger than the data set: {images.name} has {len(images)} images; '
                f'use at most {len(images)}, or let simsiam preflight choose a recipe')
        if batch // world < 2:
            raise ValueError(f'--batch-size {batch} on {world} processes: batch norm needs at least 2 samples each')
        self.images, self.aug, self.seed, self.device = images, aug, seed, torch.device(device)
        self.max_unreadable, self.unreadable = max_unreadable, {}
        self.batch, self.rank, self.world = batch, rank, world
        self.rule = aug.rule()
        self.whole = not on_device and self.device.type == 'cpu' and kernel.library() is not None
        self.buffers = _Buffers(
            (2, batch // world, aug.size, aug.size, 3), np.float32 if self.whole else np.uint8,
            self.device.type == 'cuda')
        self._colours = _compiled(jitter_and_gray) if self.device.type == 'cuda' else jitter_and_gray
        self._threads = make_threads(workers)
        self.stream = hasattr(images, 'samples')
        # A stream is read in a thread of its own, which is one batch early.
        self._reader = ThreadPoolExecutor(1, 'simsiam-stream') if self.stream and workers else None

    def __len__(self) -> int:
        """Steps per epoch; the last incomplete batch is dropped."""
        return len(self.images) // self.batch

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The views of one epoch, from its batch number `start` on."""
        for batch in self.batches(epoch, start):
            yield self.finished(batch)

    def batches(self, epoch: int, start: int = 0) -> Iterator['_Batch']:
        """What the CPU has to do for `epoch`: its batches, read and cut."""
        jobs = self._stream_jobs(epoch, start) if self.stream else self._jobs(epoch, start)
        for batch in in_order(self._threads, jobs, AHEAD - 1 if self.stream else AHEAD):
            batch.raw = None  # so that AHEAD + 1 global batches wait undecoded at most, the one being read included
            self._count(batch.bad, epoch)
            yield batch

    def _jobs(self, epoch: int, start: int) -> Iterator[tuple[_Batch, list[Callable[[], None]]]]:
        """A global batch is a run of the epoch's permutation, and a process takes its slice of it.

        Thus N processes see, batch for batch, what one process sees.
        """
        order = permutation(self.seed, epoch, len(self.images))
        share = self.batch // self.world
        for b in range(start, len(self)):
            first = b * self.batch + self.rank * share
            batch = _Batch(self, epoch, order[first:first + share])
            yield batch, [functools.partial(batch.fill, part) for part in parts(share)]

    def _stream_jobs(self, epoch: int, start: int) -> Iterator[tuple[_Batch, list[Callable[[], None]]]]:
        """A global batch is a run of the stream. Every process reads all of it, and decodes its slice."""
        samples = self.images.samples(self.seed, epoch, start * self.batch)
        share = self.batch // self.world

        def take(b: int) -> list[bytes | np.ndarray]:
            raw = list(itertools.islice(samples, self.batch))
            if len(raw) < self.batch:
                had = b * self.batch + len(raw)
                raise DataError(
                    f'{self.images.name}: the stream ended after {had} images of epoch {epoch}, where '
                    f'{len(self.images)} were expected; give --images-per-epoch {had}, or less')
            return raw

        def job(b: int, raw: list[bytes | np.ndarray]) -> tuple[_Batch, list[Callable[[], None]]]:
            first = b * self.batch + self.rank * share
            batch = _Batch(self, epoch, np.arange(first, first + share), raw)
            return batch, [functools.partial(batch.fill, part) for part in parts(share)]

        if self._reader is None:
            for b in range(start, len(self)):
                yield job(b, take(b))
            return
        waiting = None
        try:
            for b in range(start, len(self)):
                raw = (waiting or self._reader.submit(take, b)).result()
                waiting = self._reader.submit(take, b + 1) if b + 1 < len(self) else None
                yield job(b, raw)
                del raw
        finally:  # also where the consumer stops early; a generator is closed where it runs
            if waiting is not None:
                waiting.cancel()
            self._reader.submit(getattr(samples, 'close', int))

    def finished(self, batch: _Batch) -> tuple[Tensor, Tensor]:
        """The views of a batch, on the device."""
        # Only pinned memory may be copied behind our back: the other kind is soon filled again.
        x = batch.tensor.to(self.device, non_blocking=batch.tensor.is_pinned())
        x = x.permute(0, 1, 4, 2, 3)  # (2, B, 3, S, S), channels last
        if self.whole:
            return x[0], x[1]
        return finish(x[0], batch.params[0], self._colours), finish(x[1], batch.params[1], self._colours)

    def read(self, index: int, bad: dict[int, str]) -> np.ndarray:
        """An unreadable image is named in `bad` and replaced by the next readable one (black if none is left)."""
        for step in range(len(self.images)):
            at = (index + step) % len(self.images)
            try:
                return self.images.read(at)
            except UnreadableError as e:
                bad[at] = str(e)
                if len(bad) > int(self.max_unreadable * len(self.images)):
                    break  # the run ends when this batch is counted: a folder that went away is not tried file by file
        return np.zeros((self.aug.size, self.aug.size, 3), np.uint8)

    def _count(self, bad: dict[int, str], epoch: int) -> None:
        self.unreadable.update(bad)
        self.judge(self.unreadable, epoch)

    def judge(self, unreadable: dict[int, str], epoch: int) -> None:
        """Raises UnreadableError where these are more than are allowed."""
        allowed = int(self.max_unreadable * len(self.images))
        found = list(unreadable.values())
        if self.stream and found:  # where an image comes in one epoch says nothing about another
            found = [text for at, text in unreadable.items() if at // len(self.images) == epoch]
        if len(found) > allowed:
            raise UnreadableError(
                f'{found[0]}; {len(found)} unreadable so far, {allowed} of {len(self.images)} allowed: repair '
                'or remove it, or allow a share of them with --max-unreadable 0.01')


def _compiled(colours: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Fused by torch.compile, or as it is where that fails, which is said once."""
    state: dict[str, Any] = {'run': None}

    def run(images: Tensor, table: Tensor) -> Tensor:
        try:
            if state['run'] is None:  # raises at once where there is no compiler for this Python
                state['run'] = torch.compile(colours, dynamic=False)
            return state['run'](images, table)
        except Exception as e:  # compilers fail in many ways, none of which should end the run
            if state['run'] is colours:
                raise
            _logger.warning(f'the augmentation cannot be compiled here ({type(e).__name__}); going on without, slower')
            state['run'] = colours
            return colours(images, table)

    return run
