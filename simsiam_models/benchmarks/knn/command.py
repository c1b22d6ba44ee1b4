"""Weighted k nearest neighbours on frozen features, as MMSelfSup measures ImageNet.

Each image is resized to a short side of 256 px and cropped to the central 224 px; its feature is the average pool of
the frozen backbone, scaled to length 1. Each of the k nearest training images of a test image adds exp(cosine / T) to
its class; T = 0.07 and k = 10, 20, 100, 200 are published. `find_neighbours` is exact and breaks ties by a fixed rule.
Without --image-size, images have the size in the model's configuration, 224 px for published weights; CIFAR's stay at
32 px. Monitors that other programs run on CIFAR use k = 200 and T = 0.1, which is another protocol.

    simsiam knn IMAGENET --dataset imagenet --model simsiam_resnet50.mm_ep200_in1k
    torchrun --nproc-per-node 8 -m simsiam_models.cli knn IMAGENET --dataset imagenet
"""
import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...runtime.distributed import World, join_world
from ...runtime.messages import check_flags, silent
from ..backbone import load_backbone
from ..datasets.classification import open_pair
from ..features import Features, extract
from ..options import (
    add_extraction,
    add_held_out,
    add_model,
    check_extraction,
    check_held_out,
    make_transform,
    read_extraction,
    read_sizes,
    report_pair,
)
from ..protocols import KNN_KS, KNN_T, LEAST
from ..results.record import check_output, format_record, record_path, write_record
from ..search import Rows, count_hits, find_neighbours

KINDS = ('folder', 'imagenet', 'cifar10', 'cifar100', 'places205', 'inat18')


def evaluate(
    bank: Features, queries: Features, ks: Sequence[int] = KNN_KS, t: float = KNN_T, classes: int | None = None,
    world: World | None = None,
) -> dict[str, float]:
    """Returns the percentage of correct queries for each k: 'k=10' (top-1) and 'k=10 top-5' (among min(5, k) classes).

    Images that could not be read are left out. A k larger than the bank takes all of it. With several processes, each
    classifies a share of the queries.

    Raises:
        ValueError: ks or t are outside their range, or no image of the bank or of the queries could be read.
    """
    check(ks, t)
    for part, features in (('training', bank), ('test', queries)):
        if not len(features.readable):
            raise ValueError(
                f'none of the {len(features)} {part} images can be read, the first: '
                f'{next(iter(features.unreadable.values()), "there is none")}; repair them: without them there is '
                'nothing to measure')
    world = world or World(0, 1, torch.device('cpu'))
    bank_labels = np.asarray(bank.labels)[bank.readable]
    mine = queries.readable[world.rank::world.size]
    labels = np.asarray(queries.labels)[mine]
    classes = classes or int(max(bank_labels.max(), np.asarray(queries.labels).max())) + 1
    found, cosines = find_neighbours(
        Rows(bank.array('avgpool'), None if len(bank_labels) == len(bank) else bank.readable),
        Rows(queries.array('avgpool'), mine), min(max(ks), len(bank_labels)), world.device)
    right = sum(world.gather(count_hits(found, cosines, bank_labels, labels, ks=ks, t=t, classes=classes)))
    percent = 100 * right / len(queries.readable)
    return {f'k={k}{top}': float(percent[i, j]) for j, top in ((0, ''), (1, ' top-5')) for i, k in enumerate(ks)}


def check(ks: Sequence[int], t: float) -> None:
    """Raises ValueError for a k or T outside its range."""
    distinct = bool(ks) and min(ks) >= 1 and len(set(ks)) == len(ks)
    check_flags([
        ('--k', ' '.join(map(str, ks)), distinct, 'whole numbers from 1, each once'),
        ('--temperature', f'{t:g}', 0 < t < float('inf'), 'more than 0')])


def select_ks(ks: Sequence[int], n: int, say: Callable[[str], Any] = print) -> list[int]:
    """Returns the ks that n training images suffice for, and reports the others with `say`.

    Raises:
        ValueError: n is less than every k.
    """
    large = ' '.join(str(k) for k in ks if k > n)
    if min(ks) > n:
        raise ValueError(f'--k {large}: there are {n} training images; use --k {n} or less')
    if large:
        say(f'--k {large}: skipped, as there are only {n} training images')
    return [k for k in ks if k <= n]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('data', metavar='DATA', help='folder of the data set')
    add('--dataset', choices=KINDS, default='folder', help='default: folder (train/ and val/, or classes alone)')
    add_model(parser)
    add('--k', nargs='+', type=int, default=list(KNN_KS), metavar='K', help='neighbours (default: 10 20 100 200)')
    add('--temperature', type=float, default=KNN_T, metavar='T', help='default: 0.07')
    add('--output', '--out', dest='output', type=Path, default=Path('results'), metavar='FOLDER',
        help='folder for the record (default: results)')
    add_held_out(parser)
    add_extraction(parser)
    add('--allow-partial', action='store_true',
        help='accept a part of the data set, and leave unreadable images out')


def run(args: argparse.Namespace) -> int:
    """Extracts the features, measures, and writes the record."""
    check(args.k, args.temperature)
    began = time.perf_counter()
    check_extraction(args, *read_sizes(args, LEAST))
    check_held_out(args)
    check_output(args.output)
    pair = open_pair(args.dataset, args.data, args.allow_partial, args.val_share, args.seed)
    with join_world(args.device) as world:
        say = print if world.main else silent
        report_pair(pair, world)
        backbone = load_backbone(args.model, world.device, args.branch)
        transform = make_transform(args, backbone, say)
        bank, queries = (
            extract(backbone, images, ['avgpool'], transform, read_extraction(args), world)
            for images in (pair.train, pair.test))
        n = len(bank.readable)
        ks = select_ks(args.k, n, say) if n else args.k  # `evaluate` refuses an empty bank
        metrics = evaluate(bank, queries, ks, args.temperature, pair.classes, world)
    if not world.main:
        return 0
    unreadable = [*bank.unreadable.values(), *queries.unreadable.values()]
    protocol: dict[str, Any] = {
        'T': args.temperature, 'k': ks, 'features': 'avgpool', 'resize': transform.resize,
        'image_size': transform.crop, 'amp': 'off' if args.amp == 'auto' else args.amp}
    if args.amp == 'bfloat16':
        protocol['changed'] = 'amp: bfloat16 where off is published'
    benchmark = f'{args.dataset}_knn_T{args.temperature:g}'
    data = pair.data() | {'path': args.data}
    path = record_path(args.output, benchmark, backbone, protocol, data)
    record = write_record(
        path, benchmark, protocol, backbone, data, metrics, seconds=time.perf_counter() - began,
        extra={'unreadable': len(unreadable), 'shared_images': pair.shared})
    if unreadable:
        print(f'{len(unreadable)} images cannot be read and are left out, the first: {unreadable[0]}')
    print(f'{format_record(record)}\nwritten to {path}')
    return 0
