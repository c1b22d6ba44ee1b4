"""Looks at a data set through features: nearest images, copies, outliers, likely wrong labels.

    simsiam neighbours PHOTOS --output photos.csv --html photos.html
    simsiam neighbours PHOTOS --query photo.jpg                          what is similar, and is it there already?
    simsiam neighbours --features photos-*.parquet --output found.parquet   from files that simsiam embed wrote

--output NAME.csv lists the k nearest of each image; NAME-copies.csv, NAME-outliers.csv and, with labels,
NAME-labels.csv list what was found. The search is exact; it uses faiss above a million images, or at any size with
--approximate.
"""
import argparse
import tempfile
from pathlib import Path
from typing import cast

import numpy as np

from ...data import UnreadableError
from ...data.readers.images import FileImages, Images
from ...pages.document import check_page
from ...runtime.distributed import World, cores, join_world
from ...runtime.messages import as_text
from ...runtime.tables import check_table
from ..backbone import load_backbone
from ..features import Extraction, extract
from ..options import make_transform
from .copies import LIMIT, compare, look_at, name_kind
from .nearest import find_nearest
from .report import Findings, examine, print_query, write_outputs
from .sources import (
    FeatureSource,
    add_data,
    add_network,
    check_k,
    check_source,
    choose_k,
    open_paths,
    open_source,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_data(parser)
    add('--query', nargs='+', type=Path, metavar='IMAGE', help='only look up the images nearest to these files')
    add('--k', type=int, default=5, metavar='K', help='nearest images to list (default: 5)')
    add('--output', '--out', dest='output', type=Path, metavar='FILE',
        help='FILE.csv or FILE.parquet for the nearest images; findings go to FILE-copies, FILE-outliers, FILE-labels')
    add('--html', type=Path, metavar='FILE.html', help='contact sheet: a single file to open in a browser')
    add('--approximate', action='store_true', help='search only some of the images, with faiss; prints the recall')
    add_network(parser)


def run(args: argparse.Namespace) -> int:
    """Gets the features, searches, and writes what was found."""
    check(args)
    queries = None if args.query is None else _open_queries(args.query)
    with join_world(args.device) as world:
        source = open_source(args, world)
    if source is None or not world.main:
        return 0
    if queries is not None:
        return _look_up(args, source, queries, world)
    k = choose_k(args, len(source.table.paths))
    workers = cores() if args.workers is None else args.workers
    found = examine(source.table, source.images, k, world.device, args.approximate, workers)
    for text in found.describe():
        print(text)
    write_outputs(args.output, args.html, found)
    return 0


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for a wrong flag or combination, RuntimeError if a flag lacks a package."""
    check_source(args)
    if args.query is None and args.output is None and args.html is None:
        raise ValueError('nothing to write: add --output FILE.csv, --html FILE.html, or --query IMAGE')
    check_k(args)
    if args.output is not None:
        check_table(args.output)
    check_page(args.html)


def _open_queries(paths: list[Path]) -> FileImages:
    """Raises FileNotFoundError or ValueError if a path is no image."""
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f'--query {path}: no such file; name an image')
    queries = cast(FileImages, open_paths([str(path) for path in paths], '--query'))
    for row in range(len(queries)):
        try:
            queries.read(row)
        except UnreadableError as e:
            raise ValueError(f'--query {e}; name another image') from None
    return queries


def _look_up(args: argparse.Namespace, source: FeatureSource, queries: Images, world: World) -> int:
    """Prints and writes the nearest images of --query."""
    table, images, backbone, _ = source
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


