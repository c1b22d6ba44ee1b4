"""Every number of a fine-tuning run: flags, defaults by the number of images, and the semi-supervised protocols."""
import argparse
import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...runtime.messages import check_flags
from .. import protocols
from ..options import check_extraction, check_held_out, read_sizes
from ..results.sweep import each_rate

# Defaults of --protocol plain; `choose_by_size` has those that depend on the number of images.
PLAIN = {
    'optimizer': 'adamw', 'weight_decay': 0.05, 'layer_decay': 0.8, 'smoothing': 0.1, 'ema_decay': 0.9998,
    'crop_scale': (0.25, 1.0), 'flip': 0.5, 'randaugment': 'rand-m7-mstd0.5-inc1', 'erase': 0.0}
BY_SIZE = ('epochs', 'batch_size', 'lr', 'warmup_epochs', 'mixup', 'cutmix', 'patience')
FLAGS = {'optimizer': 'opt', 'flip': 'flip-p', 'erase': 'erase-p'}  # the flags that are not named after their setting
STEPS, RATE = 1000, 2e-3  # small data sets train for this many steps, at this learning rate
MIXED = 20_000  # mixup and cutmix help with this many images or more (as in BiT's rule, Kolesnikov et al., 2020)
# Settings, the test that their values must pass, and the rule in words.
RANGES: list[tuple[tuple[str, ...], Callable[[Any], bool], str]] = [
    (('epochs',), lambda x: x >= 1, 'at least 1'),
    (('batch_size',), lambda x: x >= 2, 'at least 2'),
    (('lr', 'head_multiplier'), lambda x: 0 < x < math.inf, 'above 0'),
    (('weight_decay', 'mixup', 'cutmix', 'patience'), lambda x: x >= 0, 'at least 0'),
    (('layer_decay',), lambda x: 0 < x <= 1, 'above 0, at most 1'),
    (('smoothing', 'ema_decay'), lambda x: 0 <= x < 1, 'at least 0, below 1'),
    (('crop_scale',), lambda x: 0 < x[0] <= x[1] <= 1, '0 < MIN <= MAX <= 1'),
    (('flip', 'erase'), lambda x: 0 <= x <= 1, 'a probability')]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Every number that affects what is learned. By default, the optional parts are off."""

    epochs: int
    batch_size: int  # over all processes
    optimizer: str
    lr: float  # the rate in use, of the last layer (with head_multiplier: of the backbone)
    weight_decay: float
    momentum: float = 0.9
    layer_decay: float | None = None  # each layer's rate is that of the next layer times this
    head_multiplier: float | None = None  # instead of layer_decay: the classifier's rate / the backbone's
    steps: tuple[int, ...] | None = None  # the rate falls after each of these epochs; None: cosine to 0
    warmup_epochs: int = 0
    smoothing: float = 0.0
    mixup: float = 0.0  # alpha
    cutmix: float = 0.0  # alpha
    ema_decay: float = 0.0
    patience: int = 0  # epochs without a better validation top-1 before the run stops early
    eval_every: int = 1  # epochs; the last epoch is always measured
    keep: str = 'best'  # the epoch whose weights are exported: 'best' on the validation images, or 'last'
    partial_batch: bool = False  # whether a last, smaller batch of an epoch trains too
    image_size: int
    resize: int
    crop_scale: tuple[float, float]
    flip: float
    randaugment: str | None = None
    erase: float = 0.0
    seed: int


def name_flag(name: str) -> str:
    return '--' + FLAGS.get(name, name).replace('_', '-')


def check_ranges(args: argparse.Namespace) -> None:
    """Raises ValueError for a number outside its range."""
    check_flags(
        (name_flag(name), value, is_allowed(value), rule) for names, is_allowed, rule in RANGES for name in names
        if (value := getattr(args, name)) is not None)
    check_held_out(args)


def resolve_plain(
    args: argparse.Namespace, images: int, own: int = protocols.SIZE, processes: int = 1,
) -> list[tuple[Path, Settings]]:
    """Returns folder and settings of each run of --protocol plain, one for each --lr; ValueError for a wrong flag.

    `own` is the model's image size in pixels.
    """
    runs = [(one.lr, _resolve_one(one, images, own, processes)) for one in each_rate(args)]
    return [(args.output if len(runs) == 1 else args.output / f'lr{lr:g}', s) for lr, s in runs]


def _resolve_one(args: argparse.Namespace, images: int, own: int, processes: int) -> Settings:
    for name in ('list', 'head_multiplier', 'grid'):
        if getattr(args, name) is not None and getattr(args, name) is not False:  # 0 is a value that was given
            raise ValueError(f'{name_flag(name)} belongs to --protocol semi_1pct or semi_10pct; add one of them')
    check_ranges(args)
    given = {k: getattr(args, k) for k in (*PLAIN, *BY_SIZE) if getattr(args, k) is not None}
    numbers = {**PLAIN, **choose_by_size(images, given, processes), **given}
    warmup = numbers['warmup_epochs']
    check_flags([('--warmup-epochs', warmup, 0 <= warmup < numbers['epochs'], '0 .. --epochs - 1')])
    size, resize = read_sizes(args, own)
    check_extraction(args, size, resize)
    numbers |= {
        'lr': numbers['lr'] * numbers['batch_size'] / 256, 'crop_scale': tuple(numbers['crop_scale']),
        'layer_decay': None if numbers['layer_decay'] == 1 else numbers['layer_decay'],
        'randaugment': None if numbers['randaugment'] == 'none' else numbers['randaugment']}
    return Settings(**numbers, image_size=size, resize=resize, seed=args.seed)


def choose_by_size(n: int, given: dict[str, Any], processes: int = 1) -> dict[str, Any]:
    """Returns the defaults for n training images, if the user gave the settings `given`."""
    # With few images, 30 epochs of the usual batches are over before anything is learned. So batches are smaller, there
    # are more epochs at a higher rate, and images are not mixed.
    mixed = n >= MIXED
    each = max(2 if mixed else 1, min(64 if n >= 1000 else 32 if n >= 200 else 16, n) // processes)
    batch = given.get('batch_size') or max(2, (each - each % 2 * mixed) * processes)
    in_epoch = max(1, n // batch)
    epochs = given.get('epochs') or min(100, max(30, math.ceil(STEPS / in_epoch)))
    rate = RATE * min(1.0, math.sqrt(STEPS / (epochs * in_epoch)))
    return {
        'epochs': epochs, 'batch_size': batch, 'lr': rate * 256 / min(batch, n), 'warmup_epochs': epochs // 10,
        'mixup': 0.2 if mixed else 0.0, 'cutmix': 1.0 if mixed else 0.0, 'patience': max(10, epochs // 3)}


def fit_batch(s: Settings, n: int, processes: int, say: Callable[[str], Any]) -> Settings:
    """Lowers the batch to the n training images. All processes get the same share of it, an even one with mixup."""
    multiple = processes * (2 if s.mixup or s.cutmix else 1)
    if s.batch_size % multiple:
        raise ValueError(
            f'--batch-size {s.batch_size} does not divide by {multiple} ({processes} processes'
            f'{", pairs for mixup" if multiple > processes else ""}); use a multiple of {multiple}')
    if n >= s.batch_size or s.partial_batch:
        return s
    batch = n // multiple * multiple
    if batch < max(2, multiple):
        hint = ', or use --mixup 0 --cutmix 0' if n >= max(2, processes) and multiple > processes else (
            ', or use fewer processes' if processes > 1 else '')
        raise ValueError(f'{n} training images are too few for a batch of {processes} processes; add images{hint}')
    say(f'--batch-size {s.batch_size} is more than the {n} training images; {batch} is used')
    return dataclasses.replace(s, batch_size=batch, lr=s.lr * batch / s.batch_size)


def resolve_semi(args: argparse.Namespace) -> list[tuple[Path, Settings]]:
    """Returns folder and settings of each semi-supervised run, for each --lr or all nine; else ValueError."""
    for name in (*PLAIN, *BY_SIZE):
        if name not in (*protocols.SEMI, 'lr') and getattr(args, name) is not None:
            raise ValueError(f'{name_flag(name)} is fixed by --protocol {args.protocol}; leave it out')
    if args.grid and (args.lr is not None or args.head_multiplier is not None):
        raise ValueError('--grid runs all nine pairs; leave --lr and --head-multiplier out')
    if args.dataset == 'imagenet' and args.list is None:
        raise ValueError(
            f'--protocol {args.protocol} needs --list FILE, the names of the labelled images; imagenet_subsets of '
            'https://github.com/google-research/simclr has those of 1 % and 10 %')
    for one in each_rate(args):
        check_ranges(one)
    size, resize = read_sizes(args)
    check_extraction(args, size, resize)
    numbers = {**protocols.SEMI_FIXED, **protocols.SEMI, 'weight_decay': protocols.SEMI_WEIGHT_DECAY[args.protocol]}
    numbers |= {k: getattr(args, k) for k in protocols.SEMI if getattr(args, k) is not None}
    lrs: Sequence[float] = protocols.SEMI_LRS
    multipliers: Sequence[float] = protocols.SEMI_HEAD_MULTIPLIERS
    if not args.grid:
        lrs = args.lr or [lrs[1]]
        multipliers = [multipliers[1] if args.head_multiplier is None else args.head_multiplier]
    return [
        (args.output / f'lr{lr:g}_head{multiplier:g}' if len(lrs) > 1 else args.output, Settings(
            **numbers, lr=lr, head_multiplier=multiplier, keep='last', partial_batch=True, image_size=size,
            resize=resize, seed=args.seed))
        for lr in lrs for multiplier in multipliers]


def list_deviations(run: dict[str, Any]) -> list[str]:
    """Returns the numbers of a semi-supervised run that are not the protocol's."""
    rules = {
        **{k: [v] for k, v in protocols.SEMI.items()}, 'lr': protocols.SEMI_LRS,
        'head_multiplier': protocols.SEMI_HEAD_MULTIPLIERS, 'image_size': [protocols.SIZE],
        'resize': [protocols.RESIZE], 'amp': ['off']}
    return [f'{k} {run[k]}' for k, values in rules.items() if run[k] not in values]
