"""VOC07 image classification with linear SVMs on frozen features, from all images or from k per class.

The feature maps of the backbone's five stages are pooled to about 9000 values each, and one SVM per class separates it
from the rest. By default, all trainval images train and 3-fold cross-validation chooses the cost of each class. With
--low-shot, k positives and 19 k negatives train, in five draws for each k. The published page calls these benchmarks
"SVM" and "Low-shot SVM".

    simsiam svm VOCdevkit --model simsiam_resnet50.mm_ep200_in1k --jobs 8
    simsiam svm VOCdevkit --model simsiam_resnet50.mm_ep200_in1k --low-shot --jobs 8

A process that fits all of trainval takes 1.9 GB (measured with 5011 x 8192 values). OUTPUT/svm-*.jsonl stores finished
fits, so the same command continues an interrupted run. The seconds of a record are those of its fits, summed over
sessions and processes. You may delete that file once the records are written, and OUTPUT/.svm-*.lock whenever no such
command runs. OUTPUT/.svm-*/ holds the normalized features (0.7 GB per stage) while the command runs; if the command
was killed, you may delete it.
"""
import argparse
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...data.evaluation import Transform
from ...data.readers.index import digest
from ...runtime.distributed import World, join_world
from ...runtime.files import explain_write_errors, hold_lock
from ...runtime.messages import check_flags, require
from ...runtime.versions import versions
from ..backbone import Backbone, compute_maps, has_protocol_sizes, load_backbone
from ..datasets.voc import Voc07, open_voc07
from ..features import Features, extract
from ..options import add_extraction, add_model, check_extraction, read_extraction, read_sizes
from ..protocols import (
    LINEAR_SVC,
    LOW_SHOT_DRAWS,
    LOW_SHOT_KS,
    LOW_SHOT_NEGATIVES,
    SIZE,
    SVM_AP,
    SVM_COST_AT_K1,
    SVM_COSTS,
    SVM_FOLDS,
    SVM_TAPS,
)
from ..results.record import check_output, format_record, record_path, write_record
from ..shared_images import report_shared
from .fits import FORMAT, write_svm_data
from .jobs import FinishedTasks
from .variants import FullSvm, LowShotSvm, Results, fit_svms

LOW_SHOT_TAP = 'feat5'  # the best one in the published low-shot table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `simsiam svm`."""
    add = parser.add_argument
    add('data', metavar='DATA', help='VOC devkit: the folder that contains VOC2007, or VOC2007 itself')
    add_model(parser)
    add('--taps', nargs='+', choices=SVM_TAPS, metavar='TAP',
        help=f'stages whose features are classified, {SVM_TAPS[0]} .. {SVM_TAPS[-1]} (default: all; with --low-shot '
        f'{LOW_SHOT_TAP}, the best one in the published table)')
    add('--low-shot', action='store_true',
        help=f'train with k positives and {LOW_SHOT_NEGATIVES} k negatives per class instead of all images')
    add('--k', nargs='+', type=int, metavar='K',
        help=f'low-shot: positives per class (default: {_join(LOW_SHOT_KS)}; with --allow-partial, those for which '
        'every class has enough images)')
    add('--samples', type=int, metavar='N', help=f'low-shot: independent draws (default: {LOW_SHOT_DRAWS})')
    add('--seed', type=int, default=0, help="seed of the draws and of scikit-learn's solver (default: 0)")
    add('--jobs', type=int, metavar='N', help='processes that fit, with one thread each (default: one per core)')
    add('--output', '--out', dest='output', type=Path, default=Path('results'), metavar='FOLDER',
        help='folder for the records (default: results)')
    add_extraction(
        parser, f'images are squashed to N x N pixels (default: {SIZE}, as published, for every model)',
        'short side before that, in pixels (default: image size x 8/7)')
    add('--allow-partial', action='store_true', help='continue with fewer images than VOC07 has')
    parser.set_defaults(
        kept='features stay in the cache and finished fits in --output; run the same command to continue')


def run(args: argparse.Namespace) -> int:
    """Fits the SVMs, prints the tables and writes the records."""
    check_arguments(args)
    data = open_voc07(args.data, args.allow_partial)
    labels = data.labels_trainval, data.labels_test
    check_counts(data.names, *labels, choose_ks(args, data.labels_trainval))
    stages = sorted(set(args.taps or ([LOW_SHOT_TAP] if args.low_shot else SVM_TAPS)))
    with join_world(args.device) as world:
        world.broadcast_from_main(lambda: check_output(args.output))
        backbone = load_backbone(args.model, world.device, args.branch)
        features = _extract(args, backbone, data, stages, world)
        pooling = find_pooling(backbone, make_transform(args).crop)
    if not world.main:
        return 0
    shared = report_shared(data.trainval, data.test, print)
    trainval_labels, test_labels = (x[part.readable] for x, part in zip(labels, features, strict=True))
    if unreadable := sum(len(part.unreadable) for part in features):
        print(f'{unreadable} images cannot be read and are left out')
        check_counts(data.names, trainval_labels, test_labels, choose_ks(args, trainval_labels))
    ks = choose_ks(args, trainval_labels)
    if ks and not args.k and len(ks) < len(LOW_SHOT_KS):
        print(f'low-shot: only k = {_join(ks)}, as a class has too few images for {_join(set(LOW_SHOT_KS) - set(ks))}')
    svm = LowShotSvm(stages, data.names, ks, args.samples or LOW_SHOT_DRAWS) if ks else FullSvm(stages, data.names)
    name = name_fits(args, features, stages, (trainval_labels, test_labels))
    # The lock file lies beside the work folder and stays: waiting for a deleted file would exclude nobody.
    with hold_lock(args.output / f'.svm-{name}.lock', World(0, 1, world.device)):  # other ranks have left
        finished = FinishedTasks(args.output / f'svm-{name}.jsonl')
        work = args.output / f'.svm-{name}'
        try:
            if missing := finished.select_missing(svm.list_tasks(finished)):
                stages = sorted({stage for _, stage, *_ in missing})
                svm_data = write_svm_data(work, features, stages, labels, args.seed)
                fit_svms(svm, svm_data, finished, args.jobs or _count_cores())
        finally:
            shutil.rmtree(work, ignore_errors=True)
        protocol = describe_protocol(args, pooling, unreadable, ks)
        report(args.output, svm, finished, backbone=backbone, data=data, protocol=protocol,
            extra={'unreadable': unreadable, 'shared_images': shared})
    return 0


def check_arguments(args: argparse.Namespace) -> None:
    """Raises RuntimeError if scikit-learn is missing, and ValueError for the first flag that is not allowed."""
    require('svm', sklearn='scikit-learn')
    k, rule = args.k and _join(args.k), 'used with --low-shot; add that flag, or leave this one out'
    check_flags([
        ('--k', k, args.low_shot or args.k is None, rule),
        ('--samples', args.samples, args.low_shot or args.samples is None, rule),
        ('--jobs', args.jobs, args.jobs is None or args.jobs >= 1, 'at least 1'),
        ('--samples', args.samples, args.samples is None or args.samples >= 1, 'at least 1'),
        ('--k', k, args.k is None or min(args.k) >= 1, 'at least 1 each'),
        ('--seed', args.seed, 0 <= args.seed < 2**32, 'from 0 to 4294967295')])
    check_extraction(args, *read_sizes(args))


def choose_ks(args: argparse.Namespace, labels: np.ndarray) -> list[int] | None:
    """Returns the k of the low-shot SVM, or None without --low-shot.

    With --allow-partial, the default is those published k for which `labels` (N, classes) has enough images.
    """
    if not args.low_shot:
        return None
    if args.k or not args.allow_partial:
        return sorted(set(args.k or LOW_SHOT_KS))
    return find_possible_ks(labels) or [LOW_SHOT_KS[0]]  # which `check_counts` refuses


def find_possible_ks(labels: np.ndarray) -> list[int]:
    """Returns those published k for which every class has enough images in `labels` (N, classes)."""
    positive, negative = (labels == 1).sum(0).min(), (labels == 0).sum(0).min()
    return [k for k in LOW_SHOT_KS if positive >= k and negative >= LOW_SHOT_NEGATIVES * k]


def _join(ks: Iterable[int]) -> str:
    return ' '.join(map(str, sorted(ks)))


def check_counts(
    names: Sequence[str], labels_trainval: np.ndarray, labels_test: np.ndarray, ks: Sequence[int] | None,
) -> None:
    """Checks that every class has enough images to train (for all folds or for the largest k) and to test.

    Raises:
        ValueError: names the first class with too few images, the rule and the next step.
    """
    for name, train, test in zip(names, labels_trainval.T, labels_test.T, strict=True):
        positive, negative = int((train == 1).sum()), int((train == 0).sum())
        if ks is None and min(positive, len(train) - positive) < SVM_FOLDS:
            raise ValueError(
                f'{name}: {positive} of the {len(train)} trainval images are positive, and {SVM_FOLDS}-fold '
                f'cross-validation needs {SVM_FOLDS} positive and {SVM_FOLDS} others; use all of VOC07')
        if ks is not None and (positive < max(ks) or negative < LOW_SHOT_NEGATIVES * max(ks)):
            possible = _join(find_possible_ks(labels_trainval))
            raise ValueError(
                f'{name}: {positive} positive and {negative} negative trainval images, and --k {max(ks)} needs '
                f'{max(ks)} and {LOW_SHOT_NEGATIVES * max(ks)}; '
                + (f'choose a smaller --k (possible here: {possible})' if possible else 'use more of VOC07'))
        if not (test == 1).any():
            raise ValueError(f'{name}: no positive test image, so average precision is undefined; use all of VOC07')


def make_transform(args: argparse.Namespace) -> Transform:
    """Creates the protocol's transform: squash the whole image to a square."""
    size, resize = read_sizes(args)
    return Transform(resize, size, 'squash')


def _extract(
    args: argparse.Namespace, backbone: Backbone, data: Voc07, stages: Sequence[str], world: World,
) -> tuple[Features, Features]:
    try:
        trainval, test = (
            extract(backbone, images, stages, make_transform(args), read_extraction(args), world)
            for images in (data.trainval, data.test))
        return trainval, test
    except ValueError as e:
        if 'stages only' not in str(e):
            raise
        raise ValueError(f'{e}; name those that it has with --taps ({SVM_TAPS[0]} is the first)') from None


def find_pooling(backbone: Backbone, size: int) -> str:
    """Returns how `extract` pools the feature maps of size x size images: 'mmselfsup' (the protocol) or 'adaptive'."""
    with torch.no_grad():
        maps = compute_maps(backbone, torch.zeros(1, 3, size, size, device=next(backbone.model.parameters()).device))
    return 'mmselfsup' if has_protocol_sizes(maps) else 'adaptive'


def name_fits(
    args: argparse.Namespace, features: tuple[Features, Features], stages: Sequence[str],
    labels: tuple[np.ndarray, np.ndarray],
) -> str:
    """Returns 16 hexadecimal characters of everything that decides a fit; --k and --samples only select fits."""
    about = {
        'format': FORMAT, 'low_shot': args.low_shot, 'taps': stages, 'seed': args.seed, 'svm': LINEAR_SVC,
        'costs': SVM_COSTS, 'folds': SVM_FOLDS, 'negatives': LOW_SHOT_NEGATIVES, 'ap': SVM_AP,
        'scikit-learn': versions()['scikit-learn']}
    rows = (x for part, kept in zip(features, labels, strict=True) for x in (part.digest, part.readable, kept))
    return digest(json.dumps(about), *rows)


def _count_cores() -> int:
    """Counts all cores: under torchrun, the other processes have ended before the first fit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def describe_protocol(
    args: argparse.Namespace, pooling: str = 'mmselfsup', unreadable: int = 0, ks: Sequence[int] | None = LOW_SHOT_KS,
) -> dict[str, Any]:
    """Returns every parameter as the record stores it; 'changed' lists differences to the published protocol."""
    transform = make_transform(args)
    amp = read_extraction(args).precision
    protocol: dict[str, Any] = {
        'svm': {k: {str(a): b for a, b in v.items()} if isinstance(v, dict) else v for k, v in LINEAR_SVC.items()},
        'costs': list(SVM_COSTS), 'random_state': args.seed, 'normalization': 'x / (||x||_2 + 1e-5), float64',
        'squash': transform.kind == 'squash', 'resize': transform.resize, 'image_size': transform.crop, 'amp': amp,
        'pooling': pooling, 'difficult': 'negatives in training, left out in test', 'ap': SVM_AP,
        'note': 'the original gives no random_state and draws unseeded; both are seeded here'}
    if args.low_shot:  # names of records depend on these texts
        protocol |= {
            'k': list(ks or ()), 'samples': args.samples or LOW_SHOT_DRAWS,
            'negatives_per_positive': LOW_SHOT_NEGATIVES,
            'std': 'over the draws, divided by their number',
            'k=N': 'oracle: per k one cost, the best on test; as published',
            'k=N_honest': 'per draw the cost of the best mean over classes by cross-validation on its own rows '
            f'({SVM_FOLDS} folds, 2 at k = 2; cost {SVM_COST_AT_K1:g} at k = 1, where nothing can be held out)'}
    else:
        protocol |= {
            'folds': SVM_FOLDS,
            'selection': f'per class, {SVM_FOLDS}-fold cross_val_score(average_precision), first of equals; refit'}
    changed = [text for text, applies in (
        (f'{unreadable} images cannot be read and are left out', unreadable), (f'features in {amp}', amp != 'off'),
        ('taps are pooled adaptively', pooling == 'adaptive')) if applies]
    if changed:
        protocol['changed'] = '; '.join(changed)
    return protocol


def report(
    output: Path, svm: FullSvm | LowShotSvm, finished: FinishedTasks, *, backbone: Backbone, data: Voc07,
    protocol: dict[str, Any], extra: dict[str, Any],
) -> None:
    """Writes a record per stage, prints the table as published, and compares the best stage to published numbers."""
    results: Results = {stage: svm.summarize(stage, finished) for stage in svm.stages}
    best = max(results, key=lambda stage: svm.score(results[stage]))
    tasks, records = svm.list_tasks(finished), {}
    for stage, result in results.items():
        benchmark, stage_protocol = f'{svm.benchmark}_feature{stage[-1]}', {**protocol, 'tap': stage}
        path = record_path(output, benchmark, backbone, stage_protocol, data.data())
        about = {'results': result, 'finished_fits': finished.path.name, 'best_layer': best, **extra}
        seconds = sum(finished.seconds[task] for task in tasks if task[1] == stage)
        with explain_write_errors(path, '--output'):
            records[stage] = write_record(
                path, benchmark, stage_protocol, backbone, data.data(), svm.compute_metrics(result), seconds=seconds,
                extra=about)
    print(svm.format_table(results))
    if len(results) > 1:
        print(f'best layer: feature{best[-1]}')
    if unconverged := sum(result['unconverged'] for result in results.values()):
        print(
            f'{unconverged} fits reached the limit of {LINEAR_SVC["max_iter"]} iterations before they converged, as in '
            'the published protocol, which has the same solver and limit')
    print(format_record(records[best]))
