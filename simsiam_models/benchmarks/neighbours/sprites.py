"""Thumbnails of many images in a few JPEG files, which a browser decodes where the map shows them."""
import io
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from ...data import UnreadableError
from ...data.readers.images import Images, spread
from ...runtime.distributed import World
from ..items import EvalItems

COLUMNS = 8  # tiles in a row of a sheet, and rows
STEP = 16  # pixels: JPEG mixes the colours of blocks of this side, so no tile bleeds into the next
QUALITY = 80
LEAST, MOST = 32, 128  # pixels of a tile's side that is not asked for
SAMPLE = 64  # images whose size says whether tiles can be smaller


class Sprites(NamedTuple):
    """Thumbnails in sheets of COLUMNS x COLUMNS tiles of `side` pixels, from the left, then downwards."""

    side: int
    sheets: list[bytes]  # JPEG
    place: np.ndarray  # (N,) the tile of each image, counted through all sheets
    sizes: np.ndarray  # (N, 2) uint8: width and height at the top left of its tile; zeros for an unreadable image
    unreadable: list[str]  # why images could not be read


def choose_side(images: Images) -> int:
    """Returns the pixels of a tile's side: fewer for more images, so that a page of any number has about one size."""
    side = int(np.clip(96 * (10_000 / len(images)) ** 0.5, LEAST, MOST))
    longest = 1
    for row in spread(len(images), SAMPLE):
        try:
            longest = max(longest, *images.read(int(row)).shape[:2])
        except UnreadableError:  # named when its thumbnail is made
            continue
    return STEP * max(1, round(side / STEP) if longest > side else -(-longest // STEP))


def sort_by_place(xy: np.ndarray) -> np.ndarray:
    """Returns an order of points (N, 2) in which those of a sheet lie close together: strips, each sorted along it."""
    order = np.argsort(xy[:, 0], kind='stable')
    sheets = -(-len(xy) // COLUMNS**2)
    length = COLUMNS**2 * -(-sheets // max(1, round(sheets ** 0.5)))
    strips = [order[i:i + length] for i in range(0, len(order), length)]
    return np.concatenate([strip[np.argsort(xy[strip, 1], kind='stable')] for strip in strips])


def make_sprites(images: Images, order: np.ndarray, side: int, workers: int) -> Sprites:
    """Draws the images in this order into sheets; images smaller than a tile keep their size."""
    def shrink(row: int) -> tuple[int, Image.Image | str]:
        try:
            image = Image.fromarray(images.read(row))
        except UnreadableError as e:
            return row, str(e)
        image.thumbnail((side, side), reducing_gap=2)
        return row, image

    place, sizes = np.empty(len(images), np.int64), np.zeros((len(images), 2), np.uint8)
    place[order] = np.arange(len(order))
    sheets, unreadable, sheet = [], [], _blank(side)
    world = World(0, 1, torch.device('cpu'))  # other processes have ended
    for at, (row, image) in enumerate(EvalItems(images, order, shrink, world, workers)):
        if isinstance(image, str):
            unreadable.append(image)
        else:
            x, y = at % COLUMNS * side, at % COLUMNS**2 // COLUMNS * side
            sheet.paste(image, (x, y))
            sizes[row] = image.size
        if (at + 1) % COLUMNS**2 == 0 or at + 1 == len(order):
            sheets.append(_encode(sheet))
            sheet = _blank(side)
    return Sprites(side, sheets, place, sizes, unreadable)


def _blank(side: int) -> Image.Image:
    return Image.new('RGB', (COLUMNS * side, COLUMNS * side), '#808080')


def _encode(sheet: Image.Image) -> bytes:
    data = io.BytesIO()
    sheet.save(data, 'JPEG', quality=QUALITY, optimize=True)
    return data.getvalue()
