"""A linear classifier on cached features (`--protocol auto`): minutes, where the published protocols take a day.

This is a protocol of its own, `auto_probe`, and never takes the place of a published one. It does not augment. Features
are standardized by the images that are learned from, so the learning rate does not depend on their scale. A grid of
learning rates and weight decays is trained as one problem. The best member on held-out training images is trained again
on all of them, and L-BFGS finds the optimum of its objective for comparison.
"""
import argparse
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...data.philox import permutation
from ...runtime.distributed import World
from ...runtime.files import finite
from ...runtime.messages import check_flags, silent
from ..backbone import load_backbone
from ..datasets.classification import open_pair
from ..features import Extraction, extract
from ..options import check_extraction, make_transform, read_sizes, report_untested_classes
from ..protocols import LEAST
from ..results.record import check_output, format_record, record_path, write_record
from .frozen import explain_out_of_memory
from .probe_features import ScaledFeatures, compute_moments
from .probe_fit import (
    NAME,
    AutoProbe,
    Fit,
    choose_batch_size,
    compute_objective,
    evaluate,
    find_optimum,
    has_diverged,
    train_grid,
)
from .protocol import OVERRIDES, flag_of

MAX_HELD_OUT = 50_000  # images
PROBE_FLAGS = ('epochs', 'batch_size', 'momentum')  # numbers of AutoProbe that a flag overrides
TRANSFORM_FLAGS = ('image_size', 'resize')

Member = dict[str, Any]  # a member of the grid, and how it did


def auto_probe(
    train: ScaledFeatures, test: ScaledFeatures, classes: int, p: AutoProbe, say: Callable[[str], Any] = print,
) -> tuple[dict[str, float], dict[str, Any]]:
    """Returns the metrics in percent, and what was chosen, dropped and found.

    Raises:
        ValueError: there are too few images.
        RuntimeError: every member of the grid diverged.
    """
    n = len(train)
    held = min(int(p.held_out * n), MAX_HELD_OUT)
    if held < 1 or n - held < 2 or classes < 2 or not len(test):
        raise ValueError(
            f'{NAME}: {n} training images, {len(test)} test images and {classes} classes are too few to hold out '
            f'{p.held_out:g} of the training images; give a larger data set')
    grid, best = search_grid(train, classes, p, held, say)
    lr, wd = best['lr'], best['weight_decay']
    tried = {name: {m[name] for m in grid} for name in ('lr', 'weight_decay')}
    edges = [name for name, x in tried.items() if len(x) > 1 and best[name] in (min(x), max(x))]
    advice = f'; no larger lr was tried: --epochs {2 * p.epochs} may give more'
    say(f'{NAME}: chosen lr {lr:g}, weight decay {wd:g}: {best["held_out_top1"]:.2f} % of the held-out images'
        + advice * ('lr' in edges and lr == max(tried['lr'])))
    metrics, objective = fit_all(train, test, classes, (lr, wd), p, say)
    return metrics, {
        'chosen': {'lr': lr, 'weight_decay': wd, 'at_edge_of': edges}, 'dropped': name_diverged(grid),
        'held_out_images': held, 'grid': grid, 'objective': objective}


def search_grid(
    train: ScaledFeatures, classes: int, p: AutoProbe, held: int, say: Callable[[str], Any],
) -> tuple[list[Member], Member]:
    """Holds out `held` training images and trains the grid on the others; returns its members and the best one."""
    order = permutation(p.seed, 0, len(train))
    held_out, learned = order[:held], order[held:]
    mean, std = compute_moments(train.array, train.rows[learned])
    train.scale_by(mean, std)
    members = [(lr, wd) for lr in p.lrs for wd in p.weight_decays]
    say(f'{NAME}: {len(members)} classifiers on {len(learned)} training images, chosen on {held} others; '
        f'{int((std == 0).sum())} of {len(std)} features are constant and left out')
    grid = describe_members(train_grid(train, learned, classes, members, p, say), members, train, held_out, say)
    if all(m['diverged'] for m in grid):
        raise RuntimeError(f'{NAME}: every classifier of the grid diverged, so no number is given; check the features')
    best = choose_best(grid)
    if more := extend_grid(best['lr'], best['weight_decay'], p):
        say(f'{NAME}: lr {best["lr"]:g}, weight decay {best["weight_decay"]:g} is the best and at an end of the grid; '
            f'trying {len(more)} beyond it')
        grid += describe_members(train_grid(train, learned, classes, more, p), more, train, held_out, say)
        best = choose_best(grid)
    return grid, best


def describe_members(
    fit: Fit, members: Sequence[tuple[float, float]], features: ScaledFeatures, held_out: np.ndarray,
    say: Callable[[str], Any],
) -> list[Member]:
    """Returns how each member did on the images that were held out of its training."""
    figures = evaluate(fit, features, held_out)
    columns = members, has_diverged(fit), fit.losses[-1], figures['top1'], figures['loss']
    grid = finite([{
        'lr': lr, 'weight_decay': wd, 'diverged': diverged, 'train_loss': float(loss), 'held_out_top1': float(top1),
        'held_out_loss': float(held_out_loss)}
        for (lr, wd), diverged, loss, top1, held_out_loss in zip(*columns, strict=True)])
    if names := name_diverged(grid):
        say(f'{NAME}: diverged and dropped: {"; ".join(names)}')
    return grid


def name_diverged(grid: list[Member]) -> list[str]:
    return [f'lr {m["lr"]:g} wd {m["weight_decay"]:g}' for m in grid if m['diverged']]


def choose_best(grid: list[Member]) -> Member:
    """Returns the member with the highest held-out accuracy; of equal ones, the one with the lowest held-out loss."""
    def rank(m: Member) -> tuple[float, float]:
        return -m['held_out_top1'], math.inf if m['held_out_loss'] is None else m['held_out_loss']

    return min((m for m in grid if not m['diverged']), key=rank)


def extend_grid(lr: float, weight_decay: float, p: AutoProbe) -> list[tuple[float, float]]:
    """Returns two members beyond each end of the grid at which this one lies.

    None have a lower weight decay than the lowest, which is as good as none.
    """
    ends = [(max(p.lrs), 4), (min(p.lrs), 1 / 4)] if len(p.lrs) > 1 else []
    more = [(lr * step**k, weight_decay) for end, step in ends if lr == end for k in (1, 2)]
    if len(p.weight_decays) > 1 and weight_decay == max(p.weight_decays):
        more += [(lr, weight_decay * 10**k) for k in (1, 2)]
    return more


def fit_all(
    train: ScaledFeatures, test: ScaledFeatures, classes: int, member: tuple[float, float], p: AutoProbe,
    say: Callable[[str], Any],
) -> tuple[dict[str, float], dict[str, float]]:
    """Trains one member on all training images; returns its metrics, and the objective by SGD and by L-BFGS."""
    rows, (_, wd) = np.arange(len(train)), member
    mean, std = compute_moments(train.array, train.rows)
    for features in (train, test):
        features.scale_by(mean, std)
    final = train_grid(train, rows, classes, [member], p)
    if has_diverged(final)[0]:
        raise RuntimeError(f'{NAME}: the chosen classifier diverged on all training images; no number is given')
    optimum, value, slope = find_optimum(train, rows, wd, final, p.lbfgs_iterations)
    by_sgd, by_lbfgs = evaluate(final, test), evaluate(optimum, test)
    metrics = {k: float(v[0]) for k, v in by_sgd.items() if k != 'loss'}
    metrics |= {f'{k}_lbfgs': float(v[0]) for k, v in by_lbfgs.items() if k != 'loss'}
    sgd = compute_objective(final, train, rows, wd)
    reached = 'reached' if sgd < 1.02 * value else 'did not reach, as it stops early'
    say(f'{NAME}: objective {sgd:.5f} by SGD, {value:.5f} by L-BFGS (largest slope {slope:.1e}); quote top1, which is '
        f'by SGD; top1_lbfgs is that of the optimum, which SGD {reached}')
    return metrics, {'sgd': sgd, 'lbfgs': value, 'lbfgs_largest_slope': slope}


def run_auto(args: argparse.Namespace, world: World) -> None:
    """`simsiam linear --protocol auto`: extracts the features of the test transform, probes them, writes the record."""
    p = resolve_probe(args)
    say = print if world.main else silent
    world.broadcast_from_main(lambda: check_output(args.output))
    pair = world.all_or_none(lambda: open_pair(args.dataset, args.data, args.allow_partial))
    backbone = world.all_or_none(lambda: load_backbone(args.model, world.device))
    report_untested_classes(pair, say)
    transform = make_transform(args, backbone, say)
    started = time.perf_counter()
    extraction = Extraction(args.cache, args.micro_batch or 256, args.workers, args.amp, args.allow_partial)
    with explain_out_of_memory():
        parts = [
            extract(backbone, images, ['avgpool'], transform, extraction, world) for images in (pair.train, pair.test)]
    if not world.main:
        return
    unreadable = [reason for part in parts for reason in part.unreadable.values()]
    if unreadable:
        say(f'{len(unreadable)} images cannot be read and are left out, the first: {unreadable[0]}')
    train, test = (
        ScaledFeatures(part.array('avgpool'), part.labels, world.device, rows=part.readable) for part in parts)
    metrics, found = auto_probe(train, test, pair.classes, p)
    protocol = {
        **dataclasses.asdict(p), 'name': NAME, 'inputs': 'avgpool', 'image_size': transform.crop,
        'resize': transform.resize, 'augmentation': 'none',
        'scaling': '(x - mean) / (std sqrt(D)) by the images that are learned from', 'ties': 'wrong',
        'amp': 'off' if args.amp == 'auto' else args.amp, 'batch_size_used': choose_batch_size(len(train), p)}
    benchmark, data = f'{args.dataset}_{NAME}', pair.data() | {'path': args.data}
    path = record_path(args.output, benchmark, backbone, protocol, data)
    record = write_record(
        path, benchmark, protocol, backbone, data, metrics, seconds=time.perf_counter() - started,
        extra=found | {'unreadable': len(unreadable)})
    say(f'by protocol {NAME}, which is not a published one: {format_record(record)}\nwritten to {path}')


def resolve_probe(args: argparse.Namespace) -> AutoProbe:
    """Returns the protocol with the numbers that flags override.

    Raises:
        ValueError: a flag names a number that the protocol does not have, or has a value that it cannot have.
    """
    given = {name for name in OVERRIDES if getattr(args, name) is not None}
    if others := sorted(given.difference(PROBE_FLAGS, TRANSFORM_FLAGS)):
        raise ValueError(
            f'{", ".join(map(flag_of, others))}: --protocol auto has no such number; it takes --epochs, --batch-size, '
            '--momentum, --image-size and --resize')
    check_extraction(args, *read_sizes(args, LEAST))
    check_flags([
        ('--epochs', args.epochs, args.epochs is None or args.epochs >= 1, 'at least 1'),
        ('--momentum', args.momentum, args.momentum is None or 0 <= args.momentum < 1, 'at least 0 and below 1')])
    return AutoProbe(seed=args.seed, **{name: getattr(args, name) for name in given.intersection(PROBE_FLAGS)})
