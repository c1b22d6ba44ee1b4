"""Weighted k nearest neighbours on frozen features, as MMSelfSup measures ImageNet.

Every image: short side to 256, centre crop 224, average pool of the frozen backbone, length 1. Each of the k nearest
training images of a test image adds exp(cosine / T) to its class; T = 0.07 and k = 10, 20, 100, 200 are published.
`neighbours` says what is exact about it, and which rule decides among equals. Without --image-size, images are as large
as the model's configuration says, 224 px for published weights; CIFAR's stay 32 px. Monitors that others run on CIFAR
take k = 200 and T = 0.1, which is another protocol.

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

from ...runtime.distributed import World, default_device, join_world
from ..backbone import load_backbone
from ..datasets.classification import open_pair
from ..features import Features, extract
from ..options import LEAST, add_extraction, check_extraction, silent, size_and_resize, transform_of, without_test_image
from ..results.record import check_output, print_record, record_path, write_record
from .search import Rows, hits, neighbours

KS, T = (10, 20, 100, 200), 0.07
KINDS = ('folder', 'imagenet', 'cifar10', 'cifar100', 'places205', 'inat18')


def knn(
    bank: 'Features', queries: 'Features', ks: 'Sequence[int]' = KS, t: float = T, classes: int | None = None,
    world: 'World | None' = None, name: str = 'avgpool',
) -> dict[str, float]:
    """Percent of the queries that are right: 'k=10' (top-1) and 'k=10 top-5' (of min(5, k) classes) for each k.

    Images that could not be read take no part. A k larger than the bank takes all of it. With several processes each
    takes a share of the queries.

    Raises:
        ValueError: ks or t outside their range; no image of the bank, or of the queries, could be read.
    """
    check(ks, t)
    for part, features in (('training', bank), ('test', queries)):
        if not len(features.readable):
            raise ValueError(
                f'none of the {len(features)} {part} images can be read, the first: '
                f'{next(iter(features.unreadable.values()), "there is none")}; repair them, as without them there is '
                'nothing to measure')
    rank, size, device = (world.rank, world.size, world.device) if world else (0, 1, torch.device('cpu'))
    of = np.asarray(bank.labels)[bank.readable]
    mine = queries.readable[rank::size]
    labels = np.asarray(queries.labels)[mine]
    classes = classes or int(max(of.max(), np.asarray(queries.labels).max())) + 1
    found, cosines = neighbours(
        Rows(bank.array(name), None if len(of) == len(bank) else bank.readable), Rows(queries.array(name), mine),
        min(max(ks), len(of)), device)
    right = hits(found, cosines, of, labels, ks, t, classes)
    right = sum(world.gather(right)) if world else right
    percent = 100 * right / len(queries.readable)
    return {f'k={k}{top}': float(percent[i, j]) for j, top in ((0, ''), (1, ' top-5')) for i, k in enumerate(ks)}


def check(ks: 'Sequence[int]', t: float) -> None:
    if not ks or min(ks) < 1 or len(set(ks)) < len(ks):
        raise ValueError(f'--k {" ".join(map(str, ks))}: must be whole numbers from 1, each once')
    if not 0 < t < float('inf'):
        raise ValueError(f'--temperature {t:g}: must be more than 0')


def fitting(ks: 'Sequence[int]', n: int, say: Callable[[str], Any] = print) -> list[int]:
    """Those that n training images have neighbours for; `say` hears of the others.

    Raises:
        ValueError: none is left.
    """
    large = ' '.join(str(k) for k in ks if k > n)
    if min(ks) > n:
        raise ValueError(f'--k {large}: there are {n} training images; use --k {n} or less')
    if large:
        say(f'--k {large}: left out, as there are {n} training images')
    return [k for k in ks if k <= n]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('data', metavar='DATA', help='folder of the data set')
    add('--dataset', choices=KINDS, default='folder', help='default: folder (train/ and val/)')
    add('--model', default='simsiam_resnet50', metavar='NAME',
        help='timm name, checkpoint, OUTPUT of train.py, local-dir:FOLDER or hf-hub:REPO (default: simsiam_resnet50)')
    add('--k', nargs='+', type=int, default=list(KS), metavar='K', help='neighbours (default: 10 20 100 200)')
    add('--temperature', type=float, default=T, metavar='T', help='default: 0.07')
    add('--output', '--out', dest='output', type=Path, default=Path('results'), metavar='FOLDER',
        help='of the record (default: results)')
    add_extraction(parser)
    add('--allow-partial', action='store_true', help='go on with a part of the data set, or without unreadable images')


def run(args: argparse.Namespace) -> int:
    check(args.k, args.temperature)
    began = time.perf_counter()
    check_extraction(args, *size_and_resize(args, LEAST))
    check_output(args.output)
    pair = open_pair(args.dataset, args.data, args.allow_partial)
    with join_world(args.device or default_device()) as world:
        say = print if world.main else silent
        if missing := without_test_image(pair):
            say(missing)
        backbone = load_backbone(args.model, world.device)
        transform = transform_of(args, backbone, say)
        bank, queries = (
            extract(backbone, images, ['avgpool'], transform, args.cache, args.batch_size, args.workers, args.amp,
                    world, args.allow_partial) for images in (pair.train, pair.test))
        n = len(bank.readable)
        ks = fitting(args.k, n, say) if n else args.k  # without any, `knn` says so
        metrics = knn(bank, queries, ks, args.temperature, pair.classes, world)
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
        path, benchmark, protocol, backbone, data, metrics, time.perf_counter() - began,
        {'unreadable': len(unreadable)})
    if unreadable:
        print(f'{len(unreadable)} images cannot be read and are left out, the first: {unreadable[0]}')
    print(f'{print_record(record)}\nwritten to {path}')
    return 0
