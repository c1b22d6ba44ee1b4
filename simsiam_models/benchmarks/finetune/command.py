"""Fine-tunes a backbone on labelled images; the result is a classifier that plain timm loads.

    simsiam finetune my_photos --output runs/my_photos          # one subfolder per class, also below train/ and val/
    torchrun --nproc-per-node 8 -m simsiam_models.cli finetune my_photos --output runs/my_photos
    timm.create_model('local-dir:runs/my_photos', pretrained=True)

The first layers learn more slowly than the last (--layer-decay). RandAugment varies the images; in large data sets
mixup and cutmix blend them. A running average of the weights is validated and kept. The same command continues a run
that was stopped or killed, even in the middle of an epoch.

Semi-supervised ImageNet with 1 % or 10 % of the labels, by MMSelfSup's protocol and its literal numbers:

    simsiam finetune imagenet --protocol semi_1pct --list 1percent.txt --output runs/semi --lr 0.01 --head-multiplier 10
    simsiam finetune imagenet --protocol semi_1pct --list 1percent.txt --output runs/semi --grid
"""
import argparse
import dataclasses
import functools
from pathlib import Path
from typing import Any, cast

from ...runtime.checkpoint import LAST
from ...runtime.distributed import default_workers, join_world
from ...runtime.lifecycle import Lifecycle
from ...runtime.log import RunLog
from ...runtime.messages import json_object
from ...runtime.precision import choose_amp
from ...runtime.signals import Signals
from ..backbone import load_backbone
from ..options import add_held_out, add_model, report_pair, report_size
from ..protocols import LEAST, RESIZE, SEMI_WEIGHT_DECAY, SIZE
from ..results.sweep import format_sweep, run_each
from ..samples import Pair
from .data import Loader, Samples, make_eval_transform, make_train_transform, open_source
from .model import Classifier
from .result import write_result
from .settings import MIXED, PLAIN, RATE, STEPS, Settings, fit_batch, resolve_plain, resolve_semi
from .training import KEYS, ClassifierTrainer, Finetuning, fit, resume

COUNT: dict[str, Any] = dict(type=int, metavar='N')  # kinds of flag
NUMBER: dict[str, Any] = dict(type=float, metavar='X')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('data', metavar='DATA', help='labelled images, as for `pretrain`: one subfolder per class, a list, ...; with '
        '--protocol the ImageNet folder')
    add_model(parser)
    add('--model-args', type=json_object, default={}, metavar='JSON',
        help='keyword arguments of the backbone, e.g. \'{"drop_path_rate": 0.1}\'')
    add('--output', '--out', dest='output', type=Path, required=True, metavar='FOLDER',
        help='folder of the run and its classifier; the same command continues the run')
    add('--protocol', choices=['plain', *SEMI_WEIGHT_DECAY], default='plain', help='default: plain')
    add_held_out(parser, seed=False)
    add('--seed', **COUNT, default=0,
        help='seed of the classifier, the order, the augmentation and the held-out images (default: 0)')
    add('--device', metavar='D', help='cuda, mps or cpu (default: the first one available)')
    add('--workers', **COUNT, help='processes that read images; 0: the main one does (default: by device and cores)')
    add('--amp', choices=['auto', 'off', 'bfloat16'], default='auto',
        help='precision (default: auto; off on a CPU and with --protocol)')
    add('--image-size', **COUNT, help=f"side of a crop in pixels (default: the model's own; with --protocol {SIZE})")
    add('--resize', **COUNT, help=f'short side in validation in pixels (default: image size x {RESIZE} / {SIZE})')
    add_training_arguments(parser.add_argument_group('optimization and augmentation'))
    add = parser.add_argument_group('semi-supervised protocol').add_argument
    add('--list', type=Path, metavar='FILE', help='names of the labelled images, one per line')
    add('--head-multiplier', **NUMBER, help="the classifier's learning rate / --lr: 1, 10 or 100 (default: 10)")
    add('--grid', action='store_true', help='run all nine pairs of --lr .1 .01 .001 and --head-multiplier 1 10 100')
    add('--dataset', choices=['imagenet', 'folder'], default='imagenet',
        help='what DATA is, with --protocol (default: imagenet)')
    add('--allow-partial', action='store_true', help='accept fewer images than the data set has')
    parser.set_defaults(kept='the same command continues from the last checkpoint')


def add_training_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add('--epochs', **COUNT, help=f'default: 30; for few images as many as make {STEPS} steps, at most 100')
    add('--batch-size', **COUNT, help='over all processes (default: 64; below 1000 images 32, below 200 images 16)')
    add('--opt', dest='optimizer', metavar='NAME', help=f"optimizer, as timm names it (default: {PLAIN['optimizer']})")
    add('--lr', nargs='+', **NUMBER, help='learning rate of the last layer per 256 samples: lr * batch / 256 is '
        f'used (default: {RATE:g} is used, times the root of {STEPS} / steps beyond {STEPS} steps); with --protocol '
        'the rate of the backbone, unscaled; given several: a run and a folder for each, and a table')
    add('--weight-decay', **NUMBER, help=f'default: {PLAIN["weight_decay"]}')
    add('--layer-decay', **NUMBER,
        help=f"each layer's rate is the next one's times this (default: {PLAIN['layer_decay']}; 1: the same rate)")
    add('--warmup-epochs', **COUNT, help='linear; then cosine to 0 (default: a tenth of --epochs)')
    add('--smoothing', **NUMBER, help=f'label smoothing (default: {PLAIN["smoothing"]})')
    add('--mixup', type=float, metavar='ALPHA', help=f'0: none (default: 0.2 from {MIXED} images on, else 0)')
    add('--cutmix', type=float, metavar='ALPHA', help=f'0: none (default: 1 from {MIXED} images on, else 0)')
    add('--ema-decay', **NUMBER, help=f'decay of the averaged weights; 0: none (default: {PLAIN["ema_decay"]})')
    add('--patience', **COUNT, help='stop after N epochs without a better validation top-1; 0: never '
        '(default: a third of --epochs, at least 10)')
    add('--crop-scale', type=float, nargs=2, metavar=('MIN', 'MAX'), help='share of the area (default: 0.25 1)')
    add('--flip-p', dest='flip', type=float, metavar='P', help=f'probability of a flip (default: {PLAIN["flip"]})')
    add('--randaugment', metavar='SPEC', help=f'as timm writes it, or none (default: {PLAIN["randaugment"]})')
    add('--erase-p', dest='erase', type=float, metavar='P',
        help=f'probability of random erasing (default: {PLAIN["erase"]:g})')


def run(args: argparse.Namespace) -> int:
    with Signals() as signals, join_world(args.device) as world:
        say = RunLog(args.output, world.main).say
        plain = args.protocol == 'plain'
        if args.branch:  # an argument of load_backbone, as those of the network
            args.model_args = {**args.model_args, 'branch': args.branch}
        # Refuses wrong flags before the data are opened.
        runs = resolve_plain(args, MIXED, LEAST) if plain else resolve_semi(args)
        images = open_source(args)
        report_pair(images, world, say)
        if plain:
            own = SIZE
            if args.image_size is None:
                backbone = load_backbone(args.model, **args.model_args)
                own = backbone.image_size
                report_size(args, backbone, say)
            runs = resolve_plain(args, len(images.train), own, world.size)

        def train(folder: Path, s: Settings) -> dict[str, Any] | None:
            with Lifecycle(folder / LAST, KEYS, world, signals, say) as life:
                return finetune(args, images, s, life)

        records = run_each([functools.partial(train, *run) for run in runs], say)
        if len(runs) > 1 and world.main:
            names, rates = ['lr'], [[float(lr)] for lr in args.lr or ()]
            if not plain:
                names, rates = ['lr', 'head multiplier'], [[s.lr, cast(float, s.head_multiplier)] for _, s in runs]
            used = ' (its lr is the one in use: --lr x batch / 256)' if plain else ''
            say(f'{format_sweep(names, rates, records)}\nsimsiam report {args.output} shows all the numbers{used}')
    return 0


def finetune(args: argparse.Namespace, images: Pair, s: Settings, life: Lifecycle) -> dict[str, Any] | None:
    """Trains a new run, or the rest of one, and exports the classifier; returns the record on rank 0."""
    world, device, n = life.world, life.world.device, len(images.train)
    s = fit_batch(s, n, world.size, life.say)
    full = args.amp == 'auto' and (device.type == 'cpu' or args.protocol != 'plain')
    amp = 'off' if full else choose_amp(args.amp, device, None, ())
    names = [str(c) for c in images.train.classes]
    classifier = Classifier(args.model, args.model_args, device, names, s, life.folder)
    classifier.check()
    trainer = ClassifierTrainer(classifier.model, len(names), s, n, world, amp)
    workers = default_workers(device) if args.workers is None else args.workers
    train_transform = make_train_transform(s, classifier.mean, classifier.std)
    eval_transform = make_eval_transform(s.image_size, s.resize, classifier.mean, classifier.std)
    train = Loader(Samples(images.train, train_transform, s.seed, True), workers, device)
    val = Loader(Samples(images.test, eval_transform, s.seed, False), workers, device)
    identity = {
        'benchmark': 'finetune', 'protocol': args.protocol, 'model': args.model, 'model_args': args.model_args,
        'weights': classifier.identity, 'images': n, 'digest': images.digest, 'validation': images.tested_on,
        'amp': amp, 'processes': world.size, **dataclasses.asdict(s)}
    # Paths may be spelled in another way, and --amp auto may choose another precision on another machine.
    free = {'model', 'processes', 'validation', *(['amp'] if args.amp == 'auto' else [])}
    life.claim(identity, free)
    run = Finetuning(trainer, train, val, life, classifier, identity)
    resume(run, free)
    life.say(
        f'{args.model}: protocol {args.protocol}, {s.epochs} epochs of {trainer.steps} steps, batch {s.batch_size}, '
        f'{s.optimizer}, lr {s.lr:.3g}, {s.image_size} px, {device.type}, amp {amp} -> {life.folder}')
    fit(run)
    return write_result(run, images.data() | {'path': args.data}, images.shared) if world.main else None
