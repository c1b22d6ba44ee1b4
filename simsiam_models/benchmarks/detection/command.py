"""Trains a detector on a ResNet backbone, all of it, and measures it: the transfer benchmarks of MMSelfSup's page.

    simsiam detect VOCdevkit --output runs/voc                                    # Faster R-CNN C4, VOC 07+12
    torchrun --nproc-per-node 8 -m simsiam_models detect coco --protocol coco_fpn_1x --output runs/coco
    simsiam detect my_objects --dataset folder --iterations 2000 --batch-size 4 --output runs/mine
    simsiam detect VOCdevkit --eval-only runs/voc --output runs/voc_again

Published: MMSelfSup's page has AP50 79.80 and 79.85 on VOC, and box / mask AP 38.6 / 34.6 and 38.8 / 34.9 on COCO, for
the older generation of weights, mm_ep100_bgr_in1k and mm_ep200_bgr_in1k.
"""
import argparse
import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.checkpoint import LAST
from ...runtime.distributed import World, cores, default_workers, join_world
from ...runtime.files import explain_write_errors
from ...runtime.lifecycle import Lifecycle
from ...runtime.log import RunLog
from ...runtime.messages import printable, require, short
from ...runtime.precision import choose_amp
from ...runtime.signals import Signals
from ..datasets.objects import KINDS, ObjectPair, open_objects
from ..options import check_held_out, parse_flags
from ..pixels import Normalizer
from ..protocols import DETECTION, DETECTION_VARIANTS
from ..results.record import check_output, read_record
from ..shared_images import report_shared
from ..trained import BACKBONE, COUNT, RECORD, add_run, check_run, follow_run, name_source, write_result
from ..transfer import KEYS, Schedule, Transfer, TransferTrainer, fit, resume
from . import stored
from .data import BatchPlan, EvalLoader, TrainLoader
from .metrics import Detections
from .model import Detector, build
from .result import write_predictions
from .settings import DetectionSettings, make_schedule, resolve
from .training import Evaluation, make_example, make_inputs

# On a user's own images, by default: iterations, at least, and epochs; evaluations.
LEAST, EPOCHS, EVALUATIONS = 1000, 12, 10
FREE = {'processes', 'protocol', 'detector', 'source', 'changed'}  # of a run's identity: these follow from the rest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('data', metavar='DATA', help='VOCdevkit with VOC2007 and VOC2012, the COCO folder, or with --dataset folder '
        'your own: a COCO json or a folder with one, or a VOC folder')
    add_run(parser, 'detector', list(DETECTION), list(KINDS))
    add('--variant', choices=list(DETECTION_VARIANTS), default='mmdet',
        help="mmdet, which MMSelfSup's page is measured with (default), or detectron2, MoCo's, for voc0712_c4_24k")
    add = parser.add_argument_group("numbers (default: the protocol's)").add_argument
    add('--batch-size', **COUNT, help='images per iteration over all processes (default: 16); the learning rate and '
        'the number of iterations follow')
    add('--iterations', **COUNT, help='the steps of the learning rate keep their places (default for --dataset folder: '
        f'{EPOCHS} epochs, at least {LEAST})')
    add('--lr', type=float, metavar='X', help='learning rate, not scaled')
    add('--image-size', **COUNT, help='short side in pixels, in training and tests')
    add('--rois', **COUNT, help='RoIs that train, per image (default: 512)')
    add('--pool-size', **COUNT, help='cells per side of a pooled RoI (default: 14; with a pyramid 7, and 14 for masks)')
    add('--proposals', **COUNT, help='proposals per image, in training and tests')
    add('--eval-every', **COUNT, help='iterations between evaluations (default for --dataset folder: '
        f'1/{EVALUATIONS} of all)')


def run(args: argparse.Namespace) -> int:
    require('simsiam detect', pycocotools='pycocotools')
    check_run(args)
    trained = None if args.eval_only is None else stored.open_trained(args.eval_only)
    if trained is not None:
        follow_run(args, trained[1]['protocol'], protocol=next(iter(DETECTION)), variant='mmdet')
    s = resolve(args)
    check_held_out(args)
    with Signals() as signals, join_world(args.device) as world:
        log = RunLog(args.output, world.main)
        pair = open_objects(
            args.dataset or s.protocol.dataset, args.data, args.variant, args.allow_partial, args.val_share, args.seed)
        log.say(describe_data(pair))
        if world.main:
            pair.shared = report_shared(pair.train, pair.test, log.say)
        choose_amp(args.amp, world.device, None, ())
        if (size := args.batch_size or s.protocol.batch_size) % world.size:
            raise ValueError(
                f'--batch-size {size} does not divide by {world.size} processes; use a multiple of {world.size}')
        if trained is not None:
            return measure_again(args, s, pair, world, log, trained)
        with Lifecycle(
                args.output / LAST, KEYS, world, signals, log.say, minutes=args.checkpoint_minutes) as life:
            fit_detector(args, s, pair, life, log)
    return 0


def train(data: str | Path, output: str | Path, **flags: Any) -> dict[str, Any]:
    """Trains and measures a detector as `simsiam detect DATA --output OUTPUT` does; returns its record::

        detection.train('my_objects', 'runs/mine', dataset='folder', model='simsiam_resnet50', protocol='coco_fpn_1x')

    Args:
        data, output: folders or files, as for the command.
        flags: those of the command, without dashes: batch_size=4 for --batch-size 4, allow_partial=True.

    Raises:
        ValueError: a flag is wrong or unknown.
        ValueError, RuntimeError, OSError: the command fails; the message is its line.
    """
    run(parse_flags('detection.train', add_arguments, data, output, flags))
    return read_record(Path(output) / RECORD)


def fit_detector(
    args: argparse.Namespace, s: DetectionSettings, pair: ObjectPair, life: Lifecycle, log: RunLog,
) -> None:
    """Trains a new detector, or the rest of one, and exports and measures it."""
    world, say = life.world, log.say
    workers = default_workers(world.device) if args.workers is None else args.workers
    batches = TrainLoader(
        pair.train, pair.train.training_indices(args.variant), s.prepare(True),
        args.batch_size or s.protocol.batch_size, world, seed=s.seed, workers=workers)
    epoch = batches.plan.per_epoch
    if args.dataset == 'folder':  # the protocols' numbers are for thousands of images
        args.iterations = args.iterations or max(LEAST, EPOCHS * epoch)
        args.eval_every = args.eval_every or -(-args.iterations // EVALUATIONS)
    schedule = make_schedule(s, args, epoch)
    published = BatchPlan(batches.plan.landscape, s.protocol.batch_size, s.seed)
    detector = build(
        args.model, s.protocol.detector, pair.train.classes, seed=s.seed, branch=args.branch,
        model_args=args.model_args, **dataclasses.asdict(s.numbers)).to(world.device)
    detector.world = world
    protocol = describe_protocol(args, s, schedule, published.per_epoch)
    source = detector.source
    identity = {
        **protocol, 'benchmark': 'detect', 'record': name_benchmark(args, s), 'weights': source.identity,
        'source': name_source(source), 'digest': pair.digest, 'processes': world.size, 'protocol': protocol,
        'detector': stored.describe(detector, s.test_side, s.long_side)}
    life.claim(identity, FREE)
    say(f'{args.model}: {detector.describe()}')
    say(describe_run(args, s, schedule, epoch))
    normalize = Normalizer(source.mean, source.std, world.device)
    trainer = TransferTrainer(
        detector, schedule, world, args.amp, functools.partial(make_example, detector, world.device))
    evaluation = make_evaluation(args, s, pair, normalize, world)
    transfer = Transfer(
        trainer, batches, lambda items, step: make_inputs(items, step, s.seed, normalize), evaluation.measure_run,
        life, log, identity)
    resume(transfer, FREE)
    fit(transfer)
    if world.main:
        stored.export(detector, args.output, s.test_side, s.long_side)
        history = [{k: entry[k] for k in ('step', 'metrics', 'seconds')} for entry in transfer.history]
        write_result(
            args.output, identity['record'], protocol, source, pair, transfer.history[-1],
            seconds=transfer.seconds, say=say, extra={'unreadable': batches.unreadable, 'history': history})
        say(f"the detector: detection.load('{args.output}'); its backbone: {args.output / BACKBONE}")


def measure_again(
    args: argparse.Namespace, s: DetectionSettings, pair: ObjectPair, world: World, log: RunLog,
    trained: tuple[Detector, dict[str, Any]],
) -> int:
    """Measures a trained detector, as --eval-only asks for."""
    detector, run = trained
    config = run['detector']
    if detector.names != pair.test.classes:
        raise ValueError(
            f'--eval-only {args.eval_only}: the detector has the classes {short(", ".join(detector.names))}, but the '
            f'images {short(", ".join(pair.test.classes))}; give the data set that it was trained on')
    detector.to(world.device).eval().requires_grad_(False)
    s = dataclasses.replace(s, numbers=detector.numbers, test_side=config['test_side'], long_side=config['long_side'])
    world.broadcast_from_main(lambda: check_output(args.output))
    normalize = Normalizer(detector.source.mean, detector.source.std, world.device)
    start = time.monotonic()
    entry = make_evaluation(args, s, pair, normalize, world).measure(detector, world)
    if world.main:
        write_result(
            args.output, name_benchmark(args, s), run['protocol'], detector.source, pair, entry,
            seconds=time.monotonic() - start, say=log.say, extra={'measured_again': str(args.eval_only)})
    return 0


def make_evaluation(
    args: argparse.Namespace, s: DetectionSettings, pair: ObjectPair, normalize: Normalizer, world: World,
) -> Evaluation:
    workers = min(16, cores()) if args.workers is None else args.workers
    loader = EvalLoader(pair.test, np.arange(len(pair.test)), s.prepare(False), world, workers)

    def write(rows: list[int], found: list[Detections]) -> None:
        with explain_write_errors(args.output, '--output'):
            write_predictions(args.output, pair.test, rows, found)

    return Evaluation(pair.test, loader, normalize, pair.name == 'voc0712', write)


def name_benchmark(args: argparse.Namespace, s: DetectionSettings) -> str:
    """Returns the name of the record: that of a published benchmark, if the data are its own."""
    if (args.dataset or s.protocol.dataset) != s.protocol.dataset:
        return f'detect_{s.protocol.detector}'
    return s.protocol.benchmark + ('' if args.variant == 'mmdet' else f'_{args.variant}')


def describe_protocol(args: argparse.Namespace, s: DetectionSettings, schedule: Schedule, epoch: int) -> dict[str, Any]:
    """Returns a record's protocol; `epoch` is the iterations of one with the protocol's batch size."""
    changed = s.describe_changes(schedule, epoch)
    return {
        'name': args.protocol, 'variant': args.variant, 'detector': s.protocol.detector,
        **dataclasses.asdict(schedule), **dataclasses.asdict(s.numbers), **s.list_images(), 'amp': args.amp,
        'seed': s.seed, **({'changed': changed} if changed else {})}


def describe_data(pair: ObjectPair) -> str:
    """Returns how many images there are, and what of the annotations is left out."""
    source = f': {pair.held_out}' if pair.held_out else ''
    lines = [f'{len(pair.train):,} training and {len(pair.test):,} test images of {pair.classes} classes{source}']
    return printable('\n'.join([*lines, *pair.train.notes, *(pair.test.notes if not pair.held_out else [])]), '\n')


def describe_run(args: argparse.Namespace, s: DetectionSettings, schedule: Schedule, epoch: int) -> str:
    """Returns the numbers of a run in a line; rate and iterations also as published if the batch size is another."""
    p, x = s.protocol, schedule
    text = (f'{args.protocol}, variant {args.variant}: {x.iterations:,} iterations of {x.batch_size} images '
            f'({x.iterations / epoch:.1f} epochs), lr {x.lr:g}, x {x.lr_gamma:g} after '
            f'{", ".join(map(str, x.lr_steps))}')
    if x.batch_size != p.batch_size:
        published = f'{p.iterations:,} iterations' if p.iterations else f'{p.epochs} epochs'
        text += f' (published: {published} of {p.batch_size} images, lr {p.lr:g})'
    return text
