"""Writes the features of any images for other tools, and draws t-SNE pictures of them.

    simsiam embed PHOTOS --output photos.npz                     average pool, paths and labels
    simsiam embed PHOTOS --output photos.parquet                 or .csv, .npy, .safetensors
    simsiam embed PHOTOS --what avgpool feat4 --output FOLDER    one .npy file each, for more than memory holds
    simsiam embed IMAGENET --part val --what feat1 feat2 feat3 feat4 feat5 --output val.npz --tsne
    torchrun --nproc-per-node 8 -m simsiam_models embed PHOTOS --output photos.parquet  photos-00000-of-00008.parquet

`feature_table` has the formats, and `tsne` the picture.
"""
import argparse
from pathlib import Path
from typing import Any, cast

import numpy as np

from ..data import open_parts
from ..data.readers.images import Images, name_of
from ..runtime.distributed import join_world
from ..runtime.messages import as_text, check_flags, printable, require, silent
from . import tsne
from .backbone import Backbone, load_backbone
from .feature_table import FeatureTable, check_format, write_shards, write_table
from .features import NAMES, Features, extract
from .options import add_extraction, add_model, check_extraction, make_transform, read_extraction, read_sizes
from .protocols import LEAST


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('data', metavar='DATA', help="as for `pretrain`: a folder of images, a list, tar shards, ...")
    add('--output', '--out', dest='output', type=Path, required=True, metavar='FILE|FOLDER',
        help='FILE.npz, .npy, .csv, .parquet (under torchrun, one file per process) or .safetensors; or a folder')
    add_model(parser)
    add('--what', nargs='+', choices=NAMES, default=['avgpool'], metavar='FEATURE',
        help='avgpool, and feat1 .. feat5, the pooled maps of the stages (default: avgpool)')
    add('--part', choices=['train', 'val'], default='train',
        help='part to use, if the data has both (default: train)')
    add('--tsne', nargs='?', type=Path, const=Path(), metavar='PNG',
        help='also draw a t-SNE picture of each feature (default: named after --output)')
    add('--tsne-classes', type=int, default=tsne.CLASSES, metavar='N',
        help='draw the first N classes (default: 20, as published)')
    add('--tsne-pca', type=int, metavar='D',
        help='first project the features onto D principal components, such as 50: faster, but not as published')
    add_extraction(parser)
    add('--allow-partial', action='store_true', help='leave unreadable images out instead of stopping')


def run(args: argparse.Namespace) -> int:
    """Extracts the features, writes them, and draws the pictures."""
    check(args)
    images = open_part(args.data, args.part)
    if args.tsne is not None and not hasattr(images, 'samples'):  # `extract` refuses streams
        shown = tsne.select_shown(images.labels, len(images), args.tsne_classes)
        tsne.check_count(len(shown), args.tsne_classes)
    with join_world(args.device) as world:
        backbone = load_backbone(args.model, world.device, args.branch)
        transform = make_transform(args, backbone, print if world.main else silent)
        features = extract(backbone, images, args.what, transform, read_extraction(args), world)
        about = describe_features(backbone, images, transform.crop, transform.resize)
        sharded = args.output.suffix == '.parquet' and world.size > 1
        table = make_table(features, images, about) if world.main or sharded else None
        if sharded and table is not None:
            files = write_shards(args.output, table, world)
    if not world.main or table is None:
        return 0
    for text in features.unreadable.values():
        print(f'left out: {text}')
    if not sharded:
        write_table(args.output, table)
    where = f'{files[0]} to {files[-1].name}' if sharded else args.output
    print(f'{where}: {", ".join(f"{n} {len(x)} x {x.shape[1]}" for n, x in table.arrays.items())} of '
          f'{printable(images.name)} by {backbone.name} (weights {backbone.digest})')
    if args.tsne is not None:
        _draw_pictures(args, table, f'{backbone.name} on {images.name}')
    return 0


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for a wrong flag, RuntimeError if a flag lacks a package."""
    check_format(args.output, len(args.what))
    if args.tsne is not None:
        require('--tsne', sklearn='scikit-learn', matplotlib='matplotlib')
        if args.tsne != Path() and args.tsne.suffix != '.png':
            raise ValueError(f'--tsne {args.tsne}: must be a file that ends in .png')
    check_flags([
        ('--tsne-classes', args.tsne_classes, args.tsne_classes >= 1, 'at least 1'),
        ('--tsne-pca', args.tsne_pca, args.tsne_pca is None or args.tsne_pca >= 2, 'at least 2')])
    check_extraction(args, *read_sizes(args, LEAST))


def describe_features(backbone: Backbone, images: Images, size: int, resize: int) -> dict[str, Any]:
    """Returns where features come from, for `FeatureTable.about`."""
    return {'model': backbone.name, 'weights': backbone.digest, 'data': as_text(images.name), 'image_size': size,
            'resize': resize}


def make_table(features: Features, images: Images, about: dict[str, Any]) -> FeatureTable:
    """Returns the readable rows; if these are all, the features stay mapped from their files."""
    rows = features.readable
    whole = len(rows) == len(features)
    arrays = {name: features.array(name) if whole else features.rows(name, rows) for name in features.names}
    labels = None if features.labels is None else features.labels[rows].astype('int64')
    names = [as_text(name_of(images, int(i))) for i in rows]
    return FeatureTable(arrays, names, labels, [as_text(name) for name in features.classes], about)


def open_part(data: str, part: str) -> Images:
    """Opens the part 'train' or 'val' of DATA; raises ValueError if there is none."""
    train, val, unusable = open_parts(data)
    images = cast(Images, train) if part == 'train' else val  # `extract` refuses streams
    if images is None:
        if unusable:
            raise ValueError(
                f'{unusable.images.name} cannot be the validation part of {data}: {unusable.reason}; give '
                f'{unusable.images.name} itself, without --part')
        raise ValueError(f'{data} has no validation part; leave --part out')
    return images


def _draw_pictures(args: argparse.Namespace, table: FeatureTable, title: str) -> None:
    chosen = tsne.select_shown(table.labels, len(table.paths), args.tsne_classes)
    labels = None if table.labels is None else table.labels[chosen]
    target = args.output.with_name(f'{args.output.stem}.png') if args.tsne == Path() else args.tsne
    target.parent.mkdir(parents=True, exist_ok=True)
    for name, array in table.arrays.items():
        file = target if len(table.arrays) == 1 else target.with_name(f'{target.stem}-{name}.png')
        x, how = np.array(array[chosen]), f't-SNE of {name}'
        if args.tsne_pca is not None:
            x = tsne.reduce_features(x, args.tsne_pca)
            how += f' after PCA to {x.shape[1]} dimensions'
        shown = f'{len(chosen)} images'
        if labels is not None:
            shown += f' of {len(np.unique(labels))} classes'
            shown += f' (the first of {len(table.classes)})' if len(table.classes) > args.tsne_classes else ''
        tsne.draw_scatter(tsne.compute_tsne(x), labels, table.classes, f'{printable(title)}\n{how}, {shown}', file)
        print(f'{file}: {how}, {shown}')
