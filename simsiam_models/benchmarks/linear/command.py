"""Linear evaluation: a classifier on a frozen backbone, by protocols whose numbers can be held against their sources.

  simsiam linear IMAGENET --dataset imagenet --protocol fair          68.1 is published for fb_bs512_ep100_in1k
  torchrun --no-python --nproc-per-node 8 simsiam linear IMAGENET --dataset imagenet --protocol mmselfsup
  simsiam linear FOLDER --dataset folder --protocol auto              on cached features; no published protocol

The same command continues a run that was stopped or killed. A flag that changes a protocol's number makes it another
protocol, and every line and the record say so.
"""
import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import torch

from ...runtime.distributed import join_world
from ...runtime.files import hold_lock
from ...runtime.signals import Signals, Stopped
from ..backbone import load_backbone
from ..datasets.classification import open_pair
from ..options import say_size, silent, without_test_image
from ..protocols import LEAST
from ..results.record import check_output, print_record, record_path, write_record
from .images import readable
from .probe import run_auto
from .protocol import NUMBERS, benchmark_name, choose
from .training import LinearRun, tap_shapes

DATASETS = ('imagenet', 'places205', 'inat18', 'cifar10', 'cifar100', 'folder')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('data', metavar='DATA', help='folder of the data set')
    parser.add_argument('--dataset', choices=DATASETS, default='folder', help='default: folder (train/ and val/)')
    parser.add_argument(
        '--model', default='simsiam_resnet50', metavar='NAME',
        help="a timm name, a run's folder or a checkpoint (default: simsiam_resnet50)")
    parser.add_argument(
        '--protocol', default='fair', choices=['fair', 'mmselfsup', 'moco', 'mhead', 'auto'],
        help='default: fair; auto: a grid of classifiers on cached features, chosen on held-out training images')
    parser.add_argument(
        '--output', '--out', dest='output', type=Path, default=Path('results'), metavar='FOLDER',
        help='default: results')
    parser.add_argument('--seed', type=int, default=0, metavar='N', help='default: 0')
    parser.add_argument('--device', metavar='D', help='cuda, mps or cpu (default: the first of these that is there)')
    parser.add_argument('--workers', type=int, metavar='N', help='threads that read images')
    parser.add_argument(
        '--amp', choices=['auto', 'off', 'bfloat16', 'float16'], default='auto',
        help='precision of the frozen backbone; auto is off, as published (float32)')
    parser.add_argument(
        '--micro-batch', type=int, metavar='N',
        help='images in one pass through the frozen backbone: memory, not the result (default: 256, on a CPU 8; auto '
        'takes at most 8 on a CPU)')
    parser.add_argument(
        '--cache', type=Path, metavar='DIR', help="auto: where features are kept (default: the package's cache)")
    parser.add_argument(
        '--allow-partial', action='store_true',
        help='go on with a part of the data set, or without unreadable images (which are looked for first)')
    parser.add_argument(
        '--fresh', action='store_true', help='do not continue a run that was stopped (auto has none to continue)')
    group = parser.add_argument_group('numbers of the protocol', 'with any of these it is no longer the published one')
    for name, (kind, text) in NUMBERS.items():
        nargs = {'crop_scale': 2, 'lr_steps': '*', 'report_epochs': '*'}.get(name)
        group.add_argument(f'--{name.replace("_", "-")}', type=kind, nargs=nargs, metavar='N', help=text)


def run(args: argparse.Namespace) -> int:
    """Trains, prints, writes the record; 0, or 128 + a signal's number."""
    check(args)
    auto = args.protocol == 'auto'
    try:
        with Signals() as signals, join_world(args.device) as world:
            if auto:
                run_auto(args, world)
            else:
                _run(args, world, signals)
    except Stopped as e:
        if os.environ.get('RANK', '0') == '0':
            then = 'keeps the features that are made, and trains anew' if auto else 'goes on from the last checkpoint'
            print(f'simsiam linear: {e}; the same command {then}', file=sys.stderr)
        return e.code
    except torch.OutOfMemoryError as e:
        raise RuntimeError(
            f'out of memory ({str(e).split(". ")[0]}): not the backbone, but the classifiers do not fit; lower '
            '--batch-size, or use another --device') from None
    return 0


def _run(args: argparse.Namespace, world: Any, signals: Any) -> None:
    amp = 'off' if args.amp == 'auto' else args.amp
    what = args.protocol, args.dataset, {k: getattr(args, k) for k in NUMBERS}, amp
    choose(*what, LEAST)  # what is wrong with any model is said before one is loaded
    if amp == 'float16' and world.device.type != 'cuda':
        raise ValueError(f'--amp float16 does not run on {world.device.type}; use bfloat16 or off')
    world.broadcast_from_main(lambda: check_output(args.output))
    say = print if world.main else silent
    pair = world.all_or_none(lambda: open_pair(args.dataset, args.data, args.allow_partial))
    backbone = world.all_or_none(lambda: load_backbone(args.model, world.device))
    chosen = choose(*what, backbone.image_size)
    pooling = tap_shapes(backbone, chosen.protocol, world.device)[1]
    if pooling == 'adaptive':
        chosen = dataclasses.replace(chosen, changed=chosen.changed | {'pooling': ('mmselfsup', pooling)})
    benchmark, data = benchmark_name(chosen, args.dataset), pair.data() | {'path': args.data}
    protocol = {**chosen.record(), 'seed': args.seed, 'amp': amp, 'ties': 'wrong'}
    if pooling is not None:
        protocol['pooling'] = pooling
    if chosen.protocol.reported == 'best':
        protocol['best_chosen_on'] = 'test images, as in the released code'
    path = record_path(args.output, benchmark, backbone, protocol, data)
    say(f'{args.dataset}, {len(pair.train)} training and {len(pair.test)} test images; {chosen.describe()}')
    say_size(args, backbone, say)
    if missing := without_test_image(pair):
        say(missing)
    listed = len(pair.train) + len(pair.test)
    if args.allow_partial:
        pair = readable(pair, args.workers, world, say)
    if chosen.protocol.batch_size > len(pair.train):
        say(f'batch {chosen.protocol.batch_size} is more than the {len(pair.train)} training images: one step per '
            'epoch; for your own folder --protocol auto chooses the rates by itself')
    with hold_lock(path.with_suffix('.lock'), world, 'linear'):
        run = LinearRun(
            chosen.protocol, chosen.label, backbone, pair, world, args.seed, amp, args.micro_batch, args.workers,
            path.with_suffix('.pth'), {'protocol': protocol, 'weights': backbone.digest, 'data': pair.data()}, signals,
            say)
        if not args.fresh:
            run.resume()
        run.train()
        world.all_or_none(run.check_frozen)
        if world.main:
            record = write_record(
                path, benchmark, protocol, backbone, data, run.metrics(), run.seconds,
                {'epochs': run.history, 'unreadable': listed - len(pair.train) - len(pair.test)})
            say(f'by protocol {chosen.label}: {print_record(record)}\nwritten to {path}')


def check(args: argparse.Namespace) -> None:
    """Raises ValueError."""
    auto = args.protocol == 'auto'
    rules = [
        ('--micro-batch', args.micro_batch, args.micro_batch is None or args.micro_batch >= 1, 'must be at least 1'),
        ('--workers', args.workers, args.workers is None or args.workers >= 0, 'must be at least 0'),
        ('--seed', args.seed, 0 <= args.seed < 2**63, f'must be in 0 .. {2**63 - 1}'),
        ('--cache', args.cache, auto or args.cache is None, 'only --protocol auto keeps features; leave it out'),
        ('--fresh', '', not auto or not args.fresh, '--protocol auto always trains anew; leave it out')]
    for flag, value, ok, rule in rules:
        if not ok:
            raise ValueError(f'{flag} {value}'.rstrip() + f': {rule}')
