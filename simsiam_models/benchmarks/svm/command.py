"""VOC07 image classification by linear SVMs on frozen features, with all images or with k per class.

Five taps of the backbone, pooled to about 9000 values, one SVM per class against the rest. By default all trainval
images train, and 3-fold cross-validation chooses each class's cost; with --low-shot k positives and 19 k negatives
train, five draws of each. The published page calls these "SVM" and "Low-shot SVM".

    simsiam svm VOCdevkit --model simsiam_resnet50.mm_ep200_in1k --jobs 8
    simsiam svm VOCdevkit --model simsiam_resnet50.mm_ep200_in1k --low-shot --jobs 8

A process that fits all of trainval takes 1.9 GB (measured with 5011 x 8192 values). Finished fits are kept in
OUTPUT/svm-*.jsonl, so that the same command goes on where a stopped or killed one was; the seconds of a record are
those of its fits, summed over sessions and processes. That file may be deleted once the records are written, OUTPUT/
.svm-*.lock whenever no such command runs, and so what a kill left of OUTPUT/.svm-*/, the normalised features (0.7 GB
per tap), which are there only while the command runs.
"""
import argparse
import functools
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...data.readers.index import digest
from ...runtime.distributed import World, default_device, join_world
from ...runtime.files import explain_write_errors, hold_lock, write_atomically
from ..backbone import fits_protocol, load_backbone, taps
from ..datasets import classification as datasets
from ..features import Transform, extract
from ..options import add_extraction, check_extraction, size_and_resize
from ..protocols import (
    LINEAR_SVC,
    LOW_SHOT_DRAWS,
    LOW_SHOT_KS,
    LOW_SHOT_NEGATIVES,
    SVM_AP,
    SVM_COST_AT_K1,
    SVM_COSTS,
    SVM_FOLDS,
    SVM_TAPS,
)
from ..results.record import check_output, versions
from .fits import FORMAT, Finished, Table, Task, full, full_tasks, low_shot, low_shot_tasks, normalize_rows
from .result import report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('data', metavar='DATA', help='VOC devkit: the folder that holds VOC2007, or VOC2007 itself')
    add('--model', default='simsiam_resnet50', metavar='NAME', help='backbone (default: simsiam_resnet50)')
    add('--taps', nargs='+', choices=SVM_TAPS, metavar='TAP',
        help='of feat1 .. feat5 (default: all five; with --low-shot feat5, the best one of the published table)')
    add('--low-shot', action='store_true', help='k positives and 19 k negatives per class instead of all images')
    add('--k', nargs='+', type=int, metavar='K',
        help='low-shot: positives per class (default: 1 2 4 8 16 32 64 96; with --allow-partial those of them that '
        'the images suffice for)')
    add('--samples', type=int, metavar='N', help='low-shot: independent draws (default: 5)')
    add('--seed', type=int, default=0, help="of the draws and of scikit-learn's solver (default: 0)")
    add('--jobs', type=int, metavar='N', help='processes that fit, one thread each (default: one per core)')
    add('--output', '--out', dest='output', type=Path, default=Path('results'), metavar='FOLDER',
        help='of the records (default: results)')
    add_extraction(
        parser, 'images are squashed to N x N pixels (default: 224, as published, for every model)',
        'short side before that, pixels (default: image size x 8/7)')
    add('--allow-partial', action='store_true', help='go on with fewer images than VOC07 has')
    parser.set_defaults(kept='features are kept in the cache and finished fits in --output, the same command goes on')


def run(args: argparse.Namespace) -> int:
    """Fits, prints, writes the records."""
    _check(args)
    data = datasets.open_voc07(args.data, args.allow_partial)
    taps = sorted(set(args.taps or (['feat5'] if args.low_shot else SVM_TAPS)))
    ks, samples = ks_of(args, data.labels_trainval), args.samples or LOW_SHOT_DRAWS
    check_counts(data.names, data.labels_trainval, data.labels_test, ks)
    with join_world(args.device or default_device()) as world:
        world.broadcast_from_main(lambda: check_output(args.output))
        backbone = load_backbone(args.model, world.device)
        features = _extract(args, backbone, data, taps, world)
        pooling = pooling_of(backbone, transform_of(args).crop)
    if not world.main:
        return 0
    labels = tuple(x[f.readable] for x, f in zip((data.labels_trainval, data.labels_test), features, strict=True))
    unreadable = sum(len(f.unreadable) for f in features)
    if unreadable:
        print(f'{unreadable} images cannot be read and are left out')
        ks = ks_of(args, labels[0])
        check_counts(data.names, *labels, ks)
    if ks and not args.k and len(ks) < len(LOW_SHOT_KS):
        print(f'low-shot: only k = {_words(ks)}, as a class has too few images for {_words(set(LOW_SHOT_KS) - set(ks))}')
    name = name_of(args, features, taps, labels)
    work, jobs, classes = args.output / f'.svm-{name}', args.jobs or _cores(), len(data.names)
    # The lock lies beside `work` and stays: whoever waits for a deleted one excludes nobody.
    with hold_lock(work.with_name(f'{work.name}.lock'), World(0, 1, world.device), 'svm'):  # the others have left
        finished = Finished(args.output / f'svm-{name}.jsonl')

        def tasks() -> list['Task']:
            return low_shot_tasks(taps, ks, samples, classes) if args.low_shot else full_tasks(finished, taps, classes)

        left = sorted({task[1] for task in tasks() if task not in finished.results})  # taps
        try:
            table = write_table(work, features, left, data.labels_trainval, data.labels_test, args.seed)
            if args.low_shot:
                results = low_shot(table, finished, taps, ks, samples, classes, jobs)
            else:
                results = full(table, finished, taps, data.names, jobs)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        seconds = {tap: sum(finished.seconds[task] for task in tasks() if task[1] == tap) for tap in taps}
        protocol = protocol_of(args, pooling, unreadable, ks)
        report(args.output, protocol, backbone, data, results, finished, unreadable, seconds)
    return 0


def ks_of(args: argparse.Namespace, labels: 'np.ndarray') -> list[int] | None:
    """None without --low-shot. Of the published ks, if a partial set is allowed, those that its images suffice for."""
    if not args.low_shot:
        return None
    if args.k or not args.allow_partial:
        return sorted(set(args.k or LOW_SHOT_KS))
    return possible_ks(labels) or [LOW_SHOT_KS[0]]  # `check_counts` says why not even that


def possible_ks(labels: 'np.ndarray') -> list[int]:
    """Of the published ks those for which each class has enough images, of labels (N, classes)."""
    return [k for k in LOW_SHOT_KS if ((labels == 1).sum(0) >= k).all() and ((labels == 0).sum(0) >= LOW_SHOT_NEGATIVES * k).all()]


def _words(ks: Iterable[int]) -> str:
    return ' '.join(map(str, sorted(ks)))


def name_of(
    args: argparse.Namespace, features: tuple[Any, Any], taps: Sequence[str], labels: tuple['np.ndarray', 'np.ndarray'],
) -> str:
    """16 hexadecimal characters of all that decides a fit; --k and --samples only decide which fits there are."""
    about = {
        'format': FORMAT, 'low_shot': args.low_shot, 'taps': taps, 'seed': args.seed, 'svm': LINEAR_SVC, 'costs': SVM_COSTS,
        'folds': SVM_FOLDS, 'negatives': LOW_SHOT_NEGATIVES, 'ap': SVM_AP, 'scikit-learn': versions()['scikit-learn']}
    rows = (part for f, x in zip(features, labels, strict=True) for part in (f.digest, f.readable, x))
    return digest(json.dumps(about), *rows)


def _check(args: argparse.Namespace) -> None:
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise RuntimeError('svm needs scikit-learn: pip install scikit-learn') from None
    for flag, value in ('--k', args.k and ' '.join(map(str, args.k))), ('--samples', args.samples):
        if value is not None and not args.low_shot:
            raise ValueError(f'{flag} {value}: is of the low-shot SVM; add --low-shot, or leave {flag} out')
    rules = [
        ('--jobs', args.jobs, args.jobs is None or args.jobs >= 1, 'at least 1'),
        ('--samples', args.samples, args.samples is None or args.samples >= 1, 'at least 1'),
        ('--k', args.k, args.k is None or min(args.k) >= 1, 'at least 1 each'),
        ('--seed', args.seed, 0 <= args.seed < 2**32, '0 .. 4294967295')]
    for flag, value, ok, rule in rules:
        if not ok:
            raise ValueError(f'{flag} {value}: must be {rule}')
    check_extraction(args, *size_and_resize(args))


def check_counts(
    names: Sequence[str], labels_trainval: 'np.ndarray', labels_test: 'np.ndarray', ks: Sequence[int] | None,
) -> None:
    """Is there enough of each class for 3 folds, or for the largest k, and something to test on?

    Raises:
        ValueError: the first class that has too few images, the rule, and what to do.
    """
    for name, train, test in zip(names, labels_trainval.T, labels_test.T, strict=True):
        positive, negative = int((train == 1).sum()), int((train == 0).sum())
        if ks is None and min(positive, len(train) - positive) < SVM_FOLDS:
            raise ValueError(
                f'{name}: {positive} of the {len(train)} trainval images are positive, and {SVM_FOLDS}-fold '
                f'cross-validation needs {SVM_FOLDS} positive and {SVM_FOLDS} others; use the whole of VOC07')
        if ks is not None and (positive < max(ks) or negative < LOW_SHOT_NEGATIVES * max(ks)):
            possible = _words(possible_ks(labels_trainval))
            raise ValueError(
                f'{name}: {positive} positive and {negative} negative trainval images, and --k {max(ks)} needs '
                f'{max(ks)} and {LOW_SHOT_NEGATIVES * max(ks)}; ' + (
                    f'choose a smaller --k (possible here: {possible})' if possible else 'use more of VOC07'))
        if not (test == 1).any():
            raise ValueError(f'{name}: no positive test image, so there is no average precision; use all of VOC07')


def transform_of(args: argparse.Namespace) -> 'Transform':
    """Section 4.1 of the protocol."""
    size, resize = size_and_resize(args)
    return Transform(resize, size, 'squash')


def _extract(args: argparse.Namespace, backbone: Any, data: Any, taps: Sequence[str], world: Any) -> tuple[Any, Any]:
    try:
        return tuple(
            extract(
                backbone, images, taps, transform_of(args), args.cache, args.batch_size, args.workers, args.amp, world,
                args.allow_partial)
            for images in (data.trainval, data.test))
    except ValueError as e:
        if 'stages only' not in str(e):
            raise
        raise ValueError(f'{e}; name those that it has with --taps (feat1 is the first)') from None


def pooling_of(backbone: Any, size: int) -> str:
    """How `extract` pools the taps of images of size x size: as the protocol does, or adaptively (`pooled`)."""
    with torch.no_grad():
        maps = taps(backbone, torch.zeros(1, 3, size, size, device=next(backbone.model.parameters()).device))
    return 'mmselfsup' if fits_protocol(maps) else 'adaptive'


def write_table(
    folder: Path, features: tuple[Any, Any], taps: Sequence[str], labels_trainval: 'np.ndarray',
    labels_test: 'np.ndarray', seed: int,
) -> 'Table':
    """Normalise the features of each tap into a file that all processes map.

    The bytes are written, never mapped: on a full disk a mapped file is a signal that ends the process.

    Raises:
        ValueError: a feature is not finite.
        OSError: no room.
    """
    with explain_write_errors(folder, '--output'):
        folder.mkdir(parents=True, exist_ok=True)
    paths = [{tap: folder / f'{tap}_{part}.npy' for tap in taps} for part in ('trainval', 'test')]
    for source, files in zip(features, paths, strict=True):
        for tap, path in files.items():
            write = functools.partial(_write_rows, tap, source.array(tap), source.readable)
            with explain_write_errors(path, '--output'):
                write_atomically(path, write)
    labels = (x[f.readable] for x, f in zip((labels_trainval, labels_test), features, strict=True))
    return Table(*paths, *labels, seed)


def _write_rows(tap: str, x: 'np.ndarray', rows: 'np.ndarray', file: Any) -> None:
    """These rows of x, normalised, as .npy."""
    np.lib.format.write_array_header_1_0(
        file, {'descr': '<f8', 'fortran_order': False, 'shape': (len(rows), x.shape[1])})
    for i in range(0, len(rows), 512):
        part = normalize_rows(x[rows[i:i + 512]])
        if not np.isfinite(part).all():
            raise ValueError(
                f'{tap} of some image is not finite, so no SVM can be fitted; the weights are damaged, or --amp off is '
                'needed')
        file.write(part.tobytes())


def protocol_of(
    args: argparse.Namespace, pooling: str = 'mmselfsup', unreadable: int = 0, ks: Sequence[int] | None = LOW_SHOT_KS,
) -> dict[str, Any]:
    """Every parameter, as the record tells it; 'changed': in what it is no more the published one."""
    transform = transform_of(args)
    amp = 'off' if args.amp == 'auto' else args.amp  # as `extract` takes it
    protocol: dict[str, Any] = {
        'svm': {k: {str(a): b for a, b in v.items()} if isinstance(v, dict) else v for k, v in LINEAR_SVC.items()},
        'costs': list(SVM_COSTS), 'random_state': args.seed, 'normalization': 'x / (||x||_2 + 1e-5), float64',
        'squash': transform.kind == 'squash', 'resize': transform.resize, 'image_size': transform.crop, 'amp': amp,
        'pooling': pooling, 'difficult': 'negatives in training, left out in test', 'ap': SVM_AP,
        'note': 'the original gives no random_state and draws unseeded; both are seeded here'}
    if args.low_shot:
        protocol |= {
            'k': list(ks), 'samples': args.samples or LOW_SHOT_DRAWS, 'negatives_per_positive': LOW_SHOT_NEGATIVES,
            'std': 'over the draws, divided by their number',
            'k=N': 'oracle: per k one cost, the best on test; as published',
            'k=N_honest': 'per draw the cost of the best mean over classes by cross-validation on its own rows (3 '
            f'folds, 2 at k = 2; cost {SVM_COST_AT_K1:g} at k = 1, where nothing can be held out)'}
    else:
        protocol['folds'] = SVM_FOLDS
        protocol['selection'] = f'per class, {SVM_FOLDS}-fold cross_val_score(average_precision), first of equals; refit'
    changed = [what for what, is_so in (
        (f'{unreadable} images cannot be read and are left out', unreadable), (f'features in {amp}', amp != 'off'),
        ('taps are pooled adaptively', pooling == 'adaptive')) if is_so]
    if changed:
        protocol['changed'] = '; '.join(changed)
    return protocol


def _cores() -> int:
    """All of them: under torchrun the other processes have ended when one fits."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
