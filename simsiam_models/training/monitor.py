"""Measures output std and effective rank, which show a collapse, and the kNN accuracy of the features."""
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from ..data import DataError, EvalImages, Images, Stream, Transform
from ..data.augment import normalize
from ..data.philox import permutation
from ..data.threads import split_range
from ..runtime.distributed import World, gather_rows
from ..runtime.messages import counted
from .recipes import Recipe

COLLAPSED_STD, COLLAPSED_RANK = 0.6, 2.0
MIN_SAMPLES = 8  # the rank of fewer means little
RANK_ROWS = 256  # rows of p whose rank is computed: an eighth of the time of 512
PICTURES, GRID = 64, 32  # of a batch, for `measure_pixel_std`
# The kNN monitor: images per batch; least and most images of a measurement; seconds of the first one; share of the run;
# bytes of pixels that are kept for the next measurement.
BATCH, LEAST, MOST, SECONDS, SHARE, KEPT = 128, 100, 60_000, 3.0, 0.05, 256 << 20


@torch.no_grad()
def output_std(z: Tensor) -> Tensor:
    """Returns std x sqrt(d) of z / ||z|| for z (B, d), mean over channels (paper, 4.1): 1 healthy, 0 collapsed."""
    std: Tensor = F.normalize(z.float(), dim=1).std(0).mean() * z.shape[1] ** 0.5
    return std


@torch.no_grad()
def effective_rank(z: Tensor) -> float:
    """Returns the effective rank: exp of the entropy of the outputs' singular values (Roy & Vetterli, 2007).

    The rows of z (B, d) are normalised and centred first. The result is between 1 and min(B - 1, d); NaN for a NaN.
    """
    if not z.isfinite().all():
        return math.nan
    z = F.normalize(z.float(), dim=1)
    z = (z - z.mean(0)).double().cpu()
    gram = z @ z.T if len(z) <= z.shape[1] else z.T @ z  # several times faster than the singular values of z
    s = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    share = s / s.sum().clamp_min(1e-12)
    return float(torch.exp(-(share * share.clamp_min(1e-12).log()).sum()))


def is_collapsed(std: float, rank: float, samples: float = math.inf) -> bool:
    """Returns whether outputs shrink towards one point (std) or differ only along a line (rank); True for NaN.

    The rank is below the number of samples, so it counts only with 8 or more. tests/perf/collapse.py saw std 0.747
    and rank 11.7 or more in 60 healthy runs; without stop-gradient 10 of 12 runs fall below std 0.6 before step 120.
    """
    return not (std > COLLAPSED_STD and (rank > COLLAPSED_RANK or samples < MIN_SAMPLES))


@torch.no_grad()
def measure_pixel_std(x: Tensor) -> Tensor:
    """Returns how much PICTURES of (B, 3, S, S) vary around their mean colour at GRID x GRID pixels; blank: 0."""
    step = max(1, x.shape[-1] // GRID)
    x = x[:PICTURES, :, ::step, ::step].float()
    return (x - x.mean((2, 3), keepdim=True)).std(0).mean()


@torch.no_grad()
def constant_channels(model: nn.Module) -> Tensor:
    """Returns the share of batch norm channels with a running variance below 1e-5 (the usual eps): dead ones."""
    variances = [m.running_var for m in model.modules() if isinstance(m, _BatchNorm) and m.running_var is not None]
    if not variances:
        return torch.zeros((), device=next(model.parameters()).device)
    return (torch.cat(variances) < 1e-5).float().mean()


@torch.no_grad()
def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, k: int, t: float, *, chunk: int = 1024,
) -> float:
    """Computes MMSelfSup's weighted kNN: percent of queries whose class has the largest sum of exp(cosine / T).

    bank (N, d) with labels (N,), queries (M, d) with labels (M,); k is at most N.
    """
    bank, queries = F.normalize(bank.float(), dim=1), F.normalize(queries.float(), dim=1)
    classes = int(torch.max(bank_labels.max(), labels.max())) + 1
    right = 0
    for q, y in zip(queries.split(chunk), labels.split(chunk), strict=True):
        s, at = (q @ bank.T).topk(min(k, len(bank)), dim=1)  # (m, k)
        votes = s.new_zeros(len(q), classes).scatter_add_(1, bank_labels[at], (s / t).exp())
        right += int((votes.argmax(1) == y).sum())
    return 100 * right / len(queries)


class Moment:
    """A point in a run: on CUDA a place in the device's queue, which the host fills in advance; elsewhere a time."""

    def __init__(self, device: torch.device) -> None:
        self.clock = time.perf_counter()
        self.event: torch.cuda.Event | None = None
        if device.type == 'cuda':
            self.event = torch.cuda.Event(enable_timing=True, blocking=True)
            self.event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Blocks until the device reaches this point."""
        if self.event is not None:
            self.event.synchronize()

    def since(self, earlier: 'Moment') -> float:
        """Returns seconds; call wait() first."""
        if self.event is not None and earlier.event is not None:
            return float(earlier.event.elapsed_time(self.event)) / 1000
        return self.clock - earlier.clock


class Reading:
    """Figures of a step on their way to the host: output std and rank, and the evidence that `doctor` needs.

    The copies start behind the step and are read after the next one is launched, so the device stays busy. Only CUDA
    can say when a copy has arrived; elsewhere it is made at once. x1 is the normalised view, (B, 3, S, S); p1 and z1,
    (B, d), are as the model returned them.
    """

    @torch.no_grad()
    def __init__(self, loss: Tensor, x1: Tensor, p1: Tensor, z1: Tensor, model: nn.Module) -> None:
        self._samples = float(len(z1))
        scalars = {
            'loss': loss, 'std': output_std(z1), 'p_std': output_std(p1), 'pixels': measure_pixel_std(x1),
            'cosine': F.cosine_similarity(p1.float(), z1.float()).mean(), 'constant_channels': constant_channels(model)}
        self._names = list(scalars)
        together = torch.stack([x.to(z1.device, torch.float32) for x in scalars.values()])
        self._host = [
            torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda).copy_(x, non_blocking=x.is_cuda)
            for x in (together, z1, p1[:RANK_ROWS])]
        self.moment = Moment(z1.device)

    def read(self) -> dict[str, float]:
        """Returns loss, std, rank, p_std, p_rank, pixels, cosine, constant_channels and samples."""
        self.moment.wait()
        scalars, z, p = self._host
        figures = dict(zip(self._names, scalars.tolist(), strict=True))
        return {**figures, 'rank': effective_rank(z), 'p_rank': effective_rank(p), 'samples': self._samples}


def has_classes(images: Images | Stream) -> bool:
    """Returns whether there are labels of at least two classes: with one, every neighbour is right."""
    return images.labels is not None and len(np.unique(images.labels)) > 1


def explain_no_monitor(images: Images | Stream) -> str:
    """Returns why these images have no kNN monitor."""
    if images.labels is None:
        return 'no labels'
    return 'too few images' if has_classes(images) else 'only one class, so every neighbour has the right label'


def allowed_size(recipe: Recipe, samples: int) -> int:
    """Returns how many images the kNN monitor may measure each time so that it costs at most SHARE of a run.

    `samples`: what the run trains on in all. A measured image costs as much as one of these if it is read, and a fourth
    if its pixels are kept: a step has forward and backward of two views.
    """
    measurements = 1 + (-(-recipe.epochs // recipe.knn_every) if recipe.knn_every else 1)
    read = int(SHARE * samples / measurements)
    kept = int(SHARE * samples / (1 + (measurements - 1) / 4))
    return min(MOST, max(LEAST, read, min(kept, KEPT // (3 * recipe.augmentation.size**2))))


class KnnMonitor:
    """Weighted kNN accuracy of a backbone's features on labelled images.

    The training images are the bank, and the validation images the queries. Without validation images every fifth image
    is a query. A fixed permutation chooses `size` images, one query for four of the bank: this is no benchmark.
    Unreadable images are left out.

    Args:
        size: number of images; None: as many as `measure_before` reads in about SECONDS, at most `most`.
        max_unreadable: the share of each data set that may be unreadable.
    """

    def __init__(
        self, train: Images, val: Images | None, recipe: Recipe, world: World, *, size: int | None = None,
        most: int = MOST, workers: int = 0, max_unreadable: float = 0.1,
    ) -> None:
        order = permutation(0, 0, len(train))
        held = len(order) // 5
        bank, queries = (order[held:], order[:held]) if val is None else (order, permutation(0, 0, len(val)))
        self.k, self.t, self.world, self.max_unreadable = recipe.knn_k, recipe.knn_t, world, max_unreadable
        self.whole = [(train, bank), (train if val is None else val, queries)]
        self.unreadable: list[dict[int, str]] = [{}, {}]  # of bank and queries, at the last measurement
        self.transform = Transform(recipe.eval_resize, recipe.augmentation.size)
        self.workers = workers and workers + 1  # this thread waits meanwhile
        self.size, self.most = size, most
        self.select(most if size is None else size)

    def select(self, size: int) -> None:
        """Measures with `size` images from here on, or with all if there are fewer."""
        least, ((train, bank), (val, queries)) = self.world.size, self.whole
        queries = queries[:max(least, size // 5, size - len(bank))]
        self.sets = [(train, bank[:max(least, size - len(queries))]), (val, queries)]
        self._kept: list[list[Tensor] | None] = [None, None]  # pixels of the bank and of the queries, if they are few

    @property
    def sizes(self) -> list[int]:
        """Returns the numbers of bank images and queries that were readable at the last measurement."""
        return [len(rows) - len(bad) for (_, rows), bad in zip(self.sets, self.unreadable, strict=True)]

    @property
    def queries(self) -> int:
        return self.sizes[1]

    def describe(self) -> str:
        bank, queries = self.sizes
        text = f'kNN (k={self.k}, T={self.t:g}; {bank} bank images, {queries} queries)'
        bad = [reason for part in reversed(self.unreadable) for reason in part.values()]
        return f'{text}, {counted(len(bad), "unreadable image")} left out (the first: {bad[0]})' if bad else text

    @torch.no_grad()
    def measure_before(self, backbone: nn.Module, start: str = 'random', *, pixels: bool) -> dict[str, float]:
        """Chooses the size if it is None; returns percent for the backbone, named `start`, and for 'pixels'."""
        with evaluating(backbone):
            if self.size is None:
                self.size = self.world.broadcast_from_main(lambda: self._choose_size(backbone))
                self.select(self.size)
            extractors: dict[str, Callable[[Tensor], Tensor]] = {start: functools.partial(_features, backbone)}
            if pixels:
                extractors['pixels'] = _pixels
            return dict(zip(extractors, self._measure(*extractors.values()), strict=True))

    @torch.no_grad()
    def measure(self, backbone: nn.Module) -> float:
        """Returns percent; puts the backbone into evaluation mode meanwhile, and then back into its former mode."""
        with evaluating(backbone):
            return self._measure(functools.partial(_features, backbone))[0]

    def _choose_size(self, backbone: nn.Module) -> int:
        """Returns how many images all processes read in SECONDS, as this one reads and computes its first few."""
        (images, rows), n, seconds = self.sets[0], 0, 0.0
        while seconds < SECONDS / 10 and n < len(rows):
            n = min(len(rows), 4 * n or 8)
            began = time.perf_counter()
            for _, x in self._load(images, rows[:n]):
                _features(backbone, self._normalize(x)).sum().item()
            seconds = time.perf_counter() - began
        return min(self.most, max(LEAST, int(SECONDS * self.world.size * n / seconds)))

    def _measure(self, *extractors: Callable[[Tensor], Tensor]) -> list[float]:
        """Returns percent for the features of each extractor."""
        total, hidden = sum(len(rows) for _, rows in self.sets), not (self.world.main and sys.stderr.isatty())
        with tqdm(total=total, desc='kNN', unit='image', leave=False, dynamic_ncols=True, disable=hidden) as bar:
            tables = [self._extract(part, extractors, bar) for part in (0, 1)]
        self._judge_unreadable()
        kept, labels = [], []
        for (images, rows), bad in zip(self.sets, self.unreadable, strict=True):
            keep = np.array([row not in bad for row in rows.tolist()])
            kept.append(torch.from_numpy(keep).to(self.world.device))
            codes = cast(np.ndarray, images.labels)[rows[keep]].astype(np.int64)
            labels.append(torch.from_numpy(codes).to(self.world.device))
        return [
            knn_accuracy(bank[kept[0]], labels[0], queries[kept[1]], labels[1], self.k, self.t)
            for bank, queries in zip(*tables, strict=True)]

    def _extract(self, part: int, extractors: Sequence[Callable[[Tensor], Tensor]], bar: tqdm) -> list[Tensor]:
        """Returns features of the bank (0) or the queries (1) by each extractor; notes which images are unreadable."""
        found = []
        for x in self._read(part):
            pixels = self._normalize(x)
            found.append([extract(pixels) for extract in extractors])
            bar.update(self.world.size * len(x))
        return [gather_rows(torch.cat(x), len(self.sets[part][1]), self.world) for x in zip(*found, strict=True)]

    def _read(self, part: int) -> Iterator[Tensor]:
        """Yields the pixels of this process's images; keeps them if there are few."""
        if (before := self._kept[part]) is not None:
            yield from before
            return
        world, (images, rows), kept = self.world, self.sets[part], list[Tensor]()
        loader = self._load(images, rows[world.rank::world.size])
        few = 3 * self.transform.crop**2 * sum(len(rows) for _, rows in self.sets) <= KEPT
        for _, x in loader:
            kept += [x] if few else []
            yield x
        self.unreadable[part] = {k: v for bad in world.gather(loader.unreadable) for k, v in bad.items()}
        self._kept[part] = kept if few else None

    def _load(self, images: Images, rows: np.ndarray) -> EvalImages:
        batches = [rows[part] for part in split_range(len(rows), BATCH)]
        return EvalImages(images, batches, self.transform, self.workers, self.world.device)

    def _normalize(self, x: Tensor) -> Tensor:
        return normalize(x.to(self.world.device).permute(0, 3, 1, 2).float() / 255)

    def _judge_unreadable(self) -> None:
        """Raises DataError if too many images of a data set, or all of the bank or the queries, are unreadable."""
        (train, bank), (val, queries) = self.sets
        for images, rows, bad in ((train, bank, self.unreadable[0]), (val, queries, self.unreadable[1])):
            n, found = len(rows), len(bad)
            if train is val:  # bank and queries are parts of one data set
                n, found = len(bank) + len(queries), sum(map(len, self.unreadable))
            if found > self.max_unreadable * n or len(bad) == len(rows):
                first = next(iter((bad or self.unreadable[1]).values()))
                raise DataError(
                    f'{images.name}: {found} of {n} images for the kNN monitor cannot be read (the first: {first}), '
                    f'more than --max-unreadable {self.max_unreadable:g} allows: repair or remove them')


def _features(backbone: nn.Module, x: Tensor) -> Tensor:
    features: Tensor = backbone(x.contiguous(memory_format=torch.channels_last)).float()
    return features


def _pixels(x: Tensor) -> Tensor:
    """Returns the normalised pixels minus each image's mean; without the subtraction they do worse."""
    return x.flatten(1) - x.mean((1, 2, 3))[:, None]


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Puts a network into evaluation mode, and then back into its former mode."""
    training = net.training
    net.eval()
    try:
        yield
    finally:
        net.train(training)
