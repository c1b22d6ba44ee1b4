"""Where features and their images come from: DATA and a model, or files that `simsiam embed` wrote."""
import argparse
import os
from pathlib import Path
from typing import NamedTuple

from ...data.readers.images import FileImages, Images, open_files
from ...runtime.distributed import World
from ...runtime.messages import check_flags, printable, silent
from ..backbone import Backbone, load_backbone
from ..embed import describe_features, make_table, open_part
from ..feature_reading import read_features
from ..feature_table import FeatureTable
from ..features import extract
from ..options import add_extraction, add_model, check_extraction, make_transform, read_extraction, read_sizes
from ..protocols import LEAST
from ..samples import subset


class FeatureSource(NamedTuple):
    """The features of the readable images, and these images."""

    table: FeatureTable
    images: Images | None  # None: the files are not here
    backbone: Backbone | None  # None: the features come from files
    left_out: list[str]  # why images could not be read


def add_data(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('data', metavar='DATA', nargs='?', help='as for `pretrain`: a folder of images, a list, tar shards, ...')
    add('--features', nargs='+', type=Path, metavar='FILE',
        help='instead of DATA: files that simsiam embed wrote; images are read from the paths in them')


def add_network(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the model that computes the features of DATA."""
    add_model(parser)
    parser.add_argument(
        '--part', choices=['train', 'val'], default='train', help='part to use, if the data has both (default: train)')
    add_extraction(parser)
    parser.add_argument(
        '--allow-partial', action='store_true', help='leave unreadable images out instead of stopping')


def check_source(args: argparse.Namespace) -> None:
    """Raises ValueError for a wrong flag or combination of those that this module adds."""
    if (args.data is None) == (args.features is None):
        raise ValueError('give either DATA or --features FILE')
    check_extraction(args, *read_sizes(args, LEAST))


def open_source(args: argparse.Namespace, world: World) -> FeatureSource | None:
    """Computes or reads the features. Files are read by the main process alone; the others get None."""
    if args.features is None:
        images = open_part(args.data, args.part)
        return _extract(args, load_backbone(args.model, world.device, args.branch), images, world)
    if not world.main:
        return None
    table = read_features(args.features)
    return FeatureSource(table, open_paths(table.paths, 'the images of --features'), None, [])


def choose_k(args: argparse.Namespace, n: int) -> int:
    """Returns how many neighbours of n images to list: --k, or all others; raises ValueError for a single image."""
    k: int = min(args.k, n - 1)
    if k < 1:
        raise ValueError(f'{args.data or args.features[0]}: a single image has no neighbours; give more images')
    if k < args.k:
        print(f'--k {args.k}: using {k}, as there are only {n} images')
    return k


def check_k(args: argparse.Namespace) -> None:
    check_flags([('--k', args.k, args.k >= 1, 'at least 1')])


def _extract(args: argparse.Namespace, backbone: Backbone, images: Images, world: World) -> FeatureSource:
    say = print if world.main else silent
    transform = make_transform(args, backbone, say)
    features = extract(backbone, images, ['avgpool'], transform, read_extraction(args), world)
    left_out = list(features.unreadable.values())
    for text in left_out:
        say(f'left out: {text}')
    table = make_table(features, images, describe_features(backbone, images, transform.crop, transform.resize))
    images = subset(images, features.readable) if left_out else images
    return FeatureSource(table, images, backbone, left_out)


def open_paths(paths: list[str], name: str) -> FileImages | None:
    """Returns the files at these paths; None, with a line, if the first is no file."""
    if not os.path.isfile(paths[0]):  # Path.is_file raises for some names
        print(f'{printable(paths[0])} is not a file on this machine, so there is no search for copies, and no '
              'pictures are shown; run the command where the paths in --features exist, or give DATA instead')
        return None
    return open_files(paths, name)
