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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import LEAST, SIZE
from .knn import check_sizes, say_size, silent, sizes, without_test_image

DATASETS = ('imagenet', 'places205', 'inat18', 'cifar10', 'cifar100', 'folder')


@dataclass(frozen=True)
class Protocol:
    """One linear protocol as literal numbers; the comments of PROTOCOLS say where they come from."""

    name: str
    inputs: str  # 'avgpool': the backbone's pooled features; 'five': MMSelfSup's five pooled taps, batch norm on each
    optimizer: str  # 'larc': apex LARC, clip=False; 'lars_mmselfsup': lr inside the momentum buffer; 'sgd'
    batch_size: int  # samples per optimizer step, over all processes
    lr: float
    lr_per_256: bool  # lr is per 256 samples of the batch
    epochs: int
    schedule: str  # 'cosine': lr 0.5 (1 + cos(pi epoch / epochs)), epoch from 0; 'steps': x lr_gamma after each
    augmentation: str  # 'resized_crop'; 'resized_crop_colour': + colour jitter and PCA lighting; 'random_crop'
    eval_every: int  # epochs; the last one is always evaluated
    reported: str  # 'best' or 'last' epoch is the number of the protocol
    lr_steps: tuple[int, ...] = ()  # epochs done
    lr_gamma: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    trust: float = 0.001  # of LARC and LARS
    init_std: float = 0.01  # of the classifier's weights; its bias starts at 0
    crop_scale: tuple[float, float] = (0.08, 1.0)  # share of the area
    jitter: float = 0.4  # brightness, contrast, saturation; always
    lighting: float = 0.1  # standard deviation of the PCA noise
    flip_p: float = 0.5
    image_size: int = 224  # pixels
    resize: int = 256  # short side, pixels
    report_epochs: tuple[int, ...] = ()  # reported beside the last epoch

    @property
    def scaled_lr(self) -> float:
        return self.lr * self.batch_size / 256 if self.lr_per_256 else self.lr

    @property
    def idle(self) -> set[str]:
        """Numbers that play no part in this protocol."""
        steps, colour = self.schedule == 'steps', self.augmentation == 'resized_crop_colour'
        return {
            *(() if steps else ('lr_steps', 'lr_gamma')), *(() if colour else ('jitter', 'lighting')),
            *(('crop_scale',) if self.augmentation == 'random_crop' else ()),
            *(('trust',) if self.optimizer == 'sgd' else ())}


MHEAD = dict(
    inputs='five', optimizer='sgd', batch_size=256, lr=0.01, lr_per_256=False, schedule='steps', nesterov=True,
    weight_decay=1e-4, eval_every=10, reported='last')
PROTOCOLS = {p.name: p for p in (
    # facebookresearch/simsiam, main_lincls.py and its README; the paper's text has lr 0.02 (TPU).
    Protocol(
        'fair', inputs='avgpool', optimizer='larc', batch_size=4096, lr=0.1, lr_per_256=True, epochs=90,
        schedule='cosine', augmentation='resized_crop', eval_every=1, reported='best'),
    # MMSelfSup v0.9.1, resnet50_linear-8xb512-coslr-90e_in1k: its tables' AvgPool column.
    Protocol(
        'mmselfsup', inputs='avgpool', optimizer='lars_mmselfsup', batch_size=4096, lr=1.6, lr_per_256=False, epochs=90,
        schedule='cosine', augmentation='resized_crop', eval_every=10, reported='last'),
    # facebookresearch/moco, main_lincls.py; MMSelfSup's resnet50_linear-8xb32-steplr-100e has the same numbers.
    Protocol(
        'moco', inputs='avgpool', optimizer='sgd', batch_size=256, lr=30.0, lr_per_256=False, epochs=100,
        schedule='steps', lr_steps=(60, 80), augmentation='resized_crop', eval_every=1, reported='best'),
    # MMSelfSup v0.9.1, *_mhead*: its tables' Feature1 .. Feature5 columns.
    Protocol('mhead', epochs=90, lr_steps=(30, 60), augmentation='resized_crop_colour', **MHEAD),
    # Evaluated after epochs 10 and 20 there, and not after 28: which of them the table shows is not known.
    Protocol(
        'mhead_places205', epochs=28, lr_steps=(7, 14, 21), augmentation='random_crop', report_epochs=(20,), **MHEAD),
    Protocol('mhead_inat18', epochs=84, lr_steps=(24, 48, 72), augmentation='resized_crop', **MHEAD),
)}
# The numbers that a flag of the same name overrides.
NUMBERS: dict[str, tuple[type, str]] = {
    'batch_size': (int, 'samples per optimizer step, over all processes'),
    'lr': (float, 'learning rate (fair: per 256 samples)'),
    'epochs': (int, 'passes over the training images'),
    'lr_steps': (int, 'epochs after which the rate falls'),
    'lr_gamma': (float, 'by what it falls'),
    'momentum': (float, "the optimizer's"),
    'weight_decay': (float, "the optimizer's"),
    'trust': (float, "LARC's and LARS's coefficient"),
    'init_std': (float, "of the classifier's weights"),
    'crop_scale': (float, 'least and largest share of the area'),
    'jitter': (float, 'brightness, contrast, saturation'),
    'lighting': (float, 'standard deviation of the PCA noise'),
    'flip_p': (float, 'probability of a horizontal flip'),
    'image_size': (int, "pixels (default: the model's own, 224 where it has none; CIFAR: 32)"),
    'resize': (int, "short side of a test image, and of Places205's training images, pixels (default: image size x "
               '8/7; CIFAR: the same)'),
    'eval_every': (int, 'epochs between evaluations'),
    'report_epochs': (int, 'epochs that are reported as well'),
}


@dataclass(frozen=True)
class Chosen:
    """A protocol, and what was changed in it: field -> (published, used)."""

    protocol: Protocol
    changed: dict[str, tuple[Any, Any]]

    @property
    def label(self) -> str:
        return f'{self.protocol.name} (changed)' if self.changed else self.protocol.name

    def describe(self) -> str:
        if not self.changed:
            return f'protocol {self.label}, as published'
        said = ', '.join(f'{k} {old} -> {new}' for k, (old, new) in self.changed.items())
        return f'protocol {self.label}: no longer the published one, since {said}'

    def record(self) -> dict[str, Any]:
        idle = self.protocol.idle
        numbers = {k: v for k, v in dataclasses.asdict(self.protocol).items() if k not in idle}
        return {
            **numbers, 'name': self.label, 'base': self.protocol.name, 'scaled_lr': self.protocol.scaled_lr,
            'changed': {k: {'published': old, 'used': new} for k, (old, new) in self.changed.items()}}


def choose(name: str, dataset: str, overrides: dict[str, Any], amp: str = 'off', own: int = SIZE) -> Chosen:
    """The protocol `name` on a kind of data set, with the numbers that flags override.

    Args:
        own: the image size, pixels, that holds where no flag gives one: the model's.

    Raises:
        ValueError: no such protocol, or a number that cannot be.
    """
    if name == 'mhead' and f'mhead_{dataset}' in PROTOCOLS:
        name = f'mhead_{dataset}'
    if name not in PROTOCOLS:
        raise ValueError(f'--protocol {name} is not known; use one of {", ".join(PROTOCOLS)}, or auto')
    base = PROTOCOLS[name]
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in overrides.items() if v is not None}
    given['image_size'], given['resize'] = sizes(dataset, given.get('image_size'), given.get('resize'), own)
    if unused := sorted(base.idle & set(given)):
        flags = ', '.join(f'--{k.replace("_", "-")}' for k in unused)
        raise ValueError(f'{flags}: protocol {name} has no such number; leave it out')
    p = dataclasses.replace(base, **given)
    for key in ('batch_size', 'epochs', 'eval_every', 'lr', 'init_std'):
        if not getattr(p, key) > 0:
            raise ValueError(f'--{key.replace("_", "-")} {getattr(p, key)}: it must be above 0')
    for key in ('momentum', 'weight_decay', 'trust', 'jitter', 'lighting', 'lr_gamma'):
        if not getattr(p, key) >= 0:
            raise ValueError(f'--{key.replace("_", "-")} {getattr(p, key)}: it cannot be below 0')
    check_sizes(p.image_size, p.resize)
    if not 0 < p.crop_scale[0] <= p.crop_scale[1] <= 1:
        raise ValueError(f'--crop-scale {p.crop_scale[0]} {p.crop_scale[1]}: two shares of the area, the larger last')
    if not 0 <= p.flip_p <= 1:
        raise ValueError(f'--flip-p {p.flip_p}: a probability is between 0 and 1')
    if p.nesterov and p.momentum == 0:
        raise ValueError('--momentum 0 leaves nothing to Nesterov; use a value above 0')
    if not all(1 <= e <= p.epochs for e in given.get('report_epochs', ())):
        raise ValueError(
            f'--report-epochs {" ".join(map(str, p.report_epochs))}: there are epochs 1 to {p.epochs}; name some of '
            'these, or raise --epochs')
    if p.report_epochs and max(p.report_epochs) > p.epochs:
        p = dataclasses.replace(p, report_epochs=tuple(e for e in p.report_epochs if e <= p.epochs))
    old, new = dataclasses.asdict(base), dataclasses.asdict(p)
    changed = {k: (old[k], new[k]) for k in new if new[k] != old[k]}
    return Chosen(p, changed | ({'amp': ('off', amp)} if amp != 'off' else {}))


def benchmark_name(chosen: Chosen, dataset: str) -> str:
    """As weights/published.json calls it, where somebody published a number by this very protocol."""
    name = chosen.protocol.name
    if name.startswith('mhead'):
        return f'{dataset}_mhead_linear'
    if dataset == 'imagenet' and name in ('fair', 'mmselfsup'):
        return 'imagenet_linear' if name == 'fair' else 'imagenet_linear_avgpool'
    return f'{dataset}_linear_{name}'


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
    import torch

    from ..training.distributed import join_world
    from ..training.stopping import Signals, Stopped

    check(args)
    auto = args.protocol == 'auto'
    try:
        with Signals() as signals, join_world(args.device) as world:
            if auto:
                from .probe import run_auto

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


@contextmanager
def backbone_fits() -> Iterator[None]:
    """Around what sends images through the backbone. Raises RuntimeError where the memory does not suffice."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as e:
        raise RuntimeError(
            f'out of memory ({str(e).split(". ")[0]}) in the backbone: lower --micro-batch') from None


def _run(args: argparse.Namespace, world: Any, signals: Any) -> None:
    from .backbone import load_backbone
    from .datasets import open_pair
    from .linear_data import readable
    from .linear_training import LinearRun, tap_shapes
    from .record import check_output, print_record, record_path, write_record
    from .tables import alone

    amp = 'off' if args.amp == 'auto' else args.amp
    what = args.protocol, args.dataset, {k: getattr(args, k) for k in NUMBERS}, amp
    choose(*what, LEAST)  # what is wrong with any model is said before one is loaded
    if amp == 'float16' and world.device.type != 'cuda':
        raise ValueError(f'--amp float16 does not run on {world.device.type}; use bfloat16 or off')
    world.share(lambda: check_output(args.output))
    say = print if world.main else silent
    pair = world.attempt(lambda: open_pair(args.dataset, args.data, args.allow_partial))
    backbone = world.attempt(lambda: load_backbone(args.model, world.device))
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
    with alone(path.with_suffix('.lock'), world, 'linear'):
        run = LinearRun(
            chosen.protocol, chosen.label, backbone, pair, world, args.seed, amp, args.micro_batch, args.workers,
            path.with_suffix('.pth'), {'protocol': protocol, 'weights': backbone.digest, 'data': pair.data()}, signals,
            say)
        if not args.fresh:
            run.resume()
        run.train()
        world.attempt(run.check_frozen)
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
