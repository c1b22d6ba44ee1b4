"""Trains FCN-D8 on a ResNet backbone, all of it, and measures it: the segmentation benchmarks of MMSelfSup's page.

    simsiam segment VOCdevkit --output runs/voc                                   # VOC12 + Aug, 20k iterations
    torchrun --nproc-per-node 4 -m simsiam_models segment VOCdevkit --output runs/voc
    simsiam segment cityscapes --protocol cityscapes_40k --output runs/cityscapes
    simsiam segment my_masks --dataset folder --image-size 240 --batch-size 8 --output runs/mine
    simsiam segment VOCdevkit --eval-only runs/voc --output runs/voc_again

Published: MMSelfSup's page has mIoU 48.35 and 46.27 on VOC12 for the older generation of weights, mm_ep100_bgr_in1k and
mm_ep200_bgr_in1k. Other methods with the same box AP on COCO have 64 to 65 there, so these two are outliers, and no
target; their cause is not known. There is no published number for Cityscapes.
"""
import argparse
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
from ...runtime.messages import short
from ...runtime.precision import choose_amp
from ...runtime.signals import Signals
from ..datasets.masks import KINDS, MaskPair, open_masks
from ..options import check_held_out, parse_flags
from ..pixels import Normalizer
from ..protocols import SEGMENTATION
from ..results.record import check_output, read_record
from ..shared_images import report_shared
from ..trained import BACKBONE, COUNT, RECORD, add_run, check_run, follow_run, name_source, write_result
from ..transfer import KEYS, Transfer, TransferTrainer, fit, resume
from . import stored
from .data import load_tests, load_training
from .inference import Inference
from .model import LOSS_MEANS, Segmenter, build
from .result import choose_shown, write_pictures, write_prediction
from .settings import SegmentationSettings, resolve
from .training import SegmentationEvaluation, make_example, make_inputs

FREE = {'processes', 'protocol', 'segmenter', 'source', 'changed'}  # of a run's identity: these follow from the rest
# On a user's own images, by default: iterations, at least, and epochs; evaluations.
LEAST, EPOCHS, EVALUATIONS = 2000, 30, 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('data', metavar='DATA', help='VOCdevkit with VOC2012 and the masks of SBD, the Cityscapes folder, or with '
        '--dataset folder your own: images/ and masks/ with the same names, perhaps with train/ and val/ in both')
    add_run(parser, 'segmenter', list(SEGMENTATION), list(KINDS))
    add('--classes', type=Path, metavar='FILE', help='names of the classes of your own masks, one per line from id 0 '
        'on, or `id name` lines (default: DATA/classes.txt, or else the ids found); 255 is ignored')
    add = parser.add_argument_group("numbers (default: the protocol's)").add_argument
    add('--batch-size', **COUNT, help='images per iteration over all processes (default: 16; Cityscapes: 8); the '
        'learning rate and the number of iterations follow')
    add('--iterations', **COUNT, help='the learning rate falls to its floor over them (default for --dataset folder: '
        f'{EPOCHS} epochs, at least {LEAST})')
    add('--lr', type=float, metavar='X', help='learning rate, not scaled')
    add('--image-size', **COUNT, help='side of a crop and of a window in pixels (default: 512; Cityscapes: 769); the '
        'size that images are resized to follows')
    add('--test', choices=['whole', 'slide'], help='test whole images, or windows of the size of a crop')
    add('--loss-mean', choices=LOSS_MEANS, help='mean of the loss over all pixels, also ignored ones, as published, or '
        'over the valid ones')
    add('--head-channels', **COUNT, help='of the decode head; the auxiliary head has half as many (default: 512)')
    add('--eval-every', **COUNT, help='iterations between evaluations (default for --dataset folder: '
        f'1/{EVALUATIONS} of all)')


def run(args: argparse.Namespace) -> int:
    check_run(args)
    trained = None if args.eval_only is None else stored.open_trained(args.eval_only)
    if trained is not None:
        follow_run(args, trained[2]['protocol'], protocol=next(iter(SEGMENTATION)))
    s = resolve(args)
    check_held_out(args)
    with Signals() as signals, join_world(args.device) as world:
        choose_amp(args.amp, world.device, None, ())
        log = RunLog(args.output, world.main)
        pair = open_masks(
            args.dataset or s.published.dataset, args.data, args.allow_partial, args.val_share, args.seed, args.classes)
        log.say(pair.describe())
        if world.main:
            pair.shared = report_shared(pair.train, pair.test, log.say)
        if trained is not None:
            return measure_again(args, name_benchmark(s, pair), pair, world, log, trained)
        if s.used.batch_size % world.size:
            raise ValueError(
                f'--batch-size {s.used.batch_size} does not divide by {world.size} processes; use a multiple of '
                f'{world.size}')
        with Lifecycle(
                args.output / LAST, KEYS, world, signals, log.say, minutes=args.checkpoint_minutes) as life:
            fit_segmenter(args, s, pair, life, log)
    return 0


def train(data: str | Path, output: str | Path, **flags: Any) -> dict[str, Any]:
    """Trains and measures a segmenter as `simsiam segment DATA --output OUTPUT` does; returns its record::

        segmentation.train('my_masks', 'runs/mine', dataset='folder', model='simsiam_resnet50', batch_size=8)

    Args:
        data, output: folders, as for the command.
        flags: those of the command, without dashes: batch_size=4 for --batch-size 4, allow_partial=True.

    Raises:
        ValueError: a flag is wrong or unknown.
        ValueError, RuntimeError, OSError: the command fails; the message is its line.
    """
    run(parse_flags('segmentation.train', add_arguments, data, output, flags))
    return read_record(Path(output) / RECORD)


def fit_segmenter(
    args: argparse.Namespace, s: SegmentationSettings, pair: MaskPair, life: Lifecycle, log: RunLog,
) -> None:
    """Trains a new segmenter, or the rest of one, and exports and measures it."""
    world, say = life.world, log.say
    workers = default_workers(world.device) if args.workers is None else args.workers
    batches = load_training(
        pair.train, s.make_augmentation(), s.used.batch_size, world, seed=s.seed, workers=workers)
    if pair.name == 'folder':  # the protocols' numbers are for thousands of images
        args.iterations = args.iterations or max(LEAST, EPOCHS * batches.plan.per_epoch)
        args.eval_every = args.eval_every or -(-args.iterations // EVALUATIONS)
        s = resolve(args)
    p, rule = s.used, s.make_inference()
    segmenter = build(
        args.model, pair.train.classes, p.align_corners, seed=s.seed, branch=args.branch, model_args=args.model_args,
        channels=(p.channels, p.aux_channels), dropout=p.dropout, loss_mean=p.loss_mean).to(world.device)
    segmenter.world, source, protocol = world, segmenter.source, s.describe(args.amp)
    identity = {
        **protocol, 'benchmark': 'segment', 'record': name_benchmark(s, pair), 'weights': source.identity,
        'digest': pair.digest, 'processes': world.size, 'protocol': protocol,
        'source': name_source(source),
        'segmenter': stored.describe(segmenter, rule, pair.train.kinds.ids)}
    life.claim(identity, FREE)
    say(f'{args.model}: {segmenter.describe()}')
    say(describe_run(s, batches.plan.per_epoch))
    normalize = Normalizer(source.mean, source.std, world.device)
    trainer = TransferTrainer(
        segmenter, s.make_schedule(), world, args.amp, functools.partial(make_example, segmenter, world.device),
        weights={'aux': p.aux_weight})
    evaluation = make_evaluation(args, rule, pair, normalize, world)
    channels = sum(segmenter.channels)
    transfer = Transfer(
        trainer, batches, lambda items, step: make_inputs(items, step, s.seed, p.crop, normalize, channels),
        evaluation.measure_run, life, log, identity)
    resume(transfer, FREE)
    fit(transfer)
    if world.main:
        stored.export(segmenter, args.output, rule, pair.train.kinds.ids)
        history = [{k: entry[k] for k in ('step', 'metrics', 'seconds')} for entry in transfer.history]
        write_result(
            args.output, identity['record'], protocol, source, pair, transfer.history[-1], seconds=transfer.seconds,
            say=say, extra={'unreadable': batches.unreadable, 'history': history})
        say(f"the segmenter: segmentation.load('{args.output}'); its backbone: {args.output / BACKBONE}")


def measure_again(
    args: argparse.Namespace, benchmark: str, pair: MaskPair, world: World, log: RunLog,
    trained: tuple[Segmenter, Inference, dict[str, Any]],
) -> int:
    """Measures a trained segmenter, as --eval-only asks for."""
    segmenter, rule, run = trained
    found, kinds = (segmenter.names, run['segmenter']['ids']), pair.test.kinds
    if found != (kinds.names, kinds.ids):
        raise ValueError(
            f'--eval-only {args.eval_only}: the segmenter has the classes {short(", ".join(segmenter.names))}, but the '
            f'masks {short(", ".join(kinds.names))}, or the same with other ids; give the data set that it was trained '
            'on')
    segmenter.to(world.device).eval().requires_grad_(False)
    world.broadcast_from_main(lambda: check_output(args.output))
    normalize = Normalizer(segmenter.source.mean, segmenter.source.std, world.device)
    start = time.monotonic()
    entry = make_evaluation(args, rule, pair, normalize, world).measure(segmenter, world)
    if world.main:
        write_result(
            args.output, benchmark, run['protocol'], segmenter.source, pair, entry,
            seconds=time.monotonic() - start, say=log.say, extra={'measured_again': str(args.eval_only)})
    return 0


def make_evaluation(
    args: argparse.Namespace, rule: Inference, pair: MaskPair, normalize: Normalizer, world: World,
) -> SegmentationEvaluation:
    """Returns what measures a segmenter on the test images, and writes its predictions."""
    workers = min(16, cores()) if args.workers is None else args.workers

    def show(found: dict[int, np.ndarray]) -> None:
        with explain_write_errors(args.output, '--output'):
            write_pictures(args.output, pair.test, found)

    def keep(row: int, labels: np.ndarray) -> None:
        with explain_write_errors(args.output, '--output'):
            write_prediction(args.output, pair.test, row, labels)

    return SegmentationEvaluation(
        load_tests(pair.test, rule.box, world, workers), rule, normalize, pair.test.classes, choose_shown(pair.test),
        show, keep)


def name_benchmark(s: SegmentationSettings, pair: MaskPair) -> str:
    """Returns the name of the record: that of a published benchmark, if the data are its own."""
    return s.published.benchmark if pair.name == s.published.dataset else 'segment_fcn_d8'


def describe_run(s: SegmentationSettings, epoch: int) -> str:
    """Returns the numbers of a run in a line; rate and iterations also as published if the batch size is another."""
    p, x = s.published, s.used
    text = (f'{s.name}: {x.iterations:,} iterations of {x.batch_size} images ({x.iterations / epoch:.1f} epochs), '
            f'crops of {x.crop} px, lr {x.lr:g} to {x.floor:g}')
    if (x.batch_size, x.iterations) != (p.batch_size, p.iterations):
        text += f' (published: {p.iterations:,} iterations of {p.batch_size} images, lr {p.lr:g} to {p.floor:g})'
    return text
