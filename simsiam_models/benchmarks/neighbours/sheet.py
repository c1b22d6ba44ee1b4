"""A contact sheet: one HTML file with thumbnails, which needs neither a network nor scripts."""
import base64
import html
import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ...data import UnreadableError
from ...runtime.files import explain_write_errors, write_atomically
from ...runtime.messages import printable

THUMBNAIL, QUALITY = 160, 72  # pixels of the long side, twice those on the page; JPEG quality
ROWS = 100  # of a section; the tables have all
STYLE = '''
:root { color-scheme: light dark; --line: #c9c9c9; --soft: #555; --back: #fff; --text: #1a1a1a; --link: #0b57d0 }
@media (prefers-color-scheme: dark) {
  :root { --line: #4a4a4a; --soft: #b5b5b5; --back: #161616; --text: #ececec; --link: #8ab4f8 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 80rem; padding: 1rem; background: var(--back); color: var(--text);
  font: 1rem/1.45 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2rem } p { max-width: 45rem }
a { color: var(--link) } :focus-visible { outline: 3px solid var(--link); outline-offset: 2px }
nav ul, .row ul { list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: .75rem }
.row { border-top: 1px solid var(--line); padding: .75rem 0 }
.row h3 { font-size: .9rem; font-weight: 600; margin: 0 0 .5rem; color: var(--soft) }
figure { margin: 0; width: 8.5rem } figcaption { font-size: .75rem; line-height: 1.3 }
figcaption b { display: block } figcaption .path { color: var(--soft); display: block }
img, .none { display: block; width: 100%; height: 6rem; object-fit: contain; object-position: left }
.none { border: 1px dashed var(--line); color: var(--soft); font-size: .75rem; padding: .25rem }
@media (max-width: 30rem) { figure { width: calc(50vw - 1.5rem) } }
'''


class Cell(NamedTuple):
    """An image of a sheet, and what stands below it before its name."""

    image: tuple[str, int]  # source and row, for `load`
    path: str
    text: str


class Section(NamedTuple):
    """Rows of images under a heading; each row has its own heading. `total` counts those that there are."""

    title: str
    explanation: str
    rows: list[tuple[str, list[Cell]]]
    total: int


Load = Callable[[tuple[str, int]], Image.Image]


def write_sheet(path: Path, title: str, sections: list[Section], load: Load) -> None:
    """Writes the sheet; `load` returns an image, or raises UnreadableError, whose place then says so.

    All text is escaped, and control characters are spelled out. Raises OSError if the file cannot be written.
    """
    links = ''.join(
        f'<li><a href="#s{i}">{_escape(s.title)} ({s.total:,})</a></li>' for i, s in enumerate(sections))
    with explain_write_errors(path, '--html'):
        path.parent.mkdir(parents=True, exist_ok=True)

        def write(file: io.BufferedIOBase) -> None:
            file.write((
                '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
                '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
                '<meta http-equiv="Content-Security-Policy" '
                'content="default-src \'none\'; img-src data:; style-src \'unsafe-inline\'">\n'
                f'<title>{_escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n'
                f'<h1>{_escape(title)}</h1>\n<nav aria-label="Sections"><ul>{links}</ul></nav>\n').encode())
            for i, section in enumerate(sections):
                for text in _list_lines(i, section, load):
                    file.write(text.encode())
            file.write(b'</main>\n</body>\n</html>\n')

        write_atomically(path, write)


def _escape(text: str) -> str:
    return html.escape(printable(text))


def _list_lines(number: int, section: Section, load: Load) -> list[str]:
    shown = f' Shown: {len(section.rows):,} of {section.total:,}.' if len(section.rows) < section.total else ''
    lines = [f'<section aria-labelledby="s{number}">\n<h2 id="s{number}">{_escape(section.title)}</h2>\n'
             f'<p>{_escape(section.explanation)}{shown}</p>\n']
    for heading, cells in section.rows:
        figures = ''.join(
            f'<li><figure>{_embed(cell, load)}<figcaption><b>{_escape(cell.text)}</b>'
            f'<span class="path">{_escape(cell.path)}</span></figcaption></figure></li>' for cell in cells)
        lines.append(f'<div class="row"><h3>{_escape(heading)}</h3><ul>{figures}</ul></div>\n')
    return [*lines, '</section>\n']


def _embed(cell: Cell, load: Load) -> str:
    try:
        image = load(cell.image)
    except UnreadableError:
        return '<span class="none">The image cannot be read.</span>'
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    data = io.BytesIO()
    image.save(data, 'JPEG', quality=QUALITY)
    text = base64.b64encode(data.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{text}" alt="{_escape(Path(cell.path).name)}" loading="lazy">'
