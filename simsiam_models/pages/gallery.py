"""Rows of small pictures with captions."""
import base64
import io
from collections.abc import Callable, Iterable
from typing import NamedTuple

from PIL import Image

from .document import escape

THUMBNAIL, QUALITY = 160, 72  # pixels of the long side, twice those on the page; JPEG quality
SMALL = 64  # pixels: JPEG would blur the colours of pictures up to this size
STYLE = '''
.row { border-top: 1px solid var(--line); padding: .75rem 0 }
.row ul { list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: .75rem }
.row h3 { font-size: .9rem; margin: 0 0 .5rem; color: var(--soft) }
.row figure { margin: 0; width: 8rem } .row figcaption { font-size: .75rem; line-height: 1.3; margin-top: .25rem }
figcaption b { display: block; font-weight: 600 } figcaption .path { color: var(--soft); display: block }
.row img, .none { display: block; width: 100%; height: 6rem; object-fit: contain; object-position: left }
.none { border: 1px dashed var(--line); color: var(--soft); font-size: .75rem; padding: .25rem }
@media (max-width: 30rem) { .row figure { width: calc((100vw - 3.5rem) / 3) } .row img, .none { height: 5rem } }
'''


class Cell(NamedTuple):
    """A picture, what stands below it, and the name or path of its file. `alt` is read out (default: the name)."""

    load: Callable[[], Image.Image | None]  # None: it cannot be read, and its place says so
    text: str
    path: str = ''
    alt: str = ''


def draw_row(heading: str, cells: Iterable[Cell]) -> str:
    """Returns a row of pictures as HTML; heading and captions are text."""
    figures = ''.join(
        f'<li><figure>{_embed(cell)}<figcaption><b>{escape(cell.text)}</b>'
        f'<bdi class="path">{escape(cell.path)}</bdi></figcaption></figure></li>' for cell in cells)
    return f'<div class="row"><h3>{escape(heading)}</h3><ul>{figures}</ul></div>\n'


def _embed(cell: Cell) -> str:
    image = cell.load()
    if image is None:
        return '<span class="none">The image cannot be read.</span>'
    return embed_image(image, cell.alt or cell.path.rstrip('/').rpartition('/')[2] or cell.text, THUMBNAIL)


def embed_image(image: Image.Image, text: str, side: int = 0) -> str:
    """Returns an element with the picture in it, as a JPEG of at most `side` pixels (0: as it is); `text` describes it.

    Changes `image`.
    """
    if side:
        image.thumbnail((side, side))
    data = io.BytesIO()
    if max(image.size) <= SMALL:
        image.save(data, 'JPEG', quality=95, subsampling=0)
    else:
        image.save(data, 'JPEG', quality=QUALITY)
    source = base64.b64encode(data.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{source}" alt="{escape(text)}" decoding="async">'
