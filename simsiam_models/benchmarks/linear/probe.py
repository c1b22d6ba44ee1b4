"""A linear classifier on cached features (`--protocol auto`): takes minutes, while published protocols take a day.

The protocol, `auto_probe`, is not a published one, and has no augmentation. Features are standardized by the images
that are learned from, so the learning rate does not depend on their scale. A grid of learning rates and weight decays
is trained as one problem. The best member on held-out training images is trained again on all of them, and L-BFGS finds
the optimum of its objective for comparison.
"""
import argparse
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ...data.philox import permutation
from ...runtime.distributed import World
from ...runtime.files import finite
from ...runtime.messages import check_flags, silent
from ..backbone import Backbone
from ..features import Extraction, extract
from ..options import check_extraction, make_transform, read_sizes
from ..protocols import LEAST
from ..results.record import format_record, record_path, write_record
from ..samples import Pair
from .frozen import explain_out_of_memory
from .probe_features import ScaledFeatures, compute_moments
from .probe_fit import NAME, AutoProbe, choose_batch_size, compute_objective, evaluate, find_optimum, train_grid
from .protocol import OVERRIDES, flag_of

MAX_HELD_OUT = 50_000  # images


def auto_probe(
    train: ScaledFeatures, test: ScaledFeatures, classes: int, p: AutoProbe, say: Callable[[str], Any] = print,
) -> tuple[dict[str, float], dict[str, Any]]:
    """Returns the metrics in percent, and what was chosen, dropped and found.

    Raises ValueError if there are too few images, RuntimeError if every member of the grid diverged.
    """
    n = len(train)
    held = min(int(p.held_out * n), MAX_HELD_OUT)
    if held < 1 or n - held < 2 or classes < 2 or not len(test):
        raise ValueError(
            f'{NAME}: {n} training images, {len(test)} test images and {classes} classes are too few to hold out '
            f'{p.held_out:g} of the training images; give a larger data set')
    grid, best, dropped = search_grid(train, classes, p, held, say)
    lr, wd = best['lr'], best['weight_decay']
    tried = {name: {m[name] for m in grid} for name in ('lr', 'weight_decay')}
    edges = [name for name, x in tried.items() if len(x) > 1 and best[name] in (min(x), max(x))]
    advice = f'; no larger lr was tried: --epochs {2 * p.epochs} may give more'
    say(f'{NAME}: chosen lr {lr:g}, weight decay {wd:g}: {best["held_out_top1"]:.2f} % of the held-out images'
        + advice * ('lr' in edges and lr == max(tried['lr'])))
    rows, moments = np.arange(n), compute_moments(train.array, train.rows)
    for features in (train, test):
        features.scale_by(*moments)
    final = train_grid(train, rows, classes, [(lr, wd)], p)
    if final.diverged[0]:
        raise RuntimeError(f'{NAME}: the chosen classifier diverged on all training images; no number is given')
    optimum, value, slope = find_optimum(train, rows, wd, final, p.lbfgs_iterations)
    metrics = {
        f'{k}{suffix}': float(v[0]) for fit, suffix in ((final, ''), (optimum, '_lbfgs'))
        for k, v in evaluate(fit, test).items() if k != 'loss'}
    sgd = compute_objective(final, train, rows, wd)
    reached = 'reached' if sgd < 1.02 * value else 'did not reach because it stops early'
    say(f'{NAME}: objective {sgd:.5f} by SGD, {value:.5f} by L-BFGS (largest slope {slope:.1e}); quote top1, from '
        f'SGD; top1_lbfgs is at the optimum, which SGD {reached}')
    return metrics, {
        'chosen': {'lr': lr, 'weight_decay': wd, 'at_edge_of': edges}, 'dropped': dropped, 'held_out_images': held,
        'grid': grid, 'objective': {'sgd': sgd, 'lbfgs': value, 'lbfgs_largest_slope': slope}}


def search_grid(
    train: ScaledFeatures, classes: int, p: AutoProbe, held: int, say: Callable[[str], Any],
) -> tuple[list[dict[str, Any]], dict[str, Any], list[str]]:
    """Holds out `held` training images, trains the grid on the rest; returns its members, the best, the diverged."""
    held_out, learned = np.split(permutation(p.seed, 0, len(train)), [held])
    train.scale_by(*(moments := compute_moments(train.array, train.rows[learned])))
    members = [(lr, wd) for lr in p.lrs for wd in p.weight_decays]
    grid, dropped = list[dict[str, Any]](), list[str]()
    say(f'{NAME}: {len(members)} classifiers on {len(learned)} training images, chosen on {held} held-out ones; '
        f'{int((moments[1] == 0).sum())} of {train.dim} features are constant and left out')
    while True:
        extended = bool(grid)
        fit = train_grid(train, learned, classes, members, p, silent if extended else say)
        figures = evaluate(fit, train, held_out)
        grid += finite([{
            'lr': lr, 'weight_decay': wd, 'diverged': fit.diverged[i], 'train_loss': float(fit.losses[-1, i]),
            'held_out_top1': float(figures['top1'][i]), 'held_out_loss': float(figures['loss'][i])}
            for i, (lr, wd) in enumerate(members)])
        if diverged := [f'lr {lr:g} wd {wd:g}' for (lr, wd), x in zip(members, fit.diverged, strict=True) if x]:
            say(f'{NAME}: diverged and dropped: {"; ".join(diverged)}')
            dropped += diverged
        if len(dropped) == len(grid):
            raise RuntimeError(
                f'{NAME}: every classifier of the grid diverged, so no number is given; check the features')
        best = min((m for m in grid if not m['diverged']), key=lambda m: (
            -m['held_out_top1'], math.inf if m['held_out_loss'] is None else m['held_out_loss']))
        members = extend_grid(best['lr'], best['weight_decay'], p)
        if extended or not members:
            return grid, best, dropped
        say(f'{NAME}: lr {best["lr"]:g}, weight decay {best["weight_decay"]:g} is the best and at an end of the grid; '
            f'trying {len(members)} beyond it')


def extend_grid(lr: float, weight_decay: float, p: AutoProbe) -> list[tuple[float, float]]:
    """Returns two members beyond each end of the grid that this one lies at; the lowest weight decay is never one."""
    ends = [(max(p.lrs), 4), (min(p.lrs), 1 / 4)] if len(p.lrs) > 1 else []
    more = [(lr * step**k, weight_decay) for end, step in ends if lr == end for k in (1, 2)]
    if len(p.weight_decays) > 1 and weight_decay == max(p.weight_decays):
        more += [(lr, weight_decay * 10**k) for k in (1, 2)]
    return more


def run_auto(args: argparse.Namespace, backbone: Backbone, pair: Pair, world: World) -> None:
    """`simsiam linear --protocol auto`: extracts the features of the test transform, probes them, writes the record."""
    p, say = resolve_probe(args), print if world.main else silent
    transform, started = make_transform(args, backbone, say), time.perf_counter()
    extraction = Extraction(args.cache, args.micro_batch or 256, args.workers, args.amp, args.allow_partial)
    with explain_out_of_memory('in the backbone: lower --micro-batch'):
        parts = [
            extract(backbone, images, ['avgpool'], transform, extraction, world) for images in (pair.train, pair.test)]
    if not world.main:
        return
    unreadable = [reason for part in parts for reason in part.unreadable.values()]
    if unreadable:
        say(f'{len(unreadable)} images cannot be read and are left out, the first: {unreadable[0]}')
    train, test = (
        ScaledFeatures(part.array('avgpool'), np.asarray(part.labels), world.device, rows=part.readable)
        for part in parts)
    metrics, found = auto_probe(train, test, pair.classes, p)
    protocol = {
        **dataclasses.asdict(p), 'name': NAME, 'inputs': 'avgpool', 'image_size': transform.crop,
        'resize': transform.resize, 'augmentation': 'none',
        'scaling': '(x - mean) / (std sqrt(D)) by the images that are learned from', 'ties': 'wrong',
        'amp': extraction.precision, 'batch_size_used': choose_batch_size(len(train), p)}
    benchmark, data = f'{args.dataset}_{NAME}', pair.data() | {'path': args.data}
    path = record_path(args.output, benchmark, backbone, protocol, data)
    record = write_record(
        path, benchmark, protocol, backbone, data, metrics, seconds=time.perf_counter() - started,
        extra=found | {'unreadable': len(unreadable), 'shared_images': pair.shared})
    say(f'protocol {NAME}, not a published one: {format_record(record)}\nwritten to {path}')


def resolve_probe(args: argparse.Namespace) -> AutoProbe:
    """Returns the protocol with the numbers that flags override; raises ValueError if one is out of range."""
    given = {name: value for name in OVERRIDES if (value := getattr(args, name)) is not None}
    if others := sorted(given.keys() - {'epochs', 'batch_size', 'momentum', 'image_size', 'resize'}):
        raise ValueError(
            f'{", ".join(map(flag_of, others))}: not used by --protocol auto, which takes --epochs, --batch-size, '
            '--momentum, --image-size and --resize')
    check_extraction(args, *read_sizes(args, LEAST))
    p = AutoProbe(seed=args.seed, **{k: v for k, v in given.items() if k not in ('image_size', 'resize')})
    check_flags([
        ('--epochs', p.epochs, p.epochs >= 1, 'at least 1'),
        ('--momentum', p.momentum, 0 <= p.momentum < 1, 'at least 0 and below 1')])
    return p
