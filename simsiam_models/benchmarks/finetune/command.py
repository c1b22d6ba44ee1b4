"""Fine-tune a backbone on labelled images; the result is a classifier that plain timm loads.

    simsiam finetune my_photos --output runs/my_photos          # one subfolder per class, also below train/ and val/
    torchrun --nproc-per-node 8 -m simsiam_models.cli finetune my_photos --output runs/my_photos
    timm.create_model('local-dir:runs/my_photos', pretrained=True)

The first layers learn more slowly than the last (--layer-decay), images are varied by RandAugment, many of them also by
mixup and cutmix, and what is validated and kept is a running average of the weights. A run that was killed goes on by
the same command.

Semi-supervised ImageNet, 1 % or 10 % of the labels, by MMSelfSup's protocol and its literal numbers:

    simsiam finetune imagenet --protocol semi_1pct --list 1percent.txt --output runs/semi --lr 0.01 --head-multiplier 10
    simsiam finetune imagenet --protocol semi_1pct --list 1percent.txt --output runs/semi --grid
"""
import argparse
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...runtime.distributed import default_workers, join_world
from ...runtime.files import hold_lock
from ...runtime.log import RunLog
from ...runtime.precision import choose_amp
from ..backbone import load_backbone
from ..options import check_extraction, say_size, size_and_resize
from ..protocols import LEAST, SEMI, SEMI_HEAD_MULTIPLIERS, SEMI_LRS, SEMI_WEIGHT_DECAY, SIZE
from . import data
from .result import Source, Target, claim, finish, open_source, print_grid
from .training import Settings, Training, add_classifier, make_optimizer

PLAIN = {  # flag -> default; what is not here depends on the number of images: `by_size`
    'opt': 'adamw', 'weight_decay': 0.05, 'layer_decay': 0.8, 'smoothing': 0.1, 'ema_decay': 0.9998,
    'crop_scale': (0.25, 1.0), 'flip_p': 0.5, 'randaugment': 'rand-m7-mstd0.5-inc1', 'erase_p': 0.0}
BY_SIZE = ('epochs', 'batch_size', 'lr', 'warmup_epochs', 'mixup', 'cutmix', 'patience')
STEPS, RATE = 1000, 2e-3  # of few images: as many steps, at this rate
MIXED = 20_000  # images from which on mixup and cutmix are of use (as in BiT's rule, Kolesnikov et al., 2020)


def json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('data', metavar='DATA', help='labelled images, as for train.py: one subfolder per class, a list, ...; with '
        '--protocol the ImageNet folder')
    add('--model', default='simsiam_resnet50', metavar='NAME', help='backbone (default: simsiam_resnet50)')
    add('--model-args', type=json_object, default={}, metavar='JSON',
        help='its keyword arguments, e.g. \'{"drop_path_rate": 0.1}\'')
    add('--out', '--output', dest='output', type=Path, required=True, metavar='FOLDER',
        help='of the run and its classifier; the same command continues it')
    add('--protocol', choices=['plain', *SEMI_WEIGHT_DECAY], default='plain', help='default: plain')
    add('--val-share', type=float, default=0.2, metavar='X',
        help='share of each class that is held out where DATA has no val folder (default: 0.2)')
    add('--seed', type=int, default=0, help='of classifier, order, augmentation and held-out images (default: 0)')
    add('--device', metavar='D', help='cuda, mps or cpu (default: the first of these that is there)')
    add('--workers', type=int, metavar='N', help='processes that read images, 0: none (default: by device and cores)')
    add('--amp', choices=['auto', 'off', 'bfloat16'], default='auto',
        help='precision (default: auto; off on a CPU and with --protocol)')
    add('--image-size', type=int, metavar='N',
        help="side of a crop, pixels (default: the model's own; with --protocol 224)")
    add('--resize', type=int, metavar='N', help='short side in validation, pixels (default: image size x 256 / 224)')
    add = parser.add_argument_group('optimization and augmentation').add_argument
    add('--epochs', type=int, metavar='N',
        help=f'default: 30; of few images as many as make {STEPS} steps, at most 100')
    add('--batch-size', type=int, metavar='N',
        help='over all processes (default: 64; below 1000 images 32, below 200 16)')
    add('--opt', metavar='NAME', help=f"timm's name of the optimizer (default: {PLAIN['opt']})")
    add('--lr', type=float, metavar='X', help='of the last layer, per 256 samples: the rate used is lr * batch / 256 '
        f'(default: a used rate of {RATE:g}, beyond {STEPS} steps times the root of {STEPS} / steps); with --protocol '
        'the rate of the backbone as it is')
    add('--weight-decay', type=float, metavar='X', help=f'default: {PLAIN["weight_decay"]}')
    add('--layer-decay', type=float, metavar='X',
        help=f"each layer's rate is the next one's times this (default: {PLAIN['layer_decay']}; 1: all alike)")
    add('--warmup-epochs', type=int, metavar='N', help='linear; then cosine to 0 (default: a tenth)')
    add('--smoothing', type=float, metavar='X', help=f'of the labels (default: {PLAIN["smoothing"]})')
    add('--mixup', type=float, metavar='ALPHA', help=f'0: none (default: 0.2 from {MIXED} images on, else 0)')
    add('--cutmix', type=float, metavar='ALPHA', help=f'0: none (default: 1 from {MIXED} images on, else 0)')
    add('--ema-decay', type=float, metavar='X',
        help=f'of the averaged weights, 0: none (default: {PLAIN["ema_decay"]})')
    add('--patience', type=int, metavar='N', help='epochs without a better validation top-1 after which the run ends, '
        '0: never (default: a third of --epochs, at least 10)')
    add('--crop-scale', type=float, nargs=2, metavar=('MIN', 'MAX'), help='share of the area (default: 0.25 1)')
    add('--flip-p', type=float, metavar='P', help=f'probability of a flip (default: {PLAIN["flip_p"]})')
    add('--randaugment', metavar='SPEC', help=f'as timm writes it, or none (default: {PLAIN["randaugment"]})')
    add('--erase-p', type=float, metavar='P', help=f'of random erasing (default: {PLAIN["erase_p"]:g})')
    add = parser.add_argument_group('semi-supervised protocol').add_argument
    add('--list', type=Path, metavar='FILE', help='names of the labelled images, one a line')
    add('--head-multiplier', type=float, metavar='X', help="the classifier's rate / --lr: 1, 10 or 100 (default: 10)")
    add('--grid', action='store_true', help='all nine pairs of --lr .1 .01 .001 and --head-multiplier 1 10 100')
    add('--dataset', choices=['imagenet', 'folder'], default='imagenet', help='default: imagenet')
    add('--allow-partial', action='store_true', help='go on with fewer images than the data set has')
    parser.set_defaults(kept='the same command goes on after the last whole epoch')


def run(args: argparse.Namespace) -> int:
    with join_world(args.device) as world:
        say = RunLog(args.output, world.main).say
        plain = args.protocol == 'plain'
        runs = [(args.output, plain_settings(args, MIXED, LEAST))] if plain else semi_runs(args)  # wrong flags first
        source = open_source(args)
        say(f'{len(source.train)} training images of {len(source.classes)} classes; validation: {source.validation}')
        if plain:
            own = SIZE
            if args.image_size is None:
                backbone = load_backbone(args.model, **args.model_args)
                own = backbone.image_size
                say_size(args, backbone, say)
            runs = [(args.output, plain_settings(args, len(source.train), own, world.size))]
        records = [run_one(args, source, s, folder, world, say) for folder, s in runs]
        if args.grid and world.main:
            say(print_grid([s for _, s in runs], records))
    return 0


def run_one(
    args: argparse.Namespace, source: 'Source', s: 'Settings', folder: Path, world: Any, say: Callable[[str], Any],
) -> dict[str, Any] | None:
    """Train to the end, export, write the record, which rank 0 returns."""
    s = fit_batch(s, len(source.train), world.size, say)
    full = args.amp == 'auto' and (world.device.type == 'cpu' or args.protocol != 'plain')
    amp = 'off' if full else choose_amp(args.amp, world.device, None, ())
    target = Target(args.model, args.model_args, world.device, source.classes, s, folder)
    run = {
        'benchmark': 'finetune', 'protocol': args.protocol, 'model': args.model, 'model_args': args.model_args,
        'weights': target.backbone.identity, 'images': len(source.train), 'digest': source.digest,
        'validation': source.validation, 'amp': amp, 'processes': world.size, **dataclasses.asdict(s)}
    add_classifier(target.backbone.model, len(source.classes), s.seed)
    target.check()
    make_optimizer(target.backbone.model, s)  # is there such a one? Asked before anything is written
    crop = data.train_transform(
        s.image_size, target.mean, target.std, s.crop_scale, s.flip, s.randaugment, s.erase)
    centre = data.eval_transform(s.image_size, s.resize, target.mean, target.std)
    workers = default_workers(world.device) if args.workers is None else args.workers
    loaders = [
        data.Loader(data.Samples(images, transform, s.seed, transform is crop), workers, world.device)
        for images, transform in ((source.train, crop), (source.val, centre))]
    free = {'model', 'processes', 'validation', *(['amp'] if args.amp == 'auto' else [])}  # paths as typed
    world.broadcast_from_main(lambda: claim(folder, run, free))
    with hold_lock(folder / 'lock', world, 'finetune'):
        training = Training(
            target.backbone.model, len(source.classes), s, *loaders, folder, world, amp, run, say, target.export)
        say(f'{args.model}: protocol {args.protocol}, {s.epochs} epochs of {training.steps} steps, batch '
            f'{s.batch_size}, {s.optimizer}, lr {s.lr:.3g}, {s.image_size} px, {world.device.type}, amp {amp} -> '
            f'{folder}')
        training.fit()
        predicted = training.predict()
        return finish(args, source, target, training, predicted, run, say) if world.main else None


def fit_batch(s: 'Settings', n: int, processes: int, say: Callable[[str], Any]) -> 'Settings':
    """The batch, at most the n training images; each process has the same number of them, with mixup an even one.

    Raises:
        ValueError: it does not divide.
    """
    multiple = processes * (2 if s.mixup or s.cutmix else 1)
    if s.batch_size % multiple:
        raise ValueError(
            f'--batch-size {s.batch_size} does not divide by {multiple} ({processes} processes'
            f'{", pairs for mixup" if multiple > processes else ""}); use a multiple of {multiple}')
    if n >= s.batch_size or s.partial_batch:
        return s
    batch = n // multiple * multiple
    if batch < max(2, multiple):
        hint = ', or use --mixup 0 --cutmix 0' if multiple > processes else ''
        raise ValueError(f'{n} training images are too few for a batch of {processes} processes; add images{hint}')
    say(f'--batch-size {s.batch_size} is more than the {n} training images: {batch} is used')
    return dataclasses.replace(s, batch_size=batch, lr=s.lr * batch / s.batch_size)


def by_size(n: int, given: dict[str, Any], processes: int = 1) -> dict[str, Any]:
    """Defaults for n training images. With few, a run of the usual 30 epochs is over before anything is learned: so
    batches are smaller, epochs and rate higher, and images are not mixed."""
    mixed = n >= MIXED
    each = max(2 if mixed else 1, min(64 if n >= 1000 else 32 if n >= 200 else 16, n) // processes)
    batch = given.get('batch_size') or max(2, (each - each % 2 * mixed) * processes)
    in_epoch = max(1, n // batch)
    epochs = given.get('epochs') or min(100, max(30, math.ceil(STEPS / in_epoch)))
    rate = RATE * min(1.0, math.sqrt(STEPS / (epochs * in_epoch)))
    return {
        'epochs': epochs, 'batch_size': batch, 'lr': rate * 256 / min(batch, n), 'warmup_epochs': epochs // 10,
        'mixup': 0.2 if mixed else 0.0, 'cutmix': 1.0 if mixed else 0.0, 'patience': max(10, epochs // 3)}


def plain_settings(args: argparse.Namespace, images: int, own: int = SIZE, processes: int = 1) -> 'Settings':
    """The defaults for so many training images, with the flags' numbers in their place; `own`: the model's size, px.

    Raises:
        ValueError: a number outside its range, or a flag of the other protocol.
    """
    for name in ('list', 'head_multiplier', 'grid'):
        if getattr(args, name) is not None and getattr(args, name) is not False:  # 0 was given, too
            raise ValueError(f'--{name.replace("_", "-")} belongs to --protocol semi_1pct or semi_10pct; name one')
    given = {k: v for k, v in vars(args).items() if k in (*PLAIN, *BY_SIZE) and v is not None}
    n = {**PLAIN, **by_size(images, given, processes), **given}
    size, resize = size_and_resize(args, own)
    _check(args, n, size, resize)
    return Settings(
        epochs=n['epochs'], batch_size=n['batch_size'], optimizer=n['opt'], lr=n['lr'] * n['batch_size'] / 256,
        weight_decay=n['weight_decay'], momentum=0.9, layer_decay=None if n['layer_decay'] == 1 else n['layer_decay'],
        head_multiplier=None, steps=None, warmup_epochs=n['warmup_epochs'], smoothing=n['smoothing'], mixup=n['mixup'],
        cutmix=n['cutmix'], ema_decay=n['ema_decay'], patience=n['patience'], eval_every=1, keep='best',
        partial_batch=False, image_size=size, resize=resize, crop_scale=tuple(n['crop_scale']),
        flip=n['flip_p'], randaugment=None if n['randaugment'] == 'none' else n['randaugment'], erase=n['erase_p'],
        seed=args.seed)


def semi_runs(args: argparse.Namespace) -> list[tuple[Path, 'Settings']]:
    """MMSelfSup's numbers: 20 epochs, SGD, x0.2 after 12 and 16, batch 256, batch norm trains; one pair, or all nine.

    Raises:
        ValueError: a flag that the protocol fixes, or a number outside its range.
    """
    fixed = [k for k in (*PLAIN, *BY_SIZE) if k not in (*SEMI, 'lr') and getattr(args, k) is not None]
    if fixed:
        raise ValueError(f'--{fixed[0].replace("_", "-")} is fixed by --protocol {args.protocol}; leave it out')
    if args.grid and (args.lr is not None or args.head_multiplier is not None):
        raise ValueError('--grid runs all nine pairs; leave --lr and --head-multiplier out')
    if args.dataset == 'imagenet' and args.list is None:
        raise ValueError(
            f'--protocol {args.protocol} needs --list FILE, the names of the labelled images; imagenet_subsets of '
            'https://github.com/google-research/simclr has those of 1 % and 10 %')
    pairs = [(0.01 if args.lr is None else args.lr, 10.0 if args.head_multiplier is None else args.head_multiplier)]
    if args.grid:
        pairs = [(lr, multiplier) for lr in SEMI_LRS for multiplier in SEMI_HEAD_MULTIPLIERS]
    n = {**SEMI, **{k: getattr(args, k) for k in SEMI if getattr(args, k) is not None}}
    size, resize = size_and_resize(args)
    _check(args, {**PLAIN, **by_size(MIXED, n), **n, 'lr': pairs[0][0]}, size, resize)
    runs = []
    for lr, multiplier in pairs:
        settings = Settings(
            epochs=n['epochs'], batch_size=n['batch_size'], optimizer='sgd', lr=lr,
            weight_decay=SEMI_WEIGHT_DECAY[args.protocol], momentum=0.9, layer_decay=None, head_multiplier=multiplier,
            steps=(12, 16), warmup_epochs=0, smoothing=0.0, mixup=0.0, cutmix=0.0, ema_decay=0.0, patience=0,
            eval_every=10, keep='last', partial_batch=True, image_size=size, resize=resize,
            crop_scale=(0.08, 1.0), flip=0.5, randaugment=None, erase=0.0, seed=args.seed)
        folder = args.output / f'lr{lr:g}_head{multiplier:g}' if args.grid else args.output
        runs.append((folder, settings))
    return runs


def _check(args: argparse.Namespace, n: dict[str, Any], size: int, resize: int) -> None:
    scale, multiplier = n['crop_scale'], args.head_multiplier
    rules = [
        ('--epochs', n['epochs'], n['epochs'] >= 1, 'at least 1'),
        ('--batch-size', n['batch_size'], n['batch_size'] >= 2, 'at least 2'),
        ('--lr', n['lr'], 0 < n['lr'] < float('inf'), 'above 0'),
        ('--weight-decay', n['weight_decay'], n['weight_decay'] >= 0, 'at least 0'),
        ('--layer-decay', n['layer_decay'], 0 < n['layer_decay'] <= 1, 'above 0, at most 1'),
        ('--warmup-epochs', n['warmup_epochs'], 0 <= n['warmup_epochs'] < n['epochs'], '0 .. --epochs - 1'),
        ('--smoothing', n['smoothing'], 0 <= n['smoothing'] < 1, 'at least 0, below 1'),
        ('--mixup', n['mixup'], n['mixup'] >= 0, 'at least 0'),
        ('--cutmix', n['cutmix'], n['cutmix'] >= 0, 'at least 0'),
        ('--ema-decay', n['ema_decay'], 0 <= n['ema_decay'] < 1, 'at least 0, below 1'),
        ('--patience', n['patience'], n['patience'] >= 0, 'at least 0'),
        ('--crop-scale', scale, 0 < scale[0] <= scale[1] <= 1, '0 < MIN <= MAX <= 1'),
        ('--flip-p', n['flip_p'], 0 <= n['flip_p'] <= 1, 'a probability'),
        ('--erase-p', n['erase_p'], 0 <= n['erase_p'] <= 1, 'a probability'),
        ('--head-multiplier', multiplier, multiplier is None or 0 < multiplier < float('inf'), 'above 0'),
        ('--val-share', args.val_share, 0 < args.val_share < 1, 'above 0, below 1'),
        ('--seed', args.seed, 0 <= args.seed < 2**63, 'at least 0')]
    for flag, value, ok, rule in rules:
        if not ok:
            raise ValueError(f'{flag} {value}: must be {rule}')
    check_extraction(args, size, resize)
