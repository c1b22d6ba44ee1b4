"""The two views of images that the network was given, drawn again: they depend on seed, epoch and index alone."""
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from ..data import Images, TwoViews
from ..data.philox import permutation
from ..data.readers.images import load_picture, name_of
from ..pages.gallery import Cell, draw_row
from .curves import read_recipe
from .run import RunFolder

SHOWN = 6  # images
TEXT = ('Each view depends only on the seed, the epoch and the number of the image, so these are the pixels that the '
        'network was given: bit for bit on a CPU; a GPU rounds the colours differently.')


def choose_samples(run: RunFolder) -> tuple[list[int], np.ndarray]:
    """Returns epochs, the first, a middle and the newest, and the images that the network was given in all of them."""
    epoch, step = run.reached
    last = epoch if step else epoch - 1
    epochs, common = list[int](), None
    for e in sorted({0, last // 2, last} - {-1}):
        steps = step if e == epoch else run.steps
        seen = permutation(run.args['seed'], e, run.args['images'])[:steps * run.args['batch_size']]
        both = seen if common is None else common[np.isin(common, seen)]
        if len(both) >= 2:
            epochs, common = [*epochs, e], both
    return epochs, np.zeros(0, int) if common is None else common[:SHOWN]


def redraw(run: RunFolder, images: Images, epochs: list[int], rows: np.ndarray) -> list[tuple[Tensor, Tensor]]:
    """Returns for each epoch the views of these samples, two of (n, 3, S, S) float32."""
    views = TwoViews(
        images, read_recipe(run).augmentation, len(rows), seed=run.args['seed'], max_unreadable=1.0)
    return [views.redraw(epoch, rows) for epoch in epochs]


def draw_views(run: RunFolder, images: Images) -> Iterator[str]:
    """Yields rows of pictures: an image, and its views in each epoch."""
    epochs, rows = choose_samples(run)
    if not len(rows):
        yield '<p>No step has been logged yet.</p>\n'
        return
    found = redraw(run, images, epochs, rows)
    for i, row in enumerate(rows.tolist()):
        cells = [Cell(partial(load_picture, images, row), 'image', Path(name_of(images, row)).name)]
        cells += [
            Cell(partial(to_picture, view[i]), f'epoch {epoch + 1}, view {number}',
                 alt=f'View {number} of image {row} in epoch {epoch + 1}')
            for epoch, pair in zip(epochs, found, strict=True) for number, view in enumerate(pair, 1)]
        yield draw_row(f'Image {row}', cells)


def to_picture(view: Tensor) -> Image.Image:
    """Maps a view (3, S, S), normalised by ImageNet's statistics, to a picture."""
    x = view.permute(1, 2, 0).numpy() * IMAGENET_DEFAULT_STD + IMAGENET_DEFAULT_MEAN
    return Image.fromarray((255 * x).round().clip(0, 255).astype(np.uint8))
