"""Softmax classifiers on cached features: many trained together by SGD, and the optimum of one by L-BFGS."""
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ...data.philox import permutation
from ...runtime.messages import silent
from ..metrics import right_within
from .probe_features import ScaledFeatures

NAME = 'auto_probe'
MAX_SCORE_BYTES = 1 << 28  # of the scores that are in memory at a time


@dataclass(frozen=True)
class AutoProbe:
    """The numbers of the protocol. The rates belong to features of length about 1; see `ScaledFeatures.scale_by`."""

    lrs: tuple[float, ...] = (0.5, 2.0, 8.0, 32.0)  # if an end of the grid is best: two more beyond it
    weight_decays: tuple[float, ...] = (1e-6, 1e-5, 1e-4, 1e-3)  # of (wd / 2) |W|^2; the bias has none
    epochs: int = 30
    batch_size: int = 1024  # at most; see `choose_batch_size`
    momentum: float = 0.9
    held_out: float = 0.1  # share of the training images, at most probe.MAX_HELD_OUT images
    lbfgs_iterations: int = 200
    seed: int = 0


@dataclass
class Fit:
    """G classifiers: weight (D, G, C), bias (G, C), and the mean training loss of each epoch (epochs, G)."""

    weight: Tensor
    bias: Tensor
    losses: np.ndarray

    @property
    def diverged(self) -> list[bool]:
        """Returns whether each member's last loss is not finite, or above log C, the loss of uniform scores."""
        highest = math.log(self.bias.shape[1]) + 1e-6
        return [not (math.isfinite(x) and x <= highest) for x in self.losses[-1]]

    def scores(self, x: Tensor) -> Tensor:
        """Maps features (B, D) to scores (B, G, C)."""
        return torch.addmm(self.bias.flatten(), x, self.weight.flatten(1)).view(len(x), *self.bias.shape)


def count_rows(g: int, classes: int, dtype: torch.dtype) -> int:
    return max(1, MAX_SCORE_BYTES // (g * classes * dtype.itemsize))


def choose_batch_size(n: int, p: AutoProbe) -> int:
    return min(p.batch_size, max(64, n // 32))


def differentiate(fit: Fit, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the cross-entropy (G,), summed over the batch, and its gradients by weight (D, G, C) and bias (G, C)."""
    chunk = count_rows(fit.bias.shape[0], fit.bias.shape[1], x.dtype)
    total, weight, bias = x.new_zeros(len(fit.bias)), cast(Tensor | None, None), torch.zeros_like(fit.bias)
    for xs, ys in zip(x.split(chunk), y.split(chunk), strict=True):
        s = fit.scores(xs)
        s -= s.logsumexp(-1, keepdim=True)
        at = ys[:, None, None].expand(-1, s.shape[1], 1)
        total -= s.gather(2, at).sum((0, 2))
        slope = s.exp_().scatter_add_(2, at, s.new_full((1, 1, 1), -1).expand(at.shape))  # softmax - one-hot, (B, G, C)
        part = xs.T @ slope.flatten(1)  # (D, G C)
        weight = part if weight is None else weight.add_(part)
        bias += slope.sum(0)
    return total, cast(Tensor, weight).view_as(fit.weight), bias


def train_grid(
    features: ScaledFeatures, rows: np.ndarray, classes: int, members: Sequence[tuple[float, float]], p: AutoProbe,
    say: Callable[[str], Any] = silent,
) -> Fit:
    """Trains a classifier for each member (lr, weight decay) on `rows`, all in one matrix product per step.

    SGD with momentum from zero weights, with a cosine schedule. Members are independent, even if one diverges.
    """
    g, make = len(members), dict[str, Any](device=features.device, dtype=features.dtype)
    lr, wd = (torch.tensor(x, **make)[:, None] for x in zip(*members, strict=True))  # (G, 1)
    fit = Fit(torch.zeros(features.dim, g, classes, **make), torch.zeros(g, classes, **make), np.zeros((p.epochs, g)))
    weight_m, bias_m = torch.zeros_like(fit.weight), torch.zeros_like(fit.bias)
    steps = -(-len(rows) // choose_batch_size(len(features), p))  # the same batch for the grid and for the final fit
    for epoch in range(p.epochs):
        started, total = time.perf_counter(), torch.zeros(g, **make)
        # In equal parts: at the rates of the grid, a last batch of two images can undo an epoch.
        for step, at in enumerate(np.array_split(rows[permutation(p.seed, epoch, len(rows))], steps)):
            at = np.sort(at)  # sequential reads from disk
            loss, weight, bias = differentiate(fit, features.take(at), features.take_labels(at))
            total += loss
            rate = lr * (0.5 * (1 + math.cos(math.pi * (epoch * steps + step) / (p.epochs * steps))))
            weight_m.mul_(p.momentum).add_(weight.div_(len(at)).add_(fit.weight * wd))
            bias_m.mul_(p.momentum).add_(bias.div_(len(at)))
            fit.weight.sub_(weight_m * rate)
            fit.bias.sub_(bias_m * rate)
        fit.losses[epoch] = (total / len(rows)).tolist()
        if (epoch + 1) % max(1, p.epochs // 6) == 0 or epoch + 1 == p.epochs:
            lowest = min((x for x in fit.losses[epoch] if not math.isnan(x)), default=math.nan)
            say(f'{NAME}: epoch {epoch + 1}/{p.epochs}  {g} classifiers  lowest loss {lowest:.4f}  '
                f'{len(rows) / (time.perf_counter() - started):.0f} images/s')
    return fit


def evaluate(fit: Fit, features: ScaledFeatures, rows: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Returns loss (G,), and top1 and, from 6 classes on, top5 (G,) in percent, on `rows` (default: all)."""
    rows = np.arange(len(features)) if rows is None else np.sort(rows)
    g, classes = fit.bias.shape
    chunk = min(4096, count_rows(g, classes, fit.bias.dtype))
    sums: dict[str, np.ndarray] = {k: np.zeros(g) for k in ('loss', 'top1', *(('top5',) if classes > 5 else ()))}
    for i in range(0, len(rows), chunk):
        at = rows[i:i + chunk]
        s, y = fit.scores(features.take(at)), features.take_labels(at)
        own = s.gather(2, y[:, None, None].expand(-1, g, 1)).squeeze(2)
        sums['loss'] += (s.logsumexp(-1) - own).sum(0).double().cpu().numpy()
        for k in set(sums) - {'loss'}:
            sums[k] += [float(right_within(s[:, m], y, int(k[3:]))) for m in range(g)]
    return {k: v / len(rows) * (1 if k == 'loss' else 100) for k, v in sums.items()}


def compute_objective(fit: Fit, features: ScaledFeatures, rows: np.ndarray, weight_decay: float) -> float:
    """Returns mean cross-entropy + (wd / 2) |W|^2 of the first member."""
    loss = float(evaluate(fit, features, rows)['loss'][0])
    return loss + 0.5 * weight_decay * float(fit.weight.double().square().sum())


def find_optimum(
    features: ScaledFeatures, rows: np.ndarray, weight_decay: float, start: Fit, iterations: int,
) -> tuple[Fit, float, float]:
    """Minimizes `compute_objective` by L-BFGS from `start`; returns the fit, its objective, and its largest slope."""
    weight, bias, rows = start.weight.clone(), start.bias.clone(), np.sort(rows)
    fit = Fit(weight, bias, start.losses)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=iterations, history_size=20, tolerance_grad=1e-7, tolerance_change=1e-12,
        line_search_fn='strong_wolfe')

    @torch.no_grad()
    def compute() -> Tensor:
        total, weight.grad, bias.grad = torch.zeros((), dtype=torch.float64), weight * weight_decay, bias * 0
        for i in range(0, len(rows), 8192):
            at = rows[i:i + 8192]
            loss, dw, db = differentiate(fit, features.take(at), features.take_labels(at))
            total += loss.double().cpu().squeeze()
            weight.grad += dw / len(rows)
            bias.grad += db / len(rows)
        return total / len(rows) + 0.5 * weight_decay * float(weight.double().square().sum())

    optimizer.step(compute)
    value = float(compute())
    slopes = [cast(Tensor, x.grad) for x in (weight, bias)]
    return fit, value, max(float(slope.abs().max()) for slope in slopes)
