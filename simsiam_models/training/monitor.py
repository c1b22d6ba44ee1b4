"""Watching a run: does the output collapse, and are images of one class near each other?"""
import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..data import EvalImages
from ..data.philox import permutation
from ..runtime.distributed import World, gather_rows

COLLAPSED_STD, COLLAPSED_RANK = 0.6, 2.0
FEW = 8  # samples
RANKED = 256  # rows of p whose rank is taken: an eighth of the time of 512
PICTURES, GRID = 64, 32  # what is looked at of a batch


@torch.no_grad()
def spread(z: Tensor) -> Tensor:
    """std x sqrt(d) of z / ||z|| (paper, section 4.1), per channel over the batch, averaged: a scalar beside z."""
    z = F.normalize(z.float(), dim=1)  # (B, d)
    return z.std(0).mean() * z.shape[1] ** 0.5


def output_std(z: Tensor) -> float:
    """`spread` as a number: 1 healthy, 0 collapsed."""
    return float(spread(z))


@torch.no_grad()
def effective_rank(z: Tensor) -> float:
    """How many directions the outputs use: exp of the entropy of their singular values (Roy & Vetterli, 2007).

    Of the centred, normalised z (B, d); between 1 and min(B - 1, d).
    """
    z = F.normalize(z.float(), dim=1)
    z = (z - z.mean(0)).double().cpu()
    gram = z @ z.T if len(z) <= z.shape[1] else z.T @ z  # several times quicker than the singular values of z itself
    s = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    share = s / s.sum().clamp_min(1e-12)
    return float(torch.exp(-(share * share.clamp_min(1e-12).log()).sum()))


def is_collapsed(std: float, rank: float, samples: float = math.inf) -> bool:
    """Outputs that shrink towards one point (std), or differ along a line only (rank); NaN counts too.

    Of fewer than 8 samples the rank, which is below their number, says nothing. Seen by tests/perf/collapse.py: std
    0.747 and rank 11.7 or more in 60 healthy runs; without stop-gradient 10 of 12 stay below std 0.6 before step 120.
    """
    return not (std > COLLAPSED_STD and (rank > COLLAPSED_RANK or samples < FEW))


@torch.no_grad()
def pixel_spread(x: Tensor) -> Tensor:
    """How much pictures (B, 3, S, S) differ from each other beyond their mean colour: 0 for blank ones.

    Of PICTURES of them, and about GRID x GRID pixels of each.
    """
    step = max(1, x.shape[-1] // GRID)
    x = x[:PICTURES, :, ::step, ::step].float()
    return (x - x.mean((2, 3), keepdim=True)).std(0).mean()


@torch.no_grad()
def constant_channels(model: nn.Module) -> Tensor:
    """Share of batch norm channels whose running variance is below 1e-5 (the usual eps): they pass nothing on."""
    variances = [
        m.running_var for m in model.modules() if isinstance(m, _BatchNorm) and m.running_var is not None]
    if not variances:
        return torch.zeros((), device=next(model.parameters()).device)
    return (torch.cat(variances) < 1e-5).float().mean()


@torch.no_grad()
def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, k: int, t: float, chunk: int = 1024,
) -> float:
    """Weighted kNN (MMSelfSup's protocol): percent of queries whose class collects most of sum exp(s / T), s = cosine.

    bank (N, d) with labels (N,), queries (M, d) with labels (M,); k is cut down to N.
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
    """A point of the run: where the device's queue of work stands on CUDA, which the host fills ahead; else a time."""

    def __init__(self, device: torch.device) -> None:
        self.clock, self.event = time.perf_counter(), None
        if device.type == 'cuda':
            self.event = torch.cuda.Event(enable_timing=True, blocking=True)
            self.event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Until the device is there."""
        if self.event is not None:
            self.event.synchronize()

    def since(self, earlier: 'Moment') -> float:
        """Seconds; wait() first."""
        if self.event is not None:
            return earlier.event.elapsed_time(self.event) / 1000
        return self.clock - earlier.clock


class Reading:
    """Figures of a step on their way to the host: how the outputs are spread, and what `doctor` asks for besides.

    The copies start behind the step and are read after the next one is launched, so the device has work meanwhile. Only
    CUDA can say when a copy has arrived; elsewhere it is made at once.

    Args:
        x1: the normalised view (B, 3, S, S).
        p1, z1: (B, d), as the model returned them.
    """

    @torch.no_grad()
    def __init__(self, loss: Tensor, x1: Tensor, p1: Tensor, z1: Tensor, model: nn.Module) -> None:
        self._known = {'samples': float(len(z1)), 'z_has_gradient': float(z1.requires_grad)}
        scalars = {
            'loss': loss, 'std': spread(z1), 'p_std': spread(p1), 'pixels': pixel_spread(x1),
            'cosine': F.cosine_similarity(p1.float(), z1.float()).mean(), 'constant_channels': constant_channels(model)}
        self._names = list(scalars)
        together = torch.stack([x.to(z1.device, torch.float32) for x in scalars.values()])
        self._host = [self._copy(x) for x in (together, z1, p1[:RANKED])]
        self.moment = Moment(z1.device)

    @staticmethod
    def _copy(x: Tensor) -> Tensor:
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
        return host.copy_(x, non_blocking=x.is_cuda)

    def read(self) -> dict[str, float]:
        """loss, std, rank; the same of p: p_std, p_rank; the other names as above."""
        self.moment.wait()
        scalars, z, p = self._host
        figures = dict(zip(self._names, scalars.tolist(), strict=True))
        return {**figures, 'rank': _rank_or_nan(z), 'p_rank': _rank_or_nan(p), **self._known}


def _rank_or_nan(z: Tensor) -> float:
    return effective_rank(z) if bool(z.isfinite().all()) else math.nan  # a NaN has no singular values


class KnnMonitor:
    """Weighted kNN accuracy of a backbone's features on labelled images.

    With validation images: bank = training images, queries = validation images. Without: every fifth image is a query.
    At most `max_bank` and `max_queries` images, chosen by a fixed permutation: a monitor, not the benchmark.
    """

    def __init__(
        self, train, val, size: int, resize: int, k: int, t: float, world: World, workers: int = 0,
        max_bank: int = 50_000, max_queries: int = 10_000,
    ) -> None:
        order = permutation(0, 0, len(train))
        held = len(order) // 5
        bank, queries = (order, permutation(0, 0, len(val))) if val is not None else (order[held:], order[:held])
        self.k, self.t, self.world = k, t, world
        self.sets = [(train, bank[:max_bank]), (val if val is not None else train, queries[:max_queries])]
        self.loaders = [
            EvalImages(images, rows[world.rank::world.size], size, resize, workers=workers, device=world.device)
            for images, rows in self.sets]
        self.labels = [
            torch.from_numpy(images.labels[rows].astype(np.int64)).to(world.device) for images, rows in self.sets]

    def describe(self) -> str:
        (_, bank), (_, queries) = self.sets
        return f'kNN (k={self.k}, T={self.t:g}; {len(bank)} bank images, {len(queries)} queries)'

    def _accuracy(self, features) -> float:
        tables = []
        for loader, (_, rows) in zip(self.loaders, self.sets, strict=True):
            tables.append(gather_rows(torch.cat([features(x) for x in loader]), len(rows), self.world))
        return knn_accuracy(tables[0], self.labels[0], tables[1], self.labels[1], self.k, self.t)

    @torch.no_grad()
    def measure(self, backbone: nn.Module) -> float:
        """Percent; the backbone is in evaluation mode for it and in the mode it was afterwards."""
        training = backbone.training
        backbone.eval()
        try:
            return self._accuracy(lambda x: backbone(x.contiguous(memory_format=torch.channels_last)).float())
        finally:
            backbone.train(training)

    def measure_pixels(self) -> float:
        """Percent, of the normalised pixels themselves, less each image's mean (without that they do worse)."""
        return self._accuracy(lambda x: x.flatten(1) - x.mean((1, 2, 3))[:, None])
