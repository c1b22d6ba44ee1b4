"""Linear evaluation: trains a classifier on a frozen backbone by a published protocol.

  simsiam linear IMAGENET --dataset imagenet --protocol fair          68.1 is published for fb_bs512_ep100_in1k
  torchrun --no-python --nproc-per-node 8 simsiam linear IMAGENET --dataset imagenet --protocol mmselfsup
  simsiam linear FOLDER --dataset folder --protocol auto              on cached features; not a published protocol

The same command continues a run that was stopped or killed. A flag that changes a number of the protocol makes it
another protocol; every line and the record then say so.
"""
import argparse
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...runtime.distributed import World, default_workers, join_world
from ...runtime.lifecycle import Lifecycle
from ...runtime.messages import check_flags, silent
from ...runtime.signals import Signals
from ..backbone import Backbone, load_backbone
from ..datasets.classification import open_pair
from ..options import add_held_out, add_model, check_held_out, report_pair, report_size
from ..protocols import LEAST
from ..results.record import check_output, format_record, record_path, write_record
from ..results.sweep import each_rate, format_sweep, run_each
from ..samples import Pair
from .frozen import FrozenBackbone, explain_out_of_memory
from .images import leave_out_unreadable
from .probe import resolve_probe, run_auto
from .protocol import OVERRIDES, ChosenProtocol, benchmark_name, choose_protocol, flag_of
from .training import KEYS, LinearRun, summarize, train

SAVE_EVERY = 10.0  # minutes, within an epoch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('data', metavar='DATA', help='folder of the data set')
    add('--dataset', choices=('imagenet', 'places205', 'inat18', 'cifar10', 'cifar100', 'folder'), default='folder',
        help='default: folder (train/ and val/, or classes alone)')
    add_model(parser)
    add('--protocol', default='fair', choices=['fair', 'mmselfsup', 'moco', 'mhead', 'auto'],
        help='default: fair; auto trains a grid of classifiers on cached features and chooses one on held-out training '
        'images')
    add('--output', '--out', dest='output', type=Path, default=Path('results'), metavar='FOLDER',
        help='folder of the record (default: results)')
    add('--seed', type=int, default=0, metavar='N', help='also of the held-out images (default: 0)')
    add_held_out(parser, seed=False)
    add('--device', metavar='D', help='cuda, mps or cpu (default: the first one available)')
    add('--workers', type=int, metavar='N', help='threads that read images')
    add('--amp', choices=['auto', 'off', 'bfloat16', 'float16'], default='auto',
        help='precision of the frozen backbone (default: auto, which is off, as published: float32)')
    add('--micro-batch', type=int, metavar='N',
        help='images in one pass through the frozen backbone, which changes the memory but not the result (default: '
        '256, on a CPU 8; auto takes at most 8 on a CPU)')
    add('--cache', type=Path, metavar='DIR', help="auto: folder of the cached features (default: the package's cache)")
    add('--allow-partial', action='store_true',
        help='accept a part of the data set; search for unreadable images first, and leave them out')
    add('--fresh', action='store_true', help='do not continue a run that was stopped (auto always starts again)')
    group = parser.add_argument_group(
        'numbers of the protocol', 'with any of these, the protocol is no longer the published one')
    for name, (kind, text) in OVERRIDES.items():
        nargs: Any = {'crop_scale': 2, 'lr': '+', 'lr_steps': '*', 'report_epochs': '*'}.get(name)
        group.add_argument(flag_of(name), type=kind, nargs=nargs, metavar='N', help=text)
    parser.set_defaults(kept='the same command continues from the last checkpoint')


def run(args: argparse.Namespace) -> int:
    """Trains, prints the result and writes the record."""
    check(args)
    auto, advice = args.protocol == 'auto', 'in the classifiers: lower --batch-size, or use another --device'
    with Signals() as signals, join_world(args.device) as world, explain_out_of_memory(advice):
        if auto:
            args.kept = 'the same command reuses the cached features and trains from the start'
        elif args.amp == 'float16' and world.device.type != 'cuda':
            raise ValueError(f'--amp float16 does not run on {world.device.type}; use bfloat16 or off')
        world.broadcast_from_main(lambda: check_output(args.output))
        pair = world.all_or_none(lambda: open_pair(
            args.dataset, args.data, args.allow_partial, args.val_share, args.seed))
        backbone = world.all_or_none(lambda: load_backbone(args.model, world.device, args.branch))
        report_pair(pair, world)
        if auto:
            run_auto(args, backbone, pair, world)
            return 0
        runs = each_rate(args)
        records = run_each(
            [functools.partial(run_published, one, backbone, pair, world, signals) for one in runs],
            print if world.main else silent)
        if len(runs) > 1 and world.main:
            print(format_sweep(['lr'], [(one.lr,) for one in runs], records))
            print(f'simsiam report {args.output} shows all the numbers')
    return 0


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for a flag outside its range, or one that the protocol does not use."""
    auto = args.protocol == 'auto'
    check_flags([
        ('--micro-batch', args.micro_batch, args.micro_batch is None or args.micro_batch >= 1, 'at least 1'),
        ('--workers', args.workers, args.workers is None or args.workers >= 0, 'at least 0')])
    check_held_out(args)
    if args.cache is not None and not auto:
        raise ValueError(f'--cache {args.cache}: only --protocol auto caches features; leave it out')
    if args.fresh and auto:
        raise ValueError('--fresh: --protocol auto always starts again; leave it out')
    for one in each_rate(args):
        (resolve_probe if auto else choose)(one)


def choose(args: argparse.Namespace, own_size: int = LEAST) -> ChosenProtocol:
    amp = 'off' if args.amp == 'auto' else args.amp
    return choose_protocol(args.protocol, args.dataset, {k: getattr(args, k) for k in OVERRIDES}, amp, own_size)


def run_published(
    args: argparse.Namespace, backbone: Backbone, pair: Pair, world: World, signals: Signals,
) -> dict[str, Any] | None:
    """Trains by a published protocol, or continues; writes the record, and returns it on rank 0."""
    say = print if world.main else silent
    workers = default_workers(world.device) if args.workers is None else args.workers
    chosen, frozen, protocol = prepare(args, backbone, pair, world.device, say)
    benchmark, data = benchmark_name(chosen, args.dataset), pair.data() | {'path': args.data}
    path = record_path(args.output, benchmark, backbone, protocol, data)
    pair, unreadable = leave_out_unreadable(pair, workers, world, say) if args.allow_partial else (pair, 0)
    # What a run and its continuation must have in common; numbers that a flag overrides carry its name.
    identity = {
        flag_of(k) if k in OVERRIDES else f'protocol {k}': v for k, v in protocol.items()
        if k not in ('scaled_lr', 'changed', 'name')}  # these follow from other numbers
    identity |= {'weights': backbone.digest, 'data': pair.data()}
    with Lifecycle(
            path.with_suffix('.pth'), KEYS, world, signals, say, minutes=SAVE_EVERY, keep_last=1,
            start_over='remove it, or start again with --fresh') as life:
        life.lock(path.with_suffix('.lock'))
        run = LinearRun(
            chosen, frozen, pair, life, workers=workers, seed=args.seed, micro_batch=args.micro_batch,
            identity=identity)
        train(run, None if args.fresh else life.resume(identity))
        world.all_or_none(lambda: frozen.check_unchanged(chosen.label))
        if world.main:
            record = write_record(
                path, benchmark, protocol, backbone, data, summarize(run.history, chosen.protocol, run.names),
                seconds=time.perf_counter() - run.started, extra={
                    'epochs': run.history, 'unreadable': unreadable, 'shared_images': pair.shared})
            say(f'protocol {chosen.label}: {format_record(record)}\nwritten to {path}')
            return record
    return None


def prepare(
    args: argparse.Namespace, backbone: Backbone, pair: Pair, device: torch.device, say: Callable[[str], Any],
) -> tuple[ChosenProtocol, FrozenBackbone, dict[str, Any]]:
    """Returns the protocol, the frozen backbone, and the protocol's entry in the record; prints what is unusual."""
    chosen = choose(args, backbone.image_size)
    p, n = chosen.protocol, len(pair.train)
    frozen = FrozenBackbone(backbone, p, device, 'off' if args.amp == 'auto' else args.amp)
    if frozen.pooling == 'adaptive':
        chosen = dataclasses.replace(chosen, changed=chosen.changed | {'pooling': ('mmselfsup', 'adaptive')})
    say(chosen.describe())
    report_size(args, backbone, say)
    if p.batch_size > n:
        say(f'batch {p.batch_size} is larger than the {n} training images, so an epoch is one step; for your own '
            'folder, --protocol auto chooses the learning rate itself')
    entry = {**chosen.record(), 'seed': args.seed, 'amp': frozen.amp, 'ties': 'wrong'}
    entry |= {'pooling': frozen.pooling} if frozen.pooling else {}
    entry |= {'best_chosen_on': 'test images, as in the released code'} if p.reported == 'best' else {}
    return chosen, frozen, entry
