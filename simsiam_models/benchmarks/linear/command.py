"""Linear evaluation: trains a classifier on a frozen backbone by a published protocol.

  simsiam linear IMAGENET --dataset imagenet --protocol fair          68.1 is published for fb_bs512_ep100_in1k
  torchrun --no-python --nproc-per-node 8 simsiam linear IMAGENET --dataset imagenet --protocol mmselfsup
  simsiam linear FOLDER --dataset folder --protocol auto              on cached features; not a published protocol

The same command continues a run that was stopped or killed. A flag that changes a number of the protocol makes it
another protocol, and every line and the record say so.
"""
import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...runtime.distributed import World, default_workers, join_world
from ...runtime.lifecycle import Lifecycle
from ...runtime.messages import check_flags, silent
from ...runtime.signals import Signals
from ..backbone import load_backbone
from ..datasets.classification import open_pair
from ..options import add_model, report_size, report_untested_classes
from ..protocols import LEAST
from ..results.record import check_output, format_record, record_path, write_record
from ..samples import Pair
from .frozen import FrozenBackbone, explain_out_of_memory
from .images import leave_out_unreadable
from .probe import run_auto
from .protocol import OVERRIDES, ChosenProtocol, benchmark_name, choose_protocol, flag_of
from .training import KEYS, LinearRun, summarize, train

DATASETS = ('imagenet', 'places205', 'inat18', 'cifar10', 'cifar100', 'folder')
SAVE_EVERY = 10.0  # minutes, within an epoch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `simsiam linear`."""
    add = parser.add_argument
    add('data', metavar='DATA', help='folder of the data set')
    add('--dataset', choices=DATASETS, default='folder', help='default: folder (train/ and val/)')
    add_model(parser)
    add('--protocol', default='fair', choices=['fair', 'mmselfsup', 'moco', 'mhead', 'auto'],
        help='default: fair; auto trains a grid of classifiers on cached features and chooses one on held-out training '
        'images')
    add('--output', '--out', dest='output', type=Path, default=Path('results'), metavar='FOLDER',
        help='folder of the record (default: results)')
    add('--seed', type=int, default=0, metavar='N', help='default: 0')
    add('--device', metavar='D', help='cuda, mps or cpu (default: the first that is available)')
    add('--workers', type=int, metavar='N', help='threads that read images')
    add('--amp', choices=['auto', 'off', 'bfloat16', 'float16'], default='auto',
        help='precision of the frozen backbone (default: auto, which is off, as published: float32)')
    add('--micro-batch', type=int, metavar='N',
        help='images in one pass through the frozen backbone, which changes the memory but not the result (default: '
        '256, on a CPU 8; auto takes at most 8 on a CPU)')
    add('--cache', type=Path, metavar='DIR', help="auto: folder of the cached features (default: the package's cache)")
    add('--allow-partial', action='store_true',
        help='accept a part of the data set, and leave out unreadable images, which are searched for first')
    add('--fresh', action='store_true', help='do not continue a run that was stopped (auto always starts again)')
    group = parser.add_argument_group(
        'numbers of the protocol', 'with any of these, the protocol is no longer the published one')
    for name, (kind, text) in OVERRIDES.items():
        nargs = {'crop_scale': 2, 'lr_steps': '*', 'report_epochs': '*'}.get(name)
        group.add_argument(flag_of(name), type=kind, nargs=nargs, metavar='N', help=text)
    parser.set_defaults(kept='the same command goes on from the last checkpoint')


def run(args: argparse.Namespace) -> int:
    """Trains, prints the result and writes the record."""
    check(args)
    advice = 'in the classifiers: lower --batch-size, or use another --device'
    with Signals() as signals, join_world(args.device) as world, explain_out_of_memory(advice):
        if args.protocol == 'auto':
            args.kept = 'the same command takes the cached features and trains from the start'
            run_auto(args, world)
        else:
            run_published(args, world, signals)
    return 0


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for a flag outside its range, or one that the protocol does not use."""
    check_flags([
        ('--micro-batch', args.micro_batch, args.micro_batch is None or args.micro_batch >= 1, 'at least 1'),
        ('--workers', args.workers, args.workers is None or args.workers >= 0, 'at least 0'),
        ('--seed', args.seed, 0 <= args.seed < 2**63, f'in 0 .. {2**63 - 1}')])
    auto = args.protocol == 'auto'
    if args.cache is not None and not auto:
        raise ValueError(f'--cache {args.cache}: only --protocol auto caches features; leave it out')
    if args.fresh and auto:
        raise ValueError('--fresh: --protocol auto always starts again; leave it out')


def run_published(args: argparse.Namespace, world: World, signals: Signals) -> None:
    """Trains by a published protocol, continuing a run that was stopped, and writes the record."""
    say = print if world.main else silent
    workers = default_workers(world.device) if args.workers is None else args.workers
    chosen, frozen, pair = prepare(args, world, say)
    benchmark, data = benchmark_name(chosen, args.dataset), pair.data() | {'path': args.data}
    protocol = describe_protocol(chosen, frozen, args.seed)
    path = record_path(args.output, benchmark, frozen.backbone, protocol, data)
    unreadable = len(pair.train) + len(pair.test)
    if args.allow_partial:
        pair = leave_out_unreadable(pair, workers, world, say)
    unreadable -= len(pair.train) + len(pair.test)
    identity = identify(protocol, frozen.backbone.digest, pair)
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
                path, benchmark, protocol, frozen.backbone, data, summarize(run.history, chosen.protocol, run.names),
                seconds=run.seconds, extra={'epochs': run.history, 'unreadable': unreadable})
            say(f'by protocol {chosen.label}: {format_record(record)}\nwritten to {path}')


def prepare(
    args: argparse.Namespace, world: World, say: Callable[[str], Any],
) -> tuple[ChosenProtocol, FrozenBackbone, Pair]:
    """Opens the data, loads the backbone, chooses the protocol, and prints what is unusual about them.

    Creates the output folder and writes nothing else.

    Raises:
        ValueError, RuntimeError, OSError: one of them cannot be used.
    """
    amp = 'off' if args.amp == 'auto' else args.amp
    overrides = {name: getattr(args, name) for name in OVERRIDES}
    choose_protocol(args.protocol, args.dataset, overrides, amp, LEAST)  # refuses wrong flags before a model is loaded
    if amp == 'float16' and world.device.type != 'cuda':
        raise ValueError(f'--amp float16 does not run on {world.device.type}; use bfloat16 or off')
    world.broadcast_from_main(lambda: check_output(args.output))
    pair = world.all_or_none(lambda: open_pair(args.dataset, args.data, args.allow_partial))
    backbone = world.all_or_none(lambda: load_backbone(args.model, world.device))
    chosen = choose_protocol(args.protocol, args.dataset, overrides, amp, backbone.image_size)
    frozen = FrozenBackbone(backbone, chosen.protocol, world.device, amp)
    if frozen.pooling == 'adaptive':
        chosen = dataclasses.replace(chosen, changed=chosen.changed | {'pooling': ('mmselfsup', 'adaptive')})
    n, batch = len(pair.train), chosen.protocol.batch_size
    say(f'{args.dataset}, {n} training and {len(pair.test)} test images; {chosen.describe()}')
    report_size(args, backbone, say)
    report_untested_classes(pair, say)
    if batch > n:
        say(f'batch {batch} is larger than the {n} training images, so an epoch is one step; for your own folder, '
            '--protocol auto chooses the learning rate itself')
    return chosen, frozen, pair


def describe_protocol(chosen: ChosenProtocol, frozen: FrozenBackbone, seed: int) -> dict[str, Any]:
    """Returns the protocol's entry in the record: its numbers, and what else affects the result."""
    protocol = {**chosen.record(), 'seed': seed, 'amp': frozen.amp, 'ties': 'wrong'}
    if frozen.pooling is not None:
        protocol['pooling'] = frozen.pooling
    if chosen.protocol.reported == 'best':
        protocol['best_chosen_on'] = 'test images, as in the released code'
    return protocol


def identify(protocol: dict[str, Any], weights: str, pair: Pair) -> dict[str, Any]:
    """Returns what a run and its continuation must have in common; numbers that a flag overrides carry its name."""
    numbers = {
        flag_of(k) if k in OVERRIDES else f'protocol {k}': v for k, v in protocol.items()
        if k not in ('scaled_lr', 'changed', 'name')}  # which follow from the others
    return {**numbers, 'weights': weights, 'data': pair.data()}
