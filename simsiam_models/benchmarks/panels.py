"""Sheets of pictures: rows of panels with headings, in one file."""
import colorsys
import unicodedata
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from ..runtime.files import write_atomically
from ..runtime.messages import printable

MOST = 16  # rows of a sheet
GAP, TITLE = 12, 26  # pixels: space between panels, height of a heading
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
FORMATS = {'.png': 'PNG', '.jpg': 'JPEG', '.jpeg': 'JPEG'}


class Panel(NamedTuple):
    """A picture with what it shows, on the left above it, and a title, on the right."""

    picture: Image.Image
    heading: str
    title: str = ''


def write_panels(path: str | Path, rows: list[list[Panel]], width: int, legend: Image.Image | None = None) -> None:
    """Writes rows of panels below one another, with a legend on top.

    Args:
        path: a .png, .jpg or .jpeg file.
        rows: 1 to 16, of equally many panels.
        width: of a panel, in pixels.

    Raises:
        ValueError: the name of the file has another ending, or there are no rows or more than 16.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f'{path}: a sheet of pictures must end in {", ".join(FORMATS)}')
    if not 1 <= len(rows) <= MOST:
        raise ValueError(f'{path}: {len(rows)} pictures; a sheet has 1 to {MOST}')
    heights = [max(panel.picture.height for panel in row) + TITLE + GAP for row in rows]
    top = GAP if legend is None else legend.height + 2 * GAP
    sheet = Image.new('RGB', (len(rows[0]) * (width + GAP) + GAP, sum(heights) + top), 'white')
    draw, font, y = ImageDraw.Draw(sheet), ImageFont.load_default(15), top
    if legend is not None:
        sheet.paste(legend, (GAP, GAP))
    for row, height in zip(rows, heights, strict=True):
        for i, panel in enumerate(row):
            x = GAP + i * (width + GAP)
            draw.text((x, y + 4), panel.heading, 'black', font)
            room = width - draw.textlength(f'{panel.heading}   ', font)
            draw.text((x + width - room, y + 4), fit_text(plain_text(panel.title), draw, font, room), 'gray', font)
            sheet.paste(panel.picture, (x, y + TITLE))
        y += height
    write_atomically(path, lambda file: sheet.save(file, FORMATS[path.suffix.lower()]))


def fit_text(text: str, draw: ImageDraw.ImageDraw, font: Font, width: float) -> str:
    """Returns the end of a text that is too wide: of a path, the file."""
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(f'...{text}', font) > width:
        text = text[1:]
    return f'...{text}'


def plain_text(text: str) -> str:
    """Returns ASCII, which Pillow's font has: letters lose their accents, others become \\u and a number."""
    letters = ''.join(c for c in unicodedata.normalize('NFKD', text) if not unicodedata.combining(c))
    return printable(letters).encode('ascii', 'backslashreplace').decode()


def choose_colour(k: int) -> tuple[int, int, int]:
    """Returns the colour of a label; those of neighbours lie far apart, as each goes on by the golden section."""
    red, green, blue = colorsys.hsv_to_rgb(k * 0.618034 % 1, 0.75 + 0.25 * (k % 2), 1 - 0.25 * (k // 2 % 2))
    return round(255 * red), round(255 * green), round(255 * blue)
