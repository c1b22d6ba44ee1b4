"""Masks as PNG files with a palette, and a sheet of images beside their true and predicted masks."""
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ...runtime.files import write_atomically
from ..panels import GAP, Panel, choose_colour, plain_text, write_panels
from .metrics import IGNORED

PANEL = 400  # pixels: the longest side of a picture
SWATCH, LINE = 14, 22  # pixels of the legend
COVERED = 0.6  # share of a class's colour over the image


class MaskRow(NamedTuple):
    """An image with its masks, for the sheet."""

    title: str  # its file
    image: np.ndarray  # (H, W, 3) uint8
    truth: np.ndarray  # (H, W) uint8 labels
    predicted: np.ndarray


def make_palette() -> np.ndarray:
    """Returns the colours of ids, (256, 3) uint8: VOC's, in which each bit of an id turns on a part of a colour."""
    ids = np.arange(256)
    palette = np.zeros((256, 3), np.uint8)
    for shift in range(3):
        for channel in range(3):
            palette[:, channel] |= ((ids >> 3 * shift + channel & 1) << 7 - shift).astype(np.uint8)
    return palette


def encode_mask(ids: np.ndarray) -> bytes:
    """Returns a mask (H, W) uint8 of ids as a PNG with a palette, whose numbers are the ids."""
    image, file = Image.fromarray(ids), io.BytesIO()
    image.putpalette(make_palette().ravel().tolist())
    image.save(file, 'PNG')
    return file.getvalue()


def write_mask(path: Path, ids: np.ndarray) -> None:
    """Writes a mask of ids; see `encode_mask`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = encode_mask(ids)
    write_atomically(path, lambda file: file.write(data))


def write_sheet(path: str | Path, rows: list[MaskRow], classes: list[str]) -> None:
    """Writes a sheet of images, each beside its true and its predicted mask, with a legend of the classes in them.

    Args:
        path: a .png, .jpg or .jpeg file.
        rows: 1 to 16 pictures.
        classes: the name of each label.
    """
    colours = np.array([choose_colour(k) for k in range(len(classes))] + [(0, 0, 0)] * (256 - len(classes)), np.uint8)
    present = sorted({int(k) for row in rows for mask in (row.truth, row.predicted) for k in np.unique(mask)})
    names = [(tuple(colours[k].tolist()), 'ignored' if k == IGNORED else classes[k]) for k in present]
    panels = [[
        Panel(_shrink(row.image), 'image', row.title), Panel(_cover(row.image, row.truth, colours), 'truth'),
        Panel(_cover(row.image, row.predicted, colours), 'prediction')] for row in rows]
    write_panels(path, panels, PANEL, draw_legend(names, 3 * PANEL + 2 * GAP))


def draw_legend(names: list[tuple[tuple[int, int, int], str]], width: int) -> Image.Image:
    """Returns a picture of colours with their names, in as many lines as they take."""
    font, places, x, y = ImageFont.load_default(14), [], 0, 0
    measure = ImageDraw.Draw(Image.new('RGB', (1, 1)))
    for colour, name in names:
        text = plain_text(name)[:40]
        needed = SWATCH + 6 + int(measure.textlength(text, font)) + 18
        if x and x + needed > width:
            x, y = 0, y + LINE
        places.append((x, y, colour, text))
        x += needed
    picture = Image.new('RGB', (width, y + LINE), 'white')
    draw = ImageDraw.Draw(picture)
    for x, y, colour, text in places:
        draw.rectangle((x, y + 3, x + SWATCH, y + 3 + SWATCH), colour, 'gray')
        draw.text((x + SWATCH + 6, y + 2), text, 'black', font)
    return picture


def _size(image: np.ndarray) -> tuple[int, int]:
    height, width = image.shape[:2]
    scale = PANEL / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _shrink(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image).resize(_size(image), Image.Resampling.BILINEAR)


def _cover(image: np.ndarray, mask: np.ndarray, colours: np.ndarray) -> Image.Image:
    """The image in gray levels under the colours of the labels."""
    below = np.asarray(_shrink(image).convert('L').convert('RGB'), np.float32)
    labels = np.asarray(Image.fromarray(mask).resize(_size(image), Image.Resampling.NEAREST))
    return Image.fromarray((COVERED * colours[labels] + (1 - COVERED) * below).astype(np.uint8))
