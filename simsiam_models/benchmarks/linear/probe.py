"""A linear classifier on cached features (`--protocol auto`): minutes where the published protocols take a day.

It is a protocol of its own, `auto_probe`, and never stands in for a published one: no augmentation, features scaled by
the images that are learned from (so that the learning rate does not depend on the backbone's scale), a grid of learning
rates and weight decays trained as one problem, the best chosen on held-out training images, that one trained again on
all of them, and the optimum of its objective found by L-BFGS beside it.
"""
import argparse
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...data.philox import permutation
from ...runtime.distributed import World
from ..backbone import load_backbone
from ..datasets.classification import open_pair
from ..features import extract
from ..metrics import right_within
from ..options import check_extraction, silent, size_and_resize, transform_of, without_test_image
from ..protocols import LEAST
from ..results.record import check_output, print_record, record_path, write_record
from .probe_features import Table, moments
from .protocol import NUMBERS
from .training import backbone_fits

NAME = 'auto_probe'
BYTES = 1 << 28  # of scores that are held at a time
HELD_OUT = 50_000  # images at most


@dataclass(frozen=True)
class AutoProbe:
    """The numbers of the protocol. Rates belong to features x' = (x - mean) / (std sqrt(D)), so |x'| is about 1."""

    lrs: tuple[float, ...] = (0.5, 2.0, 8.0, 32.0)  # of a best one at an end, two more beyond it: `beyond`
    weight_decays: tuple[float, ...] = (1e-6, 1e-5, 1e-4, 1e-3)  # of (wd / 2) |W|^2; the bias has none
    epochs: int = 30
    batch_size: int = 1024  # where images are few a 32nd of them, but 64
    momentum: float = 0.9
    held_out: float = 0.1  # share of the training images, HELD_OUT at most
    lbfgs_iterations: int = 200
    seed: int = 0


@dataclass
class Fit:
    """G members: weight (D, G, C), bias (G, C), and the mean training loss of each epoch (epochs, G)."""

    weight: Tensor
    bias: Tensor
    losses: np.ndarray

    def member(self, g: int) -> 'Fit':
        return Fit(self.weight[:, g:g + 1].clone(), self.bias[g:g + 1].clone(), self.losses[:, g:g + 1])

    def scores(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, G, C)."""
        return torch.addmm(self.bias.flatten(), x, self.weight.flatten(1)).view(len(x), *self.bias.shape)


def _rows_at_once(g: int, classes: int, dtype: torch.dtype) -> int:
    return max(1, BYTES // (g * classes * dtype.itemsize))


def _loss_and_slope(fit: Fit, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy (G,), and its derivative by the scores (B, G, C)."""
    s = fit.scores(x)
    s -= s.logsumexp(-1, keepdim=True)
    at = y[:, None, None].expand(-1, s.shape[1], 1)
    loss = -s.gather(2, at).sum((0, 2))
    return loss, s.exp_().scatter_add_(2, at, s.new_full((1, 1, 1), -1).expand(at.shape))


def gradient(fit: Fit, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the batch: loss (G,), slopes of weight (D, G, C) and bias (G, C); in chunks of bounded memory."""
    chunk = _rows_at_once(*fit.bias.shape, x.dtype)
    total, weight, bias = x.new_zeros(len(fit.bias)), None, torch.zeros_like(fit.bias)
    for xs, ys in zip(x.split(chunk), y.split(chunk), strict=True):
        loss, slope = _loss_and_slope(fit, xs, ys)
        part = xs.T @ slope.flatten(1)  # (D, G C)
        weight = part if weight is None else weight.add_(part)
        bias += slope.sum(0)
        total += loss
    return total, weight.view_as(fit.weight), bias


def steps_batch(n: int, p: AutoProbe) -> int:
    return min(p.batch_size, max(64, n // 32))


def train(
    table: Table, rows: np.ndarray, classes: int, members: Sequence[tuple[float, float]], p: AutoProbe,
    say: Callable[[str], Any] = lambda text: None,
) -> Fit:
    """SGD with momentum on `rows` from zero weights, all members (lr, weight decay) in one product per step.

    The rate falls by half a cosine, per step. Members do not touch each other, also where one diverges.
    """
    g, d = len(members), table.features
    make = dict(device=table.device, dtype=table.dtype)
    lr, wd = (torch.tensor(x, **make)[:, None] for x in zip(*members, strict=True))  # (G, 1)
    fit = Fit(torch.zeros(d, g, classes, **make), torch.zeros(g, classes, **make), np.zeros((p.epochs, g)))
    weight_m, bias_m = torch.zeros_like(fit.weight), torch.zeros_like(fit.bias)
    batch = steps_batch(len(table), p)  # the same for the grid and for the final fit
    steps = -(-len(rows) // batch)
    for epoch in range(p.epochs):
        started, total = time.perf_counter(), torch.zeros(g, **make)
        # Evenly: at the rates of the grid a last batch of two images can undo an epoch.
        for step, at in enumerate(np.array_split(rows[permutation(p.seed, epoch, len(rows))], steps)):
            at = np.sort(at)  # a disk likes them in order
            loss, weight, bias = gradient(fit, table.take(at), table.label(at))
            total += loss
            rate = lr * (0.5 * (1 + math.cos(math.pi * (epoch * steps + step) / (p.epochs * steps))))
            weight_m.mul_(p.momentum).add_(weight.div_(len(at)).add_(fit.weight * wd))
            bias_m.mul_(p.momentum).add_(bias.div_(len(at)))
            fit.weight.sub_(weight_m * rate)
            fit.bias.sub_(bias_m * rate)
        fit.losses[epoch] = (total / len(rows)).tolist()
        if (epoch + 1) % max(1, p.epochs // 6) == 0 or epoch + 1 == p.epochs:
            best = np.nanmin(fit.losses[epoch]) if not np.isnan(fit.losses[epoch]).all() else math.nan
            say(f'{NAME}: epoch {epoch + 1}/{p.epochs}  {g} classifiers  lowest loss {best:.4f}  '
                f'{len(rows) / (time.perf_counter() - started):.0f} images/s')
    return fit


def diverged(fit: Fit, classes: int) -> list[bool]:
    """Whose loss is no number, or in the last epoch above log C, that of an even guess."""
    return [not (math.isfinite(x) and x <= math.log(classes) + 1e-6) for x in fit.losses[-1]]


def evaluate(fit: Fit, table: Table, rows: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """loss (G,), and top1, top5 (G,) in percent; a tie counts as wrong, and below 6 classes there is no top5."""
    rows = np.arange(len(table)) if rows is None else np.sort(rows)
    g, classes = fit.bias.shape
    chunk = min(4096, _rows_at_once(g, classes, fit.bias.dtype))
    sums: dict[str, np.ndarray] = {k: np.zeros(g) for k in ('loss', 'top1', *(('top5',) if classes > 5 else ()))}
    for i in range(0, len(rows), chunk):
        at = rows[i:i + chunk]
        s, y = fit.scores(table.take(at)), table.label(at)
        own = s.gather(2, y[:, None, None].expand(-1, g, 1)).squeeze(2)
        sums['loss'] += (s.logsumexp(-1) - own).sum(0).double().cpu().numpy()
        for k in set(sums) - {'loss'}:
            sums[k] += [float(right_within(s[:, m], y, int(k[3:]))) for m in range(g)]
    return {k: v / len(rows) * (1 if k == 'loss' else 100) for k, v in sums.items()}


def lbfgs(table: Table, rows: np.ndarray, weight_decay: float, start: Fit, iterations: int) -> tuple[Fit, float, float]:
    """The optimum of mean cross-entropy + (wd / 2) |W|^2, from `start` (one member) on.

    Returns the fit, the objective and the largest entry of its gradient.
    """
    weight, bias = start.weight.clone(), start.bias.clone()
    fit = Fit(weight, bias, start.losses)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=iterations, history_size=20, tolerance_grad=1e-7, tolerance_change=1e-12,
        line_search_fn='strong_wolfe')
    rows = np.sort(rows)
    seen: dict[str, float] = {}

    @torch.no_grad()
    def objective() -> Tensor:
        total, weight.grad, bias.grad = torch.zeros((), dtype=torch.float64), weight * weight_decay, bias * 0
        for i in range(0, len(rows), 8192):
            at = rows[i:i + 8192]
            loss, dw, db = gradient(fit, table.take(at), table.label(at))
            total += loss.double().cpu().squeeze()
            weight.grad += dw / len(rows)
            bias.grad += db / len(rows)
        value = float(total) / len(rows) + 0.5 * weight_decay * float(weight.double().square().sum())
        seen.update(value=value, slope=max(float(weight.grad.abs().max()), float(bias.grad.abs().max())))
        return torch.tensor(value, dtype=torch.float64)

    optimizer.step(objective)
    objective()
    return fit, seen['value'], seen['slope']


def objective_of(fit: Fit, table: Table, rows: np.ndarray, weight_decay: float) -> float:
    return float(evaluate(fit, table, rows)['loss'][0]) + 0.5 * weight_decay * float(fit.weight.double().square().sum())


def auto_probe(
    train_table: Table, test_table: Table, classes: int, p: AutoProbe, say: Callable[[str], Any] = print,
) -> tuple[dict[str, float], dict[str, Any]]:
    """-> metrics in percent, and what was chosen, dropped and found.

    Raises:
        ValueError: too few images.
        RuntimeError: every member of the grid diverged.
    """
    n = len(train_table)
    held = min(int(p.held_out * n), HELD_OUT)
    if held < 1 or n - held < 2 or classes < 2 or not len(test_table):
        raise ValueError(
            f'{NAME}: {n} training images, {len(test_table)} test images and {classes} classes are too few to hold out '
            f'{p.held_out:g} of the training images; give a larger data set')
    order = permutation(p.seed, 0, n)
    chosen_on, learned = order[:held], order[held:]
    mean, std = moments(train_table.array, train_table.rows[learned])
    train_table.scale_by(mean, std)
    members = [(lr, wd) for lr in p.lrs for wd in p.weight_decays]
    say(f'{NAME}: {len(members)} classifiers on {len(learned)} training images, chosen on {held} others; '
        f'{int((std == 0).sum())} of {len(std)} features are constant and left out')
    grid = _tried(train(train_table, learned, classes, members, p, say), members, train_table, chosen_on, say)
    if all(m['diverged'] for m in grid):
        raise RuntimeError(f'{NAME}: every classifier of the grid diverged, so no number is given; check the features')
    best = _best(grid)
    if more := beyond(best['lr'], best['weight_decay'], p):
        say(f'{NAME}: lr {best["lr"]:g}, weight decay {best["weight_decay"]:g} is the best and at an end of the grid; '
            f'trying {len(more)} beyond it')
        grid += _tried(train(train_table, learned, classes, more, p), more, train_table, chosen_on, say)
        best = _best(grid)
    lr, wd = best['lr'], best['weight_decay']
    tried = {name: {m[name] for m in grid} for name in ('lr', 'weight_decay')}
    edges = [name for name, x in tried.items() if len(x) > 1 and best[name] in (min(x), max(x))]
    advice = f'; no larger lr was tried: --epochs {2 * p.epochs} may give more'
    say(f'{NAME}: chosen lr {lr:g}, weight decay {wd:g}: {best["held_out_top1"]:.2f} % of the held-out images'
        + advice * ('lr' in edges and lr == max(tried['lr'])))
    everything = np.arange(n)
    mean, std = moments(train_table.array, train_table.rows)
    for table in (train_table, test_table):
        table.scale_by(mean, std)
    final = train(train_table, everything, classes, [(lr, wd)], p)
    if diverged(final, classes)[0]:
        raise RuntimeError(f'{NAME}: the chosen classifier diverged on all training images; no number is given')
    optimum, value, slope = lbfgs(train_table, everything, wd, final, p.lbfgs_iterations)
    found, check = evaluate(final, test_table), evaluate(optimum, test_table)
    metrics = {k: float(found[k][0]) for k in found if k != 'loss'}
    metrics |= {f'{k}_lbfgs': float(check[k][0]) for k in check if k != 'loss'}
    sgd = objective_of(final, train_table, everything, wd)
    reached = 'reached' if sgd < 1.02 * value else 'did not reach, as it stops early'
    say(f'{NAME}: objective {sgd:.5f} by SGD, {value:.5f} by L-BFGS (largest slope {slope:.1e}); quote top1, which is '
        f'by SGD; top1_lbfgs is that of the optimum, which SGD {reached}')
    return metrics, {
        'chosen': {'lr': lr, 'weight_decay': wd, 'at_edge_of': edges}, 'dropped': _gone(grid), 'held_out_images': held,
        'grid': grid, 'objective': {'sgd': sgd, 'lbfgs': value, 'lbfgs_largest_slope': slope}}


def _tried(
    fit: Fit, members: Sequence[tuple[float, float]], table: Table, held: np.ndarray, say: Callable[[str], Any],
) -> list[dict[str, Any]]:
    """What became of each member, on the images `held` out of its training."""
    figures = evaluate(fit, table, held)
    columns = members, diverged(fit, fit.bias.shape[1]), fit.losses[-1], figures['top1'], figures['loss']
    tried = [{
        'lr': lr, 'weight_decay': wd, 'diverged': bad, 'train_loss': _finite(loss), 'held_out_top1': float(top1),
        'held_out_loss': _finite(held_out)} for (lr, wd), bad, loss, top1, held_out in zip(*columns, strict=True)]
    if gone := _gone(tried):
        say(f'{NAME}: diverged and dropped: {"; ".join(gone)}')
    return tried


def _gone(tried: list[dict[str, Any]]) -> list[str]:
    return [f'lr {m["lr"]:g} wd {m["weight_decay"]:g}' for m in tried if m['diverged']]


def _best(tried: list[dict[str, Any]]) -> dict[str, Any]:
    def order(m: dict[str, Any]) -> tuple[float, float]:
        return -m['held_out_top1'], math.inf if m['held_out_loss'] is None else m['held_out_loss']

    return min((m for m in tried if not m['diverged']), key=order)


def beyond(lr: float, weight_decay: float, p: AutoProbe) -> list[tuple[float, float]]:
    """Two members past each end of the grid that this one lies at; the least weight decay is as good as none."""
    ends = [(max(p.lrs), 4), (min(p.lrs), 1 / 4)] if len(p.lrs) > 1 else []
    more = [(lr * step**k, weight_decay) for end, step in ends if lr == end for k in (1, 2)]
    if len(p.weight_decays) > 1 and weight_decay == max(p.weight_decays):
        more += [(lr, weight_decay * 10**k) for k in (1, 2)]
    return more


def _finite(x: float) -> float | None:
    return float(x) if math.isfinite(x) else None


def run_auto(args: argparse.Namespace, world: World) -> None:
    """`simsiam linear --protocol auto`: features of the test transform, once; then the probe; then the record."""
    given = {k: getattr(args, k) for k in NUMBERS if getattr(args, k) is not None}
    if others := sorted(set(given) - {'batch_size', 'epochs', 'momentum', 'image_size', 'resize'}):
        flags = ', '.join(f'--{k.replace("_", "-")}' for k in others)
        raise ValueError(f'{flags}: --protocol auto has no such number; it takes --epochs, --batch-size, --momentum, '
                         '--image-size and --resize')
    check_extraction(args, *size_and_resize(args, LEAST))
    if args.epochs is not None and args.epochs < 1:
        raise ValueError(f'--epochs {args.epochs}: must be at least 1')
    if args.momentum is not None and not 0 <= args.momentum < 1:
        raise ValueError(f'--momentum {args.momentum}: must be at least 0, below 1')
    p = AutoProbe(seed=args.seed, **{k: v for k, v in given.items() if k not in ('image_size', 'resize')})
    world.broadcast_from_main(lambda: check_output(args.output))
    pair = world.all_or_none(lambda: open_pair(args.dataset, args.data, args.allow_partial))
    backbone = world.all_or_none(lambda: load_backbone(args.model, world.device))
    say = print if world.main else silent
    if missing := without_test_image(pair):
        say(missing)
    transform = transform_of(args, backbone, say)
    started = time.perf_counter()
    with backbone_fits():
        features = [
            extract(
                backbone, images, ['avgpool'], transform, args.cache, args.micro_batch or 256, args.workers, args.amp,
                world, args.allow_partial) for images in (pair.train, pair.test)]
    if not world.main:
        return
    unreadable = [why for f in features for why in f.unreadable.values()]
    if unreadable:
        print(f'{len(unreadable)} images cannot be read and are left out, the first: {unreadable[0]}')
    tables = [Table(f.array('avgpool'), f.labels, world.device, rows=f.readable) for f in features]
    metrics, found = auto_probe(*tables, pair.classes, p)
    protocol = {
        **dataclasses.asdict(p), 'name': NAME, 'inputs': 'avgpool', 'image_size': transform.crop,
        'resize': transform.resize, 'augmentation': 'none',
        'scaling': '(x - mean) / (std sqrt(D)) by the images that are learned from', 'ties': 'wrong',
        'amp': 'off' if args.amp == 'auto' else args.amp, 'batch_size_used': steps_batch(len(tables[0]), p)}
    benchmark, data = f'{args.dataset}_{NAME}', pair.data() | {'path': args.data}
    path = record_path(args.output, benchmark, backbone, protocol, data)
    record = write_record(
        path, benchmark, protocol, backbone, data, metrics, time.perf_counter() - started,
        found | {'unreadable': len(unreadable)})
    print(f'by protocol {NAME}, which is no published one: {print_record(record)}\nwritten to {path}')
