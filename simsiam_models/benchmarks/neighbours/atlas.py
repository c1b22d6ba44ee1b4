"""Draws a map of a data set as a page that opens from disk: similar images lie close together.

    simsiam atlas PHOTOS --html photos.html
    simsiam atlas PHOTOS --model runs/mine --projection tsne pca --html photos.html
    simsiam atlas --features photos.parquet --html photos.html           from a file that simsiam embed wrote

On the page, zoom in to thumbnails, search by image, show classes, copies or outliers, and save a selection of images as
a list that `simsiam pretrain` reads.
"""
import argparse
import time
from pathlib import Path

import numpy as np

from ...pages.atlas import write_atlas
from ...pages.document import check_page
from ...runtime.distributed import cores, join_world
from ...runtime.messages import as_text, check_flags, counted, size_text
from ..tsne import TSNE
from .atlas_data import explain_list, make_data, name_images, state_facts
from .projections import NAMES, UMAP, check_packages, choose_projections, fit_unit, project
from .report import Findings, examine
from .sources import FeatureSource, add_data, add_network, check_k, check_source, choose_k, open_source
from .sprites import choose_side, make_sprites, sort_by_place

THUMBNAILS = 16, 240  # pixels; the page counts them in bytes
DETAILS = {
    'tsne': f'perplexity {TSNE["perplexity"]:g}, learning rate {TSNE["learning_rate"]:g}, {TSNE["max_iter"]} '
            'iterations, features not scaled, as published by MMSelfSup; seed 0',
    'pca': 'the first two principal components of the features',
    'umap': f'{UMAP["n_neighbors"]} neighbours by cosine similarity, min_dist {UMAP["min_dist"]}, seed 0'}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_data(parser)
    add('--html', '--output', type=Path, required=True, metavar='FILE.html',
        help='the page: a single file to open in a browser')
    add('--projection', nargs='+', choices=list(NAMES), metavar='NAME',
        help='tsne, pca or umap; the page can switch between several (default: tsne; pca for 30 images or fewer)')
    add('--k', type=int, default=24, metavar='K', help='how many nearest images a search by image shows (default: 24)')
    add('--thumbnail', type=int, metavar='N',
        help='long side of the thumbnails in pixels (default: 96 for 10,000 images, smaller for more)')
    add_network(parser)


def run(args: argparse.Namespace) -> int:
    """Gets the features, projects and searches them, and writes the page."""
    check(args)
    with join_world(args.device) as world:
        source = open_source(args, world)
    if source is None or not world.main:
        return 0
    n = len(source.table.paths)
    k, kinds = choose_k(args, n), choose_projections(args.projection, n)
    workers = cores() if args.workers is None else args.workers
    (name, x), = source.table.arrays.items()
    found = examine(source.table, source.images, k, world.device, False, workers)  # first, for it checks the features
    maps, about = _project_all(np.array(x), kinds)
    for text in found.describe():
        print(text)
    about = {'Features': _describe_features(source, name), **about}
    _write_page(args, source, found, maps, about=about, workers=workers)
    return 0


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for a wrong flag or combination, RuntimeError if a projection lacks a package."""
    check_source(args)
    check_k(args)
    check_page(args.html)
    low, high = THUMBNAILS
    check_flags([(
        '--thumbnail', args.thumbnail, args.thumbnail is None or low <= args.thumbnail <= high,
        f'in {low} .. {high} pixels')])
    check_packages(args.projection or [])


def _project_all(x: np.ndarray, kinds: list[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns the maps, and a line on each for the page."""
    maps, about = {}, {}
    for kind in kinds:
        start = time.perf_counter()
        maps[kind] = project(x, kind)
        seconds = time.perf_counter() - start
        about[NAMES[kind]] = f'{DETAILS[kind]}; {seconds:.1f} s'
        print(f'{NAMES[kind]} of {counted(len(x), "image")}: {seconds:.1f} s')
    return maps, about


def _describe_features(source: FeatureSource, name: str) -> str:
    about = source.table.about
    model = f' of {about["model"]} (weights {about["weights"]})' if {'model', 'weights'} <= set(about) else ''
    size = f', images of {about["image_size"]} px' if 'image_size' in about else ''
    return f'{name}{model}{size}'


def _write_page(
    args: argparse.Namespace, source: FeatureSource, found: Findings, maps: dict[str, np.ndarray], *,
    about: dict[str, str], workers: int,
) -> None:
    """Draws the thumbnails and writes the page; prints its name and size."""
    sprites, left_out = None, source.left_out
    if source.images is not None:
        order = sort_by_place(fit_unit(next(iter(maps.values()))))
        sprites = make_sprites(source.images, order, args.thumbnail or choose_side(source.images), workers)
        for text in sprites.unreadable:
            print(f'without a thumbnail: {text}')
        left_out = left_out + [f'without a thumbnail: {text}' for text in sprites.unreadable]
        about['Thumbnails'] = f'at most {sprites.side} px, JPEG'
    root, names = name_images(source.table, source.images, args.data)
    title = f'Atlas of {as_text(args.data or source.table.about.get("data") or "features")}'
    write_atlas(
        args.html, title, make_data(found, maps, sprites, names), sprites.sheets if sprites else [],
        facts=state_facts(source.table, next(iter(maps))), usage=explain_list(root), about=about, left_out=left_out)
    print(f'{args.html}: {counted(len(names), "image")}, {size_text(args.html.stat().st_size)}')
