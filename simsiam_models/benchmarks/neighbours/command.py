"""Looks at a data set through features: nearest images, copies, outliers, likely wrong labels.

    simsiam neighbours PHOTOS --out photos.csv --html photos.html
    simsiam neighbours PHOTOS --query photo.jpg                          what is similar, and is it there already?
    simsiam neighbours --features photos-*.parquet --out found.parquet   from files that simsiam embed wrote

--out NAME.csv lists the k nearest of each image; NAME-copies.csv, NAME-outliers.csv and, with labels, NAME-labels.csv
list what was found. The search is exact; it uses faiss above a million images, or at any size with --approximate.
"""
import argparse
import tempfile
from pathlib import Path
from typing import cast

import numpy as np

from ...data import UnreadableError
from ...data.readers.images import FileImages, Images
from ...data.readers.index import Listing
from ...runtime.distributed import World, cores, join_world
from ...runtime.messages import as_text, check_flags, printable, silent
from ...runtime.tables import check_table
from ..backbone import Backbone, load_backbone
from ..embed import describe_features, make_table, open_part
from ..feature_reading import read_features
from ..feature_table import FeatureTable
from ..features import Extraction, extract
from ..options import add_extraction, add_model, check_extraction, make_transform, read_extraction, read_sizes
from ..protocols import LEAST
from ..samples import subset
from .copies import LIMIT, compare, look_at, name_kind
from .nearest import find_nearest
from .report import Findings, examine, print_query, write_outputs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('data', metavar='DATA', nargs='?', help='as for `pretrain`: a folder of images, a list, tar shards, ...')
    add('--features', nargs='+', type=Path, metavar='FILE',
        help='instead of DATA: files that simsiam embed wrote; images are read from the paths in them')
    add('--query', nargs='+', type=Path, metavar='IMAGE', help='only look up the images nearest to these files')
    add('--k', type=int, default=5, metavar='K', help='nearest images to list (default: 5)')
    add('--out', '--output', dest='output', type=Path, metavar='FILE',
        help='FILE.csv or FILE.parquet for the nearest images; findings go to FILE-copies, FILE-outliers, FILE-labels')
    add('--html', type=Path, metavar='FILE.html', help='contact sheet: a single file to open in a browser')
    add('--approximate', action='store_true', help='search only some of the images, with faiss; prints the recall')
    add_model(parser)
    add('--part', choices=['train', 'val'], default='train',
        help='part to use, if the data has both (default: train)')
    add_extraction(parser)
    add('--allow-partial', action='store_true', help='leave unreadable images out instead of stopping')


def run(args: argparse.Namespace) -> int:
    """Gets the features, searches, and writes what was found."""
    check(args)
    queries = None if args.query is None else _open_queries(args.query)
    with join_world(args.device) as world:
        backbone = None
        images: Images | None = None
        if args.features is None:
            data = open_part(args.data, args.part)
            backbone = load_backbone(args.model, world.device, args.branch)
            table, images = _extract_table(args, backbone, data, world)
        elif world.main:
            table = read_features(args.features)
            images = _open_paths(table.paths, 'the images of --features')
    if not world.main:
        return 0
    if queries is not None:
        return _look_up(args, table, images, queries, backbone, world=world)
    k = min(args.k, len(table.paths) - 1)
    if k < 1:
        raise ValueError(f'{args.data or args.features[0]}: a single image has no neighbours; give more images')
    if k < args.k:
        print(f'--k {args.k}: using {k}, as there are only {len(table.paths)} images')
    workers = cores() if args.workers is None else args.workers
    found = examine(table, images, k, world.device, args.approximate, workers)
    for text in found.describe():
        print(text)
    write_outputs(args.output, args.html, found)
    return 0


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for a wrong flag or combination, RuntimeError if a flag lacks a package."""
    if (args.data is None) == (args.features is None):
        raise ValueError('give either DATA or --features FILE')
    if args.query is None and args.output is None and args.html is None:
        raise ValueError('nothing to write: add --out FILE.csv, --html FILE.html, or --query IMAGE')
    check_flags([('--k', args.k, args.k >= 1, 'at least 1')])
    if args.output is not None:
        check_table(args.output)
    if args.html is not None and args.html.suffix not in ('.html', '.htm'):
        raise ValueError(f'--html {args.html}: must be a file that ends in .html')
    check_extraction(args, *read_sizes(args, LEAST))


def _extract_table(
    args: argparse.Namespace, backbone: Backbone, images: Images, world: World,
) -> tuple[FeatureTable, Images]:
    """Returns the features of the readable images, and those images."""
    say = print if world.main else silent
    transform = make_transform(args, backbone, say)
    features = extract(backbone, images, ['avgpool'], transform, read_extraction(args), world)
    for text in features.unreadable.values():
        say(f'left out: {text}')
    table = make_table(features, images, describe_features(backbone, images, transform.crop, transform.resize))
    return table, images if len(table.paths) == len(images) else subset(images, features.readable)


def _open_paths(paths: list[str], name: str) -> FileImages | None:
    """Returns the files at these paths; None, with a line, if the first is no file."""
    if not Path(paths[0]).is_file():
        print(f'{printable(paths[0])} is not a file on this machine, so there is no search for copies, and no '
              'pictures are shown; run the command where the paths in --features exist, or give DATA instead')
        return None
    listing = Listing()
    for path in paths:
        listing.add(path)
    return FileImages(Path(), listing.make_index(), name)


def _open_queries(paths: list[Path]) -> FileImages:
    """Raises FileNotFoundError or ValueError if a path is no image."""
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f'--query {path}: no such file; name an image')
    queries = cast(FileImages, _open_paths([str(path) for path in paths], '--query'))
    for row in range(len(queries)):
        try:
            queries.read(row)
        except UnreadableError as e:
            raise ValueError(f'--query {e}; name another image') from None
    return queries


def _look_up(
    args: argparse.Namespace, table: FeatureTable, images: Images | None, queries: Images, backbone: Backbone | None, *,
    world: World,
) -> int:
    """Prints and writes the nearest images of --query."""
    for key in ('image_size', 'resize'):
        if getattr(args, key) is None and key in table.about:
            setattr(args, key, table.about[key])
    backbone = backbone or load_backbone(args.model, world.device, args.branch)
    if table.about.get('weights', backbone.digest) != backbone.digest:
        raise ValueError(
            f'--features come from {table.about.get("model")} (weights {table.about["weights"]}), but --model '
            f'{args.model} has the weights {backbone.digest}; name the same model with --model')
    if 'weights' not in table.about:
        print(f'--features do not state their weights; the answer is right only if they come from {backbone.name}')
    transform = make_transform(args, backbone, print)
    with tempfile.TemporaryDirectory() as cache:
        extraction = Extraction(cache, args.batch_size, args.workers, args.amp)
        asked = np.array(extract(backbone, queries, ['avgpool'], transform, extraction).array('avgpool'))
    (name, bank), = table.arrays.items()
    if name != 'avgpool':
        raise ValueError(f'--features hold {name}; --query needs avgpool: run simsiam embed with --what avgpool')
    if bank.shape[1] != asked.shape[1]:
        raise ValueError(
            f'--features have {bank.shape[1]} numbers for an image, and --model {args.model} computes '
            f'{asked.shape[1]}; name the model that they come from with --model')
    found, cosines = find_nearest(bank, asked, min(args.k, len(bank)), world.device, args.approximate)
    names = [as_text(path) for path in args.query]
    answer = Findings(table, images, found, cosines, queries=(names, queries))
    answer.kinds = _name_copies(queries, images, found)
    print_query(answer)
    write_outputs(args.output, args.html, answer)
    return 0


def _name_copies(queries: Images, images: Images | None, found: np.ndarray) -> dict[tuple[int, int], str]:
    """Returns which neighbours (query, row) are copies of the query, and their kinds."""
    kinds: dict[tuple[int, int], str] = {}
    if images is None:
        return kinds
    for i, rows in enumerate(found.tolist()):
        query = look_at(queries, i)
        for row in rows:
            try:
                look = look_at(images, row)
            except UnreadableError as e:
                print(f'not compared: {e}')
                continue
            difference, mirrored = compare(query, look)
            if difference <= LIMIT:
                kinds[i, row] = name_kind(query, look, mirrored)
    return kinds


